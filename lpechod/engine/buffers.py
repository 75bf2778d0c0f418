"""Memory for bytes: one receive buffer for everybody, and pooled buffers for those that must wait.

The common turn needs no memory of its own: it receives into `BufferPool.shared` and sends from it.
Bytes that cannot leave in the same turn move to a buffer that belongs to one owner. Invariants:

- a buffer is at most four times as large as the bytes it was asked for (smallest class aside), so
  memory grows with what has arrived and never with what was announced;
- ``held`` is the sum of all buffers given out; with those that are kept it never passes ``limit``;
- buffers are kept for reuse: a fresh megabyte costs 256 page faults, more than copying it.
"""

import mmap
from collections.abc import Callable, Hashable

RECEIVE_BYTES = 256 * 1024
"""What one connection may receive in one turn, but for the rest of a larger frame: large enough
that calls into the kernel weigh little, small enough to stay in the second-level cache and to give
the other connections a turn."""

HEADROOM_BYTES = 64
"""Added to each class, so that a body whose size is a power of two fits together with a header."""

_PAGE_OFFSET_BYTES = 3072
"""Where in a page a large buffer begins: far from where data begins in the kernel's own pages.

The kernel copies with ``rep movsb`` where the CPU says that it is fast (FSRM). On AMD's Zen 4 that
takes 16 times as long if the destination's place in its page is 1 to 15 bytes further on than the
source's: 3.4 instead of 55 GB/s. What a socket is given starts at the front of a page of the
kernel's, or some frames' headers of four bytes further on; and malloc(3) starts a large block 16
bytes from the front of a page. Over loopback that met so often that an echo of 1 MiB took 1.2 times
the CPU."""

_LEAST_MAPPED_BYTES = 16 * 1024
"""Smaller buffers come from malloc(3), which wastes no page for each."""

_CAPACITIES: tuple[int, ...] = tuple(
    (4 ** max((bits + 1) // 2, 5) if bits <= 20 else 2**bits) + HEADROOM_BYTES for bits in range(65)
)
"""The classes, by how many bits it takes to count the bytes before the last, without headroom. The
smallest is 1 KiB; each is four times the one before up to 1 MiB, and twice from there on: a frame
of 5 MB that holds 16 MiB leaves room for few others."""

_KEPT_BYTES = 16 * 1024 * 1024
"""Unused buffers that are kept in any case."""

_KEPT_BUFFERS = 4
"""Of the largest size, so many are kept, too; but no more than a quarter of all that may be given
out. Without, each frame of 5 MB took 3.5 times as much CPU, most of it for fresh pages."""


class BufferPool:
    """Buffers by size class, and an account of who holds how much.

    Args:
        limit: the most that may be given out, in bytes.
        keep: how many bytes of unused buffers are kept for reuse; see `kept_bytes`.

    Attributes:
        alarm: past so many bytes given out, `on_alarm` is called with the owner of each further
            request.
        make_room: called when a request would pass the limit, with the bytes needed and the owner
            that asks; frees what it can before it returns.
    """

    __slots__ = (
        "_free",
        "_idle",
        "_keep",
        "_on_release",
        "alarm",
        "held",
        "held_by",
        "limit",
        "make_room",
        "on_alarm",
        "shared",
    )

    def __init__(self, limit: int, keep: int = _KEPT_BYTES) -> None:
        self.shared = memory(RECEIVE_BYTES + HEADROOM_BYTES)
        self.limit = limit
        self.alarm = limit
        self.on_alarm: Callable[[Hashable], None] = lambda _owner: None
        self._on_release: Callable[[Hashable], None] | None = None
        self.make_room: Callable[[int, Hashable], None] = lambda _size, _owner: None
        self.held = 0
        self.held_by: dict[Hashable, int] = {}
        self._free: dict[int, list[memoryview]] = {}
        self._idle = 0
        self._keep = keep

    def acquire(self, size: int, owner: Hashable) -> memoryview | None:
        """Give out a buffer of at least ``size`` bytes; its content is undefined.

        Args:
            size: bytes needed now.
            owner: on whose account.

        Returns:
            A buffer, or None if the limit is reached and `make_room` freed too little.
        """
        capacity = capacity_for(size)
        if self.held + capacity > self.limit:
            self.make_room(capacity, owner)
            if self.held + capacity > self.limit:
                return None
        self.held += capacity
        self.held_by[owner] = self.held_by.get(owner, 0) + capacity
        if self.held > self.alarm:
            self.on_alarm(owner)
        free = self._free.get(capacity)
        if free:
            self._idle -= capacity
            return free.pop()
        if self.held + self._idle > self.limit:
            self._reclaim(self.limit - self.held)
        return memory(capacity)

    def release(self, buffer: memoryview, owner: Hashable) -> None:
        """Take back a buffer; views of it must not be used any more.

        Args:
            buffer: the view that `acquire` returned.
            owner: the account it was given out on.
        """
        capacity = len(buffer)
        self.held -= capacity
        rest = self.held_by[owner] - capacity
        if rest:
            self.held_by[owner] = rest
        else:
            del self.held_by[owner]
        notify = self._on_release
        if self._idle + capacity <= self._keep or notify is not None:
            self._idle += capacity
            self._free.setdefault(capacity, []).append(buffer)
        if notify is not None:
            notify(owner)

    def tell(self, on_release: Callable[[Hashable], None] | None) -> None:
        """Call something with the owner of each buffer that comes back; None: nothing any more.

        Whoever wants to know has others wait for it, so until then all is kept for those.
        """
        self._on_release = on_release
        if on_release is None:
            self._reclaim(self._keep)

    def _reclaim(self, most: int) -> None:
        """Let go of unused buffers, large ones first, until there are at most so many bytes."""
        for capacity in sorted(self._free, reverse=True):
            free = self._free[capacity]
            while free and self._idle > most:
                free.pop()
                self._idle -= capacity


def capacity_for(size: int) -> int:
    """Return how large a buffer is that so many bytes are given."""
    return _CAPACITIES[max(size - HEADROOM_BYTES - 1, 0).bit_length()]


def kept_bytes(limit: int, largest: int) -> int:
    """Return how many bytes of unused buffers to keep.

    Args:
        limit: the most that may be given out, in bytes.
        largest: the largest frame with its header, in bytes.
    """
    return max(_KEPT_BYTES, min(_KEPT_BUFFERS * capacity_for(largest), limit // 4))


def memory(size: int) -> memoryview:
    """Return fresh memory, large blocks at a place in a page that the kernel copies to fast."""
    if size < _LEAST_MAPPED_BYTES:
        return memoryview(bytearray(size))
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    return memoryview(mmap.mmap(-1, _PAGE_OFFSET_BYTES + size, flags=private))[_PAGE_OFFSET_BYTES:]
