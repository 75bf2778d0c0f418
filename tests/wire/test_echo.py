"""What comes back for what a peer sends, and how it ends: the rows of the contract about bytes.

`Shell` checks counts and memory after every call, so a test only says what is particular to it.
"""

from collections.abc import Callable

import pytest

from lpechod.engine.buffers import HEADROOM_BYTES, RECEIVE_BYTES
from lpechod.wire.echo import FRAMES_PER_TURN
from lpechod.wire.frames import encode_header
from lpechod.wire.settings import EchoSettings
from lpechod.wire.states import CloseReason, IllegalTransitionError, State
from tests.wire.driver import SMALL, Shell, closes, echo_of, frame, patterned, state


class TestFrames:
    """``0 <= L <= max_frame``: echoed byte-identical, once whole."""

    @pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 1000, 1088, 1089, 4095, 4096])
    def test_one_frame(self, size: int) -> None:
        """A frame of any allowed size comes back as it came in."""
        shell = Shell(SMALL)
        shell.feed(patterned(size))
        assert shell.sent == patterned(size)
        assert state(shell) is State.OPEN
        assert shell.protocol.frames == 1

    def test_empty_frame(self) -> None:
        """A frame of length zero is echoed as four zero bytes, and ends nothing."""
        shell = Shell(SMALL)
        shell.feed(bytes(4))
        assert shell.sent == bytes(4)
        shell.feed(bytes(8))
        assert shell.sent == bytes(12)
        assert shell.protocol.wants_read

    def test_only_once_whole(self) -> None:
        """Nothing of a frame is echoed before its last byte."""
        shell = Shell(SMALL)
        data = patterned(50)
        for byte in data[:-1]:
            shell.feed(bytes([byte]))
            assert not shell.sent
        shell.feed(data[-1:])
        assert shell.sent == data

    def test_default_settings(self) -> None:
        """The largest frame of the default settings passes, though it is larger than any buffer."""
        shell = Shell()
        data = patterned(1 << 20)
        shell.feed(data)
        assert shell.sent == data
        assert shell.held == 0


class TestSegmentation:
    """Frames arrive split anywhere, or thousands in one segment."""

    STREAM = b"".join(patterned(size, size) for size in (0, 1, 70, 0, 0, 1200, 5, 4096, 3))

    @pytest.mark.parametrize("segment", [1, 2, 3, 4, 5, 7, 64, 1000, 5000, 1 << 20])
    @pytest.mark.parametrize("shared_bytes", [4, 5, 300, RECEIVE_BYTES])
    def test_segments_of_one_size(self, segment: int, shared_bytes: int) -> None:
        """The echo does not depend on how the stream was cut."""
        shell = Shell(SMALL, segments=[segment] * len(self.STREAM), shared_bytes=shared_bytes)
        shell.feed(self.STREAM)
        assert shell.sent == self.STREAM
        assert shell.held == 0

    def test_one_cut_anywhere(self) -> None:
        """Each single place to cut the stream gives the same echo."""
        stream = self.STREAM[:1400]
        for cut in range(1, len(stream)):
            shell = Shell(SMALL)
            shell.feed(stream[:cut])
            shell.feed(stream[cut:])
            assert shell.sent == echo_of(shell)
            assert shell.read == stream

    def test_thousands_in_one_segment(self) -> None:
        """Thousands of small frames in one segment come back in order."""
        stream = b"".join(frame(i.to_bytes(3, "big")) for i in range(30_000))
        shell = Shell(SMALL)
        shell.feed(stream)
        assert shell.sent == stream
        assert shell.protocol.frames == 30_000

    def test_whole_frames_need_no_memory(self) -> None:
        """Frames that arrive and leave whole are never copied, and nobody has to look again."""
        shell = Shell(SMALL)
        for _ in range(3):
            shell.inbox += patterned(100) + patterned(0)
            shell.receive()
            assert not shell.protocol.changed
            assert not shell.pool._free
        assert shell.protocol.frames == 6

    def test_pipelining_behind_a_partial_frame(self) -> None:
        """Once a split frame is done, the next ones are again received into the shared buffer."""
        shell = Shell(SMALL)
        shell.feed(patterned(100)[:50])
        assert len(shell.protocol.receive_into) == 54
        shell.feed(patterned(100)[50:])
        assert shell.protocol.receive_into is shell.pool.shared


