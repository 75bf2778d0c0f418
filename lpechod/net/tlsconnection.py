"""A connection over TLS: where readiness of the descriptor and of the stream are not the same.

Three differences. A record that was larger than the buffer leaves bytes inside OpenSSL, which no
poller tells of: the connection asks the loop to be called again. And either direction may have to
wait for the other (a key update that arrives while nothing can be sent): it then watches for that
one instead, since readiness that it can make no use of would turn the loop for nothing. And
the peer's stream ends before its connection does: what comes behind a close_notify is received to
be dropped (RFC 8446, 6.1), until the FIN. The descriptor is always watched level-triggered, also
where others are not: OpenSSL leaves unread records in the kernel, and so the kernel goes on to tell
of them.
"""

from lpechod.engine.poller import READABLE, WRITABLE
from lpechod.net.connection import Connection
from lpechod.net.tls import TlsTransport
from lpechod.wire.states import State


class TlsConnection(Connection):
    """One client, over TLS."""

    __slots__ = ("_watched",)

    _transport: TlsTransport

    def on_ready(self, mask: int, now: float) -> None:
        """Handle readiness, and come again for what the poller does not see."""
        transport = self._transport
        crossed = transport.crossed
        if crossed:
            transport.crossed = 0
            if mask & crossed:
                mask |= READABLE | WRITABLE
        Connection.on_ready(self, mask, now)  # super() would cost more, for each frame.
        if transport.more and self._interest & READABLE:
            self._loop.again(self, READABLE)
        if (crossed or transport.crossed) and self.protocol.state is not State.CLOSED:
            self._watch_as_wanted()

    def _catch_up(self, now: float) -> None:
        self._transport.eager = True
        try:
            super()._catch_up(now)
        finally:
            self._transport.eager = False

    def _receive_end(self, now: float) -> None:
        """Tell the end of the peer's stream, a close_notify, from that of its connection."""
        if self.protocol.state is State.LINGERING:
            super()._receive_end(now)
        else:
            self.protocol.receive_end()

    def _register(self) -> None:
        self._watched = READABLE
        super()._register()

    def _set_interest(self, interest: int) -> None:
        if self._transport.more and interest & ~self._interest & READABLE:
            self._loop.again(self, READABLE)  # What was left when reading was paused.
        self._interest = watched = interest
        crossed = self._transport.crossed
        if crossed:
            watched = 0
            if interest & READABLE:
                watched |= crossed & WRITABLE or READABLE
            if interest & WRITABLE:
                watched |= crossed & READABLE or WRITABLE
        if watched != self._watched:
            self._watch(watched)
            self._watched = watched
