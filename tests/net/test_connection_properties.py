"""A connection against a kernel that may do anything: any order of reads, writes, ends and resets.

The kernel is a model: a stream socket, and a poller that watches it as poll(2), select(2) or
edge-triggered epoll(7) would. All else is real: loop, connection, protocol, buffers. Budgets are
made small, so that small examples exhaust them.

What the connection may know is what the kernel told it, so the model tells as little as a kernel
may: an edge is reported once, room only to those who were refused, and nothing twice.
"""

import errno
import math
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lpechod.engine.buffers import BufferPool
from lpechod.engine.loop import TICKS_PER_SECOND, Loop
from lpechod.engine.poller import (
    EDGE,
    ERROR,
    HANGUP,
    MAX_EVENTS,
    PEER_CLOSED,
    READABLE,
    WRITABLE,
    Ready,
)
from lpechod.net.connection import Connection
from lpechod.net.counts import ConnectionCounts
from lpechod.net.edge import EdgeConnection
from lpechod.net.handshake import HandshakeError
from lpechod.net.steady import SteadyConnection, SteadyPath
from lpechod.net.transport import BLOCKED, PeerGoneError, StreamError
from lpechod.wire import echo, pending
from lpechod.wire.settings import EchoSettings
from lpechod.wire.states import CloseReason, State
from lpechod.wire.tally import Tally
from tests.fake_time import FakeClock
from tests.net.harness import body_of, frame

SETTINGS = EchoSettings(
    max_frame_bytes=300,
    high_watermark_bytes=1500,
    low_watermark_bytes=300,
    idle_s=10,
    frame_s=5,
    min_rate_bytes_per_s=100,
    write_s=4,
    lifetime_s=60,
    linger_s=2,
)

FD = 7
TOO_LARGE = b"\xff\xff\xff\xff"


class KernelSocket:
    """A connected stream socket, seen by its owner; a `Transport`.

    Attributes:
        incoming: bytes that have arrived and were not received yet.
        at_eof: whether the peer's FIN has arrived behind them.
        gone: whether its reset has.
        filtered: whether a packet filter refuses what is sent (EPERM).
        room: how many bytes a send takes.
        refused: whether a send was short since there was last news of room.
        taken: bytes that were sent.
        received: bytes that were handed out.
        eof_told: whether the end of file was received.
        whole_reads: whether a short read means that nothing is left, as epoll(7) promises.
        news: whether anything has changed that an edge would tell.
    """

    def __init__(self, room: int, *, whole_reads: bool) -> None:
        self.fd = FD
        self.incoming = bytearray()
        self.at_eof = False
        self.gone = False
        self.filtered = False
        self.room = room
        self.refused = False
        self.taken = bytearray()
        self.received = bytearray()
        self.eof_told = False
        self.ended = False
        self.closed = False
        self.whole_reads = whole_reads
        self.short = False
        self.news = True

    # What its owner does.

    def receive(self, buffer: memoryview) -> int:
        """Hand out what has arrived; bytes in front of a reset can still be read (tcp(7))."""
        assert not self.closed
        assert not self.eof_told, "read on after the end of file"
        assert len(buffer), "a read of nothing looks like an end of file"
        if not self.incoming:
            if self.gone:
                raise PeerGoneError("reset")
            self.eof_told = self.at_eof
            return 0 if self.at_eof else BLOCKED
        count = min(len(buffer), len(self.incoming))
        if self.short and not self.whole_reads:
            count = (count + 1) // 2
        self.short = not self.short
        buffer[:count] = self.incoming[:count]
        self.received += self.incoming[:count]
        del self.incoming[:count]
        return count

    def waiting(self) -> int:
        """Tell how much has arrived."""
        return len(self.incoming)

    def send(self, data: memoryview) -> int:
        """Take as much as there is room for."""
        return self.send_many([data])

    def send_many(self, views: Sequence[memoryview]) -> int:
        """Likewise, of several buffers."""
        assert not self.closed
        assert not self.ended, "sent behind its own FIN"
        data = b"".join(views)
        assert data, "sent nothing"
        if self.gone or self.filtered:
            raise PeerGoneError("reset")
        count = min(self.room, len(data))
        self.taken += data[:count]
        self.room -= count
        self.refused |= count < len(data)
        return count

    def readv(self, fd: int, buffers: tuple[memoryview]) -> int:
        """Do as the system call."""
        assert fd == FD
        try:
            count = self.receive(*buffers)
        except PeerGoneError:
            raise ConnectionResetError(errno.ECONNRESET, "reset") from None
        if count == BLOCKED:
            raise BlockingIOError(errno.EAGAIN, "nothing is there")
        return count

    def write(self, fd: int, data: memoryview) -> int:
        """Do as the system call."""
        assert fd == FD
        try:
            count = self.send(data)
        except PeerGoneError:
            raise BrokenPipeError(errno.EPIPE, "reset") from None
        if not count:
            raise BlockingIOError(errno.EAGAIN, "no room")
        return count

    def heed(self, error: OSError, _against: int) -> None:
        """Tell that it is over from nothing there and no room."""
        if not isinstance(error, BlockingIOError):
            raise PeerGoneError("reset") from error

    def take_leave(self) -> bool:
        """Have no word for it."""
        return True

    def end(self) -> None:
        """Send a FIN."""
        assert not self.ended
        self.ended = True

    def close(self) -> None:
        """Close, once."""
        assert not self.closed
        self.closed = True

    # What the network does.

    def arrive(self, data: bytes) -> None:
        """Let bytes arrive."""
        self.incoming += data
        self.news = True

    def finish(self) -> None:
        """Let a FIN arrive."""
        self.at_eof = self.news = True

    def break_off(self) -> None:
        """Let a reset arrive."""
        self.gone = self.news = True

    def make_room(self, size: int) -> None:
        """Let the peer acknowledge some bytes; only who was refused is told."""
        self.room += size
        if self.refused:
            self.refused = False
            self.news = True

    def condition(self) -> int:
        """Return what poll(2) would find with interest in everything."""
        over = self.at_eof or self.gone
        return (
            (READABLE if self.incoming or over else 0)
            | (WRITABLE if self.room or self.gone else 0)
            | (PEER_CLOSED if over else 0)
            | (HANGUP if self.gone or (self.at_eof and self.ended) else 0)
            | (ERROR if self.gone else 0)
        )