class TestFrameTooLarge:
    """``L > max_frame``: flushes the echoes of the frames before it, then closes."""

    @pytest.mark.parametrize("length", [4097, 0x8000_0000, 0xFFFF_FFFF])
    @pytest.mark.parametrize("segment", [1, 3, 4, 1000])
    def test_frames_before_it(self, length: int, segment: int) -> None:
        """All frames before the oversized one are echoed, and nothing of it or behind it."""
        before = patterned(10) + patterned(0) + patterned(300)
        shell = Shell(SMALL, segments=[segment] * 1000)
        shell.feed(before + encode_header(length) + patterned(20))
        assert shell.sent == before
        closes(shell, CloseReason.FRAME_TOO_LARGE)

    def test_whole_in_one_segment(self) -> None:
        """That an oversized frame has arrived whole does not make it any smaller."""
        shell = Shell(SMALL)
        shell.feed(patterned(4097))
        assert not shell.sent
        closes(shell, CloseReason.FRAME_TOO_LARGE)

    def test_header_is_enough(self) -> None:
        """It is refused with its header, before anything of its body."""
        shell = Shell(SMALL)
        shell.feed(encode_header(4097))
        assert state(shell) is State.LINGERING
        closes(shell, CloseReason.FRAME_TOO_LARGE)

    def test_pending_echoes_go_out_first(self) -> None:
        """Our end of file waits for echoes that the peer has not taken."""
        before = patterned(1000)
        shell = Shell(SMALL)
        shell.room = 10
        shell.feed(before + encode_header(4097))
        assert state(shell) is State.FLUSHING
        assert not shell.protocol.wants_read
        assert not shell.fin_sent
        shell.make_room()
        assert shell.sent == before
        closes(shell, CloseReason.FRAME_TOO_LARGE)

    def test_behind_a_backlog(self) -> None:
        """It is found behind more frames than one turn looks at, too."""
        before = bytes(4 * (FRAMES_PER_TURN + 1))
        shell = Shell(SMALL)
        shell.feed(before + encode_header(4097) + b"abc")
        assert shell.sent == before
        closes(shell, CloseReason.FRAME_TOO_LARGE)

    def test_right_behind_a_turn(self) -> None:
        """It is found as the first thing that a turn looks at."""
        before = bytes(4 * FRAMES_PER_TURN)
        shell = Shell(SMALL)
        shell.feed(before + encode_header(4097))
        assert shell.sent == before
        closes(shell, CloseReason.FRAME_TOO_LARGE)

    def test_while_echoes_are_pending(self) -> None:
        """It is refused in the queueing path like in the direct one."""
        shell = Shell(SMALL)
        shell.room = 0
        shell.feed(patterned(10))
        shell.feed(patterned(20) + encode_header(4097))
        assert state(shell) is State.FLUSHING
        shell.make_room()
        assert shell.sent == patterned(10) + patterned(20)
        closes(shell, CloseReason.FRAME_TOO_LARGE)


class TestHalfCloseAtBoundary:
    """Half-closes at a frame boundary: flushes every pending echo, then closes."""

    def test_nothing_pending(self) -> None:
        """With nothing pending it is closed at once."""
        shell = Shell(SMALL)
        shell.feed(patterned(10))
        shell.half_close()
        assert state(shell) is State.CLOSED
        closes(shell, CloseReason.PEER_CLOSED)

    def test_without_a_frame(self) -> None:
        """A connection that never sent anything was closed by its peer."""
        shell = Shell(SMALL)
        shell.half_close()
        closes(shell, CloseReason.PEER_CLOSED)

    def test_echoes_pending(self) -> None:
        """Pending echoes go out before it is closed, and the end of file is not read again."""
        shell = Shell(SMALL)
        shell.room = 7
        shell.feed(patterned(1000))
        shell.half_close()
        assert state(shell) is State.FINISHING
        assert not shell.protocol.wants_read
        shell.make_room(500)
        assert state(shell) is State.FINISHING
        shell.make_room()
        assert shell.sent == patterned(1000)
        closes(shell, CloseReason.PEER_CLOSED)

    def test_behind_a_backlog(self) -> None:
        """The end of file is not seen before all frames in front of it."""
        shell = Shell(SMALL)
        stream = bytes(4 * 3 * FRAMES_PER_TURN)
        shell.inbox += stream
        shell.half_close()
        assert shell.sent == stream
        closes(shell, CloseReason.PEER_CLOSED)

    def test_while_paused(self) -> None:
        """The end of file waits behind the high watermark, and then everything goes out."""
        shell = Shell(SMALL)
        shell.room = 0
        stream = patterned(2048) + patterned(100)
        shell.feed(patterned(2048))
        shell.inbox += patterned(100)
        shell.half_close()
        assert state(shell) is State.OPEN
        shell.make_room()
        assert shell.sent == stream
        closes(shell, CloseReason.PEER_CLOSED)


