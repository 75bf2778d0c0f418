"""How a turn is divided among those who move many bytes, so that they don't hold up the others.

Whoever is ready is served in each turn of the loop, which is what keeps latencies short. But 200
who have 256 KiB each would make a turn of a tenth of a second. So among many a turn is divided; and
who has filled its share, and therefore has more, is served *by turns* from then on: whoever was
ready first comes first, with as much as there is room for, until that turn's budget is used up.
Invariants:

- each turn serves the one who has been ready for longest: no turn is wasted, and nobody has to wait
  for more than that all others have been served once;
- a turn costs what is new in it, and who is served, and not all who wait;
- whoever moves little at a time is served in each turn, before all of those.
"""

import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from lpechod.engine.buffers import RECEIVE_BYTES
from lpechod.engine.poller import MAX_EVENTS

SHARED_BYTES = 4 * 1024 * 1024
"""What all that are ready may receive in one turn, some milliseconds of copying, if there are more
than each could have `RECEIVE_BYTES` of."""

FEW = SHARED_BYTES // RECEIVE_BYTES
"""As long as no more are ready, nobody has to share."""

LEAST_SHARE_BYTES = SHARED_BYTES // MAX_EVENTS
"""What each may receive in a turn at least, however many are ready. Whoever moves less at a time is
no burden."""

ROTATED_BYTES = 512 * 1024
"""What those who are served by turns may move in one turn if more than `FEW` of them are ready:
about a millisecond of copying; the last may pass it. Whoever echoes 200 times a second beside them
falls behind if turns take five. Of a few, none is put off for less than `SHARED_BYTES`."""

FRAME_COST_BYTES = 32
"""What it costs to find a frame's end, as bytes moved by those who are served by turns: 16,384 are
a turn's budget. That takes 0.7 ms if they are alike, 4 ms if no two are: a compromise, as what they
cost is known too late. By bytes alone, 900 who pipeline frames of a byte make turns of 0.2 s."""

SHARED_FRAME_BYTES = SHARED_BYTES // (ROTATED_BYTES // FRAME_COST_BYTES)
"""Likewise in a share: so all shares together are as many frames."""

LITTLE_READS = 4
"""After so many small reads one after the other, a source is served in each turn again. One alone
does not tell: what the kernel holds of a fast sender depends on when it was looked at last. And if
half of them were let go after one, each would have a share in the next turn: 4 MiB for all."""

UNDIVIDED = sys.maxsize
"""A share without a bound but what the buffer holds."""

_Source = TypeVar("_Source")


class Rotation(Generic[_Source]):
    """Those who are served by turns, and the share of a turn that all others have.

    Attributes:
        share: the most that one who is not served by turns should receive in the present turn, in
            bytes.
        beginning: the most that anybody should receive who holds nothing, in bytes: what is the
            front of a large frame has to be kept.
        members: those who are served by turns.
        line: those of them who are ready and whose turn has not come yet, with their masks.
        spent: how many bytes they have moved in the present turn; for them to count.
    """

    __slots__ = ("_little", "beginning", "line", "members", "share", "spent")

    def __init__(self) -> None:
        self.share = self.beginning = UNDIVIDED
        self.members: set[_Source] = set()
        self.spent = 0
        # Not a dict: to take the first of one, again and again, walks over all that were before.
        self.line: OrderedDict[_Source, int] = OrderedDict()
        self._little: dict[_Source, int] = {}
        """Members that have received little of late: how often, one time after the other."""

    def divide(self, ready: int) -> None:
        """Divide a turn among so many that are ready."""
        if ready <= FEW:
            self.share = self.beginning
        elif ready < MAX_EVENTS:
            self.share = min(SHARED_BYTES // ready, self.beginning)
        else:
            self.share = min(LEAST_SHARE_BYTES, self.beginning)

    def ration(self, beginning: int) -> None:
        """Bound what anybody may receive who holds nothing."""
        self.beginning = beginning
        self.share = min(self.share, beginning)

    @contextmanager
    def undivided(self) -> Iterator[None]:
        """Have everybody receive as much as there is room for, within a context."""
        before = self.share, self.beginning
        self.share = self.beginning = UNDIVIDED
        try:
            yield
        finally:
            self.share, self.beginning = before

    def room(self, source: _Source, buffer: memoryview, *, begins: bool) -> memoryview:
        """Return the part of a buffer that a source may receive into in this turn.

        Args:
            source: who receives.
            buffer: where to.
            begins: whether it holds nothing of a frame.
        """
        if begins and len(buffer) > self.beginning:
            return buffer[: self.beginning]
        if len(buffer) > self.share and source not in self.members:
            return buffer[: self.share]
        return buffer

    def is_generous(self, source: _Source) -> bool:
        """Whether a source may receive a large frame with one call, from its first byte on."""
        if self.beginning != UNDIVIDED:
            return False
        return self.share == UNDIVIDED or source in self.members

    def join(self, source: _Source) -> None:
        """Serve a source by turns from now on, as it may be already."""
        self.members.add(source)

    def leave(self, source: _Source) -> None:
        """Serve a source in each turn from now on, as it may be already."""
        self.members.discard(source)
        self._little.pop(source, None)

    def forget(self, source: _Source) -> None:
        """Let a source go that has ended."""
        self.leave(source)
        self.line.pop(source, None)

    def weigh(self, source: _Source, received: int, pending: int) -> None:
        """Decide how a source is served from now on: by turns, if it has filled its share.

        Args:
            source: one that is served by turns, or has filled its share.
            received: how many bytes it has received with one call, or what its frames cost.
            pending: how many bytes it has yet to send.
        """
        self.spent += received
        if source not in self.members:
            self.join(source)
        elif received >= LEAST_SHARE_BYTES or pending >= LEAST_SHARE_BYTES:
            self._little.pop(source, None)
        else:
            self._little[source] = times = self._little.get(source, 0) + 1
            if times == LITTLE_READS:
                self.leave(source)

    def expect(self, source: _Source, pending: int) -> None:
        """Serve a source by turns if so many bytes as it has yet to send are many.

        If the peers of hundreds read at last, all that waits for them could go out in one turn.
        """
        if pending >= LEAST_SHARE_BYTES and source not in self.members:
            self.join(source)

    def line_up(self, source: _Source, mask: int) -> None:
        """Note that a source is ready; who is in line already stays where it is.

        Args:
            source: one that is served by turns.
            mask: for what it is ready, in addition to what it has been ready for before.
        """
        self.line[source] = self.line.get(source, 0) | mask

    def turns(self) -> Iterator[tuple[_Source, int]]:
        """Yield, with their masks, those whose turn it is, as long as the budget lasts."""
        self.spent = 0
        budget = ROTATED_BYTES if len(self.line) > FEW else SHARED_BYTES
        while self.line and self.spent < budget:
            yield self.line.popitem(last=False)
