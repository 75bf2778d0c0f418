"""Clients that speak TLS, OpenSSL's own and Python's, against a daemon with several workers."""

import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.certificates import Issued, issue
from tests.system.daemon import PATIENCE_SECONDS, Daemon, EchoClient, frame
from tests.system.test_reload_failures import FAILURE, fail

HELLO = frame(b"\x01hello")
HANDSHAKES = "lpechod_tls_handshakes_total"


def configuration(issued: Issued, *more: str, workers: int = 1) -> str:
    """Write a configuration of one listener, with TLS."""
    return (
        f"[server]\nworkers = {workers}\n"
        f'[[listen]]\naddress = "127.0.0.1:0"\ntls = {issued.table(*more)}\n'
    )


def context(issued: Issued, certificate: Issued | None = None) -> ssl.SSLContext:
    """Make a context for a client."""
    made = ssl.create_default_context(cafile=issued.ca)
    if certificate is not None:
        made.load_cert_chain(certificate.certificate, certificate.key)
    return made


class TlsEchoClient(EchoClient):
    """A blocking client over TLS."""

    def __init__(
        self, daemon: Daemon, made: ssl.SSLContext, session: ssl.SSLSession | None = None
    ) -> None:
        super().__init__(daemon.address)
        self.tls = made.wrap_socket(self.socket, server_hostname="localhost", session=session)
        self.socket = self.tls

    def serial(self) -> object:
        """Return the serial number of the server's certificate."""
        found = self.tls.getpeercert()
        assert found
        return found["serialNumber"]

    def leave(self) -> None:
        """Take leave, and demand that of the server."""
        self.tls.unwrap().close()


