"""What a worker knows of the others: how many connections they hold, and whether they live.

All workers accept from the same sockets, and the kernel wakes whom it likes: left alone, one of
four would take half of the connections (or, with EPOLLEXCLUSIVE, all of them). So a worker that is
noticeably ahead of the least loaded one leaves the next connections to it. A socket for each worker
(SO_REUSEPORT) was rejected: it strands what is queued at a worker that stalls or dies, and balances
neither inherited nor UNIX sockets.

A worker that gives no sign of life is waited for by nobody. Signs of life are counted, not timed:
the others' heartbeats are compared at each own one, so a machine that was suspended as a whole
finds nobody stale.
"""

import sys

from lpechod.ops.segment import Segment, Slot, SlotState

_STALE_BEATS = 5
"""Own heartbeats, of which ten are a second, without one of a sibling's: then that one counts as
stalled. It must be well under the second that clients may be made to wait by a stopped worker."""

_ACCEPTING = (SlotState.STARTING, SlotState.READY)
"""Whoever is just starting will accept in a moment; a worker that did not wait for it would have
taken everything by then."""

_HEAD_START = 8
_HEAD_START_SHARE = 8
"""A worker may be ahead by 8 connections and an eighth of what the least loaded one has. Less makes
short-lived connections wait for a worker that is busy; with this, four workers that share 400
hold 86 to 105 of them."""


class Siblings:
    """The other workers, through shared memory.

    Args:
        segment: the shared memory.
        own: this worker's slot.
    """

    __slots__ = ("_beats", "_own", "_peers", "_segment", "_slots")

    def __init__(self, segment: Segment, own: Slot) -> None:
        self._segment = segment
        self._own = own
        self._slots: list[Slot] = []
        self._peers: list[Slot] = []
        self._beats: dict[int, tuple[int, int]] = {}
        self.observe()

    def observe(self) -> None:
        """Look who is there and alive; to be called at each heartbeat."""
        own = self._own.index
        self._slots = [slot for slot in self._segment.slots() if slot.index != own]
        beats: dict[int, tuple[int, int]] = {}
        self._peers = []
        for slot in self._slots:
            count = slot.beats
            before, unchanged = self._beats.get(slot.index, (count, 0))
            unchanged = unchanged + 1 if count == before else 0
            beats[slot.index] = count, unchanged
            if slot.state in _ACCEPTING and unchanged < _STALE_BEATS:
                self._peers.append(slot)
        self._beats = beats

    def allowance(self) -> int:
        """Return how many connections this worker may accept before it is too far ahead."""
        if not self._peers:
            return sys.maxsize
        least = min(slot.active for slot in self._peers)
        return least + _HEAD_START + least // _HEAD_START_SHARE - self._own.active

    def connections(self) -> int:
        """Return how many connections the others hold, draining ones included."""
        # Asked for each connection that comes, and mostly there are no others.
        return sum(slot.active for slot in self._slots) if self._slots else 0