class KernelPoller:
    """Watches one socket.

    Args:
        kind: ``level`` as poll(2), ``silent`` as select(2), which reports nothing that was not
            asked for, or ``edge`` as epoll(7) with EPOLLET.
        kernel: the socket.
    """

    def __init__(self, kind: str, kernel: KernelSocket) -> None:
        self.edge_triggered = kind == "edge"
        self.always = 0 if kind == "silent" else ERROR | HANGUP
        self.kernel = kernel
        self.interest: int | None = None

    def register(self, fd: int, mask: int) -> None:
        """Start to watch; what is true already is news."""
        assert self.interest is None
        assert fd == FD
        assert bool(mask & EDGE) == self.edge_triggered
        self.interest = mask
        self.kernel.news = True

    def modify(self, fd: int, mask: int) -> None:
        """Change the interest, which nobody does who is told of everything anyway."""
        assert self.interest is not None
        assert fd == FD
        assert not self.edge_triggered
        assert mask != self.interest, "a system call for nothing"
        self.interest = mask

    def unregister(self, fd: int) -> None:
        """Stop watching, before the descriptor is closed."""
        assert self.interest is not None
        assert fd == FD
        assert not self.kernel.closed
        self.interest = None

    forget = unregister

    def ready(self) -> int:
        """Return what a poll would report."""
        if self.interest is None or (self.edge_triggered and not self.kernel.news):
            return 0
        return self.kernel.condition() & (self.interest | self.always)

    def poll(self, _timeout: float | None, _maxevents: int = MAX_EVENTS, /) -> Ready:
        """Report, and forget the edge."""
        mask = self.ready()
        self.kernel.news = False
        return [(FD, mask)] if mask else []

    def close(self) -> None:
        """There is nothing to give back."""


