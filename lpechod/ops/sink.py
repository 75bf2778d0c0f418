"""Where log lines leave the process: a descriptor that can neither block nor end the loop.

Standard error is borrowed. Its open file description belongs to the shell, the container runtime
and the other workers as well, and O_NONBLOCK is a property of the description, not of the
descriptor (open(2)): setting it here would make *their* writes fail. So each kind of file is
written in the one way that waits for nobody and changes nothing that is shared:

- a socket (journald's stream) with send(2) and MSG_DONTWAIT, which is a flag of the call;
- a regular file with plain write(2). O_NONBLOCK means nothing there, and an own description would
  have an own offset: a traceback that the interpreter writes to standard error would land on top
  of earlier lines. A disk that stalls can still delay the writer; only a thread could help that;
- a pipe, terminal or other device through an own description, opened from /proc/self/fd, which may
  be non-blocking. The kernel refuses that to anybody but the owner (a daemon started with su, a
  pipe made by root) and for a pipe without a reader; then `_SharedDescription` has to do.

Invariants: nothing here raises or waits. A line is taken whole, or dropped whole and counted. The
tail of a line of which the kernel took a part goes out before anything else, so that a line never
continues another. After fork(2) a child opens its own sink, lest both send the same tail.

Left to the process: SIGPIPE stays ignored, as the interpreter arranges, and a background job that
must not stop at a terminal with `stty tostop` ignores SIGTTOU.
"""

import contextlib
import errno
import fcntl
import os
import select
import socket
import stat
from collections.abc import Callable
from functools import partial

_Take = Callable[[bytes], int]
"""Hands bytes to the kernel and returns how many it took, or raises OSError."""

_REOPEN_FLAGS = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY

# Absent where the package may be imported but is not run in production (macOS).
_SEND_FLAGS = socket.MSG_DONTWAIT | getattr(socket, "MSG_NOSIGNAL", 0)
_RWF_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)


class LogSink:
    """Writes lines to an inherited descriptor, at once or not at all.

    The descriptor stays the caller's: the sink works on a copy or on an own description.

    Args:
        descriptor: an open file descriptor. One that is closed or not writable is no error: every
            line is dropped.

    Attributes:
        dropped_lines: how many lines were refused, or lost their tail at `close`.
    """

    __slots__ = ("_release", "_tail", "_take", "dropped_lines")

    def __init__(self, descriptor: int = 2) -> None:
        self._tail = b""
        self.dropped_lines = 0
        try:
            self._take, self._release = _open(descriptor)
        except OSError:
            self._take, self._release = _refuse, _nothing

    def write(self, line: bytes) -> bool:
        """Hand a line to the kernel if it takes it now.

        Args:
            line: the bytes, with the newline at the end.

        Returns:
            Whether the line was taken, at least in part: its tail follows with a later call.
            Otherwise it is dropped and counted.
        """
        if self._tail:
            self._tail = self._push(self._tail)
        rest = line if self._tail else self._push(line)
        if len(rest) == len(line):
            self.dropped_lines += 1
            return False
        self._tail = rest
        return True

    def close(self) -> None:
        """Let go of the descriptor. Lines written afterwards are dropped; closing again is fine."""
        if self._tail and self._push(self._tail):
            self.dropped_lines += 1
        self._tail = b""
        release, self._take, self._release = self._release, _refuse, _nothing
        with contextlib.suppress(OSError):
            release()

    def abandon(self) -> None:
        """Close, after fork(2), without writing the tail of which the parent has the other copy."""
        self._tail = b""
        self.close()

    def _push(self, data: bytes) -> bytes:
        """Write until the kernel takes no more, for whatever reason, and return what is left.

        No errno is special. EAGAIN passes when the reader catches up, ENOSPC when somebody makes
        room, EPIPE of a named pipe when a new reader comes; and nobody is left to be told of EIO.
        """
        with contextlib.suppress(OSError):
            while data and (taken := self._take(data)):
                data = data[taken:]
        return data


class _SharedDescription:
    """Writes to a description that must stay blocking, without blocking.

    Two ways, best first: RWF_NOWAIT (pwritev2(2)), which Linux has for pipes since 6.4, though not
    for named ones; or asking poll(2) and then writing no more than a writable file has room for.
    For a pipe that is PIPE_BUF bytes (pipe(7)). A terminal that polls writable promises one byte:
    more than that was seen to fall short, while a byte a time never did. Slow, but it serves
    people who look at a screen.

    Another process that fills the last page between poll and write can still make the write wait.
    Only RWF_NOWAIT closes that gap.
    """

    __slots__ = ("_descriptor", "_nowait", "_poll", "_room")

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._nowait = bool(_RWF_NOWAIT)
        self._room = 1 if os.isatty(descriptor) else select.PIPE_BUF
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)

    def take(self, data: bytes) -> int:
        """Be the `_Take` of this description."""
        if self._nowait:
            try:
                # Offset -1: at the current position, as write(2) does; pipes have no other.
                return os.pwritev(self._descriptor, [data], -1, _RWF_NOWAIT)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                self._nowait = False
        if not self._poll.poll(0):
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return os.write(self._descriptor, data[: self._room])


def _open(descriptor: int) -> tuple[_Take, Callable[[], None]]:
    """Find the way to write to this kind of file.

    Returns:
        How to write, and how to close what was opened for it.

    Raises:
        OSError: the descriptor is not open.
    """
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISSOCK(mode) and not stat.S_ISREG(mode):
        # ENXIO, EACCES, EPERM, ENOENT, EIO: whatever the reason, the descriptor itself remains.
        with contextlib.suppress(OSError):
            own = os.open(f"/proc/self/fd/{descriptor}", _REOPEN_FLAGS)
            return partial(os.write, own), partial(os.close, own)
    # The copy keeps its meaning if somebody closes the original and its number is used again.
    copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    if stat.S_ISSOCK(mode):
        peer = socket.socket(fileno=copy)
        return lambda data: peer.send(data, _SEND_FLAGS), peer.close
    if stat.S_ISREG(mode):
        return partial(os.write, copy), partial(os.close, copy)
    return _SharedDescription(copy).take, partial(os.close, copy)


def _refuse(_data: bytes) -> int:
    raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def _nothing() -> None:
    """Release nothing."""
