"""What a worker knows of the others: how many connections they hold, and whether they live.

All workers accept from the same sockets, and the kernel wakes whom it likes: left alone, one of
four would take half of the connections (or, with EPOLLEXCLUSIVE, all of them). So a worker that is
noticeably ahead of the least loaded one leaves the next connections to it. A socket for each worker
(SO_REUSEPORT) was rejected: it strands what is queued at a worker that stalls or dies, and balances
neither inherited nor UNIX sockets.

A worker that gives no sign of life is waited for no longer than half a second. Signs of life are
counted, not timed: the others' heartbeats are compared at each own one, so a machine that was
suspended as a whole finds nobody stale.
"""

import operator
import sys

from lpechod.ops.segment import Segment, Slot

_STALE_BEATS = 5
"""Own heartbeats without one of a sibling's: then that one counts as stalled. There are ten a
second (at rest five, but who waits for others is not at rest), and it must be well under the second
that clients may be made to wait by a stopped worker."""

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

    __slots__ = ("_beats", "_own", "_peers", "_segment", "_silent", "_slots", "_some_stale")

    def __init__(self, segment: Segment, own: Slot) -> None:
        self._segment = segment
        self._own = own
        self._slots: list[Slot] = []
        """All of the others, those that are free included."""
        self._peers: list[Slot] = []
        """Those of them that do not stand still."""
        # By the index of the slot.
        self._beats: list[int] = []
        self._silent: list[int] = []
        self._some_stale = False
        self.observe()

    def observe(self) -> None:
        """Look who is alive; to be called at each heartbeat."""
        states, beats = self._segment.signs()
        added = len(beats) - len(self._beats)
        before = self._beats + beats[len(self._beats) :]
        silent = [
            unchanged + 1 if state and count == past else 0
            for unchanged, state, count, past in zip(
                self._silent + [0] * added, states, beats, before, strict=True
            )
        ]
        self._beats, self._silent = beats, silent
        stale = max(silent) >= _STALE_BEATS
        if added:
            self._meet()
        # A worker at rest mostly finds nothing changed.
        if added or stale or self._some_stale:
            self._peers = [
                slot
                for slot in self._slots
                if slot.index < len(silent) and silent[slot.index] < _STALE_BEATS
            ]
        self._some_stale = stale

    def allowance(self) -> int:
        """Return how many connections this worker may accept before it is too far ahead."""
        held = [slot.active for slot in self._peers if slot.accepts]
        if not held:
            return sys.maxsize
        least = min(held)
        return least + _HEAD_START + least // _HEAD_START_SHARE - self._own.active

    def next_waits(self) -> bool:
        """Return whether the least loaded one of the others leaves connections to others."""
        accepting = [slot for slot in self._peers if slot.accepts]
        return bool(accepting) and min(accepting, key=_active).waits

    def connections(self) -> int:
        """Return how many connections the others hold, draining ones included."""
        # Asked for each connection that comes, and mostly there are no others.
        if self._segment.used > len(self._slots) + 1:
            self._meet()
        return sum(slot.active for slot in self._slots) if self._slots else 0

    def _meet(self) -> None:
        """Take note of slots that have been used for the first time."""
        own = self._own.index
        self._slots = [self._segment.slot(i) for i in range(self._segment.used) if i != own]