class TestHalfCloseInsideFrame:
    """Half-closes inside a frame: flushes the whole frames, never a partial one, then closes."""

    @pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 50, 103])
    def test_whole_frames_only(self, cut: int) -> None:
        """Whether the cut is in the header or in the body, only whole frames come back."""
        shell = Shell(SMALL)
        shell.feed(patterned(10) + patterned(100)[:cut])
        shell.half_close()
        assert shell.sent == patterned(10)
        closes(shell, CloseReason.TRUNCATED_FRAME)

    def test_echoes_pending(self) -> None:
        """Pending echoes go out first, and the memory of the partial frame is free at once."""
        shell = Shell(SMALL)
        shell.room = 0
        shell.feed(patterned(10) + patterned(3000)[:2000])
        held = shell.pool.held
        shell.half_close()
        assert state(shell) is State.FINISHING
        assert shell.held < held
        shell.make_room()
        assert shell.sent == patterned(10)
        closes(shell, CloseReason.TRUNCATED_FRAME)


class TestReset:
    """Resets: drops everything."""

    @pytest.mark.parametrize("data", [b"", patterned(10), patterned(100)[:50], patterned(3000)])
    def test_drops_everything(self, data: bytes) -> None:
        """Whatever was pending or partial is dropped, and what was never sent counts as unsent."""
        shell = Shell(SMALL)
        shell.room = 5
        shell.feed(data)
        shell.call(shell.protocol.receive_reset)
        assert shell.protocol.echoed_bytes - shell.protocol.unsent_bytes == min(5, len(shell.sent))
        closes(shell, CloseReason.RESET)

    def test_while_we_end_it(self) -> None:
        """A reset does not change why we had decided to end it."""
        shell = Shell(SMALL)
        shell.room = 0
        shell.feed(patterned(10) + encode_header(4097))
        shell.call(shell.protocol.receive_reset)
        closes(shell, CloseReason.FRAME_TOO_LARGE)

    def test_found_by_the_first_send(self) -> None:
        """A shell whose send fails reports all of it as unsent, so that nothing counts as sent."""
        shell = Shell(SMALL)
        protocol = shell.protocol
        protocol.receive_into[:10] = patterned(6)
        echo = protocol.receive_data(10, shell.now)
        assert echo is not None
        protocol.unsent(echo, 0, shell.now)
        protocol.receive_reset()
        assert protocol.echoed_bytes == protocol.unsent_bytes == 10
        assert shell.tally.frames == shell.tally.delayed_frames == 1
        assert shell.held == 0


