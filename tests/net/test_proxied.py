"""Listeners for proxies: what precedes the first frame, and whom it lets in."""

import socket
from ipaddress import ip_network

import pytest

from lpechod.net.admission import AdmissionLimits
from lpechod.net.entrance import Entrance
from lpechod.net.networks import AccessList
from lpechod.wire.settings import EchoSettings
from tests.net.conftest import Serve
from tests.net.harness import PROXIED, Client, EchoServer, frame

EVERYBODY = AccessList((), ())
V1 = b"PROXY TCP4 192.0.2.7 198.51.100.1 4711 9000\r\n"
V2 = (
    b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c"
    + socket.inet_aton("192.0.2.7")
    + socket.inet_aton("198.51.100.1")
    + b"\x12\x67\x23\x28"
)
LOCAL = b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00"
PEER = "192.0.2.7:4711"


def access(*, allow: str = "", deny: str = "") -> AccessList:
    """Make an access list of networks that are separated by spaces."""
    return AccessList(
        tuple(map(ip_network, allow.split())),
        tuple(map(ip_network, deny.split())),
    )


def dial(server: EchoServer) -> Client:
    """Connect without a header, and see the connection accepted or turned away."""
    entrance, server.entrance = server.entrance, Entrance()
    counts = server.service.counts
    before = counts.accepted + sum(counts.rejected.values())
    client = server.dial()
    server.entrance = entrance
    server.turn_until(
        lambda: counts.accepted + sum(counts.rejected.values()) > before, "accepted or rejected"
    )
    return client


@pytest.fixture(name="entrance")
def _entrance() -> Entrance:
    return PROXIED


@pytest.mark.parametrize("header", [V1, V2])
def test_the_client_is_whom_the_proxy_names(serve: Serve, header: bytes) -> None:
    """The log has the client's address as its peer, and the proxy's beside it."""
    server = serve()
    client = dial(server)
    client.socket.sendall(header)
    client.exchange(frame(b"hello"))
    (connection,) = server.service.connections
    assert connection.peer == ("192.0.2.7", 4711)
    client.close()
    server.turn_until(lambda: not server.service.connections, "ended")
    (line,) = server.log.of("connection_closed")
    assert (line["peer"], line["proxy"]) == (PEER, client.name)
    assert line["received_bytes"] == line["sent_bytes"] == 9


@pytest.mark.parametrize("header", [V1, V2, LOCAL])
def test_a_header_in_pieces(serve: Serve, header: bytes) -> None:
    """A header may arrive byte by byte, with the first frame at its heels, and no loop spins."""
    server = serve()
    client = dial(server)
    for byte in header[:-1]:
        client.socket.sendall(bytes([byte]))
        server.settle()
    server.assert_quiet()
    assert server.tally.received_bytes == 0
    client.socket.sendall(header[-1:])
    client.exchange(frame(b"hello"))


@pytest.mark.parametrize("header", [V1, V2, LOCAL])
def test_a_frame_in_the_segment_of_the_header(serve: Serve, header: bytes) -> None:
    """What follows the header in the same segment belongs to the stream of frames."""
    server = serve()
    client = dial(server)
    client.socket.sendall(header + frame(b"hello"))
    assert client.receive_exactly(9) == frame(b"hello")


def test_a_proxy_may_speak_for_itself(serve: Serve) -> None:
    """A health check of a proxy has its own address, which no access list is asked about."""
    server = serve(entrance=Entrance(access(allow="192.0.2.0/24"), EVERYBODY))
    client = dial(server)
    client.socket.sendall(LOCAL)
    client.exchange(frame(b"hello"))
    client.close()
    assert "proxy" not in server.closed(client)


@pytest.mark.parametrize(
    ("sent", "problem"),
    [
        (frame(b"hello"), "no signature"),
        (b"GET / HTTP/1.1\r\n\r\n", "no signature"),
        (b"PROXY UDP4 ", "TCP4"),
    ],
)
def test_no_header(serve: Serve, sent: bytes, problem: str) -> None:
    """Who sends something else is disconnected at once, and the log says what is wrong with it."""
    server = serve()
    client = dial(server)
    client.socket.sendall(sent)
    server.settle()
    client.expect_eof()
    client.close()
    assert server.closed(client)["reason"] == "proxy_error"
    (line,) = server.log.of("handshake_failed")
    assert problem in str(line["problem"])
    assert line["reason"] == "proxy_error"


