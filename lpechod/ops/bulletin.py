"""When a worker shows its counters to the others: at each heartbeat, and less often at rest.

Heartbeats are all that a worker at rest does, and to gather and to lay out all numbers is more than
half of what each costs. So while nothing happens but heartbeats, its numbers are shown once a
second: nothing in them changes then but how long it has been turning, and the histograms by the
turn in which they were shown last.
"""

from collections.abc import Callable

from lpechod.engine.loop import Loop
from lpechod.net.service import EchoService
from lpechod.ops.counters import Totals
from lpechod.ops.segment import Slot

BEATS_AT_REST = 5
"""At rest, show the numbers every so many heartbeats, which is once a second, whatever
has changed."""


class Bulletin:
    """Shows the totals of one worker.

    Args:
        slot: where.
        loop: the worker's; tells whether there were turns beside the heartbeats.
        service: tells whether anything was done in them.
        totals: gathers what is to be shown.

    Attributes:
        at_rest: whether nothing has happened since the heartbeat before the latest.
    """

    __slots__ = (
        "_loop",
        "_progress",
        "_service",
        "_slot",
        "_totals",
        "_turns",
        "_withheld",
        "at_rest",
    )

    def __init__(
        self, slot: Slot, loop: Loop, service: EchoService, totals: Callable[[], Totals]
    ) -> None:
        self._slot = slot
        self._loop = loop
        self._service = service
        self._totals = totals
        self._turns = loop.turns
        self._progress = service.progress
        self._withheld = 0
        self.at_rest = False

    def beat(self) -> None:
        """Show what is new; to be called with each heartbeat."""
        turns, progress = self._loop.turns, self._service.progress
        self.at_rest = turns - self._turns == 1 and progress == self._progress
        self._turns, self._progress = turns, progress
        self._withheld += 1
        if not self.at_rest or self._withheld >= BEATS_AT_REST:
            self.show()

    def show(self) -> None:
        """Show all totals as they are now."""
        self._withheld = 0
        self._slot.publish(self._totals())
