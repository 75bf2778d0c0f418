"""What a peer does and what it gets for it: the contract of the wire, row by row, on every poller.

Each class is one row. Sockets are real, of this kernel; time is not. What a connection ended with
is read from its line in the log, and `EchoServer.finish` compares that line and all counters with
what the clients saw.
"""

import math
import socket
from dataclasses import replace

import pytest

from lpechod.engine.buffers import RECEIVE_BYTES
from lpechod.net.entrance import OPEN_TO_ALL, Entrance
from lpechod.wire.settings import EchoSettings
from lpechod.wire.states import CloseReason, State
from tests.net.conftest import Serve
from tests.net.harness import (
    POLLERS,
    PROXIED,
    PROXIED_TLS,
    SECURED,
    Client,
    EchoServer,
    KernelBuffers,
    assert_same,
    body_of,
    frame,
)

SMALL = EchoSettings(
    max_frame_bytes=4096,
    high_watermark_bytes=8192,
    low_watermark_bytes=2048,
    lifetime_s=math.inf,
)
"""The time-outs are the defaults: idle 300 s, frame 30 s and 1024 B/s, write 30 s, linger 2 s."""

TICK = 0.1
"""Deadlines are met up to a tick late."""

MOST_READ = SMALL.high_watermark_bytes + RECEIVE_BYTES + SMALL.max_frame_bytes
"""Most that is read of a peer that does not read, beyond what the kernel takes of its echoes."""

NARROW = KernelBuffers(send=8192, receive=8192)
"""Kernel buffers that fill up soon."""


ENTRANCES = {
    "direct": (OPEN_TO_ALL, list(POLLERS)),
    "proxied": (PROXIED, ["epoll", "epoll-et"]),
    "tls": (SECURED, ["epoll", "epoll-et"]),
    "proxied-tls": (PROXIED_TLS, ["epoll"]),
}
"""The wire is the same behind a PROXY header and over TLS, which know less of pollers."""

CASES = [
    pytest.param((entrance, poller), id=f"{name}-{poller}")
    for name, (entrance, pollers) in ENTRANCES.items()
    for poller in pollers
    if poller in POLLERS
]


@pytest.fixture(name="case", params=CASES)
def _case(request: pytest.FixtureRequest) -> tuple[Entrance, str]:
    entrance, poller = request.param
    return entrance, poller


@pytest.fixture(name="entrance")
def _entrance(case: tuple[Entrance, str]) -> Entrance:
    return case[0]


@pytest.fixture(name="poller_name")
def _poller_name(case: tuple[Entrance, str]) -> str:
    return case[1]


def flood(client: Client, data: bytes) -> int:
    """Send without reading until neither the kernel nor the server takes more."""
    rest = memoryview(data)
    blocked = 0
    while rest and blocked < 5:
        count = client.send_some(rest)
        rest = rest[count:]
        blocked = 0 if count or client.server.turn() else blocked + 1
    return len(data) - len(rest)


def paused(serve: Serve, echo: EchoSettings = SMALL) -> tuple[EchoServer, Client, bytes, int]:
    """Return a server that has stopped reading from a client, what it offers, and has sent."""
    server = serve(echo=echo, buffers=NARROW)
    client = server.connect(buffers=NARROW)
    stream = frame(body_of(1000)) * 3000
    sent = flood(client, stream)
    assert sent < len(stream)
    assert server.tally.backpressure_pauses == 1
    return server, client, stream, sent


class TestEmptyFrames:
    """`L = 0`: echoes the four zero bytes."""

    def test_echoed(self, serve: Serve) -> None:
        """An empty frame comes back, and the connection goes on."""
        server = serve()
        client = server.connect()
        for _ in range(3):
            client.exchange(frame(b""))

        assert server.tally.frames == 3

    def test_between_others(self, serve: Serve) -> None:
        """Empty frames keep their place among others."""
        client = serve().connect()

        client.exchange(frame(b"") + frame(b"one") + frame(b"") * 2 + frame(b"two") + frame(b""))

    def test_a_hundred_thousand_at_once(self, serve: Serve) -> None:
        """A flood of empty frames is echoed in full, each one counted."""
        server = serve()
        client = server.connect()
        client.exchange(frame(b"") * 100_000)

        assert server.tally.frames == 100_000
        assert server.tally.frame_sizes[1] == 100_000

    @pytest.mark.parametrize("more", [-4, 0, 4])
    def test_one_full_read_of_them(self, serve: Serve, more: int) -> None:
        """A read that fills the buffer and leaves frames for later turns is no dead end."""
        server = serve(buffers=KernelBuffers(receive=1 << 20))
        client = server.connect(buffers=KernelBuffers(send=1 << 20))
        server.settle()
        stream = bytes(len(server.service.pool.shared) + more)
        assert client.send_some(stream) == len(stream)

        assert_same(stream, client.receive_exactly(len(stream)))

    def test_flood_does_not_hold_up_others(self, serve: Serve) -> None:
        """While thousands of empty frames wait to be looked at, others are served each turn."""
        server = serve()
        flooder, other = server.connect(), server.connect()
        assert flooder.send_some(frame(b"") * 50_000) == 200_000
        server.turn()
        assert server.tally.frames < 50_000
        other.send_some(frame(b"other"))
        server.turn()

        assert other.receive_some() == frame(b"other")
        assert_same(frame(b"") * 50_000, flooder.receive_exactly(200_000))


