"""A client of `tests.net.harness`; waiting for the server turns the server."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

from lpechod.net.admission import format_peer

if TYPE_CHECKING:
    from tests.net.harness import EchoServer


def assert_same(expected: bytes, actual: bytes) -> None:
    """Compare streams, and show a difference without printing megabytes."""
    if expected != actual:
        pairs = enumerate(zip(expected, actual, strict=False))
        at = next((k for k, (a, b) in pairs if a != b), min(len(expected), len(actual)))
        raise AssertionError(
            f"streams of {len(expected)} and {len(actual)} bytes differ at {at}: "
            f"{expected[at : at + 16].hex()} and {actual[at : at + 16].hex()}"
        )


class Client:
    """A client over a non-blocking socket; waiting for the server turns the server.

    Args:
        server: whose client it is.
        end: a connected socket.

    Attributes:
        name: how the server's log shows it; None for a UNIX socket.
        sent: bytes that the kernel has taken.
        received: bytes that have arrived.
        at_end: whether it has seen the server's end of file, so that nothing was lost.
        cut: whether that end came without what its kind of stream has for an end.
    """

    def __init__(self, server: EchoServer, end: socket.socket) -> None:
        end.setblocking(False)
        self.server = server
        self.socket = end
        self.name = None if end.family == socket.AF_UNIX else format_peer(end.getsockname())
        self.sent = 0
        self.received = 0
        self.at_end = False
        self.cut = False

    def greet(self) -> bool:
        """Go on with what precedes the first frame; return whether that is done."""
        return True

    def pump(self) -> None:
        """Do what happens without the program's doing; the kernel needs no help."""

    def send_some(self, data: bytes | memoryview) -> int:
        """Send what the kernel takes at once, and return how much that was."""
        try:
            count = self.socket.send(data)
        except BlockingIOError:
            return 0
        self.sent += count
        return count

    def receive_some(self, size: int = 1 << 20) -> bytes | None:
        """Return what is there: nothing yet is empty, an end of file is None."""
        try:
            data = self.socket.recv(size)
        except BlockingIOError:
            return b""
        if not data:
            self.at_end = True
            return None
        self.received += len(data)
        return data

    def send(self, data: bytes) -> None:
        """Send everything."""
        self._transfer(data, 0)

    def receive_exactly(self, size: int) -> bytes:
        """Receive so many bytes."""
        return self._transfer(b"", size)

    def exchange(self, data: bytes) -> None:
        """Send whole frames while receiving, and see exactly them come back."""
        assert_same(data, self._transfer(data, len(data)))

    def _transfer(self, data: bytes, size: int) -> bytes:
        rest = memoryview(data)
        echo = bytearray()

        def done() -> bool:
            nonlocal rest
            if rest:
                rest = rest[self.send_some(rest) :]
            while len(echo) < size:
                part = self.receive_some(size - len(echo))
                assert part is not None, f"end of file after {len(echo)} of {size} bytes"
                if not part:
                    break
                echo.extend(part)
            return not rest and len(echo) == size

        self.server.turn_until(done, f"{len(data)} sent, {size} received", [self.socket])
        return bytes(echo)

    def receive_to_end(self) -> bytes:
        """Receive until the server's end of file."""
        echo = bytearray()

        def done() -> bool:
            while part := self.receive_some():
                echo.extend(part)
            return part is None

        self.server.turn_until(done, "end of file", [self.socket])
        return bytes(echo)

    def expect_eof(self) -> None:
        """See the end of the stream, with nothing in front of it."""
        assert_same(b"", self.receive_to_end())

    def expect_reset(self) -> None:
        """See the connection reset, whatever arrives before."""

        def done() -> bool:
            try:
                while part := self.receive_some():
                    pass
            except ConnectionResetError:
                return True
            assert part is not None, "end of file instead of a reset"
            return False

        self.server.turn_until(done, "reset", [self.socket])

    def expect_silence(self) -> None:
        """See that the server has nothing to say."""
        self.server.settle()
        assert self.receive_some() == b""

    def shutdown(self) -> None:
        """End our direction: a FIN."""
        self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Close with a reset instead of an end of file."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def close(self) -> None:
        """Close; with unread data the kernel makes that a reset."""
        self.socket.close()

    def drop(self) -> None:
        """Close without a word."""
        self.socket.close()
