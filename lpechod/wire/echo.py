"""One connection's side of the echo protocol, without its socket.

`EchoProtocol` is told what happened (bytes, end of file, reset, time) and states what it wants:
`wants_read`, `wants_write`, `next_deadline`. It does no I/O and reads no clock, so each of its
behaviours can be replayed byte by byte. Invariants:

- a frame is echoed once it is whole, byte-identical, in order, and never in part;
- it holds what has arrived and not left, and not what was announced;
- nothing is read beyond the high watermark of pending echoes, until they are below the low one;
- time that we spent not reading is never counted against the peer.

Two paths lead through it. The *steady* one, for an open connection that holds nothing: bytes arrive
in the buffer that all connections share, and the part of it that is whole frames is returned to be
sent from there. Everything else goes through a buffer of the connection's own, from which whole
frames are returned in the same way unless others wait before them, and a queue.
"""

from collections.abc import Hashable

from lpechod.wire.deadlines import Deadlines
from lpechod.wire.frames import (
    HEADER_BYTES,
    TOO_LARGE,
    UNSCANNED,
    count_frames,
    scan,
    unpack_length,
)
from lpechod.wire.lifecycle import OVER, READING, Lifecycle
from lpechod.wire.partial import PartialFrame
from lpechod.wire.pending import Buffers, PendingEchoes
from lpechod.wire.settings import EchoSettings
from lpechod.wire.states import CloseReason, Event, State
from lpechod.wire.tally import Tally

FRAMES_PER_TURN = 1024
"""Most frames looked at in one go: about 0.1 ms. 256 KiB can hold 65,536 empty frames, and whoever
sends those must not make the others wait until all are counted."""

_WORTH = 4
"""The least part of a buffer that echoes have to fill, as 1 in so many, for it to be kept for them.
To keep one for each few bytes would let a peer that does not read make us hold hundreds of times
what it has sent."""

_OPEN, _LINGERING = State.OPEN, State.LINGERING

# Why reading is paused, as bits.
_WATERMARK = 1
_PRESSURE = 2


