"""The handshake of TLS, which precedes the first frame of a connection."""

from lpechod.engine.loop import Source
from lpechod.engine.poller import READABLE
from lpechod.net.counts import ConnectionCounts
from lpechod.net.handshake import HandshakeError
from lpechod.net.handshakegate import HandshakeGate
from lpechod.net.tls import TlsTransport
from lpechod.net.transport import StreamError
from lpechod.wire.states import CloseReason


class TlsHandshake:
    """The handshake of a TLS connection, when its turn has come.

    Args:
        transport: the connection's.
        gate: bounds how many handshakes are under way, and their work in a turn.
        counts: where to count its steps, and what becomes of it.
    """

    __slots__ = ("_counts", "_gate", "_touched", "_transport")

    peer = None
    """A certificate is no address."""

    def __init__(
        self, transport: TlsTransport, gate: HandshakeGate, counts: ConnectionCounts
    ) -> None:
        self._transport = transport
        self._gate = gate
        self._counts = counts
        self._touched = False

    def advance(self, waiter: Source) -> int | None:
        """Go on; see `Handshake.advance`. Who has sent nothing yet need not pass the gate."""
        if not self._touched:
            if not self._transport.touched:
                return READABLE
            self._touched = True
        if not self._gate.admits(self, waiter):
            return 0
        self._counts.steps += self._transport.waiting() > 0
        try:
            interest = self._transport.shake_hands()
        except StreamError as error:
            cut_off = error.reason is CloseReason.MISSING_CLOSE_NOTIFY
            problem = "the handshake is cut off" if cut_off else str(error)
            raise HandshakeError(CloseReason.TLS_ERROR, problem) from error
        if interest is None:
            self._gate.leave(self)
            self._counts.tls_handshakes["completed"] += 1
        return interest

    def abandon(self, reason: CloseReason | None) -> None:
        """Give its place to another, and count it; see `Handshake.abandon`."""
        self._gate.leave(self)
        results = self._counts.tls_handshakes
        if reason is CloseReason.TLS_ERROR:
            results["failed"] += 1
        elif reason is CloseReason.HANDSHAKE_TIMEOUT:
            results["timed_out"] += 1
        else:
            results["abandoned"] += 1
