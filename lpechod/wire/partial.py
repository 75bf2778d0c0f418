"""A frame that has not arrived whole, in a buffer of its own that it is received into directly.

Rejected: keeping frames in pipes with splice(2). A prototype took 0.4 to 0.6 of the CPU over
loopback for 512 KiB and 1 MiB. But where each segment of 1448 bytes has a page of its own, as from
a network card, it took 0.94 to 1.08 of what it took without splice: a slot of a pipe holds one
segment, so the 256 slots that an unprivileged process may have are full at 370 KB, and the frame
has to move to a buffer after all. Three pipes for each frame took 1.07 to 1.20, and one user may
have 64 such pipes (pipe(7), pipe-user-pages-soft).
"""

from collections.abc import Hashable

from lpechod.wire.frames import HEADER_BYTES
from lpechod.wire.pending import Buffers


class PartialFrame:
    """What has arrived of a frame; or, with a ``need`` that ``have`` covers, unscanned frames.

    The buffer grows by one class of its source when it is full, so memory follows the bytes that
    arrived and not the length that the header announces.

    Args:
        buffers: source of memory.
        owner: on whose account to take it.
        buffer: a buffer from there.
        have: how many bytes of it are valid.
        need: size of the frame with its header, in bytes; `HEADER_BYTES` until the header is whole.
        now: when its first byte arrived, in seconds.
    """

    __slots__ = ("_buffers", "_owner", "buffer", "have", "need", "since")

    def __init__(
        self,
        buffers: Buffers,
        owner: Hashable,
        buffer: memoryview,
        have: int,
        need: int,
        now: float,
    ) -> None:
        self._buffers = buffers
        self._owner = owner
        self.buffer = buffer
        self.have = have
        self.need = need
        self.since = now

    @classmethod
    def begin(
        cls, buffers: Buffers, owner: Hashable, received: memoryview, need: int, now: float
    ) -> "PartialFrame | None":
        """Copy what has been received into a buffer of its own; None if there is no memory."""
        have = len(received)
        # A byte more, as there is more to come: a read that has filled the receive buffer would
        # fill this one, too, and all of it be copied once more, into the next larger.
        buffer = buffers.acquire(max(have, min(need, have + 1)), owner)
        if buffer is None:
            return None
        buffer[:have] = received
        return cls(buffers, owner, buffer, have, need, now)

    @property
    def scannable(self) -> bool:
        """Whether all that was asked for is there, so that a look at it will tell more."""
        return self.need <= self.have

    @property
    def outgrown(self) -> bool:
        """Whether the buffer is too small for the frame."""
        return self.need > len(self.buffer)

    def room(self) -> memoryview | None:
        """Return where the next bytes go; None if there is no memory for them.

        Never past the frame's end, nor past a header of which a part is there: what follows belongs
        into the shared buffer, and a frame that ends where a read ends is a boundary at which a
        draining connection can be closed, however much its peer pipelines.
        """
        have, need, full = self.have, self.need, self.buffer
        if have == len(full):
            # The next is four times as large, also where there is a class between. Asking for that
            # would go past it: a class has as much headroom as the one before, so a full buffer
            # times four is just more than it holds.
            larger = self._buffers.acquire(min(need, have * 2), self._owner)
            if larger is None:
                return None
            larger[:have] = full
            self.buffer = larger  # First: who is told of what comes back sees how things stand.
            self._buffers.release(full, self._owner)
        return self.buffer[have:need]

    def drop(self, count: int, need: int, now: float) -> None:
        """Go on with what is behind the first ``count`` bytes, as if it had begun to arrive now."""
        rest = self.have - count
        self.buffer[:rest] = self.buffer[count : self.have]
        self.have, self.need, self.since = rest, need, now

    def deadline(self, frame_s: float, min_rate_bytes_per_s: int) -> float:
        """Return by when it has to be whole, as far as its length is known."""
        return self.since + frame_s + (self.need - HEADER_BYTES) / min_rate_bytes_per_s

    def release(self) -> None:
        """Give the buffer back."""
        self._buffers.release(self.buffer, self._owner)
