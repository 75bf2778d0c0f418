"""What only TLS has: records that are no frames, and two directions that depend on each other."""

import pytest

from lpechod.engine.buffers import RECEIVE_BYTES
from lpechod.net.entrance import Entrance
from lpechod.wire.echo import FRAMES_PER_TURN
from lpechod.wire.settings import EchoSettings
from tests.net.conftest import Serve
from tests.net.harness import (
    SECURED,
    EchoServer,
    KernelBuffers,
    TlsClient,
    assert_same,
    body_of,
    frame,
)
from tests.net.tlsclient import RECORD_BYTES
from tests.net.tlswire import NARROW, meet, seal, transport_of


@pytest.fixture(name="entrance")
def _entrance() -> Entrance:
    return SECURED


@pytest.fixture(name="poller_name", params=["epoll", "epoll-et"])
def _poller_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def deliver(server: EchoServer, client: TlsClient, cipher: bytes) -> None:
    """Send what is encrypted already, with one call."""
    assert client.socket.send(cipher) == len(cipher)
    server.settle()


def flood(client: TlsClient, stream: bytes) -> int:
    """Send without reading until the server takes no more, and return how much was sent."""
    sent = blocked = 0
    while sent < len(stream) and blocked < 5:
        count = client.send_some(stream[sent : sent + RECORD_BYTES])
        sent += count
        blocked = 0 if count or client.server.turn() else blocked + 1
    return sent


class TestRecords:
    """Nothing is stranded inside OpenSSL, where no poller sees it."""

    def test_more_frames_in_a_record_than_in_a_turn(self, serve: Serve) -> None:
        """A record of frames beyond the budget of a turn is echoed without another byte."""
        server = serve()
        client = meet(server)
        stream = frame(b"") * (FRAMES_PER_TURN * 2 + 1)
        deliver(server, client, seal(client, stream))
        assert_same(stream, client.receive_exactly(len(stream)))
        server.assert_quiet()

    @pytest.mark.parametrize("first", [1, 3, 4, 5, 1000])
    def test_rest_of_a_record_behind_a_small_buffer(self, serve: Serve, first: int) -> None:
        """A record whose front ends a frame in a small buffer is echoed to its last frame."""
        server = serve()
        client = meet(server)
        stream = frame(body_of(1200)) + frame(b"ten more") * 10
        stream += frame(body_of(RECORD_BYTES - len(stream) + first - 4))
        deliver(server, client, seal(client, stream[:first]))
        deliver(server, client, seal(client, stream[first:]))
        assert_same(stream, client.receive_exactly(len(stream)))
        server.assert_quiet()
        assert not transport_of(server, client).more

    def test_records_larger_than_a_read(self, serve: Serve) -> None:
        """A read takes so many records, and what it leaves of one is read in the next turn."""
        server = serve(buffers=KernelBuffers(receive=1 << 20))
        client = meet(server, KernelBuffers(send=1 << 20))
        stream = frame(body_of(RECEIVE_BYTES + 10_000 - 4))
        for at in range(0, len(stream), RECORD_BYTES):
            client.socket.send(seal(client, stream[at : at + RECORD_BYTES]))
        server.settle()
        assert_same(stream, client.receive_exactly(len(stream)))
        server.assert_quiet()

    @pytest.mark.parametrize("cut", [1, 5, 6, 100, -1])
    def test_record_in_pieces(self, serve: Serve, cut: int) -> None:
        """A record that is not whole is no news, and costs no turns until the rest is there."""
        server = serve()
        client = meet(server)
        cipher = seal(client, frame(body_of(1000)))
        deliver(server, client, cipher[:cut])
        client.expect_silence()
        server.assert_quiet()
        deliver(server, client, cipher[cut:])
        assert_same(frame(body_of(1000)), client.receive_exactly(1004))


class TestPauses:
    """Plaintext waits inside OpenSSL while nothing is read."""

    def test_high_watermark(self, serve: Serve) -> None:
        """A reader that was too slow gets everything, from within records too."""
        settings = EchoSettings(
            max_frame_bytes=4096, high_watermark_bytes=8192, low_watermark_bytes=2048
        )
        server = serve(echo=settings, buffers=NARROW)
        client = meet(server, NARROW)
        stream = frame(body_of(1000)) * 1000
        sent = flood(client, stream)
        assert sent < len(stream)
        server.assert_quiet()
        rest = stream[sent:]
        echo = bytearray()

        def done() -> bool:
            nonlocal rest
            rest = rest[client.send_some(rest[:RECORD_BYTES]) :]
            echo.extend(client.receive_some() or b"")
            return len(echo) == len(stream)

        server.turn_until(done, "all echoes", [client.socket])
        assert_same(stream, bytes(echo))
        assert server.tally.backpressure_pauses > 0
        server.assert_quiet()

    def test_pause_with_plaintext_inside(self, serve: Serve) -> None:
        """What a pause for want of memory leaves inside OpenSSL is read when it is over."""
        server = serve()
        client = meet(server)
        stream = frame(body_of(1200)) + frame(b"more") * 10
        deliver(server, client, seal(client, stream[:5]))
        assert client.socket.send(seal(client, stream[5:]))
        connection = server.connection_of(client)
        while not transport_of(server, client).more:
            server.turn()
        connection.pause(server.clock.now)
        server.settle()
        server.assert_quiet()
        assert transport_of(server, client).more
        connection.unpause(server.clock.now)
        assert_same(stream, client.receive_exactly(len(stream)))
        server.assert_quiet()
