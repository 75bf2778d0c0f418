"""What patience a peer meets, and how the operator ends a connection: the rows about time."""

import math

import pytest

from lpechod.wire.echo import FRAMES_PER_TURN, EchoProtocol
from lpechod.wire.frames import encode_header
from lpechod.wire.settings import EchoSettings
from lpechod.wire.states import CloseReason, State
from tests.wire.driver import SMALL, START, Shell, closes, patterned, state

MOMENT = 1 / 1024
LATER = START + 1e6


class TestIdle:
    """Sends nothing, with nothing pending, for `timeouts.idle`: closes."""

    def test_from_the_start(self) -> None:
        """A peer that never sends is idle from the first moment."""
        shell = Shell(SMALL)
        assert shell.wait_for_deadline() == SMALL.idle_s
        closes(shell, CloseReason.IDLE_TIMEOUT)

    def test_any_frame_counts(self) -> None:
        """Each frame starts the time afresh; a moment before its end nothing happens."""
        shell = Shell(SMALL)
        for _ in range(5):
            shell.wait(SMALL.idle_s - MOMENT)
            shell.feed(patterned(0))
        assert state(shell) is State.OPEN
        assert shell.wait_for_deadline() == SMALL.idle_s

    def test_not_inside_a_frame(self) -> None:
        """Inside a frame another time counts, however short the idle time is."""
        shell = Shell(EchoSettings(idle_s=1.0, frame_s=8.0))
        shell.feed(b"\0")
        shell.wait(2.0)
        assert state(shell) is State.OPEN
        assert shell.wait_for_deadline() == 6.0
        closes(shell, CloseReason.FRAME_TIMEOUT)

    def test_not_with_echoes_pending(self) -> None:
        """Who has echoes to read is not idle, and is given the whole time after the last one."""
        shell = Shell(EchoSettings(idle_s=1.0, write_s=8.0))
        shell.room = 0
        shell.feed(patterned(10))
        shell.wait(5.0)
        assert state(shell) is State.OPEN
        shell.make_room()
        assert shell.wait_for_deadline() == 1.0
        closes(shell, CloseReason.IDLE_TIMEOUT)

    def test_not_while_we_pause(self) -> None:
        """Time in which we do not read is not idle, and afterwards it starts afresh."""
        shell = Shell(SMALL)
        shell.wait(SMALL.idle_s - 1)
        shell.call(lambda: shell.protocol.pause(shell.now))
        assert math.isinf(shell.protocol.next_deadline())
        shell.wait(SMALL.idle_s)
        shell.call(lambda: shell.protocol.unpause(shell.now))
        assert shell.wait_for_deadline() == SMALL.idle_s

    def test_off(self) -> None:
        """An infinite time never ends."""
        shell = Shell(EchoSettings(idle_s=math.inf))
        assert math.isinf(shell.protocol.next_deadline())
        shell.wait(1e9)
        assert state(shell) is State.OPEN