class TestSplitsAndBatches:
    """Frames arrive split anywhere, or thousands in one segment: same echo."""

    def test_byte_by_byte(self, serve: Serve) -> None:
        """A frame that comes as single bytes comes back whole, with its last byte."""
        server = serve()
        client = server.connect()
        data = frame(b"dribbled")
        for byte in data[:-1]:
            client.send(bytes([byte]))
            client.expect_silence()
        client.send(data[-1:])

        assert client.receive_exactly(len(data)) == data

    def test_every_split(self, serve: Serve) -> None:
        """Wherever a stream is cut in two, the frames that are whole come back at once."""
        client = serve().connect()
        frames = [frame(b"a"), frame(b""), frame(b"bcdef"), frame(b"")]
        stream = b"".join(frames)
        for cut in range(len(stream) + 1):
            client.send(stream[:cut])
            whole = b""
            for each in frames:
                if len(whole) + len(each) > cut:
                    break
                whole += each
            assert client.receive_exactly(len(whole)) == whole
            client.expect_silence()
            client.send(stream[cut:])
            assert client.receive_exactly(len(stream) - len(whole)) == stream[len(whole) :]

    def test_second_frame_dribbled(self, serve: Serve) -> None:
        """A frame does not wait for the one that has begun behind it."""
        client = serve().connect()
        first, second = frame(b"first"), frame(b"second")
        client.send(first + second[:1])
        assert client.receive_exactly(len(first)) == first
        for byte in second[1:-1]:
            client.send(bytes([byte]))
            client.expect_silence()
        client.send(second[-1:])

        assert client.receive_exactly(len(second)) == second

    def test_thousands_in_one_segment(self, serve: Serve) -> None:
        """Thousands of frames that are read at once come back at once."""
        server = serve()
        client = server.connect()
        stream = b"".join(frame(body_of(size % 40)) for size in range(5000))
        assert client.send_some(stream) == len(stream)

        assert_same(stream, client.receive_exactly(len(stream)))
        assert server.tally.frames == 5000

    @pytest.mark.parametrize("size", [RECEIVE_BYTES - 4, RECEIVE_BYTES + 60, RECEIVE_BYTES + 61])
    def test_frame_that_fills_the_receive_buffer(self, serve: Serve, size: int) -> None:
        """A frame just as large as one read, or a byte larger, is nothing special."""
        client = serve().connect()

        client.exchange(frame(body_of(size)) + frame(b"next"))

    def test_megabytes(self, serve: Serve) -> None:
        """Frames of the largest size allowed, between small ones, come back byte for byte."""
        server = serve()
        client = server.connect()
        client.exchange((frame(body_of(1 << 20)) + frame(b"small") + frame(b"")) * 3)

        server.settle()
        assert server.service.pool.held == 0

    def test_clients_keep_apart(self, serve: Serve) -> None:
        """Twenty clients that pipeline at a time get their own bytes, and nobody else's."""
        server = serve()
        clients = [server.connect() for _ in range(20)]
        streams = [frame(bytes([number]) * 3000) * 200 for number in range(len(clients))]
        rest = [memoryview(stream) for stream in streams]
        echoes = [bytearray() for _ in clients]

        def done() -> bool:
            for number, client in enumerate(clients):
                rest[number] = rest[number][client.send_some(rest[number][:50_000]) :]
                echoes[number] += client.receive_some() or b""
            return all(map(len, echoes)) and list(map(len, echoes)) == list(map(len, streams))

        server.turn_until(done, "all echoes", [client.socket for client in clients])
        for stream, echo in zip(streams, echoes, strict=True):
            assert_same(stream, bytes(echo))


class TestTooLarge:
    """`L > max_frame`: flushes the echoes of the frames before it, then closes."""

    @pytest.mark.parametrize("length", [4097, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF])
    def test_closed(self, serve: Serve, length: int) -> None:
        """What announces too much ends the connection, after the echoes of what came before."""
        server = serve(echo=SMALL)
        client = server.connect()
        good = frame(b"good") * 2
        client.send(good + length.to_bytes(4, "big") + b"never read")

        assert client.receive_to_end() == good
        assert server.service.pool.held == 0
        client.close()
        line = server.closed(client)
        line.pop("proxy", None)
        assert line == {
            "connection": 1,
            "peer": client.name,
            "listener": server.listeners[0].name,
            "reason": "frame_too_large",
            "duration_s": 0.0,
            "frames": 2,
            "received_bytes": client.sent,
            "sent_bytes": len(good),
        }
        assert server.service.counts.closed[CloseReason.FRAME_TOO_LARGE] == 1

    def test_largest_allowed(self, serve: Serve) -> None:
        """The limit itself is allowed, and the frame behind it as well."""
        client = serve(echo=SMALL).connect()

        client.exchange(frame(body_of(4096)) + frame(body_of(4095)))

    @pytest.mark.parametrize("cut", [1, 2, 3])
    def test_split_header(self, serve: Serve, cut: int) -> None:
        """The length is judged once its last byte is there."""
        server = serve(echo=SMALL)
        client = server.connect()
        header = (4097).to_bytes(4, "big")
        client.send(header[:cut])
        client.expect_silence()
        client.send(header[cut:])

        client.expect_eof()
        client.close()
        assert server.closed(client)["reason"] == "frame_too_large"

    def test_pending_echoes_are_flushed(self, serve: Serve) -> None:
        """Echoes that wait for a slow reader reach it before the end, all of them."""
        server = serve(buffers=NARROW)
        client = server.connect(buffers=NARROW)
        good = frame(body_of(50_000)) * 2
        client.send(good + b"\xff\xff\xff\xff")
        server.settle()
        assert server.connection_of(client).protocol.unsent_bytes

        assert_same(good, client.receive_to_end())
        client.close()
        assert server.closed(client)["reason"] == "frame_too_large"

    def test_no_memory_for_an_announcement(self, serve: Serve) -> None:
        """A hundred frames announced at their largest take no more memory than has arrived."""
        server = serve()
        for _ in range(100):
            server.connect().send((1 << 20).to_bytes(4, "big") + bytes(96))
        server.settle()

        assert 0 < server.service.pool.held <= 100 * 1088


