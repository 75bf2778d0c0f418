"""Listening sockets that fail, and descriptors that run out."""

import os
import resource
import socket
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from lpechod.net.listener import Listener, ListeningSocket


class WatchedSocket(ListeningSocket):
    """A listening socket that counts calls of accept(2), and fails them as a kernel may.

    Attributes:
        calls: how often it was asked for a connection.
        failures: errnos for the next calls.
        failing: an errno for all calls after those, until it is taken away.
    """

    def __init__(self, listening: socket.socket) -> None:
        super().__init__(fileno=listening.detach())
        self.setblocking(False)
        self.calls = 0
        self.failures: deque[int] = deque()
        self.failing = 0

    def accept_descriptor(self) -> tuple[int, object]:
        self.calls += 1
        number = self.failures.popleft() if self.failures else self.failing
        if number:
            raise OSError(number, os.strerror(number))
        return super().accept_descriptor()


def watched(listener: Listener) -> WatchedSocket:
    """Put a `WatchedSocket` in the place of a listener's socket, on the same descriptor."""
    replaced = WatchedSocket(listener.socket)
    listener.socket = replaced
    return replaced


@contextmanager
def descriptors_left(count: int) -> Iterator[None]:
    """Let this process open so many more descriptors, and no others."""
    free = [os.dup(0) for _ in range(count + 1)]
    for fd in free:
        os.close(fd)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
