"""Notices a loop that turns without doing work.

A descriptor that stays ready and that nobody acts on, work that asks for another turn for ever, or
a deadline that is always past: each costs a whole processor while everything seems to be well. Our
own tests find no such defect, or it would be mended; this is for the one that they miss. HAProxy
aborts a process that spins. Here it is logged and counted, since the connections are still served.

Each turn that does work moves a byte, counts a connection or makes a step of a handshake. So of the
turns of a second, those beyond the bytes, connections and steps of that second did nothing,
whatever the others did.
"""

from lpechod.engine.loop import Loop
from lpechod.engine.poller import ERROR, HANGUP, PEER_CLOSED, READABLE, URGENT, WRITABLE
from lpechod.net.eventlog import EventLog
from lpechod.net.service import EchoService

SPIN_TURNS_PER_SECOND = 2000
"""Turns without work that make a spin. A spin makes 50,000 and more; wake-ups for nothing, such as
for a connection that a sibling was quicker to accept, come near that number in a storm only."""

_PERIOD_SECONDS = 1.0

_MOST_NAMED = 8
"""Descriptors in the log line. Mostly it is one; thousands are no better known by their names."""

_MASK_NAMES = {
    READABLE: "readable",
    URGENT: "urgent",
    WRITABLE: "writable",
    ERROR: "error",
    HANGUP: "hangup",
    PEER_CLOSED: "peer_closed",
}


class SpinDetector:
    """Watches one loop.

    Args:
        loop: the loop.
        service: what it works for; tells what was done.
        log: gets one line when a spell of spinning begins and one when it is over.

    Attributes:
        spins: how many seconds of spinning there were.
    """

    __slots__ = (
        "_began_at",
        "_log",
        "_loop",
        "_progress",
        "_seen_at",
        "_service",
        "_turns",
        "spins",
    )

    def __init__(self, loop: Loop, service: EchoService, log: EventLog) -> None:
        self._loop = loop
        self._service = service
        self._log = log
        self._seen_at = loop.now
        self._turns = loop.turns
        self._progress = service.progress
        self._began_at: float | None = None
        self.spins = 0

    def check(self, now: float) -> None:
        """Compare with what was seen a second ago; to be called several times a second by a timer.

        Args:
            now: the loop's time, in seconds.
        """
        elapsed = now - self._seen_at
        if elapsed < _PERIOD_SECONDS:
            return
        progress, turns = self._service.progress, self._loop.turns
        idle = (turns - self._turns) - (progress - self._progress)
        if idle > SPIN_TURNS_PER_SECOND * elapsed:
            self.spins += 1
            if self._began_at is None:
                self._began_at = self._seen_at
                self._report(round(idle / elapsed))
        elif self._began_at is not None:
            self._log.info("loop_spin_ended", duration_s=round(self._seen_at - self._began_at, 1))
            self._began_at = None
        self._seen_at, self._turns, self._progress = now, turns, progress

    def _report(self, turns_per_second: int) -> None:
        named = self._loop.ready[:_MOST_NAMED]
        self._log.warning(
            "loop_spinning",
            turns_per_second=turns_per_second,
            descriptors=[fd for fd, _ in named],
            masks=[_describe(mask) for _, mask in named],
            asking=self._loop.asking,
        )


def _describe(mask: int) -> str:
    """Write a mask as names, with a number for what has none."""
    names = [name for bit, name in _MASK_NAMES.items() if mask & bit]
    rest = mask & ~sum(_MASK_NAMES)
    return "|".join([*names, hex(rest)] if rest else names)
