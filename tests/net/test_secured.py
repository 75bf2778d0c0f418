"""The steady path of connections over TLS: who is on it, and that it makes no difference."""

from collections.abc import Callable

import pytest

from lpechod.engine.poller import HANGUP, READABLE
from lpechod.net.entrance import Entrance
from lpechod.wire.states import State
from tests.net.conftest import Serve
from tests.net.harness import SECURED, EchoServer, TlsClient, assert_same, body_of, frame
from tests.net.tlsclient import RECORD_BYTES
from tests.net.tlswire import NARROW, meet, seal, seal_notice, transport_of

PING = frame(body_of(64))


@pytest.fixture(name="entrance")
def _entrance() -> Entrance:
    return SECURED


@pytest.fixture(name="poller_name", params=["epoll", "epoll-et"])
def _poller_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def is_on_path(server: EchoServer, client: TlsClient) -> bool:
    """Tell whether the connection of a client is on the path."""
    return transport_of(server, client).fd in server.service.steady.secured.connections


def deliver(server: EchoServer, client: TlsClient, data: bytes) -> None:
    """Send one record, and have the server receive it."""
    cipher = seal(client, data)
    assert client.socket.send(cipher) == len(cipher)
    server.settle()


class TestMembership:
    """A connection is on the path exactly while it is steady."""

    def test_from_the_handshake_on(self, serve: Serve) -> None:
        """A connection joins when hands are shaken, and stays while it sends whole frames."""
        server = serve()
        assert not server.service.steady.secured.connections
        client = meet(server)
        for data in (PING, PING * 9, PING + frame(b"") + PING, frame(body_of(50_000))):
            assert is_on_path(server, client)
            client.exchange(data)
        client.close()
        server.closed(client)
        assert not server.service.steady.secured.connections

    def test_while_a_frame_is_incomplete(self, serve: Serve) -> None:
        """A part of a frame takes a connection off, and its rest brings it back."""
        server = serve()
        client = meet(server)
        deliver(server, client, PING + PING[:9])
        assert not is_on_path(server, client)
        deliver(server, client, PING[9:])
        assert client.receive_exactly(len(PING) * 2) == PING * 2
        assert is_on_path(server, client)

    def test_while_it_sends_much(self, serve: Serve) -> None:
        """Who fills records is off, until it sends less."""
        server = serve()
        client = meet(server)
        for body, on_path in ((16000, True), (RECORD_BYTES, False), (100_000, False), (64, True)):
            client.exchange(frame(body_of(body)))
            assert is_on_path(server, client) is on_path

    def test_while_reading_is_paused(self, serve: Serve) -> None:
        """Who is paused is off, and nothing of it is received."""
        server = serve()
        client = meet(server)
        connection = server.connection_of(client)
        connection.pause(server.clock.now)
        assert not is_on_path(server, client)
        deliver(server, client, PING)
        assert server.tally.received_bytes == 0
        connection.unpause(server.clock.now)
        assert is_on_path(server, client)
        assert client.receive_exactly(len(PING)) == PING

    def test_while_echoes_wait(self, serve: Serve) -> None:
        """A peer that does not read is off from the first echo that the kernel refuses."""
        server = serve(buffers=NARROW)
        client = meet(server, NARROW)
        piece = frame(body_of(1000))
        sent = 0
        while is_on_path(server, client):
            sent += client.send_some(piece)
            server.turn()
        assert server.connection_of(client).protocol.unsent_bytes
        assert_same(piece * (sent // len(piece)), client.receive_exactly(sent))
        server.settle()
        assert is_on_path(server, client)


class TestTurn:
    """Part of a turn is for the path, the rest for the connections themselves."""

    def test_served_and_left(self, serve: Serve) -> None:
        """What is readable is echoed; what a mask says beside that is left to the connection."""
        server = serve()
        client = meet(server)
        fd, serve_turn = transport_of(server, client).fd, server.service.steady.serve
        client.socket.send(seal(client, PING))
        other = (fd + 1000, READABLE)
        hung_up = (fd, READABLE | HANGUP)
        assert serve_turn([other, hung_up], 2, server.clock.now) == [other, hung_up]
        assert serve_turn([other, (fd, READABLE)], 2, server.clock.now) == [other]
        assert client.receive_exactly(len(PING)) == PING
        assert server.tally.frames == 1

    def test_a_record_each_in_the_largest_crowd(self, serve: Serve) -> None:
        """However many are ready, each may receive a record, so that none is left in part."""
        server = serve()
        client = meet(server)
        ready = [(transport_of(server, client).fd, READABLE)]
        client.socket.send(seal(client, PING))
        assert server.service.steady.serve(ready, 1_000_000, server.clock.now) == []
        assert RECORD_BYTES <= server.loop.rotation.share < 2 * RECORD_BYTES
        assert client.receive_exactly(len(PING)) == PING


RECORDS = {
    "frames": [PING] * 3,
    "several in a record": [PING * 7, frame(b"") * 20],
    "mixed": [PING + frame(b"x") + PING, frame(b"yy") * 3 + PING],
    "in parts": [PING[:1], PING[1:5], PING[5:] + PING, PING * 2 + PING[:3], PING[3:]],
    "full": [frame(body_of(RECORD_BYTES - 4)), frame(body_of(RECORD_BYTES - 5)), PING],
    "more than one": [
        frame(body_of(2 * RECORD_BYTES - 4))[:RECORD_BYTES],
        frame(body_of(2 * RECORD_BYTES - 4))[RECORD_BYTES:],
        PING,
    ],
    "too large": [PING, b"\xff\xff\xff\xff"],
}


def numbers(server: EchoServer, client: TlsClient) -> dict[str, object]:
    """Return all that was counted, for everybody and for a client, whose connection has ended."""
    tally, line = server.tally, server.closed(client)
    names = ("frames", "echoed_bytes", "unframed_bytes", "unsent_bytes", "delayed_frames")
    return {
        **{name: getattr(tally, name) for name in (*names, "frame_sizes")},
        **{name: line[name] for name in ("reason", "frames", "received_bytes", "sent_bytes")},
    }


def off_path(server: EchoServer) -> None:
    """Leave every event to the connection."""
    server.loop.shortcut = None


@pytest.mark.parametrize("records", RECORDS.values(), ids=RECORDS)
@pytest.mark.parametrize("together", [False, True])
def test_no_difference(serve: Serve, records: list[bytes], *, together: bool) -> None:
    """Whatever is received on the path is echoed and counted as off it, to the last number."""
    found = []
    prepare: Callable[[EchoServer], None]
    for prepare in (off_path, lambda _server: None):
        server = serve()
        prepare(server)
        client = meet(server)
        if together:
            client.socket.send(b"".join([seal(client, data) for data in records]))
        else:
            for data in records:
                deliver(server, client, data)
        if server.connection_of(client).protocol.state is State.OPEN:
            client.socket.send(seal_notice(client))
        echo = client.receive_to_end()
        client.socket.close()
        found.append((echo, numbers(server, client)))
    assert found[0] == found[1]
