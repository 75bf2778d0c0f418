"""A connection: joins one transport to one `EchoProtocol`, in the loop.

It moves bytes, keeps the poller's interest and the timer in step with what the protocol states, and
is the only place that closes. Invariants:

- reading is watched for only while the protocol wants to read, writing only after the kernel has
  refused bytes: nothing that we do not act on may keep waking the loop;
- an error or a hang-up, which no poller can mask, always leads to a close;
- what precedes the first frame has the descriptor to itself until it is complete;
- a closed connection ignores whatever the rest of the turn brings it, and its descriptor is closed
  when the turn ends.
"""

from collections.abc import Callable

from lpechod.engine.buffers import HEADROOM_BYTES, RECEIVE_BYTES, BufferPool
from lpechod.engine.loop import Loop, Source
from lpechod.engine.poller import ERROR, HANGUP, PEER_CLOSED, READABLE, WRITABLE
from lpechod.engine.rotation import FRAME_COST_BYTES, SHARED_FRAME_BYTES
from lpechod.engine.wheel import Timer
from lpechod.net.handshake import Greeter, Handshake, HandshakeError
from lpechod.net.host import Host
from lpechod.net.transport import PeerGoneError, StreamError, Transport
from lpechod.wire.echo import EchoProtocol
from lpechod.wire.settings import EchoSettings
from lpechod.wire.states import CloseReason, State
from lpechod.wire.tally import Tally

_HANDSHAKE, _OPEN = State.HANDSHAKE, State.OPEN
_LINGERING, _CLOSED = State.LINGERING, State.CLOSED

_BACKLOG = 1 << 16
"""In a mask: bytes wait in memory, which is no readiness. A bit of its own: an edge-triggered
connection may ask for `READABLE` in the same turn, and that alone is the steady path's mask."""

_LAST_READS = 16
"""Reads before a deadline is enforced. The buffer of a frame that has begun grows with each, so
that even the largest is read to its end if it is there."""