class EchoProtocol(Lifecycle):
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

    Attributes:
        foreseen_bytes: how large the next frame will be, if the latest was a large one; then call
            `make_room` before receiving.
        unframed_bytes: how many bytes were received that are not part of a whole frame (yet).
        unsent_bytes: how many bytes of echoes wait.
    """

    __slots__ = (
        "_paused", "_paused_at", "_tally", "echoed_bytes", "foreseen_bytes", "frames",
        "unframed_bytes", "unsent_bytes",
    )  # fmt: skip

    def __init__(
        self, settings: EchoSettings, buffers: Buffers, tally: Tally, owner: Hashable, now: float,
        *, handshake: bool = False,
    ) -> None:  # fmt: skip
        Deadlines.__init__(self, settings, State.HANDSHAKE if handshake else _OPEN, now)
        self.close_reason = None
        self.changed = False
        self.frames = 0
        self.echoed_bytes = self.unframed_bytes = self.unsent_bytes = 0
        self.receive_into = buffers.shared
        self._buffers = buffers
        self._tally = tally
        self._owner = owner
        self.steady = True
        self.foreseen_bytes = 0
        self._spare = None
        self._leave_blocked = False
        self._paused = 0
        self._paused_at = now

    # Receiving.

    def receive_data(self, count: int, now: float) -> memoryview | None:
        """Take ``count`` bytes that were received into `receive_into`.

        Returns:
            Echoes to be sent at once, from where they lie, or None. They count as sent.
        """
        tally = self._tally
        self.active_at = now
        if not self.steady:
            tally.unframed_bytes += count
            self.unframed_bytes += count
            return self._receive_unsteady(count, now)
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
        self._queue_unsent(echo, sent, late, now)

    def _queue_unsent(self, echo: memoryview, sent: int, late: int, now: float) -> None:
        size = len(echo)
        spare = self._spare
        if spare is not None and (size - sent) * _WORTH >= len(spare):
            self._spare = None
            self._owe(size - sent, late, now)
            self._queue(now).append(spare, size, late, now, sent)
        else:
            self._enqueue_copy(echo[sent:], late, now)

    def resume(self, now: float) -> None:
        """Go on with frames that `FRAMES_PER_TURN` left over; to be called while `has_backlog`."""
        if self._partial is not None:
            self._partial.since = now  # Until now nobody has looked whether a frame is there.
            frames = self.frames
            echo = self._scan_partial(self._partial, now)
            if echo is not None:
                self._queue_unsent(echo, 0, self.frames - frames, now)
        self.changed = True

    def make_room(self, waiting: int) -> None:
        """Receive the next frame into a buffer of its own from its first byte on.

        To be called before receiving while `foreseen_bytes` says that the latest frame did not fit
        into the shared buffer, and the next will hardly: what goes there first has to be copied.

        Args:
            waiting: bytes that are there to be received. No more memory is taken than for those.
        """
        if (
            waiting * 16 < len(self._buffers.shared)
            or self._partial is not None
            or self.state not in READING
        ):
            return
        self._spare = self._buffers.acquire(min(waiting, self.foreseen_bytes), self._owner)
        if self._spare is not None:
            self.receive_into = self._spare[: self.foreseen_bytes]
            self.foreseen_bytes = 0
            self.changed = True  # If nothing is received after all, `advance` gives it back.

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
            self._calm()
        if self._paused & _WATERMARK and pending.size <= self._settings.low_watermark_bytes:
            self.unpause(now, _WATERMARK)
        self.changed = True

    def note_progress(self, now: float) -> None:
        """Take note that the kernel has taken a part of what the stream has made of some echo."""
        self._progress_at = now

    @property
    def received_bytes(self) -> int:
        """How many bytes have been received."""
        return self.echoed_bytes + self.unframed_bytes

    # What it wants.

    @property
    def wants_read(self) -> bool:
        """Whether to receive: not while echoes pile up, nor while received bytes are unscanned."""
        if self.state in READING:
            return not self._paused and (self._partial is None or not self._partial.scannable)
        return self.state is _LINGERING

    @property
    def wants_write(self) -> bool:
        """Whether echoes are pending, or the stream's own end is."""
        return self._pending is not None or self._leave_blocked

    @property
    def has_backlog(self) -> bool:
        """Whether received bytes wait for `resume`; no descriptor will tell."""
        partial = self._partial if self.state in READING and not self._paused else None
        return partial is not None and partial.scannable

    # What the operator and a want of memory do. What time does is in `Deadlines`.

    def pause(self, now: float, why: int = _PRESSURE) -> None:
        """Stop reading until `unpause`: memory is short."""
        if self.state in READING and not self._paused:
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

    def _receive_unsteady(self, count: int, now: float) -> memoryview | None:
        if self.state not in READING:
            return None  # Lingering: received to be dropped.
        self.changed = True
        partial = self._partial
        if self._spare is not None:
            partial = PartialFrame(self._buffers, self._owner, self._spare, 0, HEADER_BYTES, now)
            self._partial, self._spare = partial, None
        if partial is None:
            shared = self.receive_into
            whole, frames, need = self._scan(shared, count)
            if frames:
                self._enqueue_copy(shared[:whole], frames, now)
                self.foreseen_bytes = 0
            self._keep(shared[whole:count], need, now)
            return None
        partial.have += count
        if partial.scannable:
            return self._scan_partial(partial, now)
        self._aim(partial)
        return None

    def _scan_partial(self, partial: PartialFrame, now: float) -> memoryview | None:
        """Return the whole frames if nothing is before them, or move them to the queue.

        What follows them begins anew.
        """
        buffer = partial.buffer
        whole, frames, need = self._scan(buffer, partial.have)
        if need == TOO_LARGE and not frames:
            self._move(Event.REFUSE, CloseReason.FRAME_TOO_LARGE)
            return None
        if not frames:
            partial.need = need
            self._aim(partial)
            return None
        if need == UNSCANNED and self._pending is not None:
            # Otherwise each go would keep a buffer for its part of the echoes.
            self._enqueue_copy(buffer[:whole], frames, now)
            if self.state not in OVER:
                partial.drop(whole, need, now)
            return None
        self._partial = None
        self.receive_into = shared = self._buffers.shared
        self.foreseen_bytes = whole if frames == 1 and whole > len(shared) else 0
        rest = buffer[whole : partial.have]
        if self._pending is None and self._spare is None:
            self._spare = buffer
            self._keep(rest, need, now)
            if self.state in OVER:
                self._owe(whole, frames, now)  # There was no memory for what follows.
                return None
            self._calm()
            return buffer[:whole]
        if self._pending is None or whole * _WORTH >= len(buffer):
            self._queue(now).append(buffer, whole, frames, now)
            self._owe(whole, frames, now)
            self._keep(rest, need, now)
        else:
            self._enqueue_copy(buffer[:whole], frames, now)
            self._keep(rest, need, now)
            partial.release()
        return None

    def _calm(self) -> None:
        """Go back to the steady path, unless something is still held, or a large frame foreseen."""
        self.steady = (
            self.state is _OPEN
            and self._partial is None
            and self._pending is None
            and not self.foreseen_bytes
        )

    def _scan(self, buffer: memoryview, end: int) -> tuple[int, int, int]:
        tally = self._tally
        limit = self._settings.max_frame_bytes
        (length,) = unpack_length(buffer)
        if length + HEADER_BYTES == end and length <= limit:
            whole, frames, need = end, 1, HEADER_BYTES
            tally.frame_sizes[(length - 1).bit_length()] += 1
        else:
            whole, frames, need = scan(buffer, end, limit, FRAMES_PER_TURN, tally.frame_sizes)
        self.frames += frames
        tally.frames += frames
        self.echoed_bytes += whole
        self.unframed_bytes -= whole
        tally.echoed_bytes += whole
        tally.unframed_bytes -= whole
        return whole, frames, need

    def _keep(self, rest: memoryview, need: int, now: float) -> None:
        """Keep what has arrived of a frame, or act on what it announces."""
        if self.state not in READING:
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
        if self.state in OVER:
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