class TestDribble:
    """Starts a frame and dribbles: `timeouts.frame` plus ``L / timeouts.min_rate``."""

    @pytest.mark.parametrize("have", [1, 2, 3])
    def test_header_incomplete(self, have: int) -> None:
        """Until its header is there a frame may take `timeouts.frame`."""
        shell = Shell(SMALL)
        shell.feed(encode_header(4096)[:have])
        assert shell.wait_for_deadline() == SMALL.frame_s
        closes(shell, CloseReason.FRAME_TIMEOUT)

    @pytest.mark.parametrize("length", [1, 512, 4096])
    def test_body(self, length: int) -> None:
        """With its header a frame may take as long as its body takes at the lowest rate, too."""
        shell = Shell(SMALL)
        shell.feed(encode_header(length))
        assert shell.wait_for_deadline() == SMALL.frame_s + length / 512
        closes(shell, CloseReason.FRAME_TIMEOUT)

    def test_counts_from_the_first_byte(self) -> None:
        """Bytes of the same frame do not start the time afresh, or a dribbler could live on it."""
        shell = Shell(SMALL)
        data = patterned(1024)
        shell.feed(data[:1])
        for byte in data[1:10]:
            shell.wait(1.0)
            shell.feed(bytes([byte]))
            if shell.protocol.close_reason is not None:
                break
        assert state(shell) is State.OPEN
        assert shell.wait_for_deadline() == SMALL.frame_s + 2.0 - 9.0
        closes(shell, CloseReason.FRAME_TIMEOUT)

    def test_each_frame_has_its_own_time(self) -> None:
        """A frame that begins where another ends begins its time there."""
        shell = Shell(SMALL)
        data = patterned(512)
        shell.feed(data[:100])
        for _ in range(5):
            shell.wait(SMALL.frame_s)
            shell.feed(data[100:] + data[:100])
        assert shell.wait_for_deadline() == SMALL.frame_s + 1.0
        assert shell.sent == data * 5
        closes(shell, CloseReason.FRAME_TIMEOUT)

    def test_not_early(self) -> None:
        """A moment before its end the frame is taken."""
        shell = Shell(SMALL)
        shell.feed(patterned(512)[:-1])
        shell.wait(SMALL.frame_s + 1.0 - MOMENT)
        shell.feed(patterned(512)[-1:])
        assert shell.sent == patterned(512)

    def test_whole_frames_before_it_go_out(self) -> None:
        """Echoes that are pending go out before the connection ends."""
        shell = Shell(SMALL)
        shell.room = 0
        shell.feed(patterned(10) + patterned(10)[:5])
        shell.wait_for_deadline()
        assert state(shell) is State.FLUSHING
        shell.make_room()
        assert shell.sent == patterned(10)
        closes(shell, CloseReason.FRAME_TIMEOUT)

    def test_not_while_we_pause(self) -> None:
        """Time in which reading is paused, for whatever cause, is not charged to the frame."""
        shell = Shell(SMALL)
        shell.feed(patterned(512)[:100])
        shell.wait(3.0)
        shell.call(lambda: shell.protocol.pause(shell.now))
        shell.wait(1000.0)
        assert state(shell) is State.OPEN
        shell.call(lambda: shell.protocol.unpause(shell.now))
        assert shell.wait_for_deadline() == SMALL.frame_s + 1.0 - 3.0

    def test_not_while_two_causes_pause(self) -> None:
        """Two pauses that overlap count as one, from the first's beginning to the second's end."""
        shell = Shell(EchoSettings(high_watermark_bytes=50, low_watermark_bytes=10, write_s=1e4))
        shell.room = 0
        shell.feed(patterned(50) + patterned(1024)[:7])
        shell.wait(100.0)
        shell.call(lambda: shell.protocol.pause(shell.now))
        shell.wait(100.0)
        shell.call(lambda: shell.protocol.unpause(shell.now))
        shell.wait(100.0)
        shell.call(lambda: shell.protocol.pause(shell.now))
        shell.wait(100.0)
        shell.make_room()
        assert not shell.protocol.wants_read
        shell.wait(100.0)
        shell.call(lambda: shell.protocol.unpause(shell.now))
        assert shell.wait_for_deadline() == 30.0 + 1024 / 1024

    def test_not_behind_the_high_watermark(self) -> None:
        """A frame that began before reading paused at the watermark loses no time by that."""
        shell = Shell(SMALL)
        shell.room = 0
        shell.feed(patterned(2044) + patterned(512)[:7])
        shell.wait(15.0)
        shell.make_room()
        assert shell.wait_for_deadline() == SMALL.frame_s + 1.0

    def test_not_for_our_backlog(self) -> None:
        """What has arrived and we have not looked at is no fault of the peer."""
        shell = Shell(SMALL)
        shell.inbox += bytes(4 * 2 * FRAMES_PER_TURN)
        shell.receive()
        assert shell.protocol.has_backlog
        assert math.isinf(shell.protocol.next_deadline())

    def test_not_behind_our_backlog(self) -> None:
        """A frame that begins behind it has its full time from when we have come to look at it."""
        shell = Shell(SMALL)
        shell.inbox += bytes(4 * FRAMES_PER_TURN) + patterned(512)[:7]
        shell.receive()
        assert shell.protocol.has_backlog
        shell.wait(15.0)
        shell.resume()
        assert shell.wait_for_deadline() == SMALL.frame_s + 1.0


