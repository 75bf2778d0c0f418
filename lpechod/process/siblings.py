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

import operator
import sys

from lpechod.ops.segment import Segment, Slot, SlotState

_STALE_BEATS = 5
"""Own heartbeats without one of a sibling's: then that one counts as stalled. There are ten a
second (at rest five, but who waits for others is not at rest), and it must be well under the second
that clients may be made to wait by a stopped worker."""

_ACCEPTING = (SlotState.STARTING, SlotState.READY)
"""Whoever is just starting will accept in a moment; a worker that did not wait for it would have
taken everything by then."""

_HEAD_START = 8
_HEAD_START_SHARE = 8
"""A worker may be ahead by 8 connections and an eighth of what the least loaded one has. Less makes
short-lived connections wait for a worker that is busy; with this, four workers that share 400
hold 86 to 105 of them."""


_active = operator.attrgetter("active")


class Siblings:
    """The other workers, through shared memory.

    Args:
        segment: the shared memory.
        own: this worker's slot.
    """

    __slots__ = ("_beats", "_own", "_peers", "_segment", "_silent", "_slots", "_states")

    def __init__(self, segment: Segment, own: Slot) -> None:
        self._segment = segment
        self._own = own
        self._slots: list[Slot] = []
        self._peers: list[Slot] = []
        # By the index of the slot, those that are free included.
        self._states: list[int] = []
        self._beats: list[int] = []
        self._silent: list[int] = []
        self.observe()

    def observe(self) -> None:
        """Look who is there and alive; to be called at each heartbeat."""
        states, beats = self._segment.signs()
        changed = states != self._states
        if changed:
            self._meet(states, beats)
        stale = max(self._silent) >= _STALE_BEATS
        self._silent = [
            unchanged + 1 if state and count == before else 0
            for unchanged, state, count, before in zip(
                self._silent, states, beats, self._beats, strict=True
            )
        ]
        self._beats = beats
        # Mostly nothing has changed, and again and again that is all a worker at rest finds out.
        if changed or stale or max(self._silent) >= _STALE_BEATS:
            self._peers = [
                slot
                for slot in self._slots
                if states[slot.index] in _ACCEPTING and self._silent[slot.index] < _STALE_BEATS
            ]

    def _meet(self, states: list[int], beats: list[int]) -> None:
        """Take note of who has come and gone; of those who were here, the silence goes on."""
        added = len(states) - len(self._states)
        before = self._states + [SlotState.FREE] * added
        self._silent = [
            unchanged if present and past else 0
            for unchanged, present, past in zip(
                self._silent + [0] * added, states, before, strict=True
            )
        ]
        self._beats = self._beats + beats[len(self._beats) :]
        self._states = states
        own = self._own.index
        self._slots = [
            self._segment.slot(index)
            for index, state in enumerate(states)
            if state and index != own
        ]

    def allowance(self) -> int:
        """Return how many connections this worker may accept before it is too far ahead."""
        if not self._peers:
            return sys.maxsize
        least = min(slot.active for slot in self._peers)
        return least + _HEAD_START + least // _HEAD_START_SHARE - self._own.active

    def next_waits(self) -> bool:
        """Return whether the least loaded one leaves connections to others, as this one does."""
        if not self._peers:
            return False
        return min(self._peers, key=_active).waits

    def connections(self) -> int:
        """Return how many connections the others hold, draining ones included."""
        # Asked for each connection that comes, and mostly there are no others.
        return sum(slot.active for slot in self._slots) if self._slots else 0
