"""A connection: joins one transport to one `EchoProtocol`, in the loop.

It moves bytes, keeps the poller's interest and the timer in step with what the protocol states, and
is the only place that closes. Invariants:

- reading is watched for only while the protocol wants to read, writing only after the kernel has
  refused bytes: nothing that we do not act on may keep waking the loop;
- an error or a hang-up, which no poller can mask, always leads to a close;
- a closed connection ignores whatever the rest of the turn brings it, and its descriptor is closed
  when the turn ends.
"""

from typing import Protocol

from lpechod.engine.buffers import BufferPool
from lpechod.engine.loop import Loop
from lpechod.engine.poller import ERROR, HANGUP, READABLE, WRITABLE
from lpechod.engine.wheel import Timer
from lpechod.net.transport import PeerGoneError, Transport
from lpechod.wire.echo import EchoProtocol
from lpechod.wire.settings import EchoSettings
from lpechod.wire.states import CloseReason, State
from lpechod.wire.tally import Tally

_BACKLOG = 1 << 16
"""In a mask: bytes wait in memory, which is no readiness. A bit of its own: an edge-triggered
connection may ask for `READABLE` in the same turn, and that alone is the steady path's mask."""

_LAST_READS = 16
"""Reads before a deadline is enforced. The buffer of a frame that has begun grows with each, so
that even the largest is read to its end if it is there."""


class Host(Protocol):
    """Whoever keeps the connections."""

    def on_closed(self, connection: "Connection") -> None:
        """Forget a connection: its descriptor is closed."""

    def on_defect(self, connection: "Connection", error: Exception) -> None:
        """Report an error that is a defect of ours."""


