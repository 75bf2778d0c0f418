"""A hashed timer wheel: O(1) to schedule and to cancel, whatever the number of timers.

The wheel knows integer ticks and nothing of clocks; its owner turns seconds into ticks. A timer due
at tick ``t`` lies in slot ``t % slots``, together with those that are due whole rotations later
(Varghese and Lauck, "Hashed and Hierarchical Timing Wheels", 1987, scheme 6). Invariants, which
`TimerWheel.check` verifies:

- every filed timer is in the slot of its tick, and its tick lies ahead of the wheel's;
- ``earliest[slot]`` is never later than the first tick due in that slot, and `next_tick` never
  later than the first due at all. Both may be earlier after a cancellation: the owner may be woken
  for nothing, once for each such slot, but never too late;
- a timer that is cancelled or moved does not fire at its old tick, not even if that has come and
  the timer waits its turn behind the one that calls it off;
- time does not go back.

Expiry is a list, not a callback: no foreign code runs while the wheel is being walked.
A heap was rejected: cancelled entries linger in it, and a daemon cancels nearly all of its timers.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

NEVER = 1 << 62
"""A tick that does not come."""

_UNFILED = -1
_DUE = -2
"""Marks of a timer that has no tick. The second one: `TimerWheel.advance` has handed it out, and it
has neither fired yet nor been called off."""

_NEAR = 64
"""Slots that are searched first for what is due next. A look at 64 slots costs a tenth of one at
1024, and a wheel with much to do nearly always has something due that soon."""


class Timer(ABC):
    """Something that has a place in the wheel. Derive from it and define `on_deadline`.

    The tick is kept in the timer itself, so that cancelling needs no search and a connection, which
    *is* a timer, needs no object of its own for it.
    """

    __slots__ = ("tick",)

    urgent: ClassVar = False
    """Whether it fires before all others that are due: who keeps watch can't wait for 10,000."""

    def __init__(self) -> None:
        self.tick = _UNFILED

    @property
    def filed(self) -> bool:
        """Whether the timer will fire: it is in a wheel, or due and waits its turn."""
        return self.tick != _UNFILED

    def claim(self) -> bool:
        """Take a timer out of the list of those due, in order to fire it.

        Returns:
            False if it has been cancelled or filed again since `TimerWheel.advance` returned it.
        """
        if self.tick != _DUE:
            return False
        self.tick = _UNFILED
        return True

    @abstractmethod
    def on_deadline(self, now: float) -> None:
        """Act on the deadline; the timer is no longer filed.

        Args:
            now: the loop's time, in seconds; never before the deadline.
        """

    def on_failure(self, error: Exception, _now: float) -> None:
        """Give up: `on_deadline` raised ``error``, a defect of ours; by default, pass it on."""
        raise error


class TimerWheel:
    """Timers by the tick at which they are due.

    Args:
        slots: how many ticks one rotation takes.
        tick: the tick at which the wheel starts; ticks are not negative.
    """

    __slots__ = ("_earliest", "_len", "_next", "_slots", "tick")

    def __init__(self, slots: int = 1024, tick: int = 0) -> None:
        self.tick = tick
        self._slots: list[dict[Timer, None]] = [{} for _ in range(slots)]
        self._earliest = [NEVER] * slots
        self._next = NEVER
        self._len = 0

    def __len__(self) -> int:
        return self._len

    def next_tick(self) -> int:
        """Return a tick before which no timer is due, or `NEVER`."""
        return self._next

    def schedule(self, timer: Timer, tick: int) -> None:
        """File a timer, or move it.

        Args:
            timer: the timer.
            tick: when it is due. What is due already fires at the next tick: a turn never meets
                work that it has created itself.
        """
        if timer.tick >= 0:
            self.cancel(timer)
        if tick <= self.tick:
            tick = self.tick + 1
        timer.tick = tick
        slot = tick % len(self._slots)
        self._slots[slot][timer] = None
        self._len += 1
        if tick < self._earliest[slot]:
            self._earliest[slot] = tick
            self._next = min(self._next, tick)

    def cancel(self, timer: Timer) -> None:
        """Take a timer out; a timer that is not filed is left as it is."""
        tick, timer.tick = timer.tick, _UNFILED
        if tick < 0:
            return
        slot = tick % len(self._slots)
        timers = self._slots[slot]
        del timers[timer]
        if not timers:
            # The usual end of a timer; forgetting the tick here saves a wake-up for each of them.
            self._earliest[slot] = NEVER
        self._len -= 1

    def advance(self, tick: int) -> list[Timer]:
        """Move on to a tick and take out every timer that is due.

        Costs the slots that were passed, each at most once: after a stall of an hour that is one
        rotation, not 36,000 ticks.

        Args:
            tick: the new present.

        Returns:
            The timers due, by slot, and within a slot in the order in which they were filed: by
            tick, that is, unless more than a rotation has passed. Each is to be fired if
            `Timer.claim` still lets it.

        Raises:
            ValueError: time would go back.
        """
        if tick < self.tick:
            raise ValueError(f"time goes back, from tick {self.tick} to {tick}")
        due: list[Timer] = []
        if tick >= self._next:
            for slot in self._passed(tick):
                if self._earliest[slot] <= tick:
                    due += self._expire(slot, tick)
            self._next = self._first_after(tick)
        self.tick = tick
        return due

    def _passed(self, tick: int) -> Iterator[int]:
        """Name the slots between the present, exclusive, and a tick, inclusive."""
        slots = len(self._slots)
        first = max(self.tick, tick - slots) + 1
        return (passed % slots for passed in range(first, tick + 1))

    def _expire(self, slot: int, tick: int) -> list[Timer]:
        timers = self._slots[slot]
        due = [timer for timer in timers if timer.tick <= tick]
        for timer in due:
            del timers[timer]
            timer.tick = _DUE
        self._len -= len(due)
        self._earliest[slot] = min([timer.tick for timer in timers], default=NEVER)
        return due

    def _first_after(self, tick: int) -> int:
        slots = len(self._slots)
        start = (tick + 1) % slots
        near = min(self._earliest[start : start + _NEAR])
        # If it is due within this rotation, then before everything in the slots that follow.
        return near if near <= tick + slots else min(self._earliest)

    def check(self) -> None:
        """Compare the bookkeeping with a plain look at every timer.

        Raises:
            AssertionError: an invariant of the module does not hold.
        """
        ticks = []
        for slot, timers in enumerate(self._slots):
            for timer in timers:
                if timer.tick % len(self._slots) != slot or timer.tick <= self.tick:
                    raise AssertionError(f"tick {timer.tick} in slot {slot} at {self.tick}")
                if timer.tick < self._earliest[slot]:
                    raise AssertionError(f"slot {slot} is due before {self._earliest[slot]}")
                ticks.append(timer.tick)
        if len(ticks) != self._len:
            raise AssertionError(f"{len(ticks)} timers, counted as {self._len}")
        if min(ticks, default=NEVER) < self._next:
            raise AssertionError(f"next is {self._next}, but {min(ticks)} is due")
