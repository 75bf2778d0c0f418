"""Whatever the network and the kernel do to a stream of frames, the echo is the same.

Limits and buffers are tiny, so that a few hundred bytes already reach every edge.
"""

import math
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lpechod.wire.echo import FRAMES_PER_TURN
from lpechod.wire.frames import encode_header
from lpechod.wire.settings import EchoSettings
from lpechod.wire.states import CloseReason, IllegalTransitionError, State
from tests.wire.driver import READING, Shell, decode, echo_of, patterned

TINY = EchoSettings(
    max_frame_bytes=5000,
    high_watermark_bytes=3000,
    low_watermark_bytes=700,
    idle_s=50.0,
    frame_s=10.0,
    min_rate_bytes_per_s=256,
    write_s=20.0,
    lifetime_s=400.0,
    linger_s=2.0,
)
SHARED_BYTES = 2200
"""Less than the largest frame, more than the smallest class of buffers."""

MATURE = 20
ROUNDING = 1e-6

PROFILE = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])

pytestmark = pytest.mark.timeout(300)  # Finding the smallest example of a failure takes a while.

SIZES = st.one_of(
    st.integers(0, 8),
    st.integers(0, 300),
    st.sampled_from([1083, 1084, 1085, 2196, 2197, 4156, 4157, 4999, 5000]),
    st.integers(0, 5000),
)
FRAMES = st.builds(patterned, SIZES, st.integers(0, 255))
FLOODS = st.integers(FRAMES_PER_TURN - 2, 3 * FRAMES_PER_TURN).map(lambda count: bytes(4 * count))
STREAMS = st.lists(st.one_of(FRAMES, FRAMES, FRAMES, FLOODS), max_size=12).map(b"".join)
TOO_LARGE = st.one_of(st.integers(5001, 5100), st.integers(5001, 0xFFFF_FFFF)).map(encode_header)
SEGMENTS = st.lists(st.one_of(st.integers(1, 5), st.integers(1, 6000)), max_size=60)
TAKES = st.lists(st.one_of(st.integers(0, 5), st.integers(0, 6000)), max_size=60)

REASON_AT_EOF = {
    "boundary": CloseReason.PEER_CLOSED,
    "partial": CloseReason.TRUNCATED_FRAME,
    "too large": CloseReason.FRAME_TOO_LARGE,
}
"""Why a connection ends whose peer half-closes behind a stream that ends like this."""


