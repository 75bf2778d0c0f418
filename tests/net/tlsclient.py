"""A client of `tests.net.harness` that speaks TLS, with OpenSSL behind memory buffers.

So it can do what a peer on the wire can do and a socket of the ssl module can't: end its direction
and go on to receive, split a record anywhere, or leave out the close_notify.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import ssl
from typing import TYPE_CHECKING

import trustme

from tests.net.plainclient import Client

if TYPE_CHECKING:
    from tests.net.harness import EchoServer

RECORD_BYTES = 16384


@functools.cache
def authority() -> trustme.CA:
    """Make the one certificate authority of a test run."""
    return trustme.CA()


@functools.cache
def server_context() -> ssl.SSLContext:
    """Make a context for a server that clients of this module trust."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    authority().issue_cert("echo.test").configure_cert(context)
    return context


@functools.cache
def client_context() -> ssl.SSLContext:
    """Make a context for clients."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority().configure_trust(context)
    return context


class TlsClient(Client):
    """A client over TLS.

    Args:
        server: whose client it is.
        end: a connected socket.
        context: its side of the handshake.

    Attributes:
        cut: whether the end of the stream came without a close_notify.
    """

    def __init__(
        self, server: EchoServer, end: socket.socket, context: ssl.SSLContext | None = None
    ) -> None:
        super().__init__(server, end)
        if end.family != socket.AF_UNIX:
            # After the segments of a handshake, the kernel delays acknowledgements by 40 ms.
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = (context or client_context()).wrap_bio(
            self._incoming, self._outgoing, server_hostname="echo.test"
        )
        self._cipher = memoryview(b"")
        self._plain = self._early = b""
        self._greeted = self._leaving = False

    def greet(self) -> bool:
        """Go on with the handshake, and tell whether it has come to an end, good or bad."""
        if self._greeted:
            return True
        try:
            self._take()
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            self.flush()
            return self._incoming.eof
        except OSError:
            return True
        self._greeted = True
        if self._early:
            self.tls.write(self._early)
            self._early = b""
        self.flush()
        if self._leaving:
            self.shutdown()
        return True

    def flush(self) -> bool:
        """Send what is encrypted, as far as the kernel takes it; tell whether that was all."""
        if self._outgoing.pending:
            self._cipher = memoryview(bytes(self._cipher) + self._outgoing.read())
        try:
            while self._cipher:
                self._cipher = self._cipher[self.socket.send(self._cipher) :]
        except BlockingIOError:
            return False
        return True

    def pump(self) -> None:
        """Go on with the handshake, and send what is encrypted."""
        if self.socket.fileno() >= 0 and (self._cipher or self._early or self._leaving):
            with contextlib.suppress(ConnectionError):
                self.greet()
                self.flush()

    def send_some(self, data: bytes | memoryview) -> int:
        """Send what the kernel takes at once; the rest of a record goes with the server's turns."""
        view = memoryview(data)
        count = 0
        if not self._greeted:
            self._early += data
            count = len(data)
        while self.flush() and count < len(view):
            count += self.tls.write(view[count : count + RECORD_BYTES])
        self.sent += count
        return count

    def receive_some(self, size: int = 1 << 20) -> bytes | None:
        """Return what is there: nothing yet is empty, an end of the stream is None."""
        self.flush()
        waiting, self._plain = self._plain[:size], self._plain[size:]
        data = waiting or self._decrypt(size)
        if data is None:
            self.at_end = True
            return None
        self.received += len(data)
        return data

    def shutdown(self) -> None:
        """End our direction: a close_notify and a FIN."""
        self._leaving = not self._greeted
        if self._greeted:
            self.take_leave()
            self.socket.shutdown(socket.SHUT_WR)

    def take_leave(self) -> None:
        """Send a close_notify, and leave the connection as it is."""
        self._plain += self._decrypt(1 << 24) or b""  # Or it would be lost to the call below.
        with contextlib.suppress(ssl.SSLError):  # The server's is not there yet.
            self.tls.unwrap()
        self.server.turn_until(self.flush, "close_notify sent", [self.socket])

    def close(self) -> None:
        """Close, in good order if there is a stream; with unread data the kernel resets it."""
        if self.socket.fileno() >= 0 and self._greeted:
            with contextlib.suppress(OSError):
                self.tls.unwrap()
            with contextlib.suppress(OSError):
                self.flush()
        super().close()

    def _take(self) -> None:
        """Take what has arrived."""
        try:
            while data := self.socket.recv(1 << 16):
                self._incoming.write(data)
        except BlockingIOError:
            return
        self._incoming.write_eof()

    def _decrypt(self, size: int) -> bytes | None:
        if self.cut:
            return None
        parts: list[bytes] = []
        have = 0
        try:
            self._take()
        except ConnectionResetError:
            if not self._incoming.pending:
                raise
        try:
            while have < size:
                data = self.tls.read(size - have)
                if not data:
                    return b"".join(parts) or None
                parts.append(data)
                have += len(data)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:  # It comes after our own close_notify.
            return b"".join(parts) or None
        except ssl.SSLEOFError:
            self.cut = True
            return b"".join(parts) or None
        return b"".join(parts)
