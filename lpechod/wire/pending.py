"""Echoes that could not leave at once: a queue of buffers for one connection.

The owner of the queue decides when to pause reading; the queue only knows what waits, in order, and
gives each buffer back as soon as its last byte has gone.
"""

from collections import deque
from collections.abc import Hashable
from typing import Protocol

from lpechod.wire.tally import Histogram

_MAX_VIEWS = 64
"""Buffers offered to one gathering write: far below IOV_MAX (1024, writev(2)), past all benefit."""

_MIN_CHUNK_BYTES = 4096
"""Room in the newest buffer for what follows, so that tiny echoes share one."""


class Buffers(Protocol):
    """Where memory comes from; `lpechod.engine.buffers.BufferPool` is one."""

    shared: memoryview

    def acquire(self, size: int, owner: Hashable) -> memoryview | None:
        """Give out a buffer of at least ``size`` bytes, or None when there is no room for it."""

    def release(self, buffer: memoryview, owner: Hashable) -> None:
        """Take a buffer back."""


class _Chunk:
    """Echoes waiting in ``buffer[start:end]``: ``frames`` of them, the oldest there ``since``."""

    __slots__ = ("buffer", "end", "frames", "since", "start")

    def __init__(self, buffer: memoryview, start: int, end: int, frames: int, since: float) -> None:
        self.buffer = buffer
        self.start = start
        self.end = end
        self.frames = frames
        self.since = since


class PendingEchoes:
    """A queue of echoes.

    Args:
        buffers: source of memory.
        owner: on whose account to take it.
        delays: where to count how long frames have waited.
    """

    __slots__ = ("_buffers", "_chunks", "_delays", "_owner", "size")

    def __init__(self, buffers: Buffers, owner: Hashable, delays: Histogram) -> None:
        self._buffers = buffers
        self._owner = owner
        self._delays = delays
        self._chunks: deque[_Chunk] = deque()
        self.size = 0
        """Bytes that wait."""

    def append(self, buffer: memoryview, size: int, frames: int, now: float, sent: int = 0) -> None:
        """Take over a buffer with echoes.

        Args:
            buffer: the buffer.
            size: how many bytes at its front are whole frames.
            frames: how many of these wait.
            now: the time.
            sent: how many bytes have been sent of it.
        """
        self._chunks.append(_Chunk(buffer, sent, size, frames, now))
        self.size += size - sent

    def append_copy(self, echo: memoryview, frames: int, now: float) -> bool:
        """Copy echoes that lie in somebody else's buffer.

        Returns:
            False if there was no memory; nothing was queued then.
        """
        size = len(echo)
        last = self._chunks[-1] if self._chunks else None
        if last is not None and len(last.buffer) - last.end >= size:
            last.buffer[last.end : last.end + size] = echo
            last.end += size
            last.frames += frames
            self.size += size
            return True
        buffer = self._buffers.acquire(max(size, _MIN_CHUNK_BYTES), self._owner)
        if buffer is None:
            return False
        buffer[:size] = echo
        self.append(buffer, size, frames, now)
        return True

    def views(self) -> list[memoryview]:
        """Return what waits, oldest first, as far as one gathering write should take it."""
        views = []
        for chunk in self._chunks:
            views.append(chunk.buffer[chunk.start : chunk.end])
            if len(views) == _MAX_VIEWS:
                break
        return views

    def drop_sent(self, count: int, now: float) -> None:
        """Drop ``count`` bytes from the front, which the kernel has taken."""
        self.size -= count
        while count:
            chunk = self._chunks[0]
            waiting = chunk.end - chunk.start
            if count < waiting:
                chunk.start += count
                return
            count -= waiting
            self._chunks.popleft()
            self._delays.observe(now - chunk.since, chunk.frames)
            self._buffers.release(chunk.buffer, self._owner)

    def discard(self) -> None:
        """Give all buffers back."""
        while self._chunks:
            self._buffers.release(self._chunks.pop().buffer, self._owner)
