"""Clients that are gone before their handshake has begun: their descriptors stay theirs."""

import gc
import socket
import struct

import pytest

from lpechod.engine.poller import available
from lpechod.net.connection import Connection
from lpechod.net.entrance import Entrance
from lpechod.net.tls import TlsTransport
from tests.net.conftest import Serve
from tests.net.harness import SECURED, EchoServer, TlsClient
from tests.net.tlswire import HELLO, dial, results, shake

_AT_ONCE = struct.pack("ii", 1, 0)
"""For SO_LINGER: close(2) sends a reset (socket(7))."""


@pytest.fixture(name="poller_name", params=list(available()))
def _poller_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(name="entrance")
def _entrance() -> Entrance:
    return SECURED


def reset(client: TlsClient) -> None:
    """Send the first byte of a handshake, and a reset behind it."""
    client.socket.send(b"\x16")
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
    client.socket.close()


def sources(server: EchoServer) -> set[int]:
    """Return the descriptors of connections that the loop serves."""
    return {*server.loop._sources} - {each.socket.fileno() for each in server.listeners}


def test_a_reset_before_the_first_step(serve: Serve) -> None:
    """A client that is reset with bytes unread ends as one, and nothing is logged as a defect."""
    server = serve()
    client = dial(server)
    reset(client)
    assert server.closed(client)["reason"] == "reset"
    assert results(server) == {"abandoned": 1}
    assert sources(server) == set()


def test_it_leaves_no_garbage(serve: Serve) -> None:
    """All that was made for such a client is freed at once, and not when cycles are looked for."""
    server = serve()
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            client = dial(server)
            reset(client)
            server.closed(client)
        kinds = (Connection, TlsTransport)
        assert not [each for each in gc.get_objects() if isinstance(each, kinds)]
    finally:
        gc.enable()


def test_whoever_comes_in_the_same_turn(serve: Serve) -> None:
    """Whom a turn accepts does not get the number of one whose handshake it has found reset."""
    server = serve()
    gone = dial(server)
    connection = server.connection_of(gone)
    number = connection._transport.fd
    reset(gone)
    newcomer = TlsClient(server, server.dial().socket)
    server.clients[-1] = newcomer
    server.turn_until(lambda: server.service.counts.accepted == 2, "accepted")
    (other,) = server.service.connections - {connection}
    assert other._transport.fd != number
    assert server.closed(gone)["reason"] == "reset"
    shake(newcomer)
    newcomer.exchange(HELLO)
    server.settle()
    server.assert_quiet()