class OpenSsl:
    """``openssl s_client``, as a process.

    Args:
        daemon: whom to connect to.
        options: of the command.
    """

    def __init__(self, daemon: Daemon, *options: str) -> None:
        program = shutil.which("openssl")
        assert program, "openssl is needed"
        self.process = subprocess.Popen(
            [program, "s_client", "-connect", daemon.address, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.output = b""

    def send(self, data: bytes) -> None:
        """Type something."""
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def wait_for(self, pattern: bytes) -> None:
        """Read what it prints until something is in it; print on from behind that."""
        assert self.process.stdout is not None
        while not (found := re.search(pattern, self.output)):
            data = self.process.stdout.read1(65536)  # type: ignore[attr-defined]
            assert data, self.output
            self.output += data
        self.output = self.output[found.end() :]

    def end(self) -> bytes:
        """End its input, and return the rest of what it prints."""
        rest, _ = self.process.communicate(timeout=PATIENCE_SECONDS)
        return self.output + rest


@contextmanager
def openssl(daemon: Daemon, *options: str) -> Iterator[OpenSsl]:
    """Run ``openssl s_client``, and leave no process behind."""
    client = OpenSsl(daemon, *options)
    try:
        yield client
    finally:
        client.process.kill()
        client.process.communicate()


def echo(client: OpenSsl, data: bytes = HELLO) -> None:
    """Type a frame, and read it back."""
    client.send(data)
    client.wait_for(re.escape(data))


@pytest.mark.parametrize(("option", "name"), [("-tls1_2", b"TLSv1.2"), ("-tls1_3", b"TLSv1.3")])
def test_s_client(tmp_path: Path, option: str, name: bytes) -> None:
    """OpenSSL's own client verifies us, is echoed, uses no compression, and ends in good order."""
    issued = issue(tmp_path)
    with (
        Daemon(tmp_path, configuration(issued)) as daemon,
        openssl(daemon, option, "-CAfile", str(issued.ca), "-verify_return_error") as client,
    ):
        client.wait_for(name + rb", Cipher is ")
        client.wait_for(b"Compression: NONE")
        client.wait_for(rb"Verify return code: 0 \(ok\)")
        echo(client)
        client.send(b"Q\n")
        client.end()
        daemon.wait_for("connection_closed", frames=1, reason="peer_closed")
        daemon.wait_until(HANDSHAKES, 1, result="completed")


def test_renegotiation(tmp_path: Path) -> None:
    """A client that wants to renegotiate is refused, and no worker is harmed."""
    issued = issue(tmp_path)
    with Daemon(tmp_path, configuration(issued)) as daemon:
        workers = daemon.workers()
        with openssl(daemon, "-tls1_2", "-CAfile", str(issued.ca)) as client:
            client.wait_for(b"Verify return code")
            echo(client)
            client.send(b"R\n")
            client.wait_for(b"RENEGOTIATING")
            client.wait_for(b"no renegotiation")
            client.end()
        line = daemon.wait_for("connection_closed", frames=1)
        assert line["reason"] in ("tls_error", "missing_close_notify", "peer_closed", "reset")
        assert daemon.workers() == workers
        daemon.wait_until(HANDSHAKES, 1, result="completed")


def test_key_update(tmp_path: Path) -> None:
    """A client may have the keys changed, of both directions, as often as it likes."""
    issued = issue(tmp_path)
    with (
        Daemon(tmp_path, configuration(issued)) as daemon,
        openssl(daemon, "-tls1_3", "-CAfile", str(issued.ca)) as client,
    ):
        client.wait_for(b"Verify return code")
        for _ in range(3):
            echo(client)
            client.send(b"K\n")
            client.wait_for(b"KEYUPDATE")
            echo(client)
            client.send(b"k\n")
            client.wait_for(b"KEYUPDATE")
        echo(client)
        client.send(b"Q\n")
        client.end()
        daemon.wait_for("connection_closed", frames=7, reason="peer_closed")


def test_client_certificates(tmp_path: Path) -> None:
    """Where clients need a certificate, they are served with one, and not without."""
    issued, client_issued = issue(tmp_path), issue(tmp_path, "client")
    config = configuration(issued, f'client_ca = "{issued.ca}"')
    keys = ("-cert", str(client_issued.certificate), "-key", str(client_issued.key))
    with Daemon(tmp_path, config) as daemon:
        for option in ("-tls1_2", "-tls1_3"):
            with openssl(daemon, option, *keys) as client:
                echo(client)
                client.send(b"Q\n")
                client.end()
        daemon.wait_until(HANDSHAKES, 2, result="completed")
        for option in ("-tls1_2", "-tls1_3"):
            with openssl(daemon, option) as client:
                client.send(HELLO)
                assert HELLO not in client.end()
        daemon.wait_until(HANDSHAKES, 2, result="failed")
        problems = {event["problem"] for event in daemon.events("handshake_failed")}
        daemon.wait_for_count("handshake_failed", 2)
        problems = {event["problem"] for event in daemon.events("handshake_failed")}
        assert problems == {"peer did not return a certificate"}


def test_oldest_version(tmp_path: Path) -> None:
    """A listener for TLS 1.3 refuses clients of TLS 1.2."""
    issued = issue(tmp_path)
    made = context(issued)
    with Daemon(tmp_path, configuration(issued, 'min_version = "1.3"')) as daemon:
        with TlsEchoClient(daemon, made) as client:
            client.echo(b"new")
        made.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(ssl.SSLError, match="ALERT_PROTOCOL_VERSION"):
            TlsEchoClient(daemon, made)
        daemon.wait_until(HANDSHAKES, 1, result="failed")
        daemon.wait_for("handshake_failed", problem="unsupported protocol")


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_sessions_are_resumed_at_any_worker(tmp_path: Path, version: ssl.TLSVersion) -> None:
    """A ticket of one worker is good for another, and frames come back whatever the worker."""
    issued = issue(tmp_path)
    made = context(issued)
    made.minimum_version = made.maximum_version = version
    with Daemon(tmp_path, configuration(issued, workers=2)) as daemon:
        with TlsEchoClient(daemon, made) as client:
            client.echo(b"first")
            assert not client.tls.session_reused
            session = client.tls.session
            client.leave()
        for number in range(30):
            with TlsEchoClient(daemon, made, session) as client:
                client.echo(bytes(number) * 1000)
                assert client.tls.session_reused
                client.leave()
        daemon.wait_for_count("connection_closed", 31)
        closed = daemon.events("connection_closed")
        assert {event["reason"] for event in closed} == {"peer_closed"}
        assert len({event["worker"] for event in closed}) == 2
        daemon.wait_until(HANDSHAKES, 31, result="completed")


def test_many_frames(tmp_path: Path) -> None:
    """Clients at two workers that send all at once get everything back."""
    issued = issue(tmp_path)
    made = context(issued)
    with Daemon(tmp_path, configuration(issued, workers=2)) as daemon:
        clients = [TlsEchoClient(daemon, made) for _ in range(8)]
        stream = b"".join(frame(bytes([size % 251]) * (size * 37)) for size in range(200))
        for client in clients:
            client.send(stream[:65536])
        for client in clients:
            assert client.receive(65536 - 40_000) == stream[: 65536 - 40_000]
            for at in range(65536, len(stream), 20_000):
                client.send(stream[at : at + 20_000])
                start = at - 40_000
                assert client.receive(20_000) == stream[start : start + 20_000]
            client.close()
        daemon.wait_until(HANDSHAKES, 8, result="completed")
        daemon.wait_for_count("connection_closed", 8)


def test_a_new_certificate(tmp_path: Path) -> None:
    """After a reload, new clients see the new certificate, and nobody is cut off in a frame."""
    issued = issue(tmp_path)
    config = configuration(issued, workers=2)
    with Daemon(tmp_path, config) as daemon:
        with TlsEchoClient(daemon, context(issued)) as old:
            before = old.serial()
            old.echo(b"before")
            old.send(HELLO[:5])
            issue(tmp_path, after=50)
            daemon.reload()
            with TlsEchoClient(daemon, context(issued)) as new:
                assert new.serial() != before
                new.echo(b"new")
                new.leave()
            old.send(HELLO[5:])
            assert old.receive(len(HELLO)) == HELLO
            old.expect_end()
        daemon.wait_for("connection_closed", reason="drained", frames=2)
        daemon.wait_until(HANDSHAKES, 2, result="completed")


def test_a_certificate_that_can_not_be_read(tmp_path: Path) -> None:
    """A reload that can't read the certificate leaves everybody with the old one."""
    issued = issue(tmp_path)
    with Daemon(tmp_path, configuration(issued), errors=FAILURE) as daemon:
        with TlsEchoClient(daemon, context(issued)) as client:
            before = client.serial()
            issue(tmp_path, after=50)
            kept = issued.certificate.read_bytes()
            issued.certificate.write_bytes(b"nothing of the kind")
            fail(daemon, r".*listen\[0\]\.tls\.certificate: .*there is no certificate in it.*")
            client.echo(b"goes on")
            with TlsEchoClient(daemon, context(issued)) as late:
                assert late.serial() == before
                late.echo(b"late")
            assert daemon.metric("lpechod_config_last_reload_successful") == 0
        issued.certificate.write_bytes(kept)
        daemon.reload()
        assert daemon.metric("lpechod_config_last_reload_successful") == 1
        with TlsEchoClient(daemon, context(issued)) as new:
            assert new.serial() != before
            new.echo(b"new")


def test_results_agree(tmp_path: Path) -> None:
    """Each connection that was made has one result of its handshake, and the metrics add up."""
    issued = issue(tmp_path)
    config = configuration(issued, workers=2)
    with Daemon(tmp_path, config) as daemon:
        for _ in range(3):
            with TlsEchoClient(daemon, context(issued)) as client:
                client.echo(b"completed")
        for data in (b"GET / HTTP/1.0\r\n\r\n", HELLO * 10):
            with daemon.connect() as client:
                client.send(data)
                while client.socket.recv(100):
                    pass
        for _ in range(4):
            with daemon.connect() as client:
                client.socket.shutdown(socket.SHUT_WR)
                client.expect_end()
        daemon.wait_for_count("connection_closed", 9)
        for result, count in {"completed": 3, "failed": 2, "abandoned": 4, "timed_out": 0}.items():
            daemon.wait_until(HANDSHAKES, count, result=result)
        assert daemon.metric("lpechod_tls_handshakes_delayed_total") == 0