def test_a_header_that_does_not_come(serve: Serve) -> None:
    """A connection has as long for its header as for any handshake, and not a byte resets that."""
    server = serve(echo=EchoSettings(handshake_s=10.0))
    client = dial(server)
    server.pass_time(6.0)
    client.socket.sendall(V1[:10])
    server.pass_time(3.9)
    assert server.service.connections
    server.pass_time(0.3)
    client.expect_eof()
    client.close()
    assert server.closed(client)["reason"] == "handshake_timeout"


def test_the_end_before_a_header(serve: Serve) -> None:
    """Who only connects, as a health check may, has done nothing wrong."""
    server = serve()
    client = dial(server)
    client.close()
    assert server.closed(client)["reason"] == "peer_closed"
    assert not server.log.of("handshake_failed")


def test_the_end_inside_a_header(serve: Serve) -> None:
    """A header that is cut off is an error of the proxy's."""
    server = serve()
    client = dial(server)
    client.socket.sendall(V2[:20])
    client.socket.shutdown(socket.SHUT_WR)
    server.turn_until(lambda: bool(server.log.of("handshake_failed")), "noticed")
    client.close()
    assert server.closed(client)["reason"] == "proxy_error"


def test_a_drain_while_the_header_is_awaited(serve: Serve) -> None:
    """A drain ends a connection whose header is still to come."""
    server = serve()
    client = dial(server)
    server.pass_time(2.0)
    server.service.drain(server.clock.now + 30.0)
    server.turn_until(lambda: server.clock.now > 0 and not server.turn(), "told")
    server.pass_time(1.0)
    client.expect_eof()
    client.close()
    assert server.closed(client)["reason"] == "drained"


def test_a_drain_finds_the_header_waiting(serve: Serve) -> None:
    """A frame that waited in the kernel behind its header, when the drain came, is echoed."""
    server = serve()
    client = dial(server)
    client.socket.sendall(V1 + frame(b"hello"))
    (connection,) = server.service.connections
    connection.drain(server.clock.now + 30.0, server.clock.now)
    assert client.receive_to_end() == frame(b"hello")


def test_a_stranger_is_no_proxy(serve: Serve) -> None:
    """Only trusted proxies may connect where proxies are expected."""
    server = serve(entrance=Entrance(proxies=access(allow="192.0.2.0/24")))
    client = dial(server)
    assert server.service.counts.rejected["untrusted_proxy"] == 1
    client.expect_eof()
    (line,) = server.log.of("connection_rejected")
    assert line["reason"] == "untrusted_proxy"


@pytest.mark.parametrize(("deny", "served"), [("192.0.2.0/24", False), ("198.51.100.0/24", True)])
def test_access_is_about_the_client(serve: Serve, deny: str, served: bool) -> None:
    """The access list is asked about the client that the header names, and not about the proxy."""
    server = serve(entrance=Entrance(access(deny=f"{deny} 127.0.0.0/8"), EVERYBODY))
    client = dial(server)
    client.socket.sendall(V1)
    if served:
        client.exchange(frame(b"hello"))
        return
    server.settle()
    client.expect_eof()
    client.close()
    server.turn_until(lambda: not server.service.connections, "ended")
    (closed,) = server.log.of("connection_closed")
    (rejected,) = server.log.of("connection_rejected")
    assert (closed["reason"], closed["peer"]) == ("rejected", PEER)
    assert (rejected["reason"], rejected["peer"]) == ("denied", PEER)
    assert server.service.counts.rejected["denied"] == 1


def test_limits_are_about_the_client(serve: Serve) -> None:
    """Clients behind one proxy are told apart, and each has the limit of its address."""
    server = serve(admission=AdmissionLimits(max_connections_per_ip=1))
    first, second, other = (dial(server) for _ in range(3))
    for client in (first, second):
        client.socket.sendall(V1)
        server.settle()
    other.socket.sendall(V1.replace(b"192.0.2.7", b"192.0.2.8"))
    first.exchange(frame(b"first"))
    other.exchange(frame(b"other"))
    second.expect_eof()
    assert server.service.counts.rejected["max_connections_per_ip"] == 1
    first.close()
    second.close()
    server.turn_until(lambda: len(server.service.connections) == 1, "ended")
    third = dial(server)
    third.socket.sendall(V1)
    third.exchange(frame(b"third"))


@pytest.mark.parametrize(("allow", "served"), [("127.0.0.0/8", True), ("192.0.2.0/24", False)])
def test_access_without_a_proxy(serve: Serve, allow: str, served: bool) -> None:
    """Who is not let in is closed at once and counted, before anything is done for it."""
    server = serve(entrance=Entrance(access(allow=allow)))
    client = dial(server)
    if served:
        client.exchange(frame(b"hello"))
        return
    assert server.service.counts.rejected["denied"] == 1
    assert server.service.counts.accepted == 0
    client.expect_eof()
