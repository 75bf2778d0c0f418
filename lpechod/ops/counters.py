"""The totals of a worker, gathered from where the data plane counts them.

The loop raises plain integers (`Tally`, `ConnectionCounts`); whoever wants to show them takes a
`Totals` between two turns. It is flat and holds integers only, so that it can be added up over
workers and laid into shared memory.

The integers of another version are read by the name of their field (`Totals.from_integers`). So a
field may come, go or move, but never change its meaning, and a list only grows at its end.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields

from lpechod.engine.loop import Loop
from lpechod.net.counts import (
    HANDSHAKE_RESULTS,
    PAUSE_REASONS,
    REJECT_REASONS,
    SCARCE_RESOURCES,
)
from lpechod.net.service import EchoService
from lpechod.wire.frames import HEADER_BYTES, SIZE_CLASSES
from lpechod.wire.states import CloseReason
from lpechod.wire.tally import Histogram, Tally

TURN_CLASSES = 21
"""50 µs doubled twenty times is 52 s: no turn that takes longer needs telling apart."""

GAUGES = frozenset({"connections_active", "buffered_bytes", "timer_entries"})
"""The fields of `Totals` that say how much there is now, not how much there has been."""

Layout = Sequence[tuple[str, int]]
"""Names of fields and how many integers each holds, in the order of the integers."""

_INTERNAL_ERROR = list(CloseReason).index(CloseReason.INTERNAL_ERROR)


def _zeros(count: int) -> Callable[[], list[int]]:
    return lambda: [0] * count


@dataclass(slots=True)
class Totals:
    """Counters and gauges of one worker, or the sum over several.

    Lists follow the order of `CloseReason`, `REJECT_REASONS`, `PAUSE_REASONS`, `HANDSHAKE_RESULTS`
    and `SCARCE_RESOURCES`, or hold the classes of a histogram; sums of histograms are in
    nanoseconds, or bytes.
    """

    connections_accepted: int = 0
    connections_active: int = 0
    connections_closed: list[int] = field(default_factory=_zeros(len(CloseReason)))
    connections_rejected: list[int] = field(default_factory=_zeros(len(REJECT_REASONS)))
    accept_pauses: list[int] = field(default_factory=_zeros(len(PAUSE_REASONS)))
    connection_durations: list[int] = field(default_factory=_zeros(25))
    connection_durations_ns: int = 0
    frames: int = 0
    received_bytes: int = 0
    sent_bytes: int = 0
    frame_sizes: list[int] = field(default_factory=_zeros(SIZE_CLASSES))
    frame_sizes_bytes: int = 0
    echo_delays: list[int] = field(default_factory=_zeros(TURN_CLASSES))
    echo_delays_ns: int = 0
    turns: list[int] = field(default_factory=_zeros(TURN_CLASSES))
    turns_ns: int = 0
    buffered_bytes: int = 0
    backpressure_pauses: int = 0
    timer_entries: int = 0
    rate_limit_evictions: int = 0
    census_overflows: int = 0
    log_lines_suppressed: int = 0
    log_lines_dropped: int = 0
    overload_ns: list[int] = field(default_factory=_zeros(len(SCARCE_RESOURCES)))
    loop_spins: int = 0
    """Seconds in which the loop spun, see `lpechod.net.spin`."""
    tls_handshakes: list[int] = field(default_factory=_zeros(len(HANDSHAKE_RESULTS)))
    tls_handshakes_delayed: int = 0

    @classmethod
    def sum(cls, parts: Iterable["Totals"]) -> "Totals":
        """Add totals up, field by field."""
        total = cls()
        for part in parts:
            for each in fields(cls):
                ours, theirs = getattr(total, each.name), getattr(part, each.name)
                added = (
                    ours + theirs
                    if isinstance(ours, int)
                    else [a + b for a, b in zip(ours, theirs, strict=True)]
                )
                setattr(total, each.name, added)
        return total

    @classmethod
    def layout(cls) -> list[tuple[str, int]]:
        """Name the fields and how many integers each holds, in order."""
        zeros = cls()
        return [(name, len(_listed(getattr(zeros, name)))) for name in cls.__slots__]

    @classmethod
    def from_integers(cls, layout: Layout, values: Sequence[int]) -> "Totals":
        """Read totals that were laid out as integers, maybe by another version.

        Args:
            layout: what the integers mean. Names that this version does not know are dropped.
            values: the integers. Fields for which there are none stay zero; a list of another
                length is cut off, or filled up with zeros.
        """
        parts, start = {}, 0
        for name, count in layout:
            parts[name] = values[start : start + count]
            start += count
        made = cls()
        for name in cls.__slots__:
            zero = getattr(made, name)
            part = _fitted(parts.get(name, ()), len(_listed(zero)))
            setattr(made, name, part[0] if isinstance(zero, int) else part)
        return made

    def to_integers(self, layout: Layout | None = None) -> list[int]:
        """Lay the totals out as integers.

        Args:
            layout: the layout to follow, by the rules of `from_integers`; by default, `layout`.
        """
        values: list[int] = []
        if layout is None:
            for name in self.__slots__:
                values += _listed(getattr(self, name))
        else:
            for name, count in layout:
                ours = _listed(getattr(self, name)) if name in self.__slots__ else ()
                values += _fitted(ours, count)
        return values

    def retire(self) -> "Totals":
        """Return what remains of a worker that has ended with these totals.

        Its gauges are zero. Connections that were still open have ended with it, as internal
        errors; so accepted connections stay the sum of those active and those closed.
        """
        left = Totals.sum([self])
        left.connections_closed[_INTERNAL_ERROR] += left.connections_active
        for name in GAUGES:
            setattr(left, name, 0)
        return left


def _listed(value: int | list[int]) -> list[int]:
    return [value] if isinstance(value, int) else value


def _fitted(part: Sequence[int], count: int) -> list[int]:
    """Cut a list off, or fill it up with zeros."""
    return [*part[:count], *[0] * (count - len(part))]


class TurnWatch:
    """Times the turns of a loop, and the echoes that left in the turn in which they came.

    The hot path reads no clock for each frame. What is known is when a turn began and ended and how
    many events it handled; so each echo of the turn is counted with the mean time of one event,
    which is the time from its receive call to the end of its send call.

    Args:
        tally: where the frames are counted.
    """

    __slots__ = (
        "_longest_short", "_placed", "_seen", "_short", "_short_seconds", "_tally", "_turns",
    )  # fmt: skip

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._longest_short = tally.echo_delays.first
        self._turns = Histogram(self._longest_short, TURN_CLASSES)
        self._seen = 0
        """Echoes that have left in the turn in which they came."""
        self._placed = 0
        """Those of them that are in the histogram already."""
        self._short = 0
        """Turns that are not in theirs yet: short ones with as many echoes as events."""
        self._short_seconds = 0.0

    def note(self, seconds: float, events: int) -> None:
        """Take note of a turn of so many seconds and events.

        Of nearly all turns the class is known beforehand, which takes two numbers and not two
        histograms; those have it when somebody wants to know (`settle`).
        """
        tally = self._tally
        seen = tally.frames - tally.delayed_frames
        frames = seen - self._seen
        self._seen = seen
        if frames and frames == events and seconds <= self._longest_short:
            self._short += 1
            self._short_seconds += seconds
            return
        self._turns.observe(seconds)
        if frames:
            self._placed += frames
            # Without any event, a timer has found bytes that arrived after the poll had returned.
            tally.echo_delays.observe(seconds / events if events else seconds, frames)

    def settle(self) -> Histogram:
        """Bring the histogram of echoes up to date, and return that of turns."""
        turns, delays, seconds = self._turns, self._tally.echo_delays, self._short_seconds
        turns.counts[0] += self._short
        turns.seconds += seconds
        # An event of a short turn is shorter still; and all of them together took the whole turn.
        delays.counts[0] += self._seen - self._placed
        delays.seconds += seconds
        self._placed = self._seen
        self._short, self._short_seconds = 0, 0.0
        return turns


def gather(service: EchoService, loop: Loop, watch: TurnWatch) -> Totals:
    """Take the totals of a worker.

    A timer takes them at the end of a turn, of which the histograms of turns and echoes know only
    afterwards; all else agrees.
    """
    tally, counts, turns = service.tally, service.counts, watch.settle()
    return Totals(
        connections_accepted=counts.accepted,
        connections_active=len(service.connections),
        connections_closed=list(counts.closed.values()),
        connections_rejected=list(counts.rejected.values()),
        accept_pauses=list(counts.accept_pauses.values()),
        connection_durations=list(counts.durations.counts),
        connection_durations_ns=_nanoseconds(counts.durations),
        frames=tally.frames,
        received_bytes=tally.received_bytes,
        sent_bytes=tally.echoed_bytes - tally.unsent_bytes,
        frame_sizes=list(tally.frame_sizes),
        frame_sizes_bytes=tally.echoed_bytes - tally.frames * HEADER_BYTES,
        echo_delays=list(tally.echo_delays.counts),
        echo_delays_ns=_nanoseconds(tally.echo_delays),
        turns=list(turns.counts),
        turns_ns=_nanoseconds(turns),
        buffered_bytes=service.pool.held,
        backpressure_pauses=tally.backpressure_pauses,
        timer_entries=loop.timers,
        overload_ns=[
            round(seconds * 1e9) for seconds in (service.overload.seconds, service.budget.seconds)
        ],
        rate_limit_evictions=service.admission.rate_evictions,
        census_overflows=service.admission.overflows,
        tls_handshakes=list(counts.tls_handshakes.values()),
        tls_handshakes_delayed=counts.tls_handshakes_delayed,
    )


def _nanoseconds(histogram: Histogram) -> int:
    return round(histogram.seconds * 1e9)