class Witness:
    """Whom the connection tells of its end."""

    def __init__(self, steady: SteadyPath) -> None:
        self.ends = 0
        self.steady = steady
        self.counts = ConnectionCounts()

    def on_closed(self, _connection: Connection) -> None:
        """Count it."""
        self.ends += 1

    def on_identified(self, _connection: Connection) -> bool:
        """Nothing precedes the first frame here."""
        raise NotImplementedError

    def on_handshake_failed(self, _connection: Connection, error: HandshakeError) -> None:
        """Let the test fail: nothing precedes the first frame here."""
        raise error

    def on_stream_failed(self, _connection: Connection, error: StreamError) -> None:
        """Let the test fail: this stream can't break."""
        raise error

    def on_defect(self, _connection: Connection, error: Exception) -> None:
        """Let the test fail with what went wrong."""
        raise error


def whole_frames(stream: bytes | bytearray) -> int:
    """Return how many bytes at the front of a stream are to be echoed."""
    end = 0
    while len(stream) - end >= 4:
        length = int.from_bytes(stream[end : end + 4], "big")
        if length > SETTINGS.max_frame_bytes or len(stream) - end - 4 < length:
            break
        end += 4 + length
    return end


class AnyKernel(RuleBasedStateMachine):
    """A connection, a kernel, and everything that may happen between them."""

    kind = "level"

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(echo, "FRAMES_PER_TURN", 3)
        self.patch.setattr(pending, "_MAX_VIEWS", 2)

    @initialize(room=st.integers(0, 400), shared=st.integers(8, 80))
    def start(self, room: int, shared: int) -> None:
        """Accept the connection."""
        self.kernel = KernelSocket(room, whole_reads=self.kind == "edge")
        self.poller = KernelPoller(self.kind, self.kernel)
        self.clock = FakeClock()
        self.loop = Loop(self.poller, self.clock)
        self.pool = BufferPool(1 << 30)
        self.pool.shared = memoryview(bytearray(shared))
        self.tally = Tally()
        steady = SteadyPath(
            self.pool,
            self.loop.rotation,
            SETTINGS.max_frame_bytes,
            self.tally,
            self.kernel.readv,
            self.kernel.write,
        )
        self.witness = Witness(steady)
        if self.kind == "steady":
            self.loop.shortcut = steady.serve
        self.unsent_by_peer = b""
        self.paused = False
        self.violent = False
        kinds: dict[str, type[Connection]] = {"edge": EdgeConnection, "steady": SteadyConnection}
        self.connection = kinds.get(self.kind, Connection)(
            self.kernel,
            self.loop,
            SETTINGS,
            self.pool,
            self.tally,
            1,
            ("192.0.2.1", 1),
            "listener",
            self.witness,
        )
        self.connection.on_deadline(self.loop.now)  # As whoever keeps it does.
        self.protocol = self.connection.protocol

    def teardown(self) -> None:
        self.patch.undo()
        if hasattr(self, "kernel"):
            self.end_in_peace()

    # The peer and the network.

    @rule(
        sizes=st.lists(st.sampled_from([0, 0, 0, 1, 4, 20, 60, 61, 299, 300]), max_size=12),
        keep=st.integers(0, 400),
    )
    def send(self, sizes: list[int], keep: int) -> None:
        """The peer sends frames, of which all but the last few bytes arrive."""
        if not self.kernel.at_eof and not self.kernel.gone:
            stream = self.unsent_by_peer + b"".join(frame(body_of(size)) for size in sizes)
            cut = max(0, len(stream) - keep)
            self.kernel.arrive(stream[:cut])
            self.unsent_by_peer = stream[cut:]

    @rule(rare=st.integers(0, 4))
    def announce_too_much(self, rare: int) -> None:
        """The peer breaks the rules."""
        if not rare:
            self.unsent_by_peer += TOO_LARGE

    @rule(rare=st.integers(0, 4))
    def end_sending(self, rare: int) -> None:
        """The peer shuts down its writing side."""
        if not rare and not self.kernel.gone:
            self.kernel.finish()

    @rule(rare=st.integers(0, 9))
    def reset(self, rare: int) -> None:
        """The peer resets."""
        if not rare:
            self.violent = True
            self.kernel.break_off()

    @rule(rare=st.integers(0, 9))
    def filter_packets(self, rare: int) -> None:
        """A packet filter stands in the way from now on, in one direction."""
        if not rare:
            self.violent = True
            self.kernel.filtered = True

    @rule(size=st.integers(1, 2000))
    def acknowledge(self, size: int) -> None:
        """The peer reads."""
        self.kernel.make_room(size)

    @rule()
    def spurious_edge(self) -> None:
        """The kernel may report anew what is true (epoll(7))."""
        self.kernel.news = True

    # Ourselves.

    @rule()
    def turn(self) -> None:
        """The loop turns once."""
        self.loop.turn()
        if self.protocol.state is State.CLOSED:
            assert self.kernel.closed
            assert self.poller.interest is None
            assert self.witness.ends == 1

    @rule(turns=st.integers(2, 12))
    def turn_often(self, turns: int) -> None:
        """The loop turns."""
        for _ in range(turns):
            self.turn()

    @rule(seconds=st.sampled_from([0.05, 0.1, 1.0, 2.1, 4.0, 11.0]))
    def wait(self, seconds: float) -> None:
        """Time passes, and the loop notices."""
        self.clock.advance(seconds)
        self.turn()
        deadline = self.protocol.next_deadline()
        assert deadline > self.loop.now - 1 / TICKS_PER_SECOND
        if self.protocol.unsent_bytes and not self.protocol.wants_write:
            self.violent = True  # A write time-out, or the end of a drain.

    @precondition(lambda self: not self.paused)
    @rule()
    def pause(self) -> None:
        """Memory runs short."""
        self.paused = True
        self.connection.pause(self.loop.now)

    @precondition(lambda self: self.paused)
    @rule()
    def unpause(self) -> None:
        """Memory is there again."""
        self.paused = False
        self.connection.unpause(self.loop.now)

    @rule(rare=st.integers(0, 9), seconds=st.floats(0, 20))
    def drain(self, rare: int, seconds: float) -> None:
        """The daemon drains."""
        if not rare:
            self.connection.drain(self.loop.now + seconds, self.loop.now)

    @rule(rare=st.integers(0, 19), cut=st.booleans())
    def end_at_once(self, rare: int, *, cut: bool) -> None:
        """Memory, or the time to drain, has run out."""
        if not rare:
            self.violent = True
            reason = CloseReason.DRAIN_TIMEOUT if cut else CloseReason.OVERLOAD
            self.connection.abort(reason, self.loop.now)

    # What holds all the time.

    @invariant()
    def echoes_are_exact_and_in_order(self) -> None:
        """What was sent is what was received, up to a frame boundary at most."""
        due = whole_frames(self.kernel.received)
        taken = self.kernel.taken
        assert taken == self.kernel.received[: len(taken)]
        assert len(taken) <= due
        assert self.protocol.echoed_bytes - self.protocol.unsent_bytes == len(taken)
        assert self.tally.echoed_bytes - self.tally.unsent_bytes == len(taken)
        if self.protocol.state is State.OPEN and not self.protocol.has_backlog:
            if not self.protocol.wants_read and self.paused:
                return  # Perhaps a backlog that waits for the pause to end.
            if self.protocol.unsent_bytes < SETTINGS.low_watermark_bytes:
                assert len(taken) + self.protocol.unsent_bytes == due

    @invariant()
    def interest_is_what_the_protocol_wants(self) -> None:
        """Nobody asks for what is not acted on, or misses what is."""
        wanted = (READABLE if self.protocol.wants_read else 0) | (
            WRITABLE if self.protocol.wants_write else 0
        )
        if self.protocol.state is State.CLOSED:
            assert self.connection._interest == 0
            return
        assert self.connection._interest == wanted
        if not self.poller.edge_triggered:
            assert self.poller.interest == wanted
        if wanted & READABLE and self.protocol.state is not State.LINGERING:
            assert not self.kernel.eof_told
            assert not self.paused
            assert self.protocol.unsent_bytes < SETTINGS.high_watermark_bytes
        if wanted & WRITABLE:
            assert self.protocol.unsent_bytes > 0

    @invariant()
    def no_wakeup_is_lost(self) -> None:
        """Whatever can be done is announced: by the kernel, or by the connection itself."""
        if self.protocol.state is State.CLOSED:
            return
        kernel = self.kernel
        readable = kernel.incoming or kernel.at_eof or kernel.gone
        writable = (kernel.room and not kernel.refused) or kernel.gone
        announced = self.poller.ready() or self.connection in self.loop._again
        if (self.protocol.wants_read and readable) or (self.protocol.wants_write and writable):
            assert announced
        if self.protocol.has_backlog:
            assert self.connection in self.loop._again

    @invariant()
    def timer_is_filed_in_time(self) -> None:
        """The timer fires at the deadline or before, and a closed connection has none."""
        deadline = self.protocol.next_deadline()
        if self.protocol.state is State.CLOSED:
            assert not self.connection.filed
        elif deadline < math.inf:
            due = max(deadline * TICKS_PER_SECOND, self.loop.now * TICKS_PER_SECOND + 1)
            assert self.connection.filed
            assert self.connection.tick <= math.ceil(due)

    @invariant()
    def memory_is_accounted_for(self) -> None:
        """What is held is held for this connection, and nothing for a closed one."""
        if self.protocol.state is State.CLOSED:
            assert not self.pool.held
        assert self.pool.held == self.pool.held_by.get(self.connection, 0)

    # The end.

    def quiesce(self) -> int:
        """Turn until nothing happens any more, and return how often that was."""
        for turns in range(2000):
            if not self.poller.ready() and not self.loop._again and not self.loop._closing:
                return turns
            self.turn()
            self.check_invariants_now()
        raise AssertionError("spins")

    def check_invariants_now(self) -> None:
        """Look at what must hold between the turns of the end as well."""
        self.echoes_are_exact_and_in_order()
        self.interest_is_what_the_protocol_wants()
        self.no_wakeup_is_lost()
        self.timer_is_filed_in_time()
        self.memory_is_accounted_for()

    def end_in_peace(self) -> None:
        """Give the connection all it needs; then every echo goes out, and it ends."""
        if self.paused:
            self.unpause()
        self.kernel.make_room(1 << 20)
        self.quiesce()
        if not self.kernel.at_eof and not self.kernel.gone:
            self.kernel.finish()
        self.quiesce()
        assert self.kernel.closed
        assert self.witness.ends == 1
        assert not self.pool.held
        if not self.violent:
            assert len(self.kernel.taken) == self.protocol.echoed_bytes
        if self.protocol.close_reason is CloseReason.PEER_CLOSED and not self.violent:
            assert self.kernel.taken == self.kernel.received
            assert not self.kernel.incoming


