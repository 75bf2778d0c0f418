"""What only TLS has: records that are no frames, and two directions that depend on each other."""

import contextlib
import math
import socket
import ssl

import pytest

from lpechod.engine.buffers import RECEIVE_BYTES
from lpechod.engine.poller import READABLE, WRITABLE
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


class Crossing:
    """Stands for OpenSSL where either direction may wait for the other, as during a key update.

    Attributes:
        wants: what `read` and `write` raise, if they do.
        calls: how often each was called.
    """

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self.wants: dict[str, type[ssl.SSLError]] = {}
        self.calls = {"read": 0, "write": 0}

    def _enter(self, name: str) -> None:
        self.calls[name] += 1
        if name in self.wants:
            raise self.wants[name]

    def read(self, _size: int, buffer: memoryview) -> int:
        """Receive."""
        self._enter("read")
        try:
            return socket.socket.recv_into(self.end, buffer)
        except BlockingIOError:
            raise ssl.SSLWantReadError from None

    def write(self, data: memoryview) -> int:
        """Send."""
        self._enter("write")
        try:
            return socket.socket.send(self.end, data)
        except BlockingIOError:
            raise ssl.SSLWantWriteError from None

    def pending(self) -> int:
        """Return that nothing is left of a record."""
        return 0


def crossing(server: EchoServer, client: TlsClient) -> Crossing:
    """Put a stand-in in the place of OpenSSL, so that the stream is in the clear."""
    transport = transport_of(server, client)
    transport.stream = stand_in = Crossing(transport._socket)  # type: ignore[arg-type]
    server.connection_of(client)._follow()  # type: ignore[attr-defined]
    return stand_in


class Plain:
    """The bytes of a client's socket, past its TLS."""

    def __init__(self, server: EchoServer, client: TlsClient) -> None:
        self.server = server
        self.socket = client.socket
        self.received = bytearray()
        server.settle()
        with contextlib.suppress(BlockingIOError):
            self.socket.recv(1 << 16)  # The tickets for another session.
        client.drop = client.close = client.socket.close  # type: ignore[method-assign]

    def receive(self, size: int) -> bytes:
        """Receive so many bytes in all."""

        def done() -> bool:
            try:
                while len(self.received) < size:
                    self.received += self.socket.recv(size - len(self.received))
            except BlockingIOError:
                return False
            return True

        self.server.turn_until(done, f"{size} bytes", [self.socket])
        return bytes(self.received)


class TestCrossedDirections:
    """Receiving may have to wait until something can be sent, and the other way round."""

    def test_receiving_waits_for_room(self, serve: Serve) -> None:
        """While receiving needs room in a full kernel, what arrives does not turn the loop."""
        server = serve(buffers=NARROW)
        client = meet(server, NARROW)
        stand_in, plain = crossing(server, client), Plain(server, client)
        stream = frame(body_of(200_000))
        rest = memoryview(stream)
        while rest:
            try:
                rest = rest[plain.socket.send(rest) :]
            except BlockingIOError:
                server.turn()
        server.settle()
        assert server.connection_of(client).protocol.unsent_bytes
        stand_in.wants["read"] = ssl.SSLWantWriteError
        plain.socket.send(frame(b"behind"))
        server.settle()
        calls = dict(stand_in.calls)
        server.assert_quiet()
        assert stand_in.calls["read"] - calls["read"] <= 10
        assert_same(stream[:50_000], plain.receive(50_000))
        assert stand_in.calls["read"] > calls["read"], "room is the occasion to receive"
        stand_in.wants.clear()
        assert_same(stream + frame(b"behind"), plain.receive(len(stream) + 10))
        server.assert_quiet()

    def test_receiving_waits_for_room_that_is_there(self, serve: Serve) -> None:
        """Where nothing is to be sent, room is still waited for if receiving needs it."""
        server = serve()
        client = meet(server)
        stand_in, plain = crossing(server, client), Plain(server, client)
        stand_in.wants["read"] = ssl.SSLWantWriteError
        plain.socket.send(frame(b"frame"))
        server.turn()
        transport, path = transport_of(server, client), server.service.steady.secured
        assert transport.crossed == WRITABLE
        assert transport.fd not in path.connections
        stand_in.wants.clear()
        assert plain.receive(9) == frame(b"frame")
        assert transport.fd in path.connections
        server.assert_quiet()

    def test_sending_waits_for_bytes(self, serve: Serve) -> None:
        """While sending needs something to be received, room in the kernel does not turn it."""
        server = serve()
        client = meet(server)
        stand_in, plain = crossing(server, client), Plain(server, client)
        stand_in.wants["write"] = ssl.SSLWantReadError
        plain.socket.send(frame(b"first"))
        server.settle()
        assert transport_of(server, client).crossed == READABLE
        assert server.connection_of(client).protocol.unsent_bytes == 9
        calls = dict(stand_in.calls)
        server.assert_quiet()
        assert stand_in.calls == calls
        stand_in.wants.clear()
        plain.socket.send(frame(b"second"))
        assert plain.receive(19) == frame(b"first") + frame(b"second")
        server.assert_quiet()

    def test_sending_waits_for_bytes_while_nothing_is_read(self, serve: Serve) -> None:
        """Bytes that let sending go on are no reason to receive what there is no place for."""
        server = serve(echo=EchoSettings(idle_s=math.inf, write_s=math.inf))
        client = meet(server)
        stand_in, plain = crossing(server, client), Plain(server, client)
        stand_in.wants["write"] = ssl.SSLWantReadError
        plain.socket.send(frame(b"first"))
        server.settle()
        connection = server.connection_of(client)
        connection.pause(server.clock.now)
        received = server.tally.received_bytes
        stand_in.wants.clear()
        plain.socket.send(frame(b"second"))
        assert plain.receive(9) == frame(b"first")
        server.settle()
        assert server.tally.received_bytes == received
        server.assert_quiet()
        connection.unpause(server.clock.now)
        assert plain.receive(19) == frame(b"first") + frame(b"second")

    def test_write_timeout(self, serve: Serve) -> None:
        """Who never sends what sending waits for is a peer that does not read."""
        server = serve()
        client = meet(server)
        stand_in, plain = crossing(server, client), Plain(server, client)
        stand_in.wants["write"] = ssl.SSLWantReadError
        plain.socket.send(frame(b"first"))
        server.settle()
        server.pass_time(30.2)
        plain.socket.close()
        assert server.closed(client)["reason"] == "write_timeout"
