"""How much a peer can make us hold, what happens when there is no memory, and what is counted."""

from collections.abc import Callable

import pytest

from lpechod.engine.buffers import RECEIVE_BYTES
from lpechod.wire.echo import FRAMES_PER_TURN, EchoProtocol
from lpechod.wire.frames import encode_header
from lpechod.wire.settings import EchoSettings
from lpechod.wire.states import CloseReason, State
from tests.wire.driver import SMALL, START, Shell, closes, echo_of, patterned, state

MOMENT = 1 / 1024


class TestSlowReader:
    """Does not read: pauses at the high watermark, resumes under the low one, then gives up."""

    def test_pauses_at_the_high_watermark(self) -> None:
        """Reading pauses with exactly so many bytes pending, not with one less."""
        for size, wants_read in ((2043, True), (2044, False)):
            shell = Shell(SMALL)
            shell.room = 0
            shell.feed(patterned(size))
            assert shell.pending_bytes == size + 4
            assert shell.protocol.wants_read == wants_read

    def test_resumes_at_the_low_watermark(self) -> None:
        """Reading goes on with exactly so many bytes pending, not with one more."""
        shell = Shell(SMALL)
        shell.room = 0
        shell.feed(patterned(2044))
        shell.make_room(2048 - 513)
        assert shell.pending_bytes == 513
        assert not shell.protocol.wants_read
        shell.make_room(1)
        assert shell.pending_bytes == 512
        assert shell.protocol.wants_read

    def test_counts_pauses(self) -> None:
        """Each pause counts once, however long it lasts and whatever is added to it."""
        shell = Shell(SMALL)
        shell.room = 0
        shell.feed(patterned(2044))
        assert shell.tally.backpressure_pauses == 1
        shell.call(lambda: shell.protocol.pause(shell.now))
        shell.call(lambda: shell.protocol.unpause(shell.now))
        shell.make_room(100)
        assert shell.tally.backpressure_pauses == 1
        shell.make_room()
        shell.room = 0
        shell.feed(patterned(3000))
        assert shell.tally.backpressure_pauses == 2

    def test_no_pause_where_nothing_is_read(self) -> None:
        """A connection that we end anyway is not paused for what it has pending."""
        shell = Shell(SMALL)
        shell.room = 0
        shell.feed(patterned(3000) + encode_header(4097))
        assert state(shell) is State.FLUSHING
        assert shell.tally.backpressure_pauses == 0

    def test_bounded_memory(self) -> None:
        """A peer that only sends can make us hold one frame more than the high watermark."""
        shell = Shell(SMALL)
        shell.room = 0
        for _ in range(100):
            shell.feed(patterned(1500))
        assert shell.pending_bytes <= 2048 + 4100
        assert shell.inbox

    @pytest.mark.parametrize("pieces", [(1, 3), (2, 2), (3, 1), (4,), (1, 1, 1, 1)])
    def test_bounded_memory_for_tiny_echoes(self, pieces: tuple[int, ...]) -> None:
        """Empty frames, however they are cut, take not much more memory than they have bytes."""
        shell = Shell(EchoSettings(high_watermark_bytes=40_000))
        shell.room = 0
        while shell.protocol.wants_read:
            for piece in pieces:
                shell.feed(bytes(piece))
        assert shell.pending_bytes == shell.settings.high_watermark_bytes
        assert shell.held < 1.2 * shell.pending_bytes

    def test_bounded_memory_for_a_backlog(self) -> None:
        """A segment full of empty frames takes not much more memory than it has bytes."""
        shell = Shell(EchoSettings())
        shell.room = 0
        shell.feed(bytes(RECEIVE_BYTES))
        assert shell.pending_bytes == RECEIVE_BYTES
        assert shell.held < 2.1 * RECEIVE_BYTES

    def test_everything_arrives(self) -> None:
        """A peer that reads in small sips gets all of it, in order."""
        stream = b"".join(patterned(size, size) for size in range(0, 4000, 37))
        shell = Shell(SMALL, segments=[700] * 999, takes=[97, 0] * 5000)
        shell.feed(stream)
        shell.finish()
        assert shell.sent == stream
        assert shell.tally.backpressure_pauses > 10

    def test_many_buffers(self) -> None:
        """A long queue is offered in pieces that a gathering write can take."""
        shell = Shell(EchoSettings(high_watermark_bytes=1 << 20))
        shell.room = 0
        for _ in range(200):
            shell.feed(patterned(4000))
        assert len(shell.protocol.data_to_send()) == 64
        shell.make_room()
        assert shell.sent == patterned(4000) * 200

    def test_back_to_the_direct_path(self) -> None:
        """Once the queue is empty, frames again come and go without being copied."""
        shell = Shell(SMALL)
        shell.room = 0
        shell.feed(patterned(100))
        shell.make_room()
        shell.inbox += patterned(10)
        shell.receive()
        assert shell.tally.delayed_frames == 1
        assert not shell.protocol.changed
        assert shell.sent == patterned(100) + patterned(10)

    def test_paused_backlog(self) -> None:
        """Frames that are already here are not looked at either while reading is paused."""
        shell = Shell(SMALL)
        shell.room = 0
        shell.feed(bytes(4 * 5 * FRAMES_PER_TURN))
        assert not shell.protocol.has_backlog
        assert not shell.protocol.wants_read
        assert shell.protocol.frames == FRAMES_PER_TURN
        shell.make_room()
        assert shell.sent == bytes(4 * 5 * FRAMES_PER_TURN)

    def test_write_timeout(self) -> None:
        """A peer that takes nothing for `timeouts.write` is ended, and its memory freed."""
        shell = Shell(SMALL)
        shell.room = 5
        shell.feed(patterned(1000) + patterned(100)[:50])
        assert shell.wait_for_deadline() == min(SMALL.write_s, SMALL.frame_s + 100 / 512)
        shell = Shell(SMALL)
        shell.room = 5
        shell.feed(patterned(1000))
        assert shell.wait_for_deadline() == SMALL.write_s
        assert state(shell) is State.LINGERING
        assert shell.held == 0
        closes(shell, CloseReason.WRITE_TIMEOUT)

    def test_write_timeout_not_early(self) -> None:
        """A moment before the time is over nothing happens."""
        shell = Shell(SMALL)
        shell.room = 5
        shell.feed(patterned(1000))
        shell.wait(SMALL.write_s - MOMENT)
        assert state(shell) is State.OPEN
        shell.wait(MOMENT)
        assert shell.protocol.close_reason is CloseReason.WRITE_TIMEOUT

    def test_any_progress_counts(self) -> None:
        """One byte taken starts the time afresh, and EAGAIN does not."""
        shell = Shell(SMALL)
        shell.room = 0
        shell.feed(patterned(1000))
        shell.wait(SMALL.write_s - 1)
        shell.make_room(1)
        shell.wait(1)
        assert state(shell) is State.OPEN
        shell.writable()
        assert shell.wait_for_deadline() == SMALL.write_s - 1
        assert shell.protocol.close_reason is CloseReason.WRITE_TIMEOUT

    def test_write_timeout_after_half_close(self) -> None:
        """A peer that has half-closed and takes nothing is closed, for the reason it had given."""
        shell = Shell(SMALL)
        shell.room = 5
        shell.feed(patterned(1000))
        shell.half_close()
        assert shell.wait_for_deadline() == SMALL.write_s
        assert state(shell) is State.CLOSED
        assert shell.protocol.close_reason is CloseReason.PEER_CLOSED
        assert shell.held == 0

    def test_write_timeout_while_flushing(self) -> None:
        """A peer that we end waits for its echoes no longer than any other."""
        shell = Shell(SMALL)
        shell.room = 5
        shell.feed(patterned(1000) + encode_header(4097))
        assert shell.wait_for_deadline() == SMALL.write_s
        assert shell.fin_sent
        closes(shell, CloseReason.FRAME_TOO_LARGE)


