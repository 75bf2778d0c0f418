"""The handshake of TLS: who gets through, and what becomes of those who do not."""

import functools
import socket
import ssl
from collections.abc import Callable
from ipaddress import ip_network

import pytest
import trustme
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lpechod.net.entrance import Entrance
from lpechod.net.networks import AccessList
from tests.net.conftest import Serve
from tests.net.harness import SECURED, EchoServer, TlsClient, frame
from tests.net.tlsclient import authority, server_context
from tests.net.tlswire import HELLO, answer, context, dial, hello, results, shake


@pytest.fixture(name="entrance")
def _entrance() -> Entrance:
    return SECURED


@pytest.fixture(name="poller_name")
def _poller_name() -> str:
    return "epoll"


def end(server: EchoServer, client: TlsClient) -> object:
    """Close the client's socket, and return the reason of its connection's end."""
    client.socket.close()
    return server.closed(client)["reason"]


class TestSegments:
    """The handshake may arrive in any pieces."""

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    def test_byte_by_byte(self, serve: Serve, version: ssl.TLSVersion) -> None:
        """A client that sends single bytes gets through, and no turn is made without one."""
        server = serve()
        client = dial(server, context(version))
        for byte in hello(client):
            client.socket.send(bytes([byte]))
            server.settle()
            assert server.turn() == 0
        for byte in answer(client) if version is ssl.TLSVersion.TLSv1_3 else b"":
            client.socket.send(bytes([byte]))
            server.settle()
            assert server.turn() == 0
        if version is ssl.TLSVersion.TLSv1_2:
            shake(client)
        client.exchange(HELLO)
        assert results(server) == {"completed": 1}

    @settings(max_examples=30, suppress_health_check=list(HealthCheck), deadline=None)
    @given(st.lists(st.integers(1, 400), max_size=20), st.booleans())
    def test_any_segments(self, serve: Serve, cuts: list[int], together: bool) -> None:
        """However both flights are cut, the first frame behind them is served."""
        server = serve()
        client = dial(server)

        def dribble(data: bytes) -> None:
            at = 0
            for cut in (*cuts, len(data)):
                client.socket.send(data[at : at + cut]) if data[at : at + cut] else None
                at += cut
                server.settle()

        dribble(hello(client))
        last = answer(client)
        client.tls.write(HELLO)
        client.sent += len(HELLO)
        if together:
            client.socket.send(last + client._outgoing.read())
        else:
            dribble(last + client._outgoing.read())
        assert client.receive_exactly(len(HELLO)) == HELLO
        assert results(server) == {"completed": 1}
        client.close()
        assert server.closed(client)["reason"] == "peer_closed"

    def test_frame_in_the_segment_of_the_finish(self, serve: Serve) -> None:
        """A first frame in one segment with the end of the handshake is echoed in that turn."""
        server = serve()
        client = dial(server)
        client.socket.send(hello(client))
        last = answer(client)
        client.tls.write(HELLO)
        client.sent += len(HELLO)
        client.socket.send(last + client._outgoing.read())
        server.turn()
        assert server.tally.echoed_bytes == len(HELLO)
        assert client.receive_exactly(len(HELLO)) == HELLO
        server.assert_quiet()

    def test_end_in_the_segment_of_the_finish(self, serve: Serve) -> None:
        """A frame and a close_notify right behind the handshake are served, too."""
        server = serve()
        client = dial(server)
        client.socket.send(hello(client))
        last = answer(client)
        client.tls.write(HELLO)
        with pytest.raises(ssl.SSLError):
            client.tls.unwrap()
        client.socket.send(last + client._outgoing.read())
        client.socket.shutdown(socket.SHUT_WR)
        assert client.receive_to_end() == HELLO
        assert not client.cut
        assert server.closed(client)["reason"] == "peer_closed"


