"""One connection's side of the echo protocol, without its socket.

`EchoProtocol` is told what happened (bytes, end of file, reset, time) and states what it wants:
`wants_read`, `wants_write`, `next_deadline`. It does no I/O and reads no clock, so each of its
behaviours can be replayed byte by byte. Invariants:

- a frame is echoed once it is whole, byte-identical, in order, and never in part;
- it holds what has arrived and not left, never what was announced;
- nothing is read beyond the high watermark of pending echoes, until they are below the low one;
- time that we spent not reading is never counted against the peer.

Two paths lead through it. The *steady* one, for an open connection that holds nothing: bytes arrive
in the buffer that all connections share, and the part of it that is whole frames is returned to be
sent from there. Everything else goes through a buffer of the connection's own and a queue.
"""

from collections.abc import Callable, Hashable

from lpechod.wire.deadlines import Deadlines
from lpechod.wire.frames import HEADER_BYTES, TOO_LARGE, count_frames, scan, unpack_length
from lpechod.wire.partial import PartialFrame
from lpechod.wire.pending import Buffers, PendingEchoes
from lpechod.wire.settings import EchoSettings
from lpechod.wire.states import CloseReason, Event, State, next_state
from lpechod.wire.tally import Tally

FRAMES_PER_TURN = 1024
"""Most frames looked at in one go: about 0.1 ms. 256 KiB can hold 65,536 empty frames, and whoever
sends those must not make the others wait until all are counted."""

_OPEN, _DRAINING = State.OPEN, State.DRAINING
_LINGERING, _CLOSED = State.LINGERING, State.CLOSED
_READING = frozenset({State.OPEN, State.DRAINING})
_LEAVING = frozenset({State.FLUSHING, State.FINISHING})
_OVER = frozenset({State.LINGERING, State.CLOSED})

# Why reading is paused, as bits.
_WATERMARK = 1
_PRESSURE = 2


