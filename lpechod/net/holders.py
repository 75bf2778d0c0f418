"""Who holds most of a pool, for when memory has run out, and one after the other has to go.

To look at all holders for each one that goes is quadratic: among 15,000 that hold a kilobyte each,
to free a sixth of it took 0.9 s, in one turn. So they are sorted, and that order is used as long as
a turn lasts; or for a tenth of a second, if they are many. Whoever holds less than at that time is
put where it belongs. Whoever holds more by now, or is new, is found at the next look.
"""

from bisect import insort
from collections.abc import Hashable, Mapping
from operator import itemgetter

from lpechod.engine.loop import Loop
from lpechod.engine.wheel import Timer

_FEW = 256
"""Sorted in each turn that asks: 50 us."""

_held = itemgetter(1)


class Holders(Timer):
    """The holders of a pool, largest first; as a timer, it forgets their order.

    Args:
        held_by: how many bytes each of them holds; not copied.
        loop: tells turns and time.
    """

    __slots__ = ("_held_by", "_loop", "_order", "_turn")

    def __init__(self, held_by: Mapping[Hashable, int], loop: Loop) -> None:
        super().__init__()
        self._held_by = held_by
        self._loop = loop
        self._order: list[tuple[Hashable, int]] = []
        """Smallest first, as it costs nothing to take the last of a list."""
        self._turn = -1

    def largest(self) -> Hashable:
        """Return who holds most, of which there has to be one."""
        if self._turn != self._loop.turns and len(self._held_by) <= _FEW:
            self.forget()
        while True:
            if not self._order:
                self._look()
            holder, held = self._order[-1]
            present = self._held_by.get(holder, 0)
            if present >= held:
                return holder
            del self._order[-1]
            if present:
                insort(self._order, (holder, present), key=_held)

    def forget(self) -> None:
        """Look anew next time; until then nobody is kept in memory for this."""
        self._order.clear()
        self._loop.cancel(self)

    def on_deadline(self, _now: float) -> None:
        """Forget: much may have changed."""
        self.forget()

    def _look(self) -> None:
        self._order = sorted(self._held_by.items(), key=_held)
        self._turn = self._loop.turns
        self._loop.schedule(self, self._loop.now)  # At the next tick.
