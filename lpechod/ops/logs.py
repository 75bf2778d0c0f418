"""The daemon's log: structlog, a rate limit for each event name, and a sink that never waits.

The limit exists because a peer decides how often things go wrong: without it, a flood of bad frames
becomes a flood of lines, and the log hides what matters. It goes by event name, so a flood of one
kind leaves the others audible. Nothing is lost without a trace: what the limit swallows is
counted, and reported as `suppressed=N` by the next line of that event that reaches the sink; what
the sink could not take is counted there.

Invariants: no method of `Log` raises or blocks. Levels are filtered first, so lines that nobody
asked for take no tokens. Event names are literals of the code; that, not a cap, bounds the table of
buckets. Nothing global is configured (structlog, `logging`, `warnings`): logs live side by side.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Literal

import structlog

from lpechod.engine import clock as clocks
from lpechod.engine.clock import Clock
from lpechod.ops.loglines import PRIORITIES, processors
from lpechod.ops.sink import LogSink

Level = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["auto", "console", "json"]

_DEBUG = PRIORITIES["debug"]
_INFO = PRIORITIES["info"]
_WARNING = PRIORITIES["warning"]
_ERROR = PRIORITIES["error"]


class _Bucket:
    """The tokens of one event name."""

    __slots__ = ("filled_at", "suppressed", "tokens")

    def __init__(self, tokens: float, now: float) -> None:
        self.tokens = tokens
        self.filled_at = now
        self.suppressed = 0


class Log:
    """Writes events that pass the level and the rate limit; an `lpechod.net.eventlog.EventLog`.

    Fields may have any name but those that lines have anyway: `timestamp`, `level`, `event`,
    `suppressed`, `exception`, and structlog's own `stack`. Use `open_log` to make one.

    Args:
        sink: where lines go; closed by `close`.
        logger: a structlog logger whose methods return whether the sink took the line.
        priority: the largest of `loglines.PRIORITIES` that is written.
        burst: lines of one event name that may pass at once.
        rate: lines of one event name that may pass each second after a burst.
        clock: seconds, monotonic.

    Attributes:
        suppressed_lines: how many lines the rate limit has swallowed, of all events together.
    """

    __slots__ = (
        "_buckets",
        "_burst",
        "_clock",
        "_logger",
        "_priority",
        "_rate",
        "_sink",
        "suppressed_lines",
    )

    def __init__(
        self,
        sink: LogSink,
        logger: structlog.typing.FilteringBoundLogger,
        *,
        priority: int,
        burst: int,
        rate: float,
        clock: Clock,
    ) -> None:
        self._sink = sink
        self._logger = logger
        self._priority = priority
        self._burst = burst
        self._rate = rate
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}
        self.suppressed_lines = 0

    @property
    def dropped_lines(self) -> int:
        """How many lines passed the limit but could not be written at once."""
        return self._sink.dropped_lines

    def debug(self, event: str, **fields: object) -> None:
        """Record a step that only somebody who debugs the daemon wants to see."""
        if self._priority >= _DEBUG:
            self._emit(self._logger.debug, event, fields)

    def info(self, event: str, **fields: object) -> None:
        """Record what a healthy daemon does."""
        if self._priority >= _INFO:
            self._emit(self._logger.info, event, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Record what an operator should look into, while the service goes on."""
        if self._priority >= _WARNING:
            self._emit(self._logger.warning, event, fields)

    def error(self, event: str, **fields: object) -> None:
        """Record what failed; ``exc_info=error`` adds the traceback."""
        if self._priority >= _ERROR:
            self._emit(self._logger.error, event, fields)

    def errors(self, event: str, each: Iterable[dict[str, object]]) -> None:
        """Record what failed for several reasons at once, a line with its fields for each.

        For the rate limit they are one: whoever mends the first 20 should not have to try again to
        be told of the others.
        """
        if self._priority >= _ERROR:
            self._emit(self._logger.error, event, *each)

    def permits(self, event: str) -> bool:
        """Tell whether the rate limit would let a line of this event pass now.

        True takes no token; the line that follows does, and as time only adds tokens it is sure
        to get one. False counts the line that the caller now must not log. (A permit that takes
        the token was rejected: it has to be remembered until the caller redeems it, or forever.)

        Args:
            event: name of the event. Its level plays no part: where the level is filtered no
                token is ever taken, the answer is always True, and the line costs its fields.
        """
        now = self._clock()
        bucket = self._buckets.get(event)
        if bucket is None:
            bucket = self._buckets[event] = _Bucket(self._burst, now)
        tokens = bucket.tokens + (now - bucket.filled_at) * self._rate
        if tokens >= 1:
            bucket.tokens = min(self._burst, tokens)
            bucket.filled_at = now
            return True
        bucket.suppressed += 1
        self.suppressed_lines += 1
        return False

    def close(self) -> None:
        """Close the sink; lines logged afterwards are dropped and counted."""
        self._sink.close()

    def abandon(self) -> None:
        """Close the copy that fork(2) has made; what waits to be written is the parent's."""
        self._sink.abandon()

    def _emit(self, write: Callable[..., bool], event: str, *lines: dict[str, object]) -> None:
        if not self.permits(event):
            return
        bucket = self._buckets[event]
        bucket.tokens -= 1
        for fields in lines:
            if bucket.suppressed:
                fields["suppressed"] = bucket.suppressed
            if write(event, **fields):
                bucket.suppressed = 0


def open_log(
    level: Level,
    log_format: LogFormat,
    burst: int,
    rate: float,
    *,
    clock: Clock,
    wall: Clock = clocks.wall,
    descriptor: int = 2,
    environ: Mapping[str, str] = os.environ,
    context: Mapping[str, object] | None = None,
) -> Log:
    """Open the log of this process; a forked worker opens its own, with counts from zero.

    Args:
        level: the least severe level that is written.
        log_format: `auto` is `console` on a terminal and `json` elsewhere.
        burst: lines of one event name that may pass at once, at least 1.
        rate: lines of one event name that may pass each second after a burst; 0 for none.
        clock: seconds, monotonic, for the rate limit.
        wall: seconds since the epoch, for time stamps.
        descriptor: where lines go. It is neither changed nor closed.
        environ: for JOURNAL_STREAM (systemd.exec(5)), NO_COLOR (no-color.org) and TERM.
        context: fields that every line carries, such as the number of the worker.
    """
    sink = LogSink(descriptor)
    terminal = os.isatty(descriptor)
    plain = bool(environ.get("NO_COLOR")) or environ.get("TERM") == "dumb"
    logger = structlog.wrap_logger(
        # structlog calls the method named like the level, whatever the object.
        SimpleNamespace(**dict.fromkeys(PRIORITIES, sink.write)),
        processors=processors(
            console=log_format == "console" or (log_format == "auto" and terminal),
            colours=terminal and not plain,
            journal=is_journal(descriptor, environ),
            wall=wall,
        ),
        wrapper_class=structlog.make_filtering_bound_logger(0),
        context_class=dict,
    )
    return Log(
        sink,
        logger.bind(**(context or {})),
        priority=PRIORITIES[level],
        burst=burst,
        rate=rate,
        clock=clock,
    )


def is_journal(descriptor: int, environ: Mapping[str, str]) -> bool:
    """Tell whether the descriptor is the stream that systemd connected to the journal.

    The variable alone says nothing: children inherit it, also behind a pipe or a shell's `2>`.
    """
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