class TestStrangers:
    """Those who do not speak TLS, or nothing."""

    @pytest.mark.parametrize(
        ("data", "problem"),
        [
            (b"GET / HTTP/1.1\r\nHost: s3cr3t\r\n\r\n", "it speaks HTTP without TLS"),
            (b"CONNECT s3cr3t:1 HTTP/1.1\r\n\r\n", None),
            (frame(b"s3cr3t" * 100), "what it sends is no TLS"),
            (frame(b"") * 1000, "what it sends is no TLS"),
            (b"s3cr3t" * 10_000, "what it sends is no TLS"),
            (b"\x16\x03\x01\xff\xff" + b"s3cr3t" * 10_000, None),
            (b"\x16\x03\x01\x00\x20" + b"s3cr3t" * 10, None),
        ],
    )
    def test_no_tls(self, serve: Serve, data: bytes, problem: str | None) -> None:
        """What is no TLS is closed without a reset, and the log has a hint, but nothing of it."""
        server = serve()
        client = dial(server)
        client.socket.send(data)
        server.settle()
        server.assert_quiet()
        client.socket.send(b"more")
        heard = b""

        def ended() -> bool:
            nonlocal heard
            try:
                while data := client.socket.recv(1000):
                    heard += data
            except BlockingIOError:
                return False
            return True

        server.turn_until(ended, "FIN", [client.socket])
        assert heard[:2] in (b"", b"\x15\x03")
        assert len(heard) <= 7, "an alert at most"
        assert end(server, client) == "tls_error"
        (line,) = server.log.of("handshake_failed")
        assert line["problem"] == problem or problem is None
        assert line["problem"] != "unknown"
        assert "s3cr3t" not in repr(line).lower()
        assert results(server) == {"failed": 1}

    def test_silent(self, serve: Serve) -> None:
        """A client that says nothing is closed when the time is over, and had no TLS object."""
        server = serve()
        client = dial(server)
        server.settle()
        assert server.pass_time(9.9) < 20
        transport = server.connection_of(client)._transport
        assert not isinstance(transport._socket, ssl.SSLSocket)  # type: ignore[attr-defined]
        server.pass_time(0.3)
        assert client.socket.recv(1) == b""
        assert end(server, client) == "handshake_timeout"
        assert results(server) == {"timed_out": 1}
        assert not server.log.of("handshake_failed")

    @pytest.mark.parametrize("sent", [1, 5, 100, None])
    def test_stops_in_the_middle(self, serve: Serve, sent: int | None) -> None:
        """A client that stops anywhere in the handshake has the same time, and costs no turns."""
        server = serve()
        client = dial(server)
        client.socket.send(hello(client)[:sent])
        server.settle()
        assert server.pass_time(9.9) < 20
        assert server.service.connections
        server.pass_time(0.3)
        assert end(server, client) == "handshake_timeout"
        assert results(server) == {"timed_out": 1}
        assert not server.service._gate.under_way

    @pytest.mark.parametrize(
        ("sent", "how", "reason", "result"),
        [
            (0, "close", "peer_closed", "abandoned"),
            (0, "reset", "reset", "abandoned"),
            (100, "close", "tls_error", "failed"),
            (100, "reset", "reset", "abandoned"),
            (None, "reset", "reset", "abandoned"),
        ],
    )
    def test_goes_away(
        self, serve: Serve, sent: int | None, how: str, reason: str, result: str
    ) -> None:
        """A client that goes away is told from one that breaks the rules."""
        server = serve()
        client = dial(server)
        client.socket.send(hello(client)[:sent])
        server.settle()
        getattr(client if how == "reset" else client.socket, how)()
        assert server.closed(client)["reason"] == reason
        assert results(server) == {result: 1}
        assert not server.service._gate.under_way
        problems = [line["problem"] for line in server.log.of("handshake_failed")]
        assert problems == ["the handshake is cut off"] * (result == "failed")

    def test_close_notify_instead(self, serve: Serve) -> None:
        """A close_notify in the place of a handshake is an error that has a name."""
        server = serve()
        client = dial(server)
        client.socket.send(b"\x15\x03\x01\x00\x02\x01\x00")
        server.settle()
        assert end(server, client) == "tls_error"
        (line,) = server.log.of("handshake_failed")
        assert line["problem"] not in ("unknown", "")

    def test_does_not_trust_us(self, serve: Serve) -> None:
        """A client that does not know our authority says so, and the log repeats it."""
        server = serve()
        client = dial(server, ssl.create_default_context(cadata=other().cert_pem.bytes().decode()))
        shake(client)
        client.flush()
        server.settle()
        assert end(server, client) == "tls_error"
        (line,) = server.log.of("handshake_failed")
        assert line["problem"] == "tlsv1 alert unknown ca"
        assert results(server) == {"failed": 1}

    def test_drained(self, serve: Serve) -> None:
        """A drain ends a handshake that has begun."""
        server = serve()
        client = dial(server)
        client.socket.send(hello(client))
        server.settle()
        server.pass_time(1.0)
        server.service.drain(server.clock.now + 30)
        server.pass_time(0.3)
        client.socket.close()
        assert server.closed(client)["reason"] in ("drained", "reset")
        assert results(server) == {"abandoned": 1}
        assert not server.service._gate.under_way