class TestLifetime:
    """Lives past `timeouts.lifetime` (off by default): closes at the next frame boundary."""

    SETTINGS = EchoSettings(
        lifetime_s=100.0, idle_s=1000.0, high_watermark_bytes=2048, low_watermark_bytes=512
    )

    def test_off_by_default(self) -> None:
        """Without being asked for, no connection has a lifetime."""
        assert math.isinf(EchoSettings().lifetime_s)

    def test_at_a_boundary(self) -> None:
        """Between two frames it is closed when its time has come."""
        shell = Shell(self.SETTINGS)
        shell.feed(patterned(10))
        assert shell.wait_for_deadline() == 100.0
        closes(shell, CloseReason.LIFETIME)

    def test_inside_a_frame(self) -> None:
        """A frame that has begun is finished and echoed, and no other."""
        shell = Shell(self.SETTINGS)
        shell.wait(90.0)
        shell.feed(patterned(100)[:50])
        shell.wait(10.0)
        assert state(shell) is State.DRAINING
        shell.feed(patterned(100)[50:] + patterned(7))
        assert shell.sent == patterned(100)
        closes(shell, CloseReason.LIFETIME)

    @pytest.mark.parametrize("have", [1, 2, 3])
    def test_inside_a_header(self, have: int) -> None:
        """A peer that pipelines cannot hide the boundary by being inside a header each time."""
        shell = Shell(self.SETTINGS)
        shell.wait(90.0)
        shell.feed(patterned(100)[:have])
        shell.wait(10.0)
        shell.feed(patterned(100)[have:] + patterned(0)[:have])
        assert shell.sent == patterned(100)
        closes(shell, CloseReason.LIFETIME)

    def test_dribbling(self) -> None:
        """A frame that is not finished in its time ends the connection for that reason."""
        shell = Shell(self.SETTINGS)
        shell.wait(90.0)
        shell.feed(patterned(100)[:50])
        shell.wait(10.0)
        shell.wait_for_deadline()
        closes(shell, CloseReason.FRAME_TIMEOUT)

    def test_with_echoes_pending(self) -> None:
        """Pending echoes go out, but a peer that always has some cannot put its end off."""
        shell = Shell(self.SETTINGS)
        shell.wait(90.0)
        shell.room = 0
        shell.feed(patterned(10))
        shell.wait(10.0)
        assert state(shell) is State.FLUSHING
        shell.feed(patterned(20))
        shell.make_room()
        assert shell.sent == patterned(10)
        closes(shell, CloseReason.LIFETIME)

    def test_while_flushing(self) -> None:
        """A connection that is ended already is not ended for another reason."""
        shell = Shell(self.SETTINGS)
        shell.wait(90.0)
        shell.room = 0
        shell.feed(patterned(10) + encode_header(1 << 21))
        shell.wait(10.0)
        assert state(shell) is State.FLUSHING
        shell.make_room()
        closes(shell, CloseReason.FRAME_TOO_LARGE)

    def test_then_drained(self) -> None:
        """A drain that follows does not take the reason away."""
        shell = Shell(self.SETTINGS)
        shell.wait(90.0)
        shell.feed(patterned(10)[:5])
        shell.wait(10.0)
        shell.call(lambda: shell.protocol.drain(LATER))
        shell.feed(patterned(10)[5:])
        closes(shell, CloseReason.LIFETIME)


