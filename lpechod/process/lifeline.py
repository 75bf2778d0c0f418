"""The line between the supervisor and one worker: short messages both ways, and the end of either.

A pair of sockets of which each process holds one end. When a process ends, however it ends, the
kernel closes its end and the other one reads an end of file. That is how a worker notices that its
supervisor has died: PR_SET_PDEATHSIG (prctl(2)) was rejected, as it has to be set after fork(2),
when the parent may be gone already, and would turn a death into a signal like any other. The line
also survives the supervisor's re-execution, with the descriptor's number handed on.

SOCK_SEQPACKET keeps messages apart and has an end of file (unix(7)). Each message is a JSON object
with a ``type``; types that a side does not know are ignored, since an upgraded supervisor talks to
the workers of the version before.
"""

import contextlib
import json
import socket
from collections.abc import Callable, Mapping
from typing import Any

from lpechod.engine.loop import Loop
from lpechod.engine.poller import READABLE

Message = Mapping[str, Any]

_MAX_MESSAGE = 1 << 17
"""Bytes. The longest names all listeners of a drain; the kernel would take 200 KiB."""


def open_lifeline() -> tuple[socket.socket, socket.socket]:
    """Make a line: one end for each process, closed on execve(2).

    Raises:
        OSError: out of descriptors or memory.
    """
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


class Lifeline:
    """One end of a line, in a loop.

    Args:
        end: the socket; owned from now on.
        loop: where to wait.
        on_message: called with each message.
        on_end: called once when the other process has gone.

    Raises:
        OSError: the poller has no room for it; it is closed.
    """

    __slots__ = ("_end", "_loop", "_on_end", "_on_message", "_open")

    def __init__(
        self,
        end: socket.socket,
        loop: Loop,
        on_message: Callable[[Message], None],
        on_end: Callable[[], None],
    ) -> None:
        end.setblocking(False)
        self._end = end
        self._loop = loop
        self._on_message = on_message
        self._on_end = on_end
        self._open = True
        try:
            loop.register(end.fileno(), self, READABLE)
        except OSError:
            end.close()
            raise

    @property
    def fd(self) -> int:
        """The descriptor."""
        return self._end.fileno()

    def send(self, kind: str, **fields: object) -> None:
        """Send a message; one to a process that has gone is dropped, its end is noticed anyway.

        A process that is stopped reads nothing, but a few hundred messages wait for it in the
        kernel, and it gets no more than a handful in its life.
        """
        with contextlib.suppress(OSError):
            self._end.send(json.dumps({"type": kind, **fields}).encode())

    def on_ready(self, _mask: int, _now: float) -> None:
        """Deliver what has arrived."""
        while self._open:
            try:
                message = self._end.recv(_MAX_MESSAGE)
            except BlockingIOError:
                return
            except ConnectionResetError:  # It went with messages of ours unread.
                message = b""
            if not message:
                self.close()
                self._on_end()
                return
            self._on_message(json.loads(message))

    def on_failure(self, error: Exception, _now: float) -> None:
        """Pass a defect on: without the line, nobody could end this worker in good order."""
        raise error

    def close(self) -> None:
        """Let go of the line; closing again is fine."""
        if self._open:
            self._open = False
            self._loop.unregister(self._end.fileno())
            self._end.close()

    def abandon(self) -> None:
        """Close the copy that fork(2) has made; the other process still waits on its own."""
        self._open = False
        self._end.close()