class TestMemory:
    """Memory grows with what arrived, never with what was announced."""

    SMALLEST = 1024 + 64

    @pytest.mark.parametrize("segment", [1, 100, 1087, 1088, 4096, 50_000, RECEIVE_BYTES])
    def test_follows_what_arrived(self, segment: int) -> None:
        """After a header of 1 MiB it is at most four times the bytes that arrived."""
        shell = Shell()
        data = patterned(1 << 20)
        end = min(len(data) - 1, 5000 * segment)
        for start in range(0, end, segment):
            shell.feed(data[start : min(start + segment, end)])
            have = min(start + segment, end)
            assert shell.held <= max(4 * have, self.SMALLEST)

    def test_announcing_costs_nothing(self) -> None:
        """A header alone takes the smallest buffer, whatever it announces."""
        for length in (1, 1000, 1 << 20):
            shell = Shell()
            shell.feed(encode_header(length))
            assert shell.held == self.SMALLEST

    def test_a_frame_needs_no_more_than_its_size(self) -> None:
        """A body whose size is a power of two takes a buffer of that size with its headroom."""
        shell = Shell()
        shell.feed(patterned(1 << 20)[:-1])
        assert shell.held == (1 << 20) + 64

    def test_growing_keeps_the_bytes(self) -> None:
        """Each growth of the buffer carries over what has arrived."""
        for size in (1083, 1084, 1085, 4156, 4157, 70_000):
            shell = Shell(segments=[1] * 3000)
            shell.feed(patterned(size))
            assert shell.sent == patterned(size)

    def test_buffers_are_given_back_as_they_empty(self) -> None:
        """A queue gives each buffer back with its last byte."""
        shell = Shell()
        shell.room = 0
        for _ in range(10):
            shell.feed(patterned(10_000))
        held = shell.pool.held
        shell.make_room(50_020)
        assert shell.held <= held / 2
        shell.make_room()
        assert shell.held == 0


