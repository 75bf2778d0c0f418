"""The PROXY header in front of a connection: a proxy tells whom it speaks for."""

import socket

from lpechod.engine.loop import Source
from lpechod.engine.poller import READABLE
from lpechod.net.counts import ConnectionCounts
from lpechod.net.handshake import HandshakeError
from lpechod.net.transport import PlainTransport, translated
from lpechod.wire.proxy import MAX_HEADER_BYTES, ProxyError, ProxyHeader
from lpechod.wire.states import CloseReason


class ProxyHandshake:
    """Receives a PROXY header, and not one byte of what follows it.

    It looks at what waits (MSG_PEEK, recv(2)) and then receives as much of that as belongs to the
    header. Peeking alone would keep a level-triggered poller awake; and what follows may be a
    client's TLS handshake, which goes on with the socket itself.

    Args:
        connected: the socket, which stays somebody else's.
        counts: where to count its steps.
    """

    __slots__ = ("_counts", "_header", "_socket", "_started")

    def __init__(self, connected: socket.SocketType, counts: ConnectionCounts) -> None:
        self._socket = connected
        self._counts = counts
        self._header = ProxyHeader()
        self._started = False

    def advance(self, _waiter: Source) -> int | None:
        """Receive what is there of the header; see `Handshake.advance`."""
        while not self._header.complete:
            try:
                waiting = self._socket.recv(MAX_HEADER_BYTES, socket.MSG_PEEK)
            except BlockingIOError:
                return READABLE
            except OSError as error:
                raise translated(error) from error
            if not waiting:
                if self._started:
                    raise HandshakeError(CloseReason.PROXY_ERROR, "the header is cut off")
                raise EOFError
            self._started = True
            self._counts.steps += 1
            try:
                self._socket.recv(self._header.take(waiting))
            except ProxyError as error:
                raise HandshakeError(CloseReason.PROXY_ERROR, str(error)) from error
        return None

    def abandon(self, _reason: CloseReason | None) -> None:
        """Do nothing: nothing is held."""

    @property
    def peer(self) -> tuple[str, int] | None:
        """The client's address as the proxy tells it; None if it speaks for itself."""
        source = self._header.source
        return None if source is None else (source.host, source.port)


class ProxiedTransport(PlainTransport):
    """The stream behind a PROXY header, which is received from a socket object.

    Args:
        connected: the socket; made non-blocking here and owned from now on.
    """

    __slots__ = ("_socket",)

    def __init__(self, connected: socket.SocketType) -> None:
        super().__init__(connected.fileno())
        connected.setblocking(False)  # The object has a time-out of its own besides.
        self._socket = connected

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()
