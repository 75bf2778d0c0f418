"""A perfect shell around an `EchoProtocol`, and what the wire should make of a stream of bytes.

`Shell` does what a connection does, with a scripted kernel instead of a socket and a number instead
of a clock, and looks after every call whether what must always hold does hold. It is as nasty as a
process with many connections can be: whatever lies in the shared buffer is overwritten as soon as
somebody else could receive, and so is every buffer that is given back.
"""

import math
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from lpechod.engine.buffers import RECEIVE_BYTES, BufferPool
from lpechod.wire.echo import EchoProtocol
from lpechod.wire.settings import EchoSettings
from lpechod.wire.states import CloseReason, State
from lpechod.wire.tally import Tally

START = 1000.0
SMALL = EchoSettings(
    max_frame_bytes=4096,
    high_watermark_bytes=2048,
    low_watermark_bytes=512,
    idle_s=60.0,
    frame_s=8.0,
    min_rate_bytes_per_s=512,
    write_s=16.0,
    linger_s=2.0,
)
"""Settings whose edges are near; the times are such that floating point is exact."""
READING = (State.OPEN, State.DRAINING)
T = TypeVar("T")


def frame(body: bytes) -> bytes:
    """Encode a frame without any help from the code under test."""
    return len(body).to_bytes(4, "big") + body


def patterned(size: int, seed: int = 0) -> bytes:
    """Return a frame whose body tells shifted, swapped or foreign bytes apart."""
    return frame(bytes((seed + i * 7 + (i >> 8)) & 0xFF for i in range(size)))


def decode(stream: bytes, max_length: int) -> tuple[list[bytes], str]:
    """Decode a stream in the most obvious way.

    Returns:
        The whole frames, headers included, and what is behind them: ``"boundary"``, ``"partial"``
        or ``"too large"``.
    """
    frames: list[bytes] = []
    start = 0
    while start < len(stream):
        if len(stream) - start < 4:
            return frames, "partial"
        length = int.from_bytes(stream[start : start + 4], "big")
        if length > max_length:
            return frames, "too large"
        end = start + 4 + length
        if len(stream) < end:
            return frames, "partial"
        frames.append(stream[start:end])
        start = end
    return frames, "boundary"


class PoisonedPool(BufferPool):
    """A `BufferPool` whose buffers are overwritten when they change hands."""

    __slots__ = ()

    def acquire(self, size: int, owner: Hashable) -> memoryview | None:
        """Give out a buffer full of garbage."""
        buffer = super().acquire(size, owner)
        if buffer is not None:
            assert len(buffer) >= size
            buffer[:] = b"\xaa" * len(buffer)
        return buffer

    def release(self, buffer: memoryview, owner: Hashable) -> None:
        """Take back a buffer and spoil it for whoever still looks at it."""
        buffer[:] = b"\x55" * len(buffer)
        super().release(buffer, owner)


