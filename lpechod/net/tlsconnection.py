"""A connection over TLS: where readiness of the descriptor and of the stream are not the same.

Three differences. What OpenSSL holds, or has yet to be given, no poller tells of: the connection
asks the loop to be called again. And receiving may have to wait for room (a key update has to be
answered while nothing can be sent): it then watches for that instead, since readiness that it can
make no use of would turn the loop for nothing. And the peer's stream ends before its connection
does: what comes behind a close_notify is received to be dropped (RFC 8446, 6.1), until the FIN. The
descriptor is always watched level-triggered, also where others are not: what has been left in the
kernel need not be remembered.
"""

import ssl

from lpechod.engine.poller import READABLE, WRITABLE
from lpechod.net.connection import Connection
from lpechod.net.steady import SteadyConnection
from lpechod.net.tls import TlsTransport
from lpechod.net.tlsrecords import Stream
from lpechod.net.transport import BLOCKED
from lpechod.wire.states import State

_KEY_UPDATE_COST_BYTES = 4096
"""What a record without data costs, as bytes moved: 9 us."""


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
                mask |= READABLE
        Connection.on_ready(self, mask, now)  # super() would cost more, for each frame.
        self._follow_up(crossed)

    def take_cipher(self, cipher: bytes, now: float) -> None:
        """Go on with ciphertext that has been received, and is not just one record."""
        self._transport.put_by(cipher)
        try:
            self.on_ready(READABLE, now)
        except Exception as error:  # noqa: BLE001 - a defect ends its own connection only.
            self.on_failure(error, now)

    def take(self, count: int, now: float) -> None:
        """Go on with ``count`` bytes that are in the shared buffer; 0: the end."""
        try:
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
        cost, self._transport.wasted = self._transport.wasted * _KEY_UPDATE_COST_BYTES, 0
        if cost and cost >= self._rotation.share:
            self._weigh(cost)

    def _flush(self, now: float) -> None:
        """Send, and take note of it also if the kernel has taken but a part of a record."""
        self._transport.moved = False
        super()._flush(now)
        if self._transport.moved:
            self.protocol.note_progress(now)

    def hold(
        self, echo: memoryview, cipher: bytes, now: float, error: OSError | None = None
    ) -> None:
        """Keep an echo, and so much of its ciphertext that the kernel has not taken."""
        if not isinstance(error, ssl.SSLError):
            self._transport.hold(cipher, len(echo))
        self.keep(echo, 0, now, error)

    def _follow_up(self, crossed: int) -> None:
        """Do what the transport demands, whether the protocol has changed or not."""
        if (crossed or self._transport.crossed) and self.protocol.state is not State.CLOSED:
            self._watch_as_wanted()
        self._follow()

    def _follow(self) -> None:
        transport = self._transport
        fd, path, stream = transport.fd, self._host.steady.secured, transport.stream
        if transport.more and self._interest & READABLE and not transport.crossed:
            self._loop.again(self, READABLE)
        elif (
            self.protocol.steady
            and self not in self._rotation.members
            and self._interest == READABLE
            and self._greeter is None
            and stream is not None
            and transport.even
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
        if self._transport.crossed and interest & READABLE:
            watched = WRITABLE
        if watched != self._watched:
            self._watch(watched)
            self._watched = watched
