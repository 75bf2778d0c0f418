"""Whoever keeps the connections, as a connection sees it."""

from typing import TYPE_CHECKING, Protocol

from lpechod.net.counts import ConnectionCounts
from lpechod.net.handshake import HandshakeError
from lpechod.net.transport import StreamError

if TYPE_CHECKING:
    from lpechod.net.connection import Connection


class Host(Protocol):
    """Whoever keeps the connections.

    Attributes:
        counts: for what nobody else sees.
    """

    counts: ConnectionCounts

    def on_identified(self, connection: "Connection") -> bool:
        """Tell whether a connection may stay, now that it is known whose it is."""

    def on_handshake_failed(self, connection: "Connection", error: HandshakeError) -> None:
        """Report what is wrong with what should have preceded the first frame."""

    def on_stream_failed(self, connection: "Connection", error: StreamError) -> None:
        """Report what the peer has done to the stream."""

    def on_closed(self, connection: "Connection") -> None:
        """Forget a connection: its descriptor is closed."""

    def on_defect(self, connection: "Connection", error: Exception) -> None:
        """Report an error that is a defect of ours."""