class Connection(Timer):
    """One client.

    Args:
        transport: its stream; closed with the connection.
        loop: where it lives.
        settings: limits and time-outs of the protocol.
        buffers: memory for bytes that must wait, on this connection's account.
        tally: where to count.
        number: identifies it in logs.
        peer: address of the client, as accept(2) gave it.
        listener: name of the listener it came in by.
        host: is told of its end.
    """

    __slots__ = (
        "_fin_sent",
        "_host",
        "_interest",
        "_loop",
        "_transport",
        "listener",
        "number",
        "opened_at",
        "peer",
        "protocol",
    )

    def __init__(
        self,
        transport: Transport,
        loop: Loop,
        settings: EchoSettings,
        buffers: BufferPool,
        tally: Tally,
        number: int,
        peer: object,
        listener: str,
        host: Host,
    ) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._host = host
        self._interest = READABLE
        self._fin_sent = False
        self.number = number
        self.peer = peer
        self.listener = listener
        self.opened_at = loop.now
        self.protocol = EchoProtocol(settings, buffers, tally, self, loop.now)
        self._register()
        loop.hasten(self, self.protocol.next_deadline())

    def on_ready(self, mask: int, now: float) -> None:
        """Receive, echo and send as far as the descriptor is ready for it."""
        protocol = self.protocol
        echo = None
        try:
            if mask & self._interest & READABLE:
                count = self._transport.receive(protocol.receive_into)
                if count > 0:
                    echo = protocol.receive_data(count, now)
                    if echo is not None:
                        sent = self._transport.send(echo)
                        if sent != len(echo):
                            protocol.unsent(echo, sent, now)
                elif count == 0:
                    protocol.receive_eof(now)
            if mask != READABLE:
                self._handle_rest(mask, now)
        except PeerGoneError:
            self._lose_peer(echo, now)
        if protocol.changed:
            self._settle(now)

    def _handle_rest(self, mask: int, now: float) -> None:
        """Handle what a mask says beside that there is something to read."""
        protocol = self.protocol
        if protocol.has_backlog:
            # Before the flush, which takes note of whether the kernel refuses any of the echoes:
            # under edge-triggering nobody else would send those that are queued behind it.
            protocol.resume(now)
        wanted = mask & self._interest
        if wanted & WRITABLE:
            self._flush(now)
        elif mask & (ERROR | HANGUP) and not wanted & READABLE:
            raise PeerGoneError("hung up while nothing was to be read")

    def on_deadline(self, now: float) -> None:
        """Act on a deadline, unless it has moved or the peer has kept it after all."""
        protocol = self.protocol
        if now >= protocol.next_deadline():
            # Bytes that already wait in the kernel were in time, however late this turn comes: the
            # process may have been stopped for a minute (SIGSTOP, a suspended machine).
            for _ in range(_LAST_READS):
                received = protocol.received_bytes
                self.on_ready(self._interest, now)
                if protocol.received_bytes == received or now < protocol.next_deadline():
                    break
            if protocol.state is not State.CLOSED and now >= protocol.next_deadline():
                protocol.handle_deadline(now)
                self._settle(now)
        if protocol.state is not State.CLOSED:
            self._loop.hasten(self, protocol.next_deadline())

    def on_failure(self, error: Exception, now: float) -> None:
        """Close after a defect of ours: nobody knows what state the connection is in."""
        self._host.on_defect(self, error)
        self._abort(CloseReason.INTERNAL_ERROR, now)

    def drain(self, until: float, now: float) -> None:
        """Close at the next frame boundary.

        Args:
            until: when to close in any case, in seconds.
            now: the time.
        """
        # Frames that already wait in the kernel were sent before anybody knew of the drain.
        self.on_ready(self._interest, now)
        if self.protocol.state is not State.CLOSED:
            self.protocol.drain(until)
            self._settle(now)

    def shed(self, now: float) -> None:
        """Close at once and free all memory: there is too little for everybody."""
        self._abort(CloseReason.OVERLOAD, now)

    def cut(self, now: float) -> None:
        """Close at once: the time to drain is over."""
        self._abort(CloseReason.DRAIN_TIMEOUT, now)

    def pause(self, now: float) -> None:
        """Stop reading until `unpause`: memory is short."""
        if self.protocol.state is not State.CLOSED:
            self.protocol.pause(now)
            self._settle(now)

    def unpause(self, now: float) -> None:
        """Read again."""
        if self.protocol.state is not State.CLOSED:
            self.protocol.unpause(now)
            self._settle(now)

    def close(self) -> None:
        """Close the descriptor; for the loop, at the end of a turn."""
        self._loop.unregister(self._transport.fd)
        self._transport.close()
        self._host.on_closed(self)

    def _register(self) -> None:
        self._loop.register(self._transport.fd, self, READABLE)

    def _watch(self, interest: int) -> None:
        self._loop.modify(self._transport.fd, interest)

    def _flush(self, now: float) -> None:
        views = self.protocol.data_to_send()
        if views:
            self.protocol.bytes_sent(self._transport.send_many(views), now)

    def _lose_peer(self, echo: memoryview | None, now: float) -> None:
        if self.protocol.state is not State.CLOSED:
            self.protocol.receive_reset()
        if echo is not None:
            self.protocol.unsent(echo, 0, now)  # It counts as sent, and `send` was what failed.

    def _settle(self, now: float) -> None:
        """Bring descriptor, interest and timer in step with a protocol that has changed."""
        protocol = self.protocol
        if protocol.wants_write and not self._interest & WRITABLE:
            try:
                self._flush(now)  # Mostly the kernel takes it, and nobody has to wait for it.
            except PeerGoneError:
                protocol.receive_reset()
        protocol.advance(now)
        if protocol.state is State.CLOSED:
            self._finish()
            return
        if protocol.state is State.LINGERING and not self._fin_sent:
            self._fin_sent = True
            self._transport.end()
        if protocol.has_backlog:
            self._loop.again(self, _BACKLOG)
        interest = (READABLE if protocol.wants_read else 0) | (
            WRITABLE if protocol.wants_write else 0
        )
        if interest != self._interest:
            self._watch(interest)
            self._interest = interest
        self._loop.hasten(self, protocol.next_deadline())

    def _abort(self, reason: CloseReason, now: float) -> None:
        if self.protocol.state is not State.CLOSED:
            self.protocol.abort(reason)
        if self.protocol.changed:  # Or else it has been closed before, descriptor and all.
            self._settle(now)

    def _finish(self) -> None:
        self._interest = 0
        self._loop.cancel(self)
        self._loop.defer_close(self)
