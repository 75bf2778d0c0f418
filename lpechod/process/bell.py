"""A bell that a worker rings to have those who wait look again whether they may accept.

One eventfd(2) for all workers of a daemon, made before the first of them and kept over reloads. It
is never read: each worker has an epoll(7) instance of its own that watches it edge-triggered, so
each write wakes all who are waiting, and nobody takes it away from another. The instance is a
descriptor like any other, which every poller can watch.

Rejected: an eventfd for each worker, which those that were forked before do not have; a signal,
which may meet another process of that number by then; and a word to the supervisor, who passes it
on: a stopped worker does not read, and its line would fill until a message that matters is dropped.
"""

import os
import select
from collections.abc import Callable

from lpechod.engine.loop import Loop
from lpechod.engine.poller import READABLE


class Bell:
    """The bell itself, of all processes that are forked after it was made.

    Args:
        fd: the descriptor of one that exists; None makes one.

    Raises:
        OSError: out of descriptors or memory.
    """

    __slots__ = ("fd",)

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) if fd is None else fd

    def ring(self) -> None:
        """Wake those who listen."""
        # The counter has 64 bits, and nobody takes from it: it will not be full in our time.
        os.eventfd_write(self.fd, 1)


class BellListener:
    """Hears a bell for one process, in its loop.

    Args:
        bell: what to listen to.
        loop: where to wait.
        on_ring: called after one ring or several, while listening.

    Raises:
        OSError: out of descriptors or memory.
    """

    __slots__ = ("_epoll", "_listening", "_loop", "_on_ring")

    def __init__(self, bell: Bell, loop: Loop, on_ring: Callable[[], None]) -> None:
        self._loop = loop
        self._on_ring = on_ring
        self._listening = False
        self._epoll = select.epoll()
        self._epoll.register(bell.fd, select.EPOLLIN | select.EPOLLET)

    def listen(self) -> None:
        """Begin to listen, unless it does already; what was rung before that is forgotten.

        Raises:
            OSError, ValueError: the poller has no room.
        """
        if not self._listening:
            self._forget()
            self._loop.register(self._epoll.fileno(), self, READABLE)
            self._listening = True

    def rest(self) -> None:
        """Sleep through the next rings."""
        if self._listening:
            self._listening = False
            self._loop.unregister(self._epoll.fileno())

    def on_ready(self, _mask: int, _now: float) -> None:
        """Tell of the rings."""
        self._forget()
        self._on_ring()

    def on_failure(self, error: Exception, _now: float) -> None:
        """Pass a defect on."""
        raise error

    def close(self) -> None:
        """Close the descriptor; the bell goes on."""
        self.rest()
        self._epoll.close()

    def _forget(self) -> None:
        self._epoll.poll(0)