class TestEcho:
    """Any frames, any segmentation, any sequence of short writes."""

    @given(
        stream=STREAMS,
        segments=SEGMENTS,
        takes=TAKES,
        shared_bytes=st.sampled_from([100, SHARED_BYTES, 1 << 18]),
    )
    @PROFILE
    def test_whole_frames(
        self, stream: bytes, segments: list[int], takes: list[int], shared_bytes: int
    ) -> None:
        """Whole frames come back exactly, and leave nothing behind."""
        shell = Shell(TINY, segments=segments, takes=takes, shared_bytes=shared_bytes)
        shell.feed(stream)
        shell.finish()
        assert shell.sent == stream
        assert shell.protocol.frames == len(decode(stream, 5000)[0])
        assert shell.protocol.state is State.OPEN
        assert shell.held == 0
        shell.half_close()
        assert shell.protocol.close_reason is CloseReason.PEER_CLOSED

    @given(stream=STREAMS, last=FRAMES, cut=st.integers(1, 5003), segments=SEGMENTS, takes=TAKES)
    @PROFILE
    def test_truncated(
        self, stream: bytes, last: bytes, cut: int, segments: list[int], takes: list[int]
    ) -> None:
        """An end of file inside a frame brings back exactly the whole frames before it."""
        rest = last[: max(1, len(last) - cut)]
        shell = Shell(TINY, segments=segments, takes=takes, shared_bytes=SHARED_BYTES)
        shell.inbox += stream + rest
        shell.half_close()
        shell.finish()
        assert shell.sent == stream
        assert shell.protocol.state is State.CLOSED
        assert shell.protocol.close_reason is CloseReason.TRUNCATED_FRAME
        assert shell.held == 0

    @given(
        stream=STREAMS,
        header=TOO_LARGE,
        behind=st.binary(max_size=50),
        segments=SEGMENTS,
        takes=TAKES,
    )
    @PROFILE
    def test_too_large(
        self, stream: bytes, header: bytes, behind: bytes, segments: list[int], takes: list[int]
    ) -> None:
        """An oversized frame brings back exactly the whole frames before it."""
        shell = Shell(TINY, segments=segments, takes=takes, shared_bytes=SHARED_BYTES)
        shell.feed(stream + header + behind)
        shell.finish()
        assert shell.sent == stream
        assert shell.protocol.state is State.LINGERING
        assert shell.protocol.close_reason is CloseReason.FRAME_TOO_LARGE
        assert shell.held == 0
        assert not shell.inbox

    @given(data=st.binary(max_size=400), segments=SEGMENTS, takes=TAKES)
    @PROFILE
    def test_garbage(self, data: bytes, segments: list[int], takes: list[int]) -> None:
        """Any garbage is either frames or a reason to close; nothing raises."""
        shell = Shell(EchoSettings(max_frame_bytes=300), segments=segments, takes=takes)
        shell.inbox += data
        shell.half_close()
        shell.finish()
        frames, then = decode(data, 300)
        assert shell.sent == b"".join(frames)
        assert shell.protocol.close_reason is REASON_AT_EOF[then]

    @given(stream=STREAMS, segments=SEGMENTS, takes=TAKES, limit=st.integers(0, 30_000))
    @PROFILE
    def test_scarce_memory(
        self, stream: bytes, segments: list[int], takes: list[int], limit: int
    ) -> None:
        """With little memory the echo is exact up to where it ends, and only `overload` ends it."""
        shell = Shell(TINY, limit=limit, segments=segments, takes=takes, shared_bytes=SHARED_BYTES)
        shell.feed(stream)
        shell.finish()
        assert stream.startswith(bytes(shell.sent))
        assert shell.held == 0
        if shell.protocol.state is not State.CLOSED:
            assert shell.sent == stream
        else:
            assert shell.protocol.close_reason is CloseReason.OVERLOAD

    @given(
        stream=STREAMS,
        segments=SEGMENTS,
        takes=TAKES,
        reads=st.integers(0, 30),
        lifetime=st.booleans(),
    )
    @PROFILE
    def test_ends_at_a_boundary(
        self, stream: bytes, segments: list[int], takes: list[int], reads: int, lifetime: bool
    ) -> None:
        """Wherever a lifetime or a drain comes, all frames that were read come back, and whole."""
        tiny = replace(TINY, lifetime_s=1.0)
        shell = Shell(tiny, segments=segments, takes=takes, shared_bytes=SHARED_BYTES)
        shell.inbox += stream
        for _ in range(reads):
            if shell.protocol.wants_read and shell.inbox:
                shell.receive()
        if lifetime:
            shell.now += 1.0
            shell.handle_deadline()
        else:
            shell.call(lambda: shell.protocol.drain(math.inf))
        shell.pump()
        shell.finish()
        assert shell.protocol.state is State.LINGERING
        assert shell.sent == shell.read
        assert decode(bytes(shell.read), 5000)[1] == "boundary"
        expected = CloseReason.LIFETIME if lifetime else CloseReason.DRAINED
        assert shell.protocol.close_reason is expected


GRACEFUL = frozenset(
    {
        CloseReason.PEER_CLOSED,
        CloseReason.TRUNCATED_FRAME,
        CloseReason.FRAME_TOO_LARGE,
        CloseReason.IDLE_TIMEOUT,
        CloseReason.FRAME_TIMEOUT,
        CloseReason.LIFETIME,
        CloseReason.DRAINED,
    }
)
TIMEOUTS = frozenset(
    {
        CloseReason.IDLE_TIMEOUT,
        CloseReason.FRAME_TIMEOUT,
        CloseReason.WRITE_TIMEOUT,
        CloseReason.LIFETIME,
        CloseReason.DRAIN_TIMEOUT,
    }
)

ENDINGS = (CloseReason.RESET, CloseReason.OVERLOAD, CloseReason.INTERNAL_ERROR)