class TestBacklog:
    """More frames in one segment than one turn may look at."""

    def test_a_million_empty_frames(self) -> None:
        """A flood of empty frames is echoed exactly, and costs a turn for each thousand or so."""
        shell = Shell()
        shell.feed(bytes(4_000_000))
        assert shell.sent == bytes(4_000_000)
        assert shell.protocol.frames == 1_000_000
        assert shell.steps >= 1_000_000 / FRAMES_PER_TURN
        assert shell.held == 0

    def test_budget_of_a_turn(self) -> None:
        """One call looks at no more than `FRAMES_PER_TURN` frames, in either path."""
        shell = Shell()
        shell.inbox += bytes(4 * 4 * FRAMES_PER_TURN)
        for turn, step in enumerate((shell.receive, shell.resume, shell.resume), 1):
            step()
            assert shell.protocol.frames == turn * FRAMES_PER_TURN
            assert shell.protocol.has_backlog
            assert not shell.protocol.wants_read
            shell.pump_writes()

    def test_exact_multiple(self) -> None:
        """Where the budget ends with the bytes, nothing is left over."""
        shell = Shell()
        shell.feed(bytes(4 * FRAMES_PER_TURN))
        assert not shell.protocol.has_backlog
        assert shell.steps == 1
        assert shell.held == 0

    @pytest.mark.parametrize("extra", [1, 3, 4, 5, 7, 50])
    def test_rest_behind_it(self, extra: int) -> None:
        """What follows the backlog, whole or not, is taken for what it is."""
        stream = bytes(4 * FRAMES_PER_TURN) + patterned(60)
        shell = Shell()
        shell.feed(stream[: 4 * FRAMES_PER_TURN + extra])
        assert shell.sent == bytes(4 * FRAMES_PER_TURN)
        assert shell.protocol.wants_read
        shell.feed(stream[4 * FRAMES_PER_TURN + extra :])
        assert shell.sent == stream

    def test_large_frame_behind_it(self) -> None:
        """A large frame that begins in the same segment is collected as always."""
        stream = bytes(4 * 3000) + patterned(500_000)
        shell = Shell(segments=[100_000] * 10)
        shell.feed(stream)
        assert shell.sent == stream

    def test_behind_a_peer_that_does_not_read(self) -> None:
        """Its echoes share a buffer while the rest is looked at: two are held, not four."""
        stream = patterned(64) * (RECEIVE_BYTES // 68)
        shell = Shell()
        shell.room = 0
        shell.feed(stream)
        assert shell.protocol.unsent_bytes >= 3 * RECEIVE_BYTES // 4
        assert shell.held <= 2 * (RECEIVE_BYTES + HEADROOM_BYTES)
        shell.make_room()
        assert shell.sent == stream

    def test_pressure(self) -> None:
        """A backlog waits while memory is short."""
        shell = Shell()
        shell.inbox += bytes(4 * 2 * FRAMES_PER_TURN)
        shell.receive()
        shell.call(lambda: shell.protocol.pause(shell.now))
        assert not shell.protocol.has_backlog
        shell.call(lambda: shell.protocol.unpause(shell.now))
        assert shell.protocol.has_backlog


class TestConnections:
    """Bytes of one connection must never reach another."""

    def test_interleaved(self) -> None:
        """Two connections over one pool, cut into pieces and stalled, get each its own bytes."""
        first = Shell(SMALL, takes=[11, 0, 700] * 99)
        shells = [first, Shell(SMALL, pool=first.pool, takes=[0, 13, 5] * 99)]
        streams = [
            b"".join(patterned(size, seed) for size in range(0, 900, 31)) for seed in (1, 99)
        ]
        for start in range(0, len(streams[0]), 177):
            for shell, stream in zip(shells, streams, strict=True):
                shell.feed(stream[start : start + 177])
        for shell, stream in zip(shells, streams, strict=True):
            shell.finish()
            assert shell.sent == stream
        assert first.pool.held == 0


class TestEnd:
    """The first reason stays, and nothing happens after the end."""

    @pytest.mark.parametrize(
        "reason", [CloseReason.OVERLOAD, CloseReason.INTERNAL_ERROR, CloseReason.DRAIN_TIMEOUT]
    )
    def test_abort(self, reason: CloseReason) -> None:
        """An abort drops everything, whatever the reason."""
        shell = Shell(SMALL)
        shell.room = 5
        shell.feed(patterned(100) + patterned(100)[:50])
        shell.call(lambda: shell.protocol.abort(reason))
        closes(shell, reason)

    def test_first_reason_stays(self) -> None:
        """An abort does not rewrite history."""
        shell = Shell(SMALL)
        shell.room = 0
        shell.feed(patterned(10))
        shell.half_close()
        shell.call(lambda: shell.protocol.abort(CloseReason.OVERLOAD))
        closes(shell, CloseReason.PEER_CLOSED)

    def test_nothing_after_the_end(self) -> None:
        """Events after the end raise or do nothing, and change nothing."""
        shell = Shell(EchoSettings(lifetime_s=50.0))
        shell.room = 0
        shell.feed(patterned(10) + patterned(10)[:5])
        protocol = shell.protocol
        shell.call(protocol.receive_reset)
        before = shell.everything()
        late = shell.now + 1000.0
        illegal: list[Callable[[], None]] = [
            protocol.receive_reset,
            lambda: protocol.receive_eof(late),
            lambda: protocol.abort(CloseReason.OVERLOAD),
            lambda: protocol.drain(late),
        ]
        for event in illegal:
            with pytest.raises(IllegalTransitionError):
                event()
            assert shell.everything() == before
        harmless: list[Callable[[], None]] = [
            lambda: protocol.bytes_sent(10, late),
            lambda: protocol.resume(late),
            lambda: protocol.pause(late),
            lambda: protocol.unpause(late),
            lambda: protocol.handle_deadline(late),
            lambda: protocol.advance(late),
        ]
        for event in harmless:
            event()
            assert shell.everything() == before

    def test_end_of_file_where_nothing_is_read(self) -> None:
        """An end of file in a state that does not read is a defect of the caller, and no more."""
        shell = Shell(SMALL)
        shell.room = 0
        shell.feed(patterned(10) + encode_header(4097))
        before = shell.everything()
        with pytest.raises(IllegalTransitionError):
            shell.protocol.receive_eof(shell.now)
        assert shell.everything() == before

    def test_early_deadline(self) -> None:
        """A timer that fires too early finds nothing to do."""
        shell = Shell(SMALL)
        shell.room = 0
        shell.feed(patterned(10) + patterned(10)[:5])
        before = shell.everything()
        shell.protocol.handle_deadline(shell.now + 1.0)
        assert not shell.protocol.changed
        assert shell.everything() == before

    def test_resume_without_backlog(self) -> None:
        """A wake-up for a backlog that is gone does nothing."""
        shell = Shell(SMALL)
        for data in (b"", patterned(10)[:5]):
            shell.feed(data)
            before = shell.everything()
            shell.resume()
            assert shell.everything() == before

    def test_nothing_sent(self) -> None:
        """A send that took nothing is no progress and changes nothing."""
        shell = Shell(SMALL)
        shell.room = 0
        shell.feed(patterned(10))
        before = shell.everything()
        shell.wait(1.0)
        assert shell.flush() == 0
        assert not shell.protocol.changed
        assert shell.everything() == before
