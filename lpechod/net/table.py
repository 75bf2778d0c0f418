"""Connections that are on a steady path, and what the path counts for all of them at once."""

from typing import Generic, TypeVar

from lpechod.wire.frames import Run
from lpechod.wire.tally import Tally

Member = TypeVar("Member")


class SteadyTable(Generic[Member]):
    """Who is on a path, by descriptor, and the frames that they mostly send.

    Args:
        shared: the buffer that is received into.
        max_frame_bytes: longest body allowed.
        tally: where to count.

    Attributes:
        connections: those who have joined.
    """

    __slots__ = ("_limit", "_run", "_shared", "_tally", "connections")

    def __init__(self, shared: memoryview, max_frame_bytes: int, tally: Tally) -> None:
        self.connections: dict[int, Member] = {}
        self._shared = shared
        self._limit = max_frame_bytes
        self._tally = tally
        self._run = Run(shared, 0, 1)
        """The latest; the next bytes are mostly like it."""

    def join(self, fd: int, connection: Member) -> None:
        """Serve a connection from now on."""
        self.connections[fd] = connection

    def leave(self, fd: int) -> None:
        """Leave a connection to itself, whether it has joined or not."""
        self.connections.pop(fd, None)

    def _recognise(self, count: int, room: int) -> Run | None:
        """Return the frames of a read; None if they are no run, or fill all the room there was.

        A read that fills it is not for a steady path: it has to be weighed, or has left a rest.
        """
        return Run.recognise(self._shared, count, self._limit) if 0 < count < room else None

    def _note(self, run: Run, reads: int) -> None:
        """Count so many reads of such frames."""
        tally = self._tally
        frames = run.frames * reads
        tally.frame_sizes[run.size_class] += frames
        tally.frames += frames
        tally.echoed_bytes += run.size * reads