class SilentKernel(AnyKernel):
    """The same with a poller that reports errors only to those who ask for something."""

    kind = "silent"


class SteadyKernel(AnyKernel):
    """The same with a connection that is on the steady path while it can be."""

    kind = "steady"

    @invariant()
    def is_on_the_path_while_steady(self) -> None:
        """Who holds nothing and waits for bytes only is on it, and nobody else."""
        steady = self.protocol.steady and self.connection._interest == READABLE
        on_path = {FD: self.connection} if steady else {}
        assert self.witness.steady.connections == on_path

    @invariant()
    def counters_agree(self) -> None:
        """What is counted for all is what is counted for the one."""
        assert sum(self.tally.frame_sizes) == self.tally.frames == self.protocol.frames
        assert self.tally.received_bytes == self.protocol.received_bytes
        assert self.protocol.received_bytes == len(self.kernel.received)


class EdgeKernel(AnyKernel):
    """The same with a poller that reports every change once."""

    kind = "edge"


_THOROUGH = settings(max_examples=150, stateful_step_count=40, deadline=None)

TestLevelTriggered = AnyKernel.TestCase
TestLevelTriggered.settings = _THOROUGH
TestSilent = SilentKernel.TestCase
TestSilent.settings = _THOROUGH
TestSteady = SteadyKernel.TestCase
TestSteady.settings = _THOROUGH
TestEdgeTriggered = EdgeKernel.TestCase
TestEdgeTriggered.settings = _THOROUGH


def test_echoes_queued_behind_a_flush_are_sent() -> None:
    """Echoes of frames that a budget left over go out, although no edge will tell of room."""
    machine = EdgeKernel()
    try:
        machine.start(room=0, shared=28)
        machine.pause()
        machine.send(sizes=[0] * 7, keep=0)
        machine.unpause()
        machine.turn()
        machine.acknowledge(size=25)
        for _ in range(3):
            machine.turn()
            machine.no_wakeup_is_lost()
    finally:
        machine.teardown()