class Connection(Timer):
    """One client.

    Whoever keeps it calls `on_deadline` once, not later than that could be due; from then on its
    timer files itself.

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
        handshakes: what precedes the first frame, in this order, if anything does.

    Attributes:
        account: the host whose limits it counts against; for whoever keeps the connections.
        proxy: the address that the connection came from, if `peer` is whom a proxy speaks for.
    """

    __slots__ = (
        "_fin_sent", "_greeter", "_handshakes", "_host", "_interest", "_loop", "_rotation",
        "_transport", "account", "listener", "number", "opened_at", "peer", "protocol", "proxy",
    )  # fmt: skip

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
        handshakes: tuple[Handshake, ...] = (),
    ) -> None:
        Timer.__init__(self)  # super() costs as much as all of the attributes below.
        self._handshakes = handshakes
        self._greeter = Greeter(self) if handshakes else None
        self._transport = transport
        self._loop = loop
        self._rotation = loop.rotation
        self._host = host
        self._interest = READABLE
        self._fin_sent = False
        self.number = number
        self.peer = peer
        self.proxy: object | None = None
        self.account: str | None = None
        self.listener = listener
        self.opened_at = loop.now
        self.protocol = EchoProtocol(
            settings, buffers, tally, self, loop.now, handshake=bool(handshakes)
        )
        self._register()
        if self._greeter is not None:
            loop.hand_over(transport.fd, self._greeter)

    def on_ready(self, mask: int, now: float) -> None:
        """Receive, echo and send as far as the descriptor is ready for it."""
        protocol = self.protocol
        try:
            if mask & self._interest & READABLE:
                if protocol.foreseen_bytes:
                    self._make_room()
                self._take(self._transport.receive(self._room()), now)
            if mask != READABLE:
                self._handle_rest(mask, now)
        except PeerGoneError as error:
            self._lose_peer(error, now)
        if protocol.changed:
            self._settle(now)

    def _take(self, count: int, now: float) -> None:
        """Act on so many bytes that have been received; on the end, if none; or on `BLOCKED`."""
        if count > 0:
            if count >= self._rotation.share or self in self._rotation.members:
                self._weigh(count)
            protocol = self.protocol
            frames = protocol.frames
            echo = protocol.receive_data(count, now)
            self._charge(protocol.frames - frames)
            if echo:
                self._send(echo, now)
        elif count == 0:
            self._receive_end(now)

    def _room(self) -> memoryview:
        protocol = self.protocol
        return self._rotation.room(self, protocol.receive_into, begins=protocol.begins)

    def _make_room(self) -> None:
        """Have a large frame received where it can stay, unless it is to come in small shares."""
        if self._rotation.is_generous(self):
            self.protocol.make_room(self._transport.waiting())

    def _weigh(self, count: int) -> None:
        """Take note of a large read, or of any by one who is served by turns."""
        self._rotation.weigh(self, count, self.protocol.unsent_bytes)

    def _charge(self, frames: int) -> None:
        """Take note of so many frames that were found, as if they had been bytes."""
        if self in self._rotation.members:
            self._rotation.spent += frames * FRAME_COST_BYTES
        elif frames >= self._rotation.share // SHARED_FRAME_BYTES:
            self._weigh(frames * FRAME_COST_BYTES)

    def _send(self, echo: memoryview, now: float) -> None:
        """Send echoes, which count as sent; what the kernel does not take goes to the queue."""
        try:
            sent = self._transport.send(echo)
            if sent > RECEIVE_BYTES + HEADROOM_BYTES:
                self._rotation.spent += sent  # More than what this turn has received of it, maybe.
        except PeerGoneError as error:
            self._lose_peer(error, now)
            sent = 0
        if sent != len(echo):
            self.protocol.unsent(echo, sent, now)

    def _receive_end(self, now: float) -> None:
        self.protocol.receive_eof(now)

    def _handle_rest(self, mask: int, now: float) -> None:
        """Handle what a mask says beside that there is something to read."""
        protocol = self.protocol
        if protocol.has_backlog:
            # Before the flush, which takes note of whether the kernel refuses any of the echoes:
            # under edge-triggering nobody else would send those that are queued behind it.
            frames = protocol.frames
            protocol.resume(now)
            self._charge(protocol.frames - frames)
        wanted = mask & self._interest
        if wanted & WRITABLE:
            self._flush(now)
        elif mask & (ERROR | HANGUP) and not wanted & READABLE:
            raise PeerGoneError("hung up while nothing was to be read")

    def shake_hands(self, mask: int, now: float) -> None:
        """Go on with what precedes the first frame."""
        greeter = self._greeter
        if greeter is None:
            return  # It has ended, earlier in this turn.
        protocol = self.protocol
        if mask & (ERROR | HANGUP) and not self._interest:
            # Nobody looks for it, but it can't be masked.
            protocol.receive_reset()
            self._settle(now)
            return
        try:
            if not self._greet(greeter, now):
                return
        except HandshakeError as error:
            self._host.on_handshake_failed(self, error)
            protocol.refuse(error.reason)
        except EOFError:
            protocol.receive_eof(now)
        except PeerGoneError as error:
            self._lose_peer(error, now)
        self._settle(now)
        if protocol.state is _OPEN:
            self._loop.schedule(self, protocol.next_deadline())
            # What follows may be there: an edge-triggered poller will not tell of it again.
            self.on_ready(READABLE | PEER_CLOSED, now)

    def _greet(self, greeter: Source, now: float) -> bool:
        """Take the handshakes as far as they go, and tell whether that is to their end."""
        while self._handshakes and self.protocol.state is _HANDSHAKE:
            interest = self._handshakes[0].advance(greeter)
            if interest is not None:
                self._set_interest(interest)
                return False
            self._pass(self._handshakes[0])
        if self.protocol.state is _HANDSHAKE:
            self.protocol.established(now)
        return True

    def _pass(self, handshake: Handshake) -> None:
        """Go on to what follows a handshake, unless it has shown a client who may not stay."""
        self._handshakes = self._handshakes[1:]
        if handshake.peer is not None:
            self.peer, self.proxy = handshake.peer, self.peer
            if not self._host.on_identified(self):
                self._handshakes = ()
                self.protocol.refuse(CloseReason.REJECTED)

    def on_deadline(self, now: float) -> None:
        """Act on a deadline, unless it has moved or the peer has kept it after all."""
        protocol = self.protocol
        if self._is_late(protocol.next_deadline, now):
            protocol.handle_deadline(now)
            self._settle(now)
        if protocol.state is not _CLOSED:
            self._loop.hasten(self, protocol.next_deadline())

    def on_failure(self, error: Exception, now: float) -> None:
        """Close after a defect of ours: nobody knows what state the connection is in."""
        self._host.on_defect(self, error)
        self.abort(CloseReason.INTERNAL_ERROR, now)

    def drain(self, until: float, now: float) -> None:
        """Close at the next frame boundary.

        Args:
            until: when to close in any case, in seconds.
            now: the time.
        """
        self._catch_up(now)  # Frames that wait in the kernel were sent before the drain was known.
        if self.protocol.state is not _CLOSED:
            self.protocol.drain(until)
            self._settle(now)

    def vacate(self, now: float) -> bool:
        """Close in good order to make room for others, if it is overdue after all.

        Returns:
            Whether it closes.
        """
        try:
            if not self._is_late(self.protocol.overdue_at, now):
                return False
            self.protocol.refuse(CloseReason.OVERLOAD)
            self._settle(now)
        except Exception as error:  # noqa: BLE001 - a defect ends its own connection only.
            self.on_failure(error, now)
        return True

    def abort(self, reason: CloseReason, now: float) -> None:
        """Close at once and free all memory."""
        if self.protocol.state is not _CLOSED:
            self.protocol.abort(reason)
        if self.protocol.changed:  # Or else it has been closed before, descriptor and all.
            self._settle(now)

    def pause(self, now: float) -> None:
        """Stop reading until `unpause`: memory is short."""
        if self.protocol.state is not _CLOSED:
            self.protocol.pause(now)
            self._settle(now)

    def unpause(self, now: float) -> None:
        """Read again."""
        if self.protocol.state is not _CLOSED:
            self.protocol.unpause(now)
            self._settle(now)

    def close(self) -> None:
        """Close the descriptor; for the loop, at the end of a turn."""
        try:
            self._loop.forget(self._transport.fd)
        finally:  # A defect must cost neither the descriptor nor a place.
            self._transport.close()
            self._host.on_closed(self)

    def _is_late(self, deadline: Callable[[], float], now: float) -> bool:
        """Tell whether a deadline has passed, and still has when all that is there is read.

        Bytes that already wait in the kernel were in time, however late this turn comes: the
        process may have been stopped for a minute (SIGSTOP, a suspended machine).
        """
        for _ in range(_LAST_READS):
            if now < deadline():
                return False
            received = self.protocol.received_bytes
            self._catch_up(now)
            if self.protocol.received_bytes == received:
                break
        return now >= deadline()

    def _catch_up(self, now: float) -> None:
        """Take what already waits in the kernel, whatever the shares of this turn."""
        with self._rotation.undivided():
            if self._greeter is None:
                self.on_ready(self._interest, now)
            else:
                self.shake_hands(0, now)

    def _register(self) -> None:
        self._loop.register(self._transport.fd, self, READABLE)

    def _watch(self, interest: int) -> None:
        self._loop.modify(self._transport.fd, interest)

    def _flush(self, now: float) -> None:
        views = self.protocol.data_to_send()
        if views:
            sent = self._transport.send_many(views)
            self._rotation.spent += sent
            self.protocol.bytes_sent(sent, now)
        elif self.protocol.at_end:
            self.protocol.changed = True  # What has to go out is the stream's own end.

    def _lose_peer(self, error: PeerGoneError, now: float) -> None:
        if self.protocol.state is _CLOSED:
            return
        if isinstance(error, StreamError):
            self._host.on_stream_failed(self, error)
            self.protocol.receive_failure(error.reason, now)
        else:
            self.protocol.receive_reset()

    def _settle(self, now: float) -> None:
        """Bring descriptor, interest and timer in step with a protocol that has changed."""
        protocol = self.protocol
        if self._greeter is not None:
            if protocol.state is _HANDSHAKE:
                return
            self._end_handshakes()
        try:
            if protocol.wants_write and not self._interest & WRITABLE:
                self._flush(now)  # Mostly the kernel takes it, and nobody has to wait for it.
        except PeerGoneError as error:
            self._lose_peer(error, now)
        protocol.advance(now, self._transport.take_leave)
        if protocol.state is _CLOSED:
            self._finish()
            return
        if protocol.state is _LINGERING and not self._fin_sent:
            self._fin_sent = True
            self._transport.end()
        self._rotation.expect(self, protocol.unsent_bytes)
        if protocol.has_backlog:
            self._loop.again(self, _BACKLOG)
        self._watch_as_wanted()
        self._loop.hasten(self, protocol.next_deadline())

    def _end_handshakes(self) -> None:
        if self._handshakes:
            self._handshakes[0].abandon(self.protocol.close_reason)
        self._handshakes = ()
        self._greeter = None
        self._loop.hand_over(self._transport.fd, self)

    def _watch_as_wanted(self) -> None:
        protocol = self.protocol
        self._set_interest(
            (READABLE if protocol.wants_read else 0) | (WRITABLE if protocol.wants_write else 0)
        )

    def _set_interest(self, interest: int) -> None:
        if interest != self._interest:
            self._watch(interest)
            self._interest = interest

    def _finish(self) -> None:
        self._interest = 0
        if self.filed:
            self._loop.cancel(self)
        self._loop.defer_close(self)
