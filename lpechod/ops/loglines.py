"""What a log line looks like, and what of a value may stand in it.

Values are data that may descend from a peer: a name in its certificate, an address, the message of
an exception. So whoever reads the log, by eye or by program, gets these invariants: an event is one
line, whatever its values hold (on the console a traceback follows, and is indented, so no text can
pass for a line of its own); no control character or bidirectional mark reaches a terminal; no
value is longer than `MAX_TEXT`; a value of raw bytes is counted, not shown; and one that cannot be
shown costs that value, never the line or the loop.
"""

import json
import math
from datetime import UTC, datetime
from enum import Enum
from functools import partial

from structlog.dev import ConsoleRenderer, plain_traceback
from structlog.processors import format_exc_info
from structlog.typing import EventDict, Processor, WrappedLogger

from lpechod.engine.clock import Clock

PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3}
"""The levels, and what sd-daemon(3) and syslog(3) call them: the smaller the more severe."""

MAX_TEXT = 512
"""Characters shown of a string. A line with a few of them fits PIPE_BUF: a pipe never tears it."""

MAX_TRACEBACK = 8192
"""Characters shown of a traceback, from its end: the error itself comes last."""

_MAX_ITEMS = 32
_JSON = json.JSONEncoder()


def processors(*, console: bool, colours: bool, journal: bool, wall: Clock) -> list[Processor]:
    """Build the structlog chain that turns an event into the bytes of its line.

    Args:
        console: for people; otherwise JSON.
        colours: whether the console may use escape sequences.
        journal: whether to begin lines with `<N>`, the priority (sd-daemon(3)).
        wall: seconds since the epoch, for the time stamp.
    """
    render: Processor
    if console:
        # Without a formatter of its own choice ConsoleRenderer takes rich's, if installed, which
        # shows local variables: the bytes of peers among them.
        render = ConsoleRenderer(
            colors=colours, sort_keys=False, exception_formatter=plain_traceback
        )
    else:
        render = _to_json
    return [
        format_exc_info,
        partial(_lay_out, wall),
        *([_escape] if console else []),
        render,
        partial(_to_bytes, journal),
    ]


def presentable(value: object) -> object:
    """Return what a line shows instead of a value: JSON's scalars, or a list of them.

    Numbers that JSON or its readers cannot hold become strings, members of an enumeration their
    value, bytes their count, and anything else its str().

    Args:
        value: anything; its methods may even raise.
    """
    try:
        if isinstance(value, (list, tuple)):
            return [_scalar(item) for item in value[:_MAX_ITEMS]]
        return _scalar(value)
    except Exception:  # noqa: BLE001 - A faulty __str__ must not end the loop that logs it.
        return f"<{type(value).__name__} that cannot be shown>"


def _scalar(value: object) -> str | float | None:
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, str):
        return _shorten(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"<{memoryview(value).nbytes} bytes>"
    if value is None or (isinstance(value, int) and value.bit_length() <= 64):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return _shorten(str(value))


def _shorten(text: str) -> str:
    excess = len(text) - MAX_TEXT
    return text if excess <= 0 else f"{text[:MAX_TEXT]}...[{excess} more]"


def _lay_out(wall: Clock, _logger: WrappedLogger, level: str, event_dict: EventDict) -> EventDict:
    """Put the fields that every line has first, and make all values presentable."""
    stamp = datetime.fromtimestamp(wall(), UTC).isoformat(timespec="microseconds")
    line: EventDict = {
        "timestamp": stamp.removesuffix("+00:00") + "Z",
        "level": level,
        "event": _shorten(event_dict.pop("event")),
    }
    trace = event_dict.pop("exception", None)
    for name, value in event_dict.items():
        line.setdefault(name, presentable(value))
    if isinstance(trace, str):
        line["exception"] = trace[-MAX_TRACEBACK:]
    elif trace is not None:  # The exception itself, by somebody who meant exc_info.
        line["exception"] = str(presentable(trace))
    return line


def _escape(_logger: WrappedLogger, _level: str, event_dict: EventDict) -> EventDict:
    """Escape what would not print. JSON does so by itself; ConsoleRenderer only quotes spaces."""
    trace: str | None = event_dict.pop("exception", None)
    line = {
        name: _printable(value) if isinstance(value, str) else value
        for name, value in event_dict.items()
    }
    if trace is not None:
        line["exception"] = "\n".join("  " + _printable(part) for part in trace.split("\n"))
    return line


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _to_json(_logger: WrappedLogger, _level: str, event_dict: EventDict) -> str:
    # The encoder escapes all but printable ASCII. All values are presentable, so it never raises.
    return _JSON.encode(event_dict)


def _to_bytes(journal: bool, _logger: WrappedLogger, level: str, text: EventDict | str) -> bytes:
    line = with_priority(str(text), level) if journal else str(text)
    return line.encode(errors="backslashreplace") + b"\n"


def with_priority(text: str, level: str) -> str:
    """Begin every line with `<N>`: to journald each is a message of its own (sd-daemon(3)).

    Args:
        text: lines, without an end of line behind the last.
        level: a key of `PRIORITIES`.
    """
    prefix = f"<{PRIORITIES[level]}>"
    return prefix + text.replace("\n", "\n" + prefix)