def fill_partial(shell: Shell) -> None:
    """Keep the beginning of a frame."""
    shell.feed(patterned(100)[:50])


def grow_partial(shell: Shell) -> None:
    """Outgrow the buffer of a partial frame."""
    shell.feed(patterned(4000)[:600])
    shell.feed(patterned(4000)[600:1200])


def queue_echo(shell: Shell) -> None:
    """Queue what a send did not take."""
    shell.room = 5
    shell.feed(patterned(100))


def queue_more(shell: Shell) -> None:
    """Queue frames behind others."""
    shell.room = 5
    shell.feed(patterned(1900))
    shell.feed(patterned(3000))


def queue_and_keep(shell: Shell) -> None:
    """Queue frames and keep the beginning of another."""
    shell.room = 5
    shell.feed(patterned(100))
    shell.feed(patterned(30) + patterned(100)[:50])


def keep_backlog(shell: Shell) -> None:
    """Keep what one turn has left over."""
    shell.feed(bytes(4 * FRAMES_PER_TURN * 3))


class TestOverload:
    """Memory that is not to be had ends this connection, and nothing else."""

    @pytest.mark.parametrize(
        ("limit", "scenario"),
        [
            (0, fill_partial),
            (1087, fill_partial),
            (1088, grow_partial),
            (4160, grow_partial),
            (0, queue_echo),
            (4159, queue_echo),
            (4160, queue_more),
            (8319, queue_more),
            (4160, queue_and_keep),
            (0, keep_backlog),
            (16_448, keep_backlog),
        ],
    )
    def test_ends_the_connection(self, limit: int, scenario: Callable[[Shell], None]) -> None:
        """Wherever memory runs out, all is given back and the reason is `overload`."""
        shell = Shell(SMALL, limit=limit)
        scenario(shell)
        assert state(shell) is State.CLOSED
        closes(shell, CloseReason.OVERLOAD)

    def test_any_limit(self) -> None:
        """At every limit a scenario either works or ends in `overload`, and never raises."""
        outcomes = set()
        for limit in range(0, 40_000, 500):
            shell = Shell(SMALL, limit=limit, segments=[50, 1100, 3000] * 9, takes=[0, 5] * 9)
            shell.feed(b"".join(patterned(size) for size in (10, 1500, 0, 3000, 40, 4000)))
            shell.finish()
            outcomes.add(shell.protocol.close_reason)
            assert echo_of(shell).startswith(bytes(shell.sent))
            assert shell.held == 0
        assert outcomes == {CloseReason.OVERLOAD, None}

    def test_whole_frames_are_returned_all_the_same(self) -> None:
        """Frames that arrived whole can be sent although the rest of the segment cannot be kept."""
        shell = Shell(SMALL, limit=0)
        shell.feed(patterned(100) + patterned(100)[:50])
        assert shell.sent == patterned(100)
        assert shell.protocol.close_reason is CloseReason.OVERLOAD

    def test_unsent_after_the_end(self) -> None:
        """Echoes that were returned with the end of the connection, and not taken, are unsent."""
        shell = Shell(SMALL, limit=0)
        shell.room = 30
        shell.feed(patterned(10) + patterned(100) + patterned(100)[:50])
        assert shell.protocol.unsent_bytes == 14 + 104 - 30
        assert shell.tally.delayed_frames == 1
        assert shell.held == 0

    def test_no_memory_needed(self) -> None:
        """With no memory at all, frames that come and go whole are echoed."""
        shell = Shell(SMALL, limit=0)
        for size in (0, 10, 4096):
            shell.feed(patterned(size))
        assert shell.sent == patterned(0) + patterned(10) + patterned(4096)

    @pytest.mark.parametrize("behind", [patterned(100)[:50], encode_header(4097)])
    def test_nothing_is_kept_after_the_end(self, behind: bytes) -> None:
        """What follows echoes that found no memory is not looked at, though now there is some."""
        shell = Shell(SMALL, limit=6000)
        shell.room = 5
        shell.feed(patterned(1900))
        shell.feed(patterned(3000) + behind)
        closes(shell, CloseReason.OVERLOAD)

    def test_keeps_the_first_reason(self) -> None:
        """Running out of memory while ending does not change why it ends."""
        shell = Shell(SMALL, limit=0)
        shell.room = 5
        shell.feed(patterned(100) + encode_header(4097))
        closes(shell, CloseReason.FRAME_TOO_LARGE)