class TestOverdue:
    """Who may be closed to make room for others, and since when."""

    SETTINGS = EchoSettings(
        idle_s=300.0,
        overload_idle_s=8.0,
        frame_s=30.0,
        overload_frame_s=4.0,
        min_rate_bytes_per_s=512,
        max_frame_bytes=4096,
    )

    def overdue_in(self, shell: Shell) -> float:
        """Return in how many seconds a connection will be overdue."""
        return shell.protocol.overdue_at() - shell.now

    def test_from_the_start(self) -> None:
        """A peer that never sends is overdue after the shorter idle time."""
        assert self.overdue_in(Shell(self.SETTINGS)) == 8.0

    def test_any_frame_counts(self) -> None:
        """Each frame starts the time afresh."""
        shell = Shell(self.SETTINGS)
        shell.wait(20.0)
        assert self.overdue_in(shell) == -12.0
        shell.feed(patterned(0))
        assert self.overdue_in(shell) == 8.0

    def test_inside_a_frame(self) -> None:
        """A frame has the shorter frame time from its first byte on, and what its length adds."""
        shell = Shell(self.SETTINGS)
        shell.wait(20.0)
        shell.feed(encode_header(1024)[:2])
        assert self.overdue_in(shell) == 4.0
        shell.wait(1.0)
        shell.feed(encode_header(1024)[2:])
        assert self.overdue_in(shell) == 4.0 - 1.0 + 2.0

    def test_not_with_echoes_to_take(self) -> None:
        """Who has echoes to read is not idle, whatever it sends."""
        shell = Shell(self.SETTINGS)
        shell.room = 0
        shell.feed(patterned(10))
        assert math.isinf(shell.protocol.overdue_at())
        shell.make_room()
        assert self.overdue_in(shell) == 8.0

    def test_not_while_we_pause(self) -> None:
        """Time in which we do not read is not counted against the peer."""
        shell = Shell(self.SETTINGS)
        shell.call(lambda: shell.protocol.pause(shell.now))
        shell.wait(20.0)
        assert math.isinf(shell.protocol.overdue_at())
        shell.call(lambda: shell.protocol.unpause(shell.now))
        assert self.overdue_in(shell) == 8.0

    def test_frame_that_we_paused_in(self) -> None:
        """A frame gets the time back in which we did not read."""
        shell = Shell(self.SETTINGS)
        shell.feed(b"\0")
        shell.wait(1.0)
        shell.call(lambda: shell.protocol.pause(shell.now))
        shell.wait(20.0)
        shell.call(lambda: shell.protocol.unpause(shell.now))
        assert self.overdue_in(shell) == 3.0

    def test_before_the_first_frame(self) -> None:
        """What precedes the first frame counts as idle time, since the peer has connected."""
        shell = Shell(self.SETTINGS)
        protocol = EchoProtocol(
            self.SETTINGS, shell.pool, shell.tally, shell, shell.now, handshake=True
        )
        assert protocol.overdue_at() == shell.now + 8.0
        protocol.established(shell.now + 2.0)
        assert protocol.overdue_at() == shell.now + 10.0

    def test_draining(self) -> None:
        """A drain waits for a frame no longer than an overload does."""
        shell = Shell(self.SETTINGS)
        shell.feed(b"\0")
        shell.call(lambda: shell.protocol.drain(LATER))
        assert self.overdue_in(shell) == 4.0

    @pytest.mark.parametrize("room", [0, math.inf])
    def test_not_when_it_is_over(self, room: float) -> None:
        """Who is being ended, by whichever side, makes room as it is."""
        ended, ending = Shell(self.SETTINGS), Shell(self.SETTINGS)
        ended.room = ending.room = room
        ended.feed(patterned(10))
        ended.half_close()
        ending.feed(patterned(10) + encode_header(4097))
        assert {state(ended), state(ending)} <= {
            State.FINISHING,
            State.FLUSHING,
            State.LINGERING,
            State.CLOSED,
        }
        assert math.isinf(ended.protocol.overdue_at())
        assert math.isinf(ending.protocol.overdue_at())

    def test_off(self) -> None:
        """Infinite times never end."""
        shell = Shell(EchoSettings(overload_idle_s=math.inf, overload_frame_s=math.inf))
        assert math.isinf(shell.protocol.overdue_at())
        shell.feed(b"\0")
        assert math.isinf(shell.protocol.overdue_at())

    def test_without_overload(self) -> None:
        """The shorter times end nothing by themselves."""
        shell = Shell(self.SETTINGS)
        shell.wait(200.0)
        assert state(shell) is State.OPEN
        assert shell.wait_for_deadline() == 100.0
        closes(shell, CloseReason.IDLE_TIMEOUT)