class TestHalfCloseAtABoundary:
    """Half-closes at a frame boundary: flushes every pending echo, then closes: `peer_closed`."""

    def test_nothing_pending(self, serve: Serve) -> None:
        """A peer that has nothing to come for is answered with an end of file."""
        server = serve()
        client = server.connect()
        client.exchange(frame(b"frame"))
        client.shutdown()

        client.expect_eof()
        assert server.closed(client)["reason"] == "peer_closed"

    def test_nothing_sent(self, serve: Serve) -> None:
        """A connection may end without a frame: a health check."""
        server = serve()
        client = server.connect()
        client.shutdown()

        client.expect_eof()
        line = server.closed(client)
        assert (line["reason"], line["frames"], line["sent_bytes"]) == ("peer_closed", 0, 0)

    def test_in_one_segment_with_frames(self, serve: Serve) -> None:
        """Frames and end of file that are there together are both served."""
        server = serve()
        client = server.connect()
        client.send_some(frame(b"frame") * 100)
        client.shutdown()

        assert client.receive_to_end() == frame(b"frame") * 100
        assert server.closed(client)["reason"] == "peer_closed"

    def test_before_it_was_accepted(self, serve: Serve) -> None:
        """A client that is done before it is accepted gets its echoes all the same."""
        server = serve()
        client = server.dial()
        client.send_some(frame(b"frame"))
        client.shutdown()

        assert client.receive_to_end() == frame(b"frame")

    @pytest.mark.parametrize("count", [2, 2000])
    def test_pending_echoes_are_flushed(self, serve: Serve, count: int) -> None:
        """A peer that sends everything, ends, and only then reads, gets every echo."""
        server = serve(buffers=NARROW)
        client = server.connect(buffers=NARROW)
        stream = frame(body_of(100_000 // count)) * count
        client.send(stream)
        client.shutdown()
        server.settle()
        # Over TLS the FIN is yet to come, though the stream has ended.
        assert server.connection_of(client).protocol.state in {State.FINISHING, State.FLUSHING}
        server.assert_quiet()

        assert_same(stream, client.receive_to_end())
        assert server.closed(client)["reason"] == "peer_closed"

    def test_more_frames_than_one_turn_looks_at(self, serve: Serve) -> None:
        """An end of file behind thousands of empty frames waits until all are echoed."""
        server = serve()
        client = server.connect()
        stream = frame(b"") * 50_000
        assert client.send_some(stream) == len(stream)
        client.shutdown()

        assert_same(stream, client.receive_to_end())
        assert server.closed(client)["reason"] == "peer_closed"

    def test_full_read_before_the_end(self, serve: Serve) -> None:
        """Bytes that fill one read exactly do not hide the end of file behind them."""
        server = serve()
        client = server.connect()
        shared = len(server.service.pool.shared)
        stream = frame(body_of(shared - 4))
        client.send(stream)
        client.shutdown()

        assert_same(stream, client.receive_to_end())

    def test_peer_that_never_reads_its_echoes(self, serve: Serve) -> None:
        """Pending echoes of an ended peer are held for the write time-out, and no longer."""
        # The peer's kernel may take a little more at first, too little to report as room: that is
        # found at the first deadline and is progress.
        server = serve(buffers=NARROW)
        client = server.connect(buffers=NARROW)
        client.send(frame(body_of(200_000)))
        client.shutdown()
        server.settle()
        server.pass_time(2 * (30 + TICK))

        assert server.closed(client)["reason"] == "peer_closed"


class TestHalfCloseInsideAFrame:
    """Half-closes inside a frame: flushes the whole frames, then closes: `truncated_frame`."""

    @pytest.mark.parametrize("kept", [1, 3, 4, 5, 8])
    def test_never_a_partial_frame(self, serve: Serve, kept: int) -> None:
        """What is left of a frame that was cut off is not echoed, what came before it is."""
        server = serve()
        client = server.connect()
        client.send(frame(b"whole") * 3 + frame(b"broken")[:kept])
        client.shutdown()

        assert client.receive_to_end() == frame(b"whole") * 3
        line = server.closed(client)
        assert (line["reason"], line["frames"]) == ("truncated_frame", 3)
        assert line["received_bytes"] == client.sent

    def test_pending_echoes_are_flushed(self, serve: Serve) -> None:
        """Whole frames before the broken one reach a peer that reads late."""
        server = serve(buffers=NARROW)
        client = server.connect(buffers=NARROW)
        client.send(frame(body_of(100_000)) + frame(b"broken")[:-1])
        client.shutdown()
        server.settle()
        server.assert_quiet()

        assert_same(frame(body_of(100_000)), client.receive_to_end())
        assert server.closed(client)["reason"] == "truncated_frame"

    def test_large_frame(self, serve: Serve) -> None:
        """A frame that misses its last byte of a megabyte is not echoed, and its memory is free."""
        server = serve()
        client = server.connect()
        client.send(frame(body_of(1 << 20))[:-1])
        server.settle()
        assert server.service.pool.held > 1 << 20
        client.shutdown()

        client.expect_eof()
        assert server.service.pool.held == 0
        assert server.closed(client)["reason"] == "truncated_frame"


class TestReset:
    """Resets: drops everything."""

    def test_idle(self, serve: Serve) -> None:
        """A reset of a silent connection is its end."""
        server = serve()
        client = server.connect()
        client.reset()

        assert server.closed(client)["reason"] == "reset"

    def test_inside_a_frame(self, serve: Serve) -> None:
        """A reset inside a frame frees what was kept of it."""
        server = serve()
        client = server.connect()
        client.send(frame(body_of(10_000))[:9000])
        server.settle()
        assert server.service.pool.held
        client.reset()

        assert server.closed(client)["reason"] == "reset"
        assert server.service.pool.held == 0

    def test_behind_a_frame(self, serve: Serve) -> None:
        """An echo that finds its client gone does not count as sent."""
        server = serve()
        client = server.connect()
        client.send_some(frame(b"nobody waits for this"))
        client.reset()

        line = server.closed(client)
        assert (line["reason"], line["sent_bytes"]) == ("reset", 0)

    def test_with_pending_echoes(self, serve: Serve) -> None:
        """A reset drops the echoes that wait, and what was taken by the kernel stays counted."""
        server, client, _, _ = paused(serve)
        connection = server.connection_of(client)
        taken = connection.protocol.echoed_bytes - connection.protocol.unsent_bytes
        assert connection.protocol.unsent_bytes > 0
        client.reset()

        line = server.closed(client)
        assert (line["reason"], line["sent_bytes"]) == ("reset", taken)
        assert server.service.pool.held == 0

    def test_half_closed_before(self, serve: Serve) -> None:
        """A peer that ended its side and then resets has not ended well, but it ended."""
        server = serve(buffers=NARROW)
        client = server.connect(buffers=NARROW)
        client.send(frame(body_of(100_000)))
        client.shutdown()
        server.settle()
        client.reset()

        assert server.closed(client)["reason"] == "peer_closed"

    def test_storm_before_they_are_accepted(self, serve: Serve) -> None:
        """Clients that are gone before they are accepted cost a line each and leave nothing."""
        server = serve()
        for _ in range(200):
            server.dial().reset()
        server.turn_until(lambda: server.service.counts.accepted == 200, "all accepted")
        server.settle()

        assert server.service.counts.closed[CloseReason.RESET] == 200
        assert not server.service.connections


class TestDoesNotRead:
    """Does not read: pauses at the high watermark, resumes under the low one, `write_timeout`."""

    def test_paused_and_resumed(self, serve: Serve) -> None:
        """A peer that does not read is not read from; when it reads again, nothing is missing."""
        server, client, stream, sent = paused(serve)
        protocol = server.connection_of(client).protocol
        assert SMALL.high_watermark_bytes <= protocol.unsent_bytes <= MOST_READ
        assert not protocol.wants_read

        whole = sent - sent % 1004
        assert_same(stream[:whole], client.receive_exactly(whole))
        client.send(stream[sent : whole + 1004])
        assert_same(stream[:1004], client.receive_exactly(1004))
        assert protocol.wants_read

    def test_pauses_and_resumes_at_the_watermarks(self, serve: Serve) -> None:
        """Between the two marks nothing changes, so that reading does not flap."""
        server, client, stream, sent = paused(serve)
        protocol = server.connection_of(client).protocol
        received = 0
        rest = memoryview(stream)[sent:][:100_000]
        resumed = 0

        def step() -> bool:
            nonlocal received, rest, resumed
            received += len(client.receive_some(500) or b"")
            rest = rest[client.send_some(rest) :]
            reading = protocol.wants_read
            server.turn()
            if protocol.unsent_bytes >= SMALL.high_watermark_bytes:
                assert not protocol.wants_read
            elif reading or protocol.unsent_bytes <= SMALL.low_watermark_bytes:
                assert protocol.wants_read
            else:
                assert not protocol.wants_read
            resumed += protocol.wants_read and not reading
            return not rest and received >= client.sent - client.sent % 1004

        server.turn_until(step, "everything received", [client.socket])
        # Over TLS a pause ends with a whole record, so there are few; how few, the kernel decides.
        assert resumed == server.tally.backpressure_pauses > 1

    def test_unsent_memory_is_bounded(self, serve: Serve) -> None:
        """However much a peer offers, what is held for it stays near the high watermark."""
        server, client, stream, sent = paused(serve)
        for _ in range(20):
            flood(client, stream[sent:])
            assert server.service.pool.held <= 4 * MOST_READ

    def test_tiny_frames_take_no_more(self, serve: Serve) -> None:
        """Echoes of four bytes wait as closely packed as those of a thousand."""
        server = serve(echo=SMALL, buffers=NARROW)
        client = server.connect(buffers=NARROW)
        flood(client, frame(b"") * 200_000)
        protocol = server.connection_of(client).protocol

        assert server.service.pool.held <= 4 * (protocol.unsent_bytes + RECEIVE_BYTES)

    def test_others_are_served(self, serve: Serve) -> None:
        """A peer that does not read holds up nobody else."""
        server, _, _, _ = paused(serve)
        other = server.connect()

        other.exchange(frame(b"other") * 100)

    def test_closed_without_progress(self, serve: Serve) -> None:
        """When nothing of its echoes has left for the write time-out, a peer has had its chance."""
        server, client, _, _ = paused(serve)
        server.pass_time(29)
        assert server.connection_of(client).protocol.state is State.OPEN
        server.pass_time(1 + TICK)
        assert server.service.pool.held == 0
        server.pass_time(2 + TICK)

        line = server.closed(client)
        assert line["reason"] == "write_timeout"
        assert line["duration_s"] == pytest.approx(32, abs=3 * TICK)

    def test_progress_counts(self, serve: Serve) -> None:
        """A slow reader is no dead one: a few kilobytes every 20 seconds keep it."""
        server, client, stream, sent = paused(serve, replace(SMALL, frame_s=1000))
        protocol = server.connection_of(client).protocol
        for _ in range(5):
            server.pass_time(20)
            sent += flood(client, stream[sent:])
            before = protocol.unsent_bytes
            while protocol.unsent_bytes == before:
                client.receive_exactly(1000)  # The window opens in larger steps than this.
                server.settle()

        assert protocol.state is State.OPEN

    def test_stays_through_an_idle_time_out(self, serve: Serve) -> None:
        """Who has echoes pending is not idle, and the time it is paused is no part of a frame."""
        server = serve(echo=EchoSettings(idle_s=5, frame_s=5, write_s=100), buffers=NARROW)
        client = server.connect(buffers=NARROW)
        stream = frame(body_of(1000)) * 3000
        sent = flood(client, stream)
        server.pass_time(90)
        whole = sent - sent % 1004

        assert_same(stream[:whole], client.receive_exactly(whole))
        client.send(stream[sent : whole + 1004])
        assert_same(stream[:1004], client.receive_exactly(1004))

    def test_reads_what_was_sent_after_its_time(self, serve: Serve) -> None:
        """A stalled peer that wakes up finds a stream that ends, not one that was reset."""
        server = serve(echo=SMALL, buffers=NARROW)
        client = server.connect(buffers=NARROW)
        stream = frame(body_of(4000)) * 10
        client.send(stream)
        server.settle()
        protocol = server.connection_of(client).protocol
        assert protocol.unsent_bytes
        while protocol.state is State.OPEN:  # The kernel moves bytes for a while yet.
            server.pass_time(1)

        echo = client.receive_to_end()
        assert_same(stream[: len(echo)], echo)
        client.close()
        assert server.closed(client)["reason"] == "write_timeout"


class TestIdle:
    """Sends nothing, with nothing pending, for `timeouts.idle`: closes."""

    def test_closed_in_time(self, serve: Serve) -> None:
        """A silent connection ends when its time is over, and nobody wakes before."""
        server = serve()
        client = server.connect()
        assert server.pass_time(299.9) <= 4
        client.expect_silence()
        server.pass_time(0.1 + TICK)

        client.expect_eof()
        client.close()
        line = server.closed(client)
        assert line["reason"] == "idle_timeout"
        assert line["duration_s"] == pytest.approx(300, abs=2 * TICK)

    def test_activity_postpones(self, serve: Serve) -> None:
        """Each frame starts the time afresh, with one timer for all of them."""
        server = serve()
        client = server.connect()
        for _ in range(5):
            server.pass_time(290)
            client.exchange(frame(b"alive"))
            assert server.loop.timers == 1
        server.pass_time(300 + TICK)

        client.expect_eof()
        client.close()
        assert server.closed(client)["reason"] == "idle_timeout"

    def test_frame_that_waits_is_served(self, serve: Serve) -> None:
        """A frame that was there in time is served, though the process was stopped for an hour."""
        server = serve()
        client = server.connect()
        server.settle()
        client.send_some(frame(b"in time"))
        server.jump(3600)

        assert client.receive_exactly(11) == frame(b"in time")
        client.exchange(frame(b"goes on"))

    def test_off(self, serve: Serve) -> None:
        """An infinite time-out files no timer, once the connection is no newcomer any more."""
        server = serve(echo=EchoSettings(idle_s=math.inf))
        client = server.connect()
        server.pass_time(TICK)
        assert server.loop.timers == 0
        assert server.pass_time(1e6) <= 4

        client.exchange(frame(b"still here"))

    def test_hundreds_at_a_time(self, serve: Serve) -> None:
        """Connections whose time ends together end in the same few turns."""
        server = serve()
        for _ in range(200):
            server.connect()

        assert server.pass_time(303) < 10
        assert server.service.counts.closed[CloseReason.IDLE_TIMEOUT] == 200


class TestDribble:
    """Starts a frame and dribbles: a frame may take `timeouts.frame` plus `L / min_rate`."""

    @pytest.mark.parametrize(("begun", "seconds"), [(1, 30.0), (4, 40.0), (100, 40.0)])
    def test_closed_in_time(self, serve: Serve, begun: int, seconds: float) -> None:
        """The time grows with the length, as soon as that is known."""
        server = serve()
        client = server.connect()
        client.send(frame(body_of(10 * 1024))[:begun])
        server.settle()
        server.pass_time(seconds - 0.1)
        client.expect_silence()
        server.pass_time(0.1 + TICK)

        client.expect_eof()
        client.close()
        line = server.closed(client)
        assert line["reason"] == "frame_timeout"
        assert line["duration_s"] == pytest.approx(seconds, abs=2 * TICK)

    def test_bytes_do_not_postpone(self, serve: Serve) -> None:
        """A byte now and then defeats an idle time-out, not this one."""
        server = serve()
        client = server.connect()
        for byte in frame(body_of(1024))[:30]:
            client.send_some(bytes([byte]))
            server.pass_time(1)
        assert server.connection_of(client).protocol.state is State.OPEN
        client.send_some(b"x")
        server.pass_time(1 + TICK)

        client.expect_eof()
        client.close()
        assert server.closed(client)["reason"] == "frame_timeout"

    def test_slow_but_fast_enough(self, serve: Serve) -> None:
        """A megabyte at the least rate allowed arrives, in a quarter of an hour."""
        server = serve()
        client = server.connect()
        data = frame(body_of(1 << 20))
        for start in range(0, len(data), 1 << 16):
            client.send(data[start : start + (1 << 16)])
            server.pass_time(63)

        assert_same(data, client.receive_exactly(len(data)))

    def test_each_frame_has_its_own_time(self, serve: Serve) -> None:
        """Frames that each take most of their time add up to no time-out."""
        client = serve().connect()
        for _ in range(5):
            client.send(frame(b"slow")[:5])
            client.server.pass_time(29)
            client.send(frame(b"slow")[5:])
            assert client.receive_exactly(8) == frame(b"slow")

    def test_echoes_before_it_stay(self, serve: Serve) -> None:
        """The frames before the one that took too long have been echoed, and stay readable."""
        server = serve()
        client = server.connect()
        client.send(frame(b"good") + frame(b"slow")[:-1])
        server.pass_time(30 + TICK)

        assert client.receive_to_end() == frame(b"good")

    @pytest.mark.parametrize("size", [8, 1 << 20])
    def test_frame_that_waits_is_served(self, serve: Serve, size: int) -> None:
        """A frame that was whole in time is served, though nobody looked until it was over."""
        server = serve(buffers=KernelBuffers(receive=4 << 20))
        client = server.connect(buffers=KernelBuffers(send=4 << 20))
        data = frame(body_of(size))
        client.send(data[:6])
        server.settle()
        assert client.send_some(data[6:]) == len(data) - 6
        server.jump(7200)

        assert_same(data, client.receive_exactly(len(data)))
        client.exchange(frame(b"goes on"))

    def test_dribbler_gains_nothing_by_a_late_turn(self, serve: Serve) -> None:
        """What waits when the time is over is read once more; if that is no frame, it is over."""
        server = serve()
        client = server.connect()
        client.send(frame(body_of(1024))[:6])
        server.settle()
        client.send_some(b"more")
        server.jump(7200)

        client.expect_eof()
        client.close()
        assert server.closed(client)["reason"] == "frame_timeout"


class TestLifetime:
    """Lives past `timeouts.lifetime` (off by default): closes at the next frame boundary."""

    def test_idle(self, serve: Serve) -> None:
        """Between two frames, the end is at once."""
        server = serve(echo=EchoSettings(lifetime_s=60))
        client = server.connect()
        client.exchange(frame(b"frame"))
        server.pass_time(59.9)
        client.expect_silence()
        server.pass_time(0.1 + TICK)

        client.expect_eof()
        client.close()
        line = server.closed(client)
        assert line["reason"] == "lifetime"
        assert line["duration_s"] == pytest.approx(60, abs=2 * TICK)

    def test_inside_a_frame(self, serve: Serve) -> None:
        """A frame that has begun is finished first."""
        server = serve(echo=EchoSettings(lifetime_s=60))
        client = server.connect()
        server.pass_time(55)
        client.send(frame(b"frame")[:6])
        server.pass_time(10)
        client.expect_silence()
        client.send(frame(b"frame")[6:])

        assert client.receive_to_end() == frame(b"frame")
        client.close()
        assert server.closed(client)["reason"] == "lifetime"

    def test_stalled_frame_does_not_prolong_it(self, serve: Serve) -> None:
        """A frame that is never finished ends the connection as it would have done before."""
        server = serve(echo=EchoSettings(lifetime_s=60))
        client = server.connect()
        server.pass_time(55)
        client.send(frame(b"frame")[:6])
        server.pass_time(30 + TICK)

        client.expect_eof()
        client.close()
        assert server.closed(client)["reason"] == "frame_timeout"

    def test_peer_that_always_has_echoes_pending(self, serve: Serve) -> None:
        """A peer that keeps the queue full gets the echoes that wait, and then the end."""
        server = serve(echo=EchoSettings(lifetime_s=60, write_s=1000), buffers=NARROW)
        client = server.connect(buffers=NARROW)
        stream = frame(body_of(1000)) * 3000
        flood(client, stream)
        server.pass_time(60 + TICK)
        flood(client, stream)

        echo = client.receive_to_end()
        assert len(echo) % 1004 == 0
        assert_same(stream[: len(echo)], echo)
        client.close()
        assert server.closed(client)["reason"] == "lifetime"

    def test_off_by_default(self, serve: Serve) -> None:
        """Who is not idle may stay for more than a day."""
        server = serve()
        client = server.connect()
        for _ in range(300):
            server.pass_time(299)
            client.exchange(frame(b"alive"))


class TestDrain:
    """The daemon drains: closes at the next frame boundary, `drained`, or `drain_timeout`."""

    def drain(self, server: EchoServer, seconds: float = 30.0) -> None:
        """Do what a worker does on SIGTERM."""
        server.acceptor.drain()
        server.service.drain(server.clock.now + seconds)

    def test_idle(self, serve: Serve) -> None:
        """A connection between two frames gets its end of file at once."""
        server = serve()
        client = server.connect()
        client.exchange(frame(b"frame"))
        self.drain(server)

        client.expect_eof()
        client.close()
        line = server.closed(client)
        assert (line["reason"], line["duration_s"]) == ("drained", 0.0)

    def test_inside_a_frame(self, serve: Serve) -> None:
        """A frame that has begun is echoed first."""
        server = serve()
        client = server.connect()
        client.send(frame(b"frame")[:6])
        server.settle()
        self.drain(server)
        client.expect_silence()
        client.send(frame(b"frame")[6:])

        assert client.receive_to_end() == frame(b"frame")
        client.close()
        assert server.closed(client)["reason"] == "drained"

    def test_pipelining_peer(self, serve: Serve) -> None:
        """A peer that sends without pause gets whole echoes, and an end."""
        server = serve()
        client = server.connect()
        stream = frame(body_of(1000)) * 1000
        client.send_some(stream)
        server.turn()
        self.drain(server)

        echo = client.receive_to_end()
        assert echo
        assert len(echo) % 1004 == 0
        assert_same(stream[: len(echo)], echo)
        client.close()
        assert server.closed(client)["reason"] == "drained"

    def test_pending_echoes_are_flushed(self, serve: Serve) -> None:
        """Echoes that wait for a slow reader come before the end."""
        server = serve(buffers=NARROW)
        client = server.connect(buffers=NARROW)
        client.send(frame(body_of(200_000)))
        server.settle()
        self.drain(server)
        server.settle()
        server.assert_quiet()

        assert_same(frame(body_of(200_000)), client.receive_to_end())
        client.close()
        assert server.closed(client)["reason"] == "drained"

    def test_frames_that_wait_are_served(self, serve: Serve) -> None:
        """Frames sent before anybody could know of the drain are echoed."""
        server = serve()
        client = server.connect()
        server.settle()
        client.send_some(frame(b"frame") * 3)
        self.drain(server)

        assert client.receive_to_end() == frame(b"frame") * 3

    def test_client_in_the_queue_is_served(self, serve: Serve) -> None:
        """Who has connected but was not accepted yet gets its frames echoed, not a reset."""
        server = serve()
        server.settle()
        client = server.dial()
        client.send_some(frame(b"queued"))
        self.drain(server)
        server.pass_time(1 + TICK)

        assert client.receive_to_end() == frame(b"queued")
        client.close()
        assert server.closed(client)["reason"] == "drained"

    def test_nobody_connects_any_more(self, serve: Serve) -> None:
        """After the drain has begun, nobody listens."""
        server = serve()
        self.drain(server)

        with pytest.raises(OSError, match=r"Bad file descriptor"):
            server.listeners[0].socket.getsockname()

    @pytest.mark.parametrize("stuck", ["inside a frame", "not reading"])
    def test_forced(self, serve: Serve, stuck: str) -> None:
        """Who does not come to a boundary is closed when the time is over, and not before."""
        server = serve(echo=EchoSettings(frame_s=1000, write_s=1000), buffers=NARROW)
        client = server.connect(buffers=NARROW)
        client.send(frame(b"frame")[:6] if stuck == "inside a frame" else frame(body_of(200_000)))
        server.settle()
        self.drain(server)
        server.pass_time(29.9)
        assert server.service.connections
        server.pass_time(0.1 + TICK)

        line = server.closed(client)
        assert line["reason"] == "drain_timeout"
        assert line["duration_s"] == pytest.approx(30, abs=2 * TICK)

    def test_forced_while_it_lingers(self, serve: Serve) -> None:
        """The time to drain bounds the lingering as well, but the reason is the first one."""
        server = serve()
        client = server.connect()
        self.drain(server, 0.5)
        server.pass_time(0.5 + TICK)

        assert server.closed(client)["reason"] == "drained"

    def test_cut(self, serve: Serve) -> None:
        """A second signal ends everything within the turn, whatever is pending."""
        server = serve(buffers=NARROW)
        clients = [server.connect(buffers=NARROW) for _ in range(3)]
        clients[0].send(frame(b"frame")[:6])
        clients[1].send(frame(body_of(200_000)))
        server.settle()
        self.drain(server)
        server.service.cut(server.clock.now)
        server.turn()

        assert not server.service.connections
        assert [server.closed(client)["reason"] for client in clients] == ["drain_timeout"] * 3


class TestLinger:
    """A close by the daemon never destroys echoes already sent."""

    def refused(self, server: EchoServer) -> Client:
        """Return a client whose connection the daemon has just ended, with a frame echoed."""
        client = server.connect()
        client.send(frame(b"good") + b"\xff\xff\xff\xff")
        server.settle()
        return client

    def test_fin_before_close(self, serve: Serve) -> None:
        """The peer reads its echoes and an end of file while the descriptor is still open."""
        server = serve(echo=SMALL)
        client = self.refused(server)

        assert client.receive_to_end() == frame(b"good")
        assert len(server.service.connections) == 1

    def test_unread_data_does_not_become_a_reset(self, serve: Serve) -> None:
        """A peer that goes on sending finds its echoes intact, since what it sends is read."""
        server = serve(echo=SMALL)
        client = server.connect()
        client.send_some(frame(b"good") + b"\xff\xff\xff\xff" + bytes(300_000))
        server.settle()
        client.send(bytes(3_000_000))
        server.settle()

        assert client.receive_to_end() == frame(b"good")
        assert server.service.pool.held == 0

    def test_ends_with_the_peer(self, serve: Serve) -> None:
        """When the peer has ended its side, nothing is waited for."""
        server = serve(echo=SMALL)
        client = self.refused(server)
        client.shutdown()

        line = server.closed(client)
        assert (line["reason"], line["duration_s"]) == ("frame_too_large", 0.0)

    def test_two_seconds_at_most(self, serve: Serve) -> None:
        """A peer that never ends its side is not waited for longer, even if it keeps sending."""
        server = serve(echo=SMALL)
        client = self.refused(server)
        server.pass_time(1.9)
        client.send(bytes(10_000))
        server.settle()
        assert len(server.service.connections) == 1
        server.pass_time(0.1 + TICK)

        line = server.closed(client)
        assert line["reason"] == "frame_too_large"
        assert line["duration_s"] == pytest.approx(2, abs=2 * TICK)

    def test_reset_by_the_peer(self, serve: Serve) -> None:
        """A peer may answer the end with a reset; the reason stays."""
        server = serve(echo=SMALL)
        client = self.refused(server)
        client.reset()

        assert server.closed(client)["reason"] == "frame_too_large"


class TestPeers:
    """Every family of addresses is served, and named as operators know it."""

    def test_ipv6(self, serve: Serve) -> None:
        """An IPv6 client is logged in brackets."""
        server = serve("[::1]:0")
        client = server.connect()
        client.exchange(frame(b"six"))
        client.shutdown()

        client.expect_eof()
        line = server.closed(client)
        assert str(line["peer"]).startswith("[::1]:")
        assert line["listener"] == server.listeners[0].name

    def test_mapped(self, serve: Serve) -> None:
        """An IPv4 client of a dual-stack listener is logged as IPv4."""
        server = serve("[::]:0")
        client = server.connect(host="127.0.0.1")
        client.exchange(frame(b"four"))
        client.shutdown()

        client.expect_eof()
        assert str(server.closed(client)["peer"]).startswith("127.0.0.1:")

    def test_unix(self, serve: Serve, tmp_path: object) -> None:
        """A UNIX client, which has no address, is served just the same."""
        server = serve(f"unix:{tmp_path}/echo")
        client = server.connect()
        client.exchange(frame(body_of(500_000)) + frame(b""))
        client.shutdown()

        client.expect_eof()
        server.turn_until(lambda: bool(server.log.of("connection_closed")), "closed")
        (line,) = server.log.of("connection_closed")
        assert (line["peer"], line["reason"]) == ("unix", "peer_closed")
        assert line["listener"] == f"unix:{tmp_path}/echo"

    @pytest.mark.parametrize("pending", [False, True])
    def test_unix_peer_that_closes_with_data_unread(
        self, serve: Serve, tmp_path: object, *, pending: bool
    ) -> None:
        """A UNIX peer that leaves echoes unread is a reset, with no turn wasted on it."""
        server = serve(f"unix:{tmp_path}/echo", buffers=NARROW)
        client = server.connect(buffers=NARROW)
        client.send(frame(body_of(100_000 if pending else 10)))
        server.settle()
        client.drop()
        server.turn_until(lambda: not server.service.connections, "closed")

        assert server.log.of("connection_closed")[0]["reason"] == "reset"
        server.assert_quiet()

    def test_unix_peer_that_closes_before_its_echo(self, serve: Serve, tmp_path: object) -> None:
        """A UNIX peer that is gone when its echo comes is a reset as well, and nothing was sent."""
        server = serve(f"unix:{tmp_path}/echo")
        client = server.connect()
        client.send_some(frame(b"frame"))
        client.close()
        server.turn_until(lambda: not server.service.connections, "closed")

        (line,) = server.log.of("connection_closed")
        assert (line["reason"], line["sent_bytes"]) == ("reset", 0)

    def test_urgent_data_is_not_part_of_the_stream(self, serve: Serve) -> None:
        """Out-of-band bytes, which no frame needs, neither break a frame nor wake anybody."""
        server = serve()
        client = server.connect()
        client.send(frame(b"frame")[:6])
        server.settle()
        client.socket.send(b"!", socket.MSG_OOB)
        server.settle()
        server.assert_quiet()
        client.send(frame(b"frame")[6:])

        assert client.receive_exactly(9) == frame(b"frame")


class TestNoSpin:
    """Nothing that cannot be acted on wakes the loop, however long it lasts."""

    def test_paused(self, serve: Serve) -> None:
        """Unread input of a peer that does not read."""
        server, _, _, _ = paused(serve)
        server.settle()

        server.assert_quiet()
        assert server.pass_time(29) <= 4

    def test_paused_and_ended(self, serve: Serve) -> None:
        """An end of file behind unread input, of a peer that does not read."""
        server, client, _, _ = paused(serve)
        client.shutdown()
        server.settle()

        server.assert_quiet()

    def test_paused_for_memory(self, serve: Serve) -> None:
        """Input, then an end of file, for a connection that must not be read at present."""
        server = serve()
        client = server.connect()
        server.settle()
        connection = server.connection_of(client)
        connection.pause(server.clock.now)
        client.send_some(frame(b"waits"))
        server.assert_quiet()
        client.shutdown()
        server.assert_quiet()
        client.expect_silence()
        connection.unpause(server.clock.now)

        assert client.receive_to_end() == frame(b"waits")

    def test_paused_for_memory_and_reset(self, serve: Serve) -> None:
        """A reset of a connection that is watched for nothing at all."""
        server = serve()
        client = server.connect()
        server.settle()
        connection = server.connection_of(client)
        connection.pause(server.clock.now)
        client.reset()
        server.assert_quiet()
        connection.unpause(server.clock.now)

        assert server.closed(client)["reason"] == "reset"

    def test_inside_a_frame(self, serve: Serve) -> None:
        """The first half of a frame."""
        server = serve()
        client = server.connect()
        client.send(frame(b"frame")[:6])
        server.settle()

        server.assert_quiet()

    def test_lingering(self, serve: Serve) -> None:
        """Our end of file, to which the peer does not react."""
        server = serve(echo=SMALL)
        server.connect().send(b"\xff\xff\xff\xff")
        server.settle()

        server.assert_quiet()

    def test_draining_inside_a_frame(self, serve: Serve) -> None:
        """A drain that waits for the second half of a frame."""
        server = serve()
        client = server.connect()
        client.send(frame(b"frame")[:6])
        server.settle()
        server.service.drain(server.clock.now + 20)
        server.settle()

        server.assert_quiet()
        assert server.pass_time(19) <= 4

    def test_ended(self, serve: Serve) -> None:
        """Connections that are over, whichever way."""
        server = serve(echo=SMALL)
        for end in (Client.shutdown, Client.reset, Client.close):
            client = server.connect()
            client.send(frame(b"frame"))
            server.settle()
            end(client)
        server.settle()

        server.assert_quiet()