class Interleavings(RuleBasedStateMachine):
    """Everything that can happen to a connection, in any order, against a simple model.

    The model is the stream that was read, which says by itself what may come back, a few flags, and
    how long each patience has been tried.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shell = Shell(TINY, shared_bytes=SHARED_BYTES)
        self.shell.room = 0  # Each rule that sends says how much the kernel takes.
        self.steps = 0
        self.behind_watermark = False
        self.pressed = False
        self.may_drop = False
        self.was_paused = False
        self.partial: object = None
        self.quiet_s = 0.0
        self.stalled_s = 0.0
        self.frame_s = 0.0

    def is_open(self) -> bool:
        return self.shell.protocol.state is not State.CLOSED

    def is_mature(self) -> bool:
        """Whether enough has happened for an end to be interesting."""
        return self.is_open() and self.steps > MATURE

    def end(self, event: Callable[[], object], allowed: Collection[CloseReason | None]) -> None:
        """Let happen what may end the connection, and see that it ends for an allowed reason."""
        before = self.shell.protocol.close_reason
        self.shell.call(event)
        after = self.shell.protocol.close_reason
        assert after is before if before is not None else after in allowed

    # The peer and the kernel.

    @rule(data=st.one_of(FRAMES, FRAMES, FLOODS, FRAMES.map(lambda data: data[: len(data) // 2])))
    def peer_sends(self, data: bytes) -> None:
        if len(self.shell.inbox) < 30_000 and not self.shell.eof:
            self.shell.inbox += data

    @precondition(is_mature)
    @rule(header=TOO_LARGE)
    def peer_sends_too_much(self, header: bytes) -> None:
        if not self.shell.eof:
            self.shell.inbox += header

    @precondition(is_mature)
    @rule()
    def peer_half_closes(self) -> None:
        self.shell.eof = True

    @precondition(lambda self: self.shell.protocol.wants_read)
    @rule(
        data=FRAMES,
        size=st.one_of(st.integers(1, 5), st.integers(1, 6000), st.just(6000)),
        take=st.one_of(st.just(0), st.integers(0, 9000)),
    )
    def read(self, data: bytes, size: int, take: int) -> None:
        shell = self.shell
        if shell.eof and not shell.inbox:
            _, then = decode(bytes(shell.read), TINY.max_frame_bytes)
            shell.eof = False
            self.end(lambda: shell.protocol.receive_eof(shell.now), {REASON_AT_EOF[then]})
            return
        if not shell.inbox:
            shell.inbox += data
        self.quiet_s = 0.0
        shell.segment = size
        shell.room = take
        shell.receive()
        shell.room = 0

    @precondition(lambda self: self.shell.protocol.wants_write)
    @rule(take=st.one_of(st.none(), st.integers(0, 5), st.integers(1, 900), st.integers(1, 9000)))
    def write(self, take: int | None) -> None:
        pending = self.shell.pending_bytes
        self.shell.room = take if take is not None else max(0, pending - TINY.low_watermark_bytes)
        if self.shell.flush():
            self.quiet_s = self.stalled_s = 0.0
        self.shell.room = 0

    @precondition(lambda self: self.shell.protocol.has_backlog)
    @rule()
    def resume(self) -> None:
        self.shell.resume()

    # Time and the operator.

    @rule(seconds=st.one_of(st.floats(0, 1), st.floats(0, 5), st.none()))
    def time_passes(self, seconds: float | None) -> None:
        shell, protocol = self.shell, self.shell.protocol
        before = shell.now
        if seconds is not None:
            shell.now += seconds
        elif self.is_mature() and math.isfinite(protocol.next_deadline()):
            shell.now = max(shell.now, protocol.next_deadline())
        self.quiet_s += shell.now - before
        self.stalled_s += shell.now - before
        if not self.was_paused:
            self.frame_s += shell.now - before
        rest = bytes(shell.read[len(echo_of(shell)) :])
        length = int.from_bytes(rest[:4], "big") if len(rest) >= 4 else 0
        frame_s = TINY.frame_s + length / TINY.min_rate_bytes_per_s
        first = protocol.close_reason is None
        if shell.now >= protocol.next_deadline():
            self.may_drop = True
            self.end(lambda: protocol.handle_deadline(shell.now), {None, *TIMEOUTS})
            assert protocol.next_deadline() > shell.now
        if first and protocol.close_reason is CloseReason.FRAME_TIMEOUT:
            assert self.frame_s > frame_s - ROUNDING
        elif first and protocol.close_reason is CloseReason.IDLE_TIMEOUT:
            assert self.quiet_s > TINY.idle_s - ROUNDING
        elif first and protocol.close_reason is CloseReason.WRITE_TIMEOUT:
            assert self.stalled_s > TINY.write_s - ROUNDING
        if protocol.wants_write:
            assert self.stalled_s < TINY.write_s + ROUNDING
        if protocol.state in READING and protocol.wants_read:
            assert not rest or self.frame_s < frame_s + ROUNDING
            assert rest or protocol.wants_write or self.quiet_s < TINY.idle_s + ROUNDING

    @rule(short=st.booleans())
    def memory(self, short: bool) -> None:
        protocol = self.shell.protocol
        self.pressed = short
        change = protocol.pause if short else protocol.unpause
        self.shell.call(lambda: change(self.shell.now))

    @precondition(is_mature)
    @rule(seconds=st.floats(0, 100))
    def drain(self, seconds: float) -> None:
        shell = self.shell
        until = shell.now + seconds
        self.end(lambda: shell.protocol.drain(until), {None, CloseReason.DRAINED})
        self.time_passes(0.0)

    @precondition(is_mature)
    @rule(reason=st.sampled_from(ENDINGS))
    def end_at_once(self, reason: CloseReason) -> None:
        protocol = self.shell.protocol
        self.may_drop = True
        if reason is CloseReason.RESET:
            self.end(protocol.receive_reset, {reason})
        else:
            self.end(lambda: protocol.abort(reason), {reason})
        assert not self.is_open()

    @precondition(lambda self: not self.is_open())
    @rule(event=st.integers(0, 9))
    def late_event(self, event: int) -> None:
        protocol, now = self.shell.protocol, self.shell.now + 1e6
        events: list[Callable[[], object]] = [
            protocol.receive_reset,
            lambda: protocol.receive_eof(now),
            lambda: protocol.abort(CloseReason.OVERLOAD),
            lambda: protocol.drain(now),
            lambda: protocol.bytes_sent(1, now),
            lambda: protocol.resume(now),
            lambda: protocol.pause(now),
            lambda: protocol.unpause(now),
            lambda: protocol.handle_deadline(now),
            lambda: protocol.advance(now),
        ]
        before = self.shell.everything()
        with suppress(IllegalTransitionError):
            events[event]()
        assert self.shell.everything() == before

    # What must hold after each of them; `Shell` has checked counts and memory already.

    @invariant()
    def echo_is_exact(self) -> None:
        self.steps += 1
        shell = self.shell
        expected = echo_of(shell)
        pending = b"".join(shell.protocol.data_to_send())
        assert expected.startswith(bytes(shell.sent) + pending)
        if shell.protocol.state in READING and not shell.protocol.wants_write:
            assert shell.sent == expected[: shell.protocol.echoed_bytes]
        if not self.may_drop:
            assert shell.protocol.unsent_bytes == shell.pending_bytes

    @invariant()
    def nothing_is_left_behind(self) -> None:
        protocol = self.shell.protocol
        if protocol.state in READING and protocol.wants_read:
            assert protocol.echoed_bytes == len(echo_of(self.shell))
        if protocol.close_reason in (CloseReason.DRAINED, CloseReason.LIFETIME):
            assert decode(bytes(self.shell.read), TINY.max_frame_bytes)[1] == "boundary"
        if not protocol.unsent_bytes and not self.is_open() and protocol.close_reason in GRACEFUL:
            assert self.shell.sent == echo_of(self.shell)

    @invariant()
    def reading_pauses_between_the_watermarks(self) -> None:
        shell, protocol = self.shell, self.shell.protocol
        if shell.pending_bytes >= TINY.high_watermark_bytes:
            self.behind_watermark = True
        if shell.pending_bytes <= TINY.low_watermark_bytes:
            self.behind_watermark = False
        if protocol.state in READING:
            active = protocol.wants_read or protocol.has_backlog
            assert active == (not self.behind_watermark and not self.pressed)
        paused = self.behind_watermark or self.pressed
        if self.was_paused and not paused:
            self.quiet_s = 0.0
        self.was_paused = paused
        if not protocol.wants_write:
            self.stalled_s = 0.0
        if protocol._partial is not self.partial:
            self.partial = protocol._partial
            self.frame_s = 0.0
        limit = TINY.high_watermark_bytes + max(TINY.max_frame_bytes + 4, SHARED_BYTES)
        assert shell.pending_bytes < limit

    def teardown(self) -> None:
        """Whatever has happened, a peer that behaves from now on gets what it is owed."""
        shell = self.shell
        was_open = shell.protocol.state is State.OPEN
        shell.room = math.inf
        shell.segment = None
        shell.blocked = False
        if self.is_open():
            shell.call(lambda: shell.protocol.unpause(shell.now))
            shell.half_close()
        assert not self.is_open()
        assert shell.pool.held == 0
        if not self.may_drop:
            assert shell.sent == echo_of(shell)
        if was_open:
            _, then = decode(bytes(shell.read), TINY.max_frame_bytes)
            assert shell.protocol.close_reason is REASON_AT_EOF[then]


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(PROFILE, stateful_step_count=70)