class TestDrain:
    """The daemon drains: closes at the next frame boundary with nothing pending."""

    def test_at_a_boundary(self) -> None:
        """Between two frames and with nothing pending it is closed at once."""
        shell = Shell(SMALL)
        shell.feed(patterned(10))
        shell.call(lambda: shell.protocol.drain(LATER))
        closes(shell, CloseReason.DRAINED)

    def test_inside_a_frame(self) -> None:
        """A frame that has begun is finished and echoed first."""
        shell = Shell(SMALL)
        shell.feed(patterned(100)[:50])
        shell.call(lambda: shell.protocol.drain(LATER))
        assert state(shell) is State.DRAINING
        assert shell.protocol.wants_read
        shell.feed(patterned(100)[50:] + patterned(7))
        assert shell.sent == patterned(100)
        closes(shell, CloseReason.DRAINED)

    def test_with_echoes_pending(self) -> None:
        """A peer with echoes pending may go on until there is a lull."""
        shell = Shell(SMALL)
        shell.room = 0
        shell.feed(patterned(10))
        shell.call(lambda: shell.protocol.drain(LATER))
        shell.feed(patterned(20))
        assert state(shell) is State.DRAINING
        shell.make_room()
        assert shell.sent == patterned(10) + patterned(20)
        closes(shell, CloseReason.DRAINED)

    def test_with_a_backlog(self) -> None:
        """Frames that have arrived are echoed before it is closed."""
        shell = Shell(SMALL)
        shell.inbox += bytes(4 * 3 * FRAMES_PER_TURN)
        shell.receive()
        shell.call(lambda: shell.protocol.drain(LATER))
        shell.pump()
        assert shell.sent == bytes(4 * 3 * FRAMES_PER_TURN)
        closes(shell, CloseReason.DRAINED)

    def test_half_close(self) -> None:
        """A peer that closes by itself meanwhile has closed by itself."""
        shell = Shell(SMALL)
        shell.feed(patterned(100)[:50])
        shell.call(lambda: shell.protocol.drain(LATER))
        shell.half_close()
        closes(shell, CloseReason.TRUNCATED_FRAME)

    def test_forced(self) -> None:
        """When the time to drain is over, whatever is pending is dropped."""
        shell = Shell(SMALL)
        shell.room = 3
        shell.feed(patterned(10) + patterned(100)[:50])
        shell.call(lambda: shell.protocol.drain(shell.now + 5.0))
        assert shell.wait_for_deadline() == 5.0
        assert state(shell) is State.CLOSED
        closes(shell, CloseReason.DRAIN_TIMEOUT)

    def test_forced_at_once(self) -> None:
        """A time that has passed already forces it at the first look."""
        shell = Shell(SMALL)
        shell.feed(patterned(100)[:50])
        shell.call(lambda: shell.protocol.drain(shell.now - 5.0))
        shell.handle_deadline()
        closes(shell, CloseReason.DRAIN_TIMEOUT)

    def test_earliest_time_counts(self) -> None:
        """A second drain can shorten the time, not extend it."""
        shell = Shell(SMALL)
        shell.feed(patterned(100)[:50])
        shell.call(lambda: shell.protocol.drain(shell.now + 6.0))
        shell.call(lambda: shell.protocol.drain(shell.now + 3.0))
        shell.call(lambda: shell.protocol.drain(shell.now + 9.0))
        assert shell.wait_for_deadline() == 3.0
        closes(shell, CloseReason.DRAIN_TIMEOUT)

    def test_while_paused(self) -> None:
        """Also a connection that may not read just now is ended in time."""
        shell = Shell(SMALL)
        shell.feed(patterned(100)[:50])
        shell.call(lambda: shell.protocol.pause(shell.now))
        shell.call(lambda: shell.protocol.drain(shell.now + 5.0))
        assert shell.wait_for_deadline() == 5.0
        closes(shell, CloseReason.DRAIN_TIMEOUT)

    def test_while_we_end_it(self) -> None:
        """A drain does not disturb a connection that is ending, beyond limiting its time."""
        shell = Shell(SMALL)
        shell.room = 0
        shell.feed(patterned(10) + encode_header(4097))
        shell.call(lambda: shell.protocol.drain(shell.now + 5.0))
        assert state(shell) is State.FLUSHING
        assert shell.wait_for_deadline() == 5.0
        closes(shell, CloseReason.FRAME_TOO_LARGE)

    def test_while_finishing(self) -> None:
        """The same for one that the peer has ended."""
        shell = Shell(SMALL)
        shell.room = 0
        shell.feed(patterned(10))
        shell.half_close()
        shell.call(lambda: shell.protocol.drain(shell.now + 5.0))
        assert state(shell) is State.FINISHING
        assert shell.wait_for_deadline() == 5.0
        closes(shell, CloseReason.PEER_CLOSED)

    def test_then_lifetime(self) -> None:
        """A lifetime that ends during a drain does not take the reason away."""
        shell = Shell(EchoSettings(lifetime_s=5.0))
        shell.feed(patterned(10)[:5])
        shell.call(lambda: shell.protocol.drain(LATER))
        assert shell.wait_for_deadline() == 5.0
        shell.feed(patterned(10)[5:])
        closes(shell, CloseReason.DRAINED)


