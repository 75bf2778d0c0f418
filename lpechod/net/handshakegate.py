"""Who may go on with a TLS handshake, and when: so that a flood of them starves nobody.

A handshake's first step, with its signature, takes 0.1 to 1 ms of CPU: a turn with hundreds of
them would be a pause for every established connection. So only some steps are made in a turn, and
only so many handshakes are under way at a time; all others wait in the order in which they came.
What they have sent stays in the kernel meanwhile, and `timeouts.handshake` goes on.

Nor may those who begin and then say nothing shut out all others, which a few connections a second
could do: who waits takes the place of the one that has been silent for longest, if that is longer
than most networks take. That one needs a place again when it is heard of again.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable

from lpechod.engine.loop import Loop, Source
from lpechod.engine.wheel import Timer

STEPS_PER_TURN = 4
"""About a millisecond with keys as they are usual now (P-256, or RSA of 2048 bits)."""

SILENCE_SECONDS = 0.25
"""A round trip of most networks is less. Whoever needs longer only waits for a place again, and for
no longer than it takes those before: 256 places are for a thousand silent ones a second."""


class HandshakeGate(Timer):
    """Lets handshakes go on; itself a source in the loop, for turns without other events.

    As a timer, it looks for those who have fallen silent while others wait.

    Args:
        loop: counts turns, and calls who waits.
        limit: handshakes under way at a time, at least 1.
        on_delay: called for each that has to wait for a place.

    Attributes:
        under_way: handshakes that have a place, with the time of their latest step, oldest first.
    """

    __slots__ = ("_granted", "_left", "_limit", "_loop", "_on_delay", "_resting", "_turn",
                 "_waiting", "under_way")  # fmt: skip

    def __init__(self, loop: Loop, limit: int, on_delay: Callable[[], None]) -> None:
        super().__init__()
        self._loop = loop
        self._limit = limit
        self._on_delay = on_delay
        self._turn = -1
        self._left = 0
        self._granted: dict[Hashable, int] = {}
        """Let through, and in which turn: their step is one of the next turn's."""
        self._resting: OrderedDict[Hashable, Source] = OrderedDict()
        """Under way, but this turn's steps were used up."""
        self._waiting: OrderedDict[Hashable, Source] = OrderedDict()
        """Without a place."""
        self.under_way: OrderedDict[Hashable, float] = OrderedDict()

    def admits(self, handshake: Hashable, waiter: Source) -> bool:
        """Tell whether a handshake may make a step now.

        Args:
            handshake: identifies it.
            waiter: called in a later turn (`Loop.again`) if it may not.
        """
        self._begin_turn()
        if self._granted.get(handshake, self._turn) != self._turn:
            del self._granted[handshake]
            self._hold(handshake)
            return True
        if handshake in self._granted or handshake in self._resting or handshake in self._waiting:
            return False
        under_way = handshake in self.under_way
        if (self._left and not self._resting) and (
            under_way or (not self._waiting and self._has_place())
        ):
            self._left -= 1
            self._hold(handshake)
            return True
        if under_way:
            self._resting[handshake] = waiter
        else:
            if len(self.under_way) >= self._limit:
                self._on_delay()
            self._waiting[handshake] = waiter
        self._ask()
        return False

    def leave(self, handshake: Hashable) -> None:
        """Give the place of a handshake to another; it has ended, whether it had begun or not."""
        self._resting.pop(handshake, None)
        self._waiting.pop(handshake, None)
        self._granted.pop(handshake, None)
        self.under_way.pop(handshake, None)
        self._ask()

    def on_ready(self, _mask: int, _now: float) -> None:
        """Let the next ones step, in the turn after this."""
        self._begin_turn()
        steps = STEPS_PER_TURN
        # One is kept for a newcomer: those under way could use up all, a byte at a time.
        kept = 1 if self._waiting and len(self.under_way) < self._limit else 0
        while steps > kept and self._resting:
            self._grant(self._resting)
            steps -= 1
        while steps and self._waiting and self._has_place():
            self._grant(self._waiting)
            steps -= 1
        self._ask()

    def on_deadline(self, _now: float) -> None:
        """Look whether somebody has been silent for too long."""
        self._loop.again(self, 0)

    def on_failure(self, error: Exception, _now: float) -> None:
        """Pass a defect on: nobody would be let through any more."""
        raise error

    def _begin_turn(self) -> None:
        if self._turn != self._loop.turns:
            self._turn = self._loop.turns
            self._left = STEPS_PER_TURN - len(self._granted)

    def _grant(self, queue: OrderedDict[Hashable, Source]) -> None:
        handshake, waiter = queue.popitem(last=False)
        self._hold(handshake)
        self._granted[handshake] = self._turn
        self._loop.again(waiter, 0)

    def _ask(self) -> None:
        """Come again in the next turn if there is somebody who may go on then, or in time."""
        if self._resting or (self._waiting and self._has_place()):
            self._loop.again(self, 0)
        elif self._waiting:
            self._loop.hasten(self, next(iter(self.under_way.values())) + SILENCE_SECONDS)

    def _hold(self, handshake: Hashable) -> None:
        """Note a step, for which another one that is silent may lose its place."""
        if handshake not in self.under_way and len(self.under_way) >= self._limit:
            self.under_way.popitem(last=False)
        self.under_way[handshake] = self._loop.now
        self.under_way.move_to_end(handshake)

    def _has_place(self) -> bool:
        """Tell whether another one may begin, for which a silent one may have to give way."""
        if len(self.under_way) < self._limit:
            return True
        oldest, at = next(iter(self.under_way.items()))
        return oldest not in self._resting and self._loop.now >= at + SILENCE_SECONDS
