"""Has workers take turns: what changes for one of them, the others learn at once.

Who is ahead leaves the queue alone as long as it is (`lpechod.process.siblings`), and the one that
is behind may be waiting as well: it was ahead a moment ago. In a burst they would wait for each
other again and again, until a heartbeat of one. Nor should they wait until then for one that has
just found that it can't accept. Invariant: among those who can accept, the one with the fewest
connections is watching the queue, or has been woken to.
"""

import contextlib

from lpechod.engine.loop import Loop
from lpechod.net.acceptor import Acceptor
from lpechod.ops.segment import Slot, SlotState
from lpechod.process.bell import Bell, BellListener
from lpechod.process.siblings import Siblings


class Balance:
    """Joins the acceptor of one worker to its siblings.

    Args:
        acceptor: accepts for this worker.
        siblings: the others, as this worker sees them.
        slot: where they see this one.
        bell: wakes those who wait.
        loop: the worker's.

    Raises:
        OSError: out of descriptors or memory.
    """

    __slots__ = ("_acceptor", "_bell", "_listener", "_siblings", "_slot")

    def __init__(
        self, acceptor: Acceptor, siblings: Siblings, slot: Slot, bell: Bell, loop: Loop
    ) -> None:
        self._acceptor = acceptor
        self._siblings = siblings
        self._slot = slot
        self._bell = bell
        self._listener = BellListener(bell, loop, acceptor.rejoin)
        acceptor.on_giving_way = self._give_way
        acceptor.on_suspended = self._suspend

    def close(self) -> None:
        """Close what it has opened: nothing will be accepted any more, as the state says."""
        self._listener.close()
        self._bell.ring()

    def _give_way(self, gives_way: bool) -> None:
        self._slot.waits = gives_way
        if not gives_way:
            self._listener.rest()
            return
        if self._siblings.next_waits():
            self._bell.ring()
        with contextlib.suppress(OSError, ValueError):
            # If the poller has no room for it, a heartbeat wakes this worker.
            self._listener.listen()
        # The others may have gone ahead before they could see that this one waits.
        self._acceptor.rejoin()

    def _suspend(self, suspended: bool) -> None:
        if self._slot.state in (SlotState.READY, SlotState.PAUSED):
            self._slot.state = SlotState.PAUSED if suspended else SlotState.READY
        if suspended:
            self._bell.ring()