class EchoProtocol(Deadlines):
    """The echo protocol for one connection.

    Receive into `receive_into`, hand the count to `receive_data`, and send what it returns before
    anybody else receives; what the kernel does not take goes to `unsent`. While `wants_write`, send
    `data_to_send` and report to `bytes_sent`. When `changed` is set after a call, call `advance`
    and look at the predicates, the state and `next_deadline` again.

    Args:
        settings: limits and time-outs, shared by all connections.
        buffers: source of memory; where there is none, the connection ends with reason `overload`.
        tally: where to count.
        owner: on whose account to acquire memory.
        now: time in seconds, like every ``now`` below; it never goes back.
        handshake: whether something precedes the first frame, up to `established` or `refuse`.
    """

    __slots__ = (
        "_buffers", "_leave_blocked", "_owner", "_paused", "_paused_at", "_tally", "changed",
        "close_reason", "echoed_bytes", "frames", "receive_into", "steady", "unframed_bytes",
        "unsent_bytes",
    )  # fmt: skip

    def __init__(
        self, settings: EchoSettings, buffers: Buffers, tally: Tally, owner: Hashable, now: float,
        *, handshake: bool = False,
    ) -> None:  # fmt: skip
        Deadlines.__init__(self, settings, State.HANDSHAKE if handshake else _OPEN, now)
        self.close_reason: CloseReason | None = None
        self.changed = False
        self.frames = 0
        self.echoed_bytes = self.unframed_bytes = self.unsent_bytes = 0
        self.receive_into = buffers.shared
        self._buffers = buffers
        self._tally = tally
        self._owner: Hashable = owner
        self.steady = True
        self._leave_blocked = False
        self._paused = 0
        self._paused_at = now

    def established(self, now: float) -> None:
        """Take note that what precedes the first frame is complete."""
        self._move(Event.ESTABLISHED)
        self.steady = True
        self.active_at = now

    def refuse(self, reason: CloseReason) -> None:
        """End it in good order: the peer broke a rule outside of this protocol."""
        self._move(Event.REFUSE, reason)

    # Receiving.

    def receive_data(self, count: int, now: float) -> memoryview | None:
        """Take ``count`` bytes that were received into `receive_into`.

        Returns:
            Echoes in the shared buffer, to be sent at once, or None. They count as sent.
        """
        tally = self._tally
        self.active_at = now
        if not self.steady:
            tally.unframed_bytes += count
            self.unframed_bytes += count
            self._receive_unsteady(count, now)
            return None
        shared = self.receive_into
        (length,) = unpack_length(shared)
        if length + HEADER_BYTES == count and length <= self._settings.max_frame_bytes:
            # One whole frame is what most reads bring, and these lines are half the cost of a scan.
            tally.frame_sizes[(length - 1).bit_length()] += 1
            tally.frames += 1
            tally.echoed_bytes += count
            self.frames += 1
            self.echoed_bytes += count
            return shared[:count]
        tally.unframed_bytes += count
        self.unframed_bytes += count
        whole, frames, need = self._scan(shared, count)
        if whole != count:
            self._keep(shared[whole:count], need, now)
        return shared[:whole] if frames else None

    def unsent(self, echo: memoryview, sent: int, now: float) -> None:
        """Queue what the kernel did not take of the echoes that `receive_data` returned.

        Args:
            echo: what was returned.
            sent: how many bytes of it were taken.
            now: the time.
        """
        late = count_frames(echo, len(echo)) - count_frames(echo, sent)
        self._enqueue_copy(echo[sent:], late, now)

    def receive_eof(self, now: float) -> None:
        """Take note that the peer has shut down its writing side."""
        self.active_at = now
        self._move(Event.EOF, self._reason_of_end())

    def receive_last(self) -> None:
        """Do what `receive_eof` and `advance` do while `steady`: nothing is held, so it is over."""
        self._owner = None
        self.steady = False
        self.close_reason = CloseReason.PEER_CLOSED
        self.state = next_state(next_state(self.state, Event.EOF), Event.FLUSHED)

    def receive_end(self) -> None:
        """Take note that the peer has ended its stream, behind which more may come, to be dropped.

        That is an end in good order, as by `refuse`: a close right behind our last echo would make
        the kernel answer with a reset, which destroys echoes that the peer has not read yet.
        """
        self._move(Event.REFUSE, self._reason_of_end())

    def receive_failure(self, reason: CloseReason, now: float) -> None:
        """Take note that the stream is broken: what is pending will never go out."""
        if reason is CloseReason.MISSING_CLOSE_NOTIFY and self._partial is not None:
            reason = CloseReason.TRUNCATED_FRAME
        self._linger_until = now + self._settings.linger_s
        self._move(Event.STALLED, reason)

    def receive_reset(self) -> None:
        """Take note that the connection is gone."""
        self._move(Event.RESET, CloseReason.RESET)

    def resume(self, now: float) -> None:
        """Go on with frames that `FRAMES_PER_TURN` left over; to be called while `has_backlog`."""
        if self._partial is not None:
            self._scan_partial(self._partial, now)
        self.changed = True

    # Sending.

    def data_to_send(self) -> list[memoryview]:
        """Return pending echoes, oldest first, for one gathering write."""
        return self._pending.views() if self._pending is not None else []

    def bytes_sent(self, count: int, now: float) -> None:
        """Drop ``count`` bytes from the front of the pending echoes: the kernel has them."""
        pending = self._pending
        if not count or pending is None:
            return
        self._progress_at = self.active_at = now
        pending.drop_sent(count, now)
        self.unsent_bytes -= count
        self._tally.unsent_bytes -= count
        if not pending.size:
            self._pending = None
            self.steady = self.state is _OPEN and self._partial is None
        if self._paused & _WATERMARK and pending.size <= self._settings.low_watermark_bytes:
            self.unpause(now, _WATERMARK)
        self.changed = True

    @property
    def received_bytes(self) -> int:
        """How many bytes have been received."""
        return self.echoed_bytes + self.unframed_bytes

    # What it wants.

    @property
    def wants_read(self) -> bool:
        """Whether to receive: not while echoes pile up, nor while received bytes are unscanned."""
        if self.state in _READING:
            return not self._paused and (self._partial is None or not self._partial.scannable)
        return self.state is _LINGERING

    @property
    def wants_write(self) -> bool:
        """Whether echoes are pending, or the stream's own end is."""
        return self._pending is not None or self._leave_blocked

    @property
    def at_end(self) -> bool:
        """Whether the last echo is out, and the stream's own end is next."""
        return self._pending is None and self.state in _LEAVING

    @property
    def has_backlog(self) -> bool:
        """Whether received bytes wait for `resume`; no descriptor will tell."""
        partial = self._partial if self.state in _READING and not self._paused else None
        return partial is not None and partial.scannable

    # What the operator and a want of memory do. What time does is in `Deadlines`.

    def abort(self, reason: CloseReason) -> None:
        """End it now and drop whatever is pending."""
        self._move(Event.ABORT, reason)

    def advance(self, now: float, leave: Callable[[], bool] = lambda: True) -> None:
        """Make the transitions that need no further input, and clear `changed`.

        Args:
            now: the time.
            leave: called when the last echo is out; sends the stream's own end, as TLS has one, and
                tells whether that is out. If not, `wants_write` says so, and `write_s` runs.
        """
        # A drain waits for a lull, since it has an end of its own. A lifetime does not: a peer that
        # keeps echoes pending all the time could put it off for ever.
        done = self._pending is None or self._boundary_reason is CloseReason.LIFETIME
        if self.state is _DRAINING and self._partial is None and done:
            self._move(Event.BOUNDARY, self._boundary_reason)
        if self._pending is None and self.state in _LEAVING:  # `at_end`, without its call.
            if leave():
                self._linger_until = now + self._settings.linger_s
                self._move(Event.FLUSHED)
            elif not self._leave_blocked:
                self._leave_blocked = True
                self._progress_at = now
        self.changed = False

    def pause(self, now: float, why: int = _PRESSURE) -> None:
        """Stop reading until `unpause`: memory is short."""
        if self.state in _READING and not self._paused:
            self._paused_at = now
            self._tally.backpressure_pauses += 1
        self._paused |= why
        self.changed = True

    def unpause(self, now: float, why: int = _PRESSURE) -> None:
        """Take back `pause`."""
        if self._paused == why:
            if self._partial is not None:
                self._partial.since += now - self._paused_at
            self.active_at = now
        self._paused &= ~why
        self.changed = True

    # The unsteady path.

    def _receive_unsteady(self, count: int, now: float) -> None:
        if self.state not in _READING:
            return  # Lingering: received to be dropped.
        partial = self._partial
        if partial is None:
            shared = self.receive_into
            whole, frames, need = self._scan(shared, count)
            if frames:
                self._enqueue_copy(shared[:whole], frames, now)
            self._keep(shared[whole:count], need, now)
        else:
            partial.have += count
            if partial.scannable:
                self._scan_partial(partial, now)
            else:
                self._aim(partial)
        self.changed = True

    def _scan_partial(self, partial: PartialFrame, now: float) -> None:
        """Move the whole frames to the queue; what follows them begins anew."""
        buffer = partial.buffer
        whole, frames, need = self._scan(buffer, partial.have)
        if need == TOO_LARGE and not frames:
            self._move(Event.REFUSE, CloseReason.FRAME_TOO_LARGE)
            return
        if not frames:
            partial.need = need
            self._aim(partial)
            return
        self._partial = None
        self.receive_into = self._buffers.shared
        rest = buffer[whole : partial.have]
        if self._pending is None or whole * 4 >= len(buffer):
            self._queue(now).append(buffer, whole, frames, now)
            self._owe(whole, frames, now)
            self._keep(rest, need, now)
        else:
            # Handing over a buffer for each few bytes would let a peer that does not read make us
            # hold hundreds of times what it sent.
            self._enqueue_copy(buffer[:whole], frames, now)
            self._keep(rest, need, now)
            partial.release()

    def _scan(self, buffer: memoryview, end: int) -> tuple[int, int, int]:
        tally = self._tally
        whole, frames, need = scan(
            buffer, end, self._settings.max_frame_bytes, FRAMES_PER_TURN, tally.frame_sizes
        )
        self.frames += frames
        tally.frames += frames
        self.echoed_bytes += whole
        self.unframed_bytes -= whole
        tally.echoed_bytes += whole
        tally.unframed_bytes -= whole
        return whole, frames, need

    def _keep(self, rest: memoryview, need: int, now: float) -> None:
        """Keep what has arrived of a frame, or act on what it announces."""
        if self.state not in _READING:
            return
        if need == TOO_LARGE:
            self._move(Event.REFUSE, CloseReason.FRAME_TOO_LARGE)
        elif rest:
            partial = PartialFrame.begin(self._buffers, self._owner, rest, need, now)
            if partial is None:
                self.abort(CloseReason.OVERLOAD)
                return
            self._partial = partial
            self.steady = False
            self.changed = True
            if not partial.scannable:
                self._aim(partial)

    def _aim(self, partial: PartialFrame) -> None:
        room = partial.room()
        if room is None:
            self.abort(CloseReason.OVERLOAD)
        else:
            self.receive_into = room

    def _enqueue_copy(self, echo: memoryview, frames: int, now: float) -> None:
        self._owe(len(echo), frames, now)
        if self.state in _OVER:
            return  # For want of memory, or broken, since these echoes were returned.
        if not self._queue(now).append_copy(echo, frames, now):
            self.abort(CloseReason.OVERLOAD)

    def _queue(self, now: float) -> PendingEchoes:
        if self._pending is None:
            self._pending = PendingEchoes(self._buffers, self._owner, self._tally.echo_delays)
            self._progress_at = now
            self.steady = False
        return self._pending

    def _owe(self, size: int, frames: int, now: float) -> None:
        """Count echoes that are late; what is lost with its connection stays counted."""
        self.unsent_bytes += size
        self._tally.unsent_bytes += size
        self._tally.delayed_frames += frames
        if self.unsent_bytes >= self._settings.high_watermark_bytes:
            self.pause(now, _WATERMARK)
        self.changed = True

    # Ending.

    def _reason_of_end(self) -> CloseReason:
        truncated = self._partial is not None
        return CloseReason.TRUNCATED_FRAME if truncated else CloseReason.PEER_CLOSED

    def _move(self, event: Event, reason: CloseReason | None = None) -> None:
        """Change the state, as only `receive_last` does besides. The first reason stays."""
        self.state = next_state(self.state, event)
        if self.close_reason is None:
            self.close_reason = reason
        if self._partial is not None and self.state not in _READING:
            self._partial.release()
            self._partial = None
            self.receive_into = self._buffers.shared
        if self._pending is not None and self.state in _OVER:
            self._pending.discard()
            self._pending = None
        if self.state is _CLOSED:
            self._owner = None  # Which has us: a cycle would wait for the garbage collector.
        self._leave_blocked = False
        self.steady = False  # No event leads back to OPEN; for the one to it, see `established`.
        self.changed = True
