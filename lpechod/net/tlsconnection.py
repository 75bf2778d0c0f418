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

import ssl

from lpechod.engine.poller import READABLE, WRITABLE
from lpechod.net.connection import Connection
from lpechod.net.steady import SteadyConnection
from lpechod.net.tls import Stream, TlsTransport
from lpechod.net.transport import BLOCKED
from lpechod.wire.states import State


class TlsConnection(SteadyConnection):
    """One client, over TLS; on the steady path for as long as it is steady.

    Attributes:
        stream: its transport's, for the steady path.
    """

    __slots__ = ("_watched", "stream")

    _transport: TlsTransport
    stream: Stream

    def on_ready(self, mask: int, now: float) -> None:
        """Handle readiness, and come again for what the poller does not see."""
        transport = self._transport
        crossed = transport.crossed
        if crossed:
            transport.crossed = 0
            if mask & crossed:
                mask |= READABLE | WRITABLE
        Connection.on_ready(self, mask, now)  # super() would cost more, for each frame.
        self._follow_up(crossed)

    def take(self, count: int, now: float) -> None:
        """Go on with ``count`` bytes that have been received into the shared buffer; 0: the end."""
        try:
            if count:
                room = self._rotation.room(self, self.protocol.receive_into)
                count = self._transport.receive_on(self.stream, room, count)
            self._take(count, now)
            if self.protocol.changed:
                self._settle(now)
        except Exception as error:  # noqa: BLE001 - a defect ends its own connection only.
            self.on_failure(error, now)
        self._follow_up(0)

    def fail(self, error: OSError, now: float) -> None:
        """Act on an error that receiving has met; a part of a record is none."""
        if isinstance(error, ssl.SSLWantReadError):
            self._host.counts.steps += 1
        super().fail(error, now)

    def _take(self, count: int, now: float) -> None:
        if count == BLOCKED and not self._transport.crossed:
            self._host.counts.steps += 1  # For a part of a record, or for what is dropped.
        super()._take(count, now)

    def keep(self, echo: memoryview, sent: int, now: float, error: OSError | None = None) -> None:
        """Keep an echo that the kernel has not taken; OpenSSL has, and is to be given it again."""
        self._transport.refused = len(echo)
        super().keep(echo, sent, now, error)

    def _follow_up(self, crossed: int) -> None:
        """Do what the transport demands, whether the protocol has changed or not."""
        if (crossed or self._transport.crossed) and self.protocol.state is not State.CLOSED:
            self._watch_as_wanted()
        self._follow()

    def _follow(self) -> None:
        transport = self._transport
        fd, path, stream = transport.fd, self._host.steady.secured, transport.stream
        if transport.more and self._interest & READABLE:
            self._loop.again(self, READABLE)
        elif (
            self.protocol.steady
            and self not in self._rotation.members
            and self._interest == READABLE
            and self._greeter is None
            and not transport.crossed
            and stream is not None
        ):
            self.stream = stream
            path.join(fd, self)
            return
        path.leave(fd)

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
        Connection._register(self)  # noqa: SLF001 - hands are not shaken yet.

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