class TestCounts:
    """What the tally says, beyond what `Shell` checks after each call."""

    def test_at_once(self) -> None:
        """Frames that leave in the turn they came in are not delayed."""
        shell = Shell(SMALL)
        shell.feed(patterned(10) + patterned(0))
        assert shell.tally.frames == 2
        assert shell.tally.delayed_frames == 0
        assert shell.tally.unsent_bytes == 0
        assert shell.tally.echoed_bytes == 18

    @pytest.mark.parametrize(
        ("taken", "late"), [(0, 3), (13, 3), (14, 2), (17, 2), (18, 1), (41, 1), (42, 0)]
    )
    def test_delayed(self, taken: int, late: int) -> None:
        """A frame is delayed if its last byte was not taken at once."""
        shell = Shell(SMALL)
        shell.room = taken
        shell.feed(patterned(10) + patterned(0) + patterned(20))
        assert shell.tally.delayed_frames == late
        assert shell.tally.unsent_bytes == 42 - taken

    def test_delays(self) -> None:
        """Each delayed frame is observed once, when it has gone, with the time it waited."""
        shell = Shell(SMALL)
        shell.room = 0
        shell.feed(patterned(10) + patterned(0))
        shell.wait(0.5)
        assert sum(shell.tally.echo_delays.counts) == 0
        shell.make_room()
        assert sum(shell.tally.echo_delays.counts) == 2
        assert shell.tally.echo_delays.seconds == 1.0

    def test_lost(self) -> None:
        """Echoes that were dropped stay unsent, and are not observed."""
        shell = Shell(SMALL)
        shell.room = 4
        shell.feed(patterned(10))
        shell.call(lambda: shell.protocol.abort(CloseReason.OVERLOAD))
        assert shell.tally.unsent_bytes == 10
        assert sum(shell.tally.echo_delays.counts) == 0

    def test_shared_by_connections(self) -> None:
        """Connections of a worker count into one tally, and each for itself."""
        shell = Shell(SMALL)
        other = EchoProtocol(SMALL, shell.pool, shell.tally, "other", START)
        shell.feed(patterned(10))
        other.receive_into[:9] = patterned(5)
        other.receive_data(9, START)
        assert (shell.protocol.frames, other.frames, shell.tally.frames) == (1, 1, 2)
        assert shell.tally.received_bytes == 14 + 9