class TestLinger:
    """A close by the daemon: end the writing side, discard until EOF or 2 s, then close."""

    def test_two_seconds_by_default(self) -> None:
        """The peer has two seconds to end its side."""
        shell = Shell()
        shell.feed(encode_header(0xFFFF_FFFF))
        assert state(shell) is State.LINGERING
        assert shell.wait_for_deadline() == 2.0
        assert state(shell) is State.CLOSED
        assert shell.protocol.close_reason is CloseReason.FRAME_TOO_LARGE

    def test_discards(self) -> None:
        """What still arrives is read, counted as received, and never echoed."""
        shell = Shell(SMALL)
        shell.feed(encode_header(4097))
        shell.feed(bytes(100_000) + patterned(10))
        assert not shell.inbox
        assert not shell.sent
        assert shell.protocol.frames == 0
        assert shell.held == 0
        assert shell.protocol.received_bytes == 4 + 100_000 + 14

    def test_is_not_extended(self) -> None:
        """Who goes on sending does not get more time."""
        shell = Shell(SMALL)
        shell.feed(encode_header(4097))
        for _ in range(3):
            shell.wait(0.5)
            shell.feed(bytes(10))
        assert shell.wait_for_deadline() == 0.5
        assert state(shell) is State.CLOSED

    def test_begins_with_our_end(self) -> None:
        """The two seconds begin when the last echo has gone, not when we decided."""
        shell = Shell(SMALL)
        shell.room = 0
        shell.feed(patterned(10) + encode_header(4097))
        shell.wait(10.0)
        shell.make_room()
        assert shell.wait_for_deadline() == 2.0

    def test_limited_by_a_drain(self) -> None:
        """The end of a drain is not put off by lingering."""
        shell = Shell(SMALL)
        shell.call(lambda: shell.protocol.drain(shell.now + 0.5))
        assert state(shell) is State.LINGERING
        assert shell.wait_for_deadline() == 0.5
        assert state(shell) is State.CLOSED
        assert shell.protocol.close_reason is CloseReason.DRAINED

    def test_reset(self) -> None:
        """A reset ends it at once, and is not the reason."""
        shell = Shell(SMALL)
        shell.feed(encode_header(4097))
        shell.call(shell.protocol.receive_reset)
        closes(shell, CloseReason.FRAME_TOO_LARGE)
