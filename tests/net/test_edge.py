"""What is peculiar to edge-triggered connections: what they ask the loop to bring again."""

import socket
from pathlib import Path

import pytest

from lpechod.net.entrance import OPEN_TO_ALL, Entrance
from tests.net import harness
from tests.net.conftest import Serve
from tests.net.harness import PROXIED, frame


@pytest.fixture(name="poller_name")
def _poller_name() -> str:
    """Only edge-triggered."""
    return "epoll-et"


def test_a_connection_that_has_ended_asks_for_nothing(serve: Serve, tmp_path: Path) -> None:
    """A client that is gone before the echo of its large frame causes no further turn."""
    server = serve(f"unix:{tmp_path}/socket")
    client = server.connect()
    rest = memoryview(frame(bytes(600_000)))
    while len(rest) > 1000:
        rest = rest[client.send_some(rest[:-1000]) :]
        server.turn()
    client.socket.send(rest)
    client.socket.close()
    server.turn_until(lambda: not server.service.connections, "it has ended")

    assert server.loop.asking == []
    assert [line["reason"] for line in server.log.of("connection_closed")] == ["reset"]


@pytest.mark.parametrize("entrance", [OPEN_TO_ALL, PROXIED], ids=["plain", "proxied"])
def test_what_is_behind_descriptors_is_read(
    serve: Serve, entrance: Entrance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message with descriptors ends a read; what was sent after it does not wait for more."""
    header = b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"
    monkeypatch.setattr(harness, "proxy_header", lambda _client: header)
    server = serve(f"unix:{tmp_path}/socket", entrance=entrance)
    client = server.connect()
    server.settle()
    whole = frame(b"before and behind")
    client.sent += socket.send_fds(client.socket, [whole[:9]], [client.socket.fileno()])
    client.send_some(whole[9:])

    assert client.receive_exactly(len(whole)) == whole
    server.assert_quiet()


@pytest.mark.parametrize("place", [1, 3])
def test_what_is_behind_an_urgent_byte_is_read(serve: Serve, place: int) -> None:
    """An urgent byte, which is none of the stream, ends a read; what is behind it does not wait."""
    server = serve()
    client = server.connect()
    pieces = [frame(b"before"), frame(b"behind")]
    whole = b"".join(pieces)
    cut = len(pieces[0]) * place // 2
    client.send_some(whole[:cut])
    client.socket.send(b"!", socket.MSG_OOB)
    client.send_some(whole[cut:])

    assert client.receive_exactly(len(whole)) == whole
    server.assert_quiet()