class TestVersions:
    """Old versions are refused, and the others resume sessions."""

    @pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
    def test_old(self, serve: Serve, version: ssl.TLSVersion) -> None:
        """A client of before TLS 1.2 is refused with an alert."""
        server = serve()
        made = context()
        made.minimum_version = version
        made.maximum_version = version
        made.set_ciphers("ALL:@SECLEVEL=0")
        client = dial(server, made)
        shake(client)
        assert end(server, client) == "tls_error"
        (line,) = server.log.of("handshake_failed")
        assert line["problem"] == "unsupported protocol"
        assert results(server) == {"failed": 1}

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    def test_resumed(self, serve: Serve, version: ssl.TLSVersion) -> None:
        """A client that comes again resumes its session."""
        server = serve()
        made = context(version)
        first = dial(server, made)
        shake(first)
        first.exchange(HELLO)
        assert first.tls.version() == ("TLSv1.2" if "2" in version.name else "TLSv1.3")
        assert not first.tls.session_reused
        assert first.tls.compression() is None
        again = dial(server, made)
        again.tls = made.wrap_bio(
            again._incoming, again._outgoing, server_hostname="echo.test", session=first.tls.session
        )
        shake(again)
        again.exchange(HELLO)
        assert again.tls.session_reused
        assert results(server) == {"completed": 2}


@functools.cache
def other() -> trustme.CA:
    """Make an authority that nobody knows."""
    return trustme.CA()


class TestClientCertificates:
    """A listener may demand a certificate."""

    @pytest.fixture(name="entrance")
    def _demanding(self) -> Entrance:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.verify_mode = ssl.CERT_REQUIRED
        authority().configure_trust(made)
        authority().issue_cert("echo.test").configure_cert(made)
        return Entrance(tls=made)

    @pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
    @pytest.mark.parametrize(
        ("by", "problem"),
        [
            (authority, None),
            (lambda: None, "peer did not return a certificate"),
            (other, "certificate: unable to get local issuer certificate"),
        ],
    )
    def test_demanded(
        self,
        serve: Serve,
        version: ssl.TLSVersion,
        by: Callable[[], trustme.CA | None],
        problem: str | None,
    ) -> None:
        """Only a certificate of the right authority opens the door; the log says what is wrong."""
        server = serve()
        client = dial(server, context(version, by()))
        shake(client)
        if problem is None:
            client.exchange(HELLO)
            client.close()
            assert server.closed(client)["reason"] == "peer_closed"
            assert results(server) == {"completed": 1}
        else:
            assert server.tally.frames == 0
            assert end(server, client) == "tls_error"
            (line,) = server.log.of("handshake_failed")
            assert line["problem"] == problem
            assert results(server) == {"failed": 1}


def test_a_denied_client_costs_no_handshake(serve: Serve) -> None:
    """Who is not allowed behind a proxy is closed before anything of TLS is done."""
    nobody = AccessList((), (ip_network("127.0.0.0/8"),))
    entrance = Entrance(proxies=AccessList((), ()), access=nobody, tls=server_context())
    server = serve(entrance=entrance)
    client = dial(server)
    client.socket.send(hello(client))
    server.turn_until(lambda: bool(server.log.of("connection_rejected")), "rejected")
    assert end(server, client) == "rejected"
    assert results(server) == {}
