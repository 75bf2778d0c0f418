"""Time under a test's control: a clock that stands still, and a poller that moves it.

Nothing of it is known to the code under test: a `Loop` is given a `FakeClock` instead of the
monotonic clock, and a `FakeTimePoller` around a real poller. Descriptors stay real; only waiting is
skipped. The clock counts integer nanoseconds, as the real one does, so its readings round likewise.
"""

import math

from lpechod.engine.poller import MAX_EVENTS, Poller, Ready

_NANOSECONDS = 1_000_000_000
_MILLISECOND = 1_000_000


class FakeClock:
    """A clock that moves only when told to.

    Args:
        start: its first reading, in seconds.
    """

    def __init__(self, start: float = 1000.0) -> None:
        self.nanoseconds = round(start * _NANOSECONDS)
        self.readings = 0

    def __call__(self) -> float:
        """Return the time in seconds, and count that somebody has asked."""
        self.readings += 1
        return self.nanoseconds / _NANOSECONDS

    @property
    def now(self) -> float:
        """The time in seconds, for the test itself: not counted."""
        return self.nanoseconds / _NANOSECONDS

    def advance(self, seconds: float) -> None:
        """Move the clock on."""
        if seconds < 0:
            raise ValueError("a monotonic clock does not go back")
        self.nanoseconds += round(seconds * _NANOSECONDS)


class FakeTimePoller:
    """A poller that never blocks: where the real one would wait, the clock moves on.

    Args:
        poller: the real poller; it sees every descriptor.
        clock: moved by the time-out, rounded up to a millisecond as in epoll_wait(2), whenever
            nothing is ready.

    Attributes:
        timeouts: what each poll was asked to wait, in order.
        idle_polls: how many polls found nothing ready.
    """

    def __init__(self, poller: Poller, clock: FakeClock) -> None:
        self._poller = poller
        self._clock = clock
        self.edge_triggered = poller.edge_triggered
        self.register = poller.register
        self.modify = poller.modify
        self.unregister = poller.unregister
        self.forget = poller.forget
        self.timeouts: list[float | None] = []
        self.idle_polls = 0

    def poll(self, timeout: float | None, maxevents: int = MAX_EVENTS, /) -> Ready:
        """Return what is ready now, or skip the wait.

        Raises:
            AssertionError: the wait would last for ever.
        """
        self.timeouts.append(timeout)
        ready = self._poller.poll(0.0, maxevents)
        if ready:
            return ready
        if timeout is None:
            raise AssertionError("nothing is ready and no deadline is set: this would wait forever")
        self.idle_polls += 1
        nanoseconds = math.ceil(timeout * _NANOSECONDS)
        self._clock.nanoseconds += -(-nanoseconds // _MILLISECOND) * _MILLISECOND
        return ready

    def close(self) -> None:
        """Close the real poller."""
        self._poller.close()