class Shell:
    """One connection without a socket.

    Args:
        settings: for the protocol.
        limit: bytes that the pool may give out.
        shared_bytes: size of the buffer that all connections share: a header at least.
        pool: a pool to share with other shells, instead of one of its own.
        segments: how much each receive brings at most; after the last, whatever there is.
        takes: how much each send takes at most; 0 is EAGAIN; after the last, whatever `room` says.
    """

    def __init__(
        self,
        settings: EchoSettings | None = None,
        *,
        limit: int = 1 << 30,
        shared_bytes: int = RECEIVE_BYTES,
        pool: PoisonedPool | None = None,
        segments: Iterable[int] = (),
        takes: Iterable[int] = (),
    ) -> None:
        self.settings = settings if settings is not None else EchoSettings()
        if pool is None:
            pool = PoisonedPool(limit)
            pool.shared = pool.shared[:shared_bytes]
        self.pool = pool
        self.tally = Tally()
        self.now = START
        self.protocol = EchoProtocol(self.settings, pool, self.tally, self, self.now)
        self.inbox = bytearray()
        """What waits in the kernel to be received."""
        self.eof = False
        """Whether the end of the stream waits behind `inbox`."""
        self.read = bytearray()
        """What was received while frames were still being read."""
        self.received_bytes = 0
        self.sent = bytearray()
        self.room = math.inf
        """Bytes that the kernel still takes."""
        self.blocked = False
        """Whether the kernel refused bytes, and nobody has said since that it takes more."""
        self.fin_sent = False
        self.segment: int | None = None
        """How much a receive brings at most, once the script of segments is used up."""
        self.steps = 0
        self._segments = iter(segments)
        self._takes = iter(takes)

    # The peer.

    def feed(self, data: bytes) -> None:
        """Let bytes arrive, and everything happen that follows from it."""
        self.inbox += data
        self.pump()

    def half_close(self) -> None:
        """Let the peer shut down its writing side."""
        self.eof = True
        self.pump()

    def make_room(self, size: float = math.inf) -> None:
        """Let the peer read, so that the kernel takes ``size`` bytes more."""
        self.room += size
        self.writable()

    def writable(self) -> None:
        """Let the poller report that the kernel takes bytes again."""
        self.blocked = False
        self.pump()

    def finish(self) -> None:
        """Report writability until the script of sends is used up and nothing waits."""
        while self.protocol.wants_write:
            self.writable()

    # Time.

    def wait(self, seconds: float) -> None:
        """Let time pass, and a deadline fire if one has come."""
        self.now += seconds
        if self.now >= self.protocol.next_deadline():
            self.handle_deadline()
        self.pump()

    def wait_for_deadline(self) -> float:
        """Let time pass until exactly the next deadline, and return how many seconds it took."""
        deadline = self.protocol.next_deadline()
        assert math.isfinite(deadline)
        elapsed = deadline - self.now
        self.now = deadline
        self.handle_deadline()
        self.pump()
        return elapsed

    def handle_deadline(self) -> None:
        """Fire a deadline; none may be left that has passed, or a loop would spin on it."""
        self.call(lambda: self.protocol.handle_deadline(self.now))
        assert self.protocol.next_deadline() > self.now

    # The loop.

    def pump(self) -> None:
        """Do everything that can be done without the peer, the kernel or time."""
        while self._step():
            self.steps += 1

    def _step(self) -> bool:
        protocol = self.protocol
        if protocol.has_backlog:
            self.resume()
        elif protocol.wants_write and not self.blocked:
            self.flush()
        elif protocol.wants_read and self.inbox:
            self.receive()
        elif protocol.wants_read and self.eof:
            self.receive_eof()
        else:
            return False
        return True

    def resume(self) -> None:
        """Go on with a backlog."""
        self.call(lambda: self.protocol.resume(self.now))

    def pump_writes(self) -> None:
        """Send what is pending as far as the kernel takes it, and nothing else."""
        while self.protocol.wants_write and not self.blocked:
            self.flush()

    def receive(self) -> None:
        """Receive once, and send at once what that returns."""
        protocol = self.protocol
        if protocol.foreseen_bytes:
            protocol.make_room(len(self.inbox))
        into = protocol.receive_into
        segment = next(self._segments, self.segment or len(self.inbox))
        count = min(len(into), len(self.inbox), segment)
        assert count > 0, "a receive of no bytes looks like the end of the stream"
        data = self.inbox[:count]
        del self.inbox[:count]
        into[:count] = data
        self.received_bytes += count
        if protocol.state in READING:
            self.read += data

        def take() -> None:
            echo = protocol.receive_data(count, self.now)
            if echo is not None:
                assert not protocol.wants_write, "echoes overtake those that wait"
                sent = self._send([echo])
                if sent != len(echo):
                    protocol.unsent(echo, sent, self.now)
            if into is self.pool.shared:
                into[:count] = b"\xcc" * count  # Somebody else receives.

        self.call(take)

    def receive_eof(self) -> None:
        """Receive the end of the stream."""
        self.eof = False
        self.call(lambda: self.protocol.receive_eof(self.now))

    def flush(self) -> int:
        """Offer the kernel what is pending, and return how much it took."""
        protocol = self.protocol
        views = protocol.data_to_send()
        assert views
        assert all(views)
        sent = self._send(views)
        self.call(lambda: protocol.bytes_sent(sent, self.now))
        return sent

    def _send(self, views: list[memoryview]) -> int:
        offered = b"".join(views)
        taken = int(min(len(offered), self.room, next(self._takes, len(offered))))
        self.room -= taken
        self.blocked = taken < len(offered)
        self.sent += offered[:taken]
        return taken

    def call(self, event: Callable[[], T]) -> T:
        """Tell the protocol of an event, do what it then asks for, and check what must hold."""
        before = self._stated()
        deadline = self.protocol.next_deadline()
        result = event()
        if self.protocol.changed:
            self.protocol.advance(self.now)
            assert not self.protocol.changed
        else:
            # Nobody will look again, so there must be nothing to see, and no earlier deadline.
            assert self._stated() == before
            assert self.protocol.next_deadline() >= deadline
        if self.protocol.state is State.LINGERING:
            self.fin_sent = True
        self.check()
        return result

    def _stated(self) -> tuple[object, ...]:
        protocol = self.protocol
        return (
            protocol.state,
            protocol.close_reason,
            protocol.wants_read,
            protocol.wants_write,
            protocol.has_backlog,
        )

    # What must hold.

    def everything(self) -> tuple[object, ...]:
        """Return all that can be seen from outside, to tell whether anything changed."""
        protocol, tally = self.protocol, self.tally
        return (
            *self._stated(),
            protocol.next_deadline(),
            protocol.frames,
            protocol.received_bytes,
            protocol.echoed_bytes,
            protocol.unsent_bytes,
            protocol.data_to_send(),
            tally.frames,
            tally.received_bytes,
            tally.echoed_bytes,
            tally.unsent_bytes,
            tally.delayed_frames,
            tally.backpressure_pauses,
            list(tally.frame_sizes),
            list(tally.echo_delays.counts),
            self.held,
        )

    @property
    def held(self) -> int:
        """Bytes of memory on this connection's account."""
        return self.pool.held_by.get(self, 0)

    @property
    def pending_bytes(self) -> int:
        """How many bytes of echoes wait."""
        pending = self.protocol._pending
        return 0 if pending is None else pending.size

    def check(self) -> None:
        """Check the counts, the memory and the predicates against each other."""
        protocol, tally = self.protocol, self.tally
        assert protocol.received_bytes == tally.received_bytes == self.received_bytes
        assert protocol.frames == tally.frames == sum(tally.frame_sizes)
        assert protocol.echoed_bytes == tally.echoed_bytes
        assert protocol.unsent_bytes == tally.unsent_bytes
        assert tally.echoed_bytes - tally.unsent_bytes == len(self.sent)
        assert sum(tally.echo_delays.counts) <= tally.delayed_frames <= tally.frames
        if not tally.unsent_bytes:
            assert sum(tally.echo_delays.counts) == tally.delayed_frames
        self._check_memory()
        state = protocol.state
        assert protocol.wants_write == (self.pending_bytes > 0)
        assert not (protocol.wants_read and protocol.has_backlog)
        if state not in READING:
            assert protocol.wants_read == (state is State.LINGERING)
            assert not protocol.has_backlog
        if state in (State.LINGERING, State.CLOSED):
            assert not protocol.wants_write
            assert protocol.close_reason is not None
        if state is State.CLOSED:
            assert math.isinf(protocol.next_deadline())

    def _check_memory(self) -> None:
        protocol = self.protocol
        chunks = [] if protocol._pending is None else list(protocol._pending._chunks)
        buffers = [chunk.buffer for chunk in chunks]
        used = sum(chunk.end for chunk in chunks)
        if protocol._partial is not None:
            buffers.append(protocol._partial.buffer)
            used += protocol._partial.have + len(self.inbox)
            into = protocol.receive_into.obj
            assert into is protocol._partial.buffer.obj or into is self.pool.shared.obj
        else:
            assert protocol.receive_into is self.pool.shared
        assert len({id(buffer.obj) for buffer in buffers}) == len(buffers)
        assert self.held == sum(map(len, buffers))
        assert self.pool.held == sum(self.pool.held_by.values())
        # Fourfold for what the classes round up, once for pieces that did not fit behind others;
        # beside it a chunk for tiny echoes, and a first chunk from a backlog.
        assert self.held <= 5 * used + 2 * 4160 + len(self.pool.shared)


def echo_of(shell: Shell) -> bytes:
    """Return what should come back for all that the protocol has read as frames."""
    frames, _ = decode(bytes(shell.read), shell.settings.max_frame_bytes)
    return b"".join(frames)


def state(shell: Shell) -> State:
    """Return where a connection stands; a call, so that no type checker thinks that it stays."""
    return shell.protocol.state


def closes(shell: Shell, reason: CloseReason) -> None:
    """See a connection off that is over for ``reason``: our FIN, the peer's, then the close."""
    assert shell.protocol.close_reason is reason
    if state(shell) is not State.CLOSED:
        assert state(shell) is State.LINGERING
        assert shell.fin_sent
        shell.half_close()
    assert state(shell) is State.CLOSED
    assert shell.protocol.close_reason is reason
    assert shell.held == 0
