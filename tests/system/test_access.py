"""Who may connect to a daemon, directly and through HAProxy."""

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from tests.system.daemon import PATIENCE_SECONDS, Daemon, EchoClient, free_address

LISTEN = '[[listen]]\naddress = "127.0.0.1:0"\n'
PROXIED = f'{LISTEN}proxy_protocol = true\ntrusted_proxies = ["127.0.0.0/8"]\n'


def test_denied_clients_are_turned_away(tmp_path: Path) -> None:
    """Who is denied is closed at once, counted and logged, and a reload can let them in."""
    with Daemon(tmp_path, f'{LISTEN}deny = ["127.0.0.0/8"]\nallow = ["127.0.0.2"]') as daemon:
        with daemon.connect() as client:
            client.expect_end()
        rejected = daemon.wait_for("connection_rejected")
        assert (rejected["reason"], rejected["peer"][:10]) == ("denied", "127.0.0.1:")
        daemon.wait_until("lpechod_connections_rejected_total", 1, reason="denied")
        host, _, port = daemon.address.rpartition(":")
        with socket.create_connection((host, int(port)), source_address=("127.0.0.2", 0)) as other:
            other.sendall(bytes(4))
            assert other.recv(4) == bytes(4)
        daemon.reload(daemon.path.read_text().replace('["127.0.0.2"]', '["127.0.0.1"]'))
        with daemon.connect() as client:
            client.echo(b"hello")


def test_clients_that_come_too_often_are_turned_away(tmp_path: Path) -> None:
    """Beyond its burst and its rate an address is closed at once and counted, by each worker."""
    limits = "[limits]\nconnection_rate = 0.001\nconnection_burst = 2\n"
    with Daemon(tmp_path, limits + LISTEN) as daemon:
        for _ in range(2):
            with daemon.connect() as client:
                client.echo(b"hello")
        with daemon.connect() as client:
            client.expect_end()
        assert daemon.wait_for("connection_rejected")["reason"] == "connection_rate"
        daemon.wait_until("lpechod_connections_rejected_total", 1, reason="connection_rate")


def test_only_trusted_proxies_may_connect(tmp_path: Path) -> None:
    """A client that is no trusted proxy is closed at once, whatever it sends."""
    config = PROXIED.replace("127.0.0.0/8", "192.0.2.0/24")
    with Daemon(tmp_path, config) as daemon:
        with daemon.connect() as client:
            client.expect_end()
        assert daemon.wait_for("connection_rejected")["reason"] == "untrusted_proxy"


def test_a_header_that_does_not_come(tmp_path: Path) -> None:
    """A proxy that sends nothing is disconnected after timeouts.handshake."""
    with Daemon(tmp_path, f'[timeouts]\nhandshake = "200ms"\n{PROXIED}') as daemon:
        with daemon.connect() as client:
            client.expect_end()
        assert daemon.wait_for("connection_closed")["reason"] == "handshake_timeout"


@pytest.fixture(name="proxied")
def _proxied(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon(tmp_path, PROXIED) as daemon:
        yield daemon


ECHO_CHECK = """\
    option tcp-check
    tcp-check connect send-proxy linger
    tcp-check send-binary 00000001ff
    tcp-check expect binary 00000001ff
"""


SENDS_PROXY = [
    ("send-proxy check-send-proxy", ""),
    ("send-proxy-v2 check-send-proxy", ""),
]


@pytest.mark.parametrize(("options", "check"), [*SENDS_PROXY, ("send-proxy-v2", ECHO_CHECK)])
def test_behind_haproxy(tmp_path: Path, proxied: Daemon, options: str, check: str) -> None:
    """Behind HAProxy, which also checks our health, the log has the clients' own addresses."""
    with behind_haproxy(tmp_path, proxied, options, check) as address:
        client = connect(address)
        host, port = client.socket.getsockname()
        with client:
            client.echo(b"hello")
            client.echo(bytes(1 << 20))
        closed = proxied.wait_for("connection_closed", peer=f"{host}:{port}")
        assert (closed["reason"], closed["frames"]) == ("peer_closed", 2)
        assert closed["proxy"].startswith("127.0.0.1:")
        proxied.wait_for_count("connection_closed", 3)
        reasons = {each["reason"] for each in proxied.events("connection_closed")}
        assert reasons <= {"peer_closed", "reset"}  # It ends its checks with a reset.
        assert not proxied.events("handshake_failed")


@pytest.mark.parametrize(
    ("options", "check"),
    [
        *SENDS_PROXY,
        ("send-proxy-v2", ECHO_CHECK.replace("linger", "ssl linger")),
    ],
)
def test_tls_behind_haproxy(tmp_path: Path, options: str, check: str) -> None:
    """HAProxy passes TLS on behind its header: the client's address, and nobody else's reading."""
    authority = trustme.CA()
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    issued = authority.issue_cert("echo.test")
    issued.cert_chain_pems[0].write_to_path(chain)
    issued.private_key_pem.write_to_path(key)
    key.chmod(0o600)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    config = f'{PROXIED}tls = {{ certificate = "{chain}", key = "{key}" }}\n'
    options += " check-ssl verify none" if check else ""
    with (
        Daemon(tmp_path, config) as daemon,
        behind_haproxy(tmp_path, daemon, options, check) as address,
    ):
        client = connect(address)
        host, port = client.socket.getsockname()
        client.socket = context.wrap_socket(client.socket, server_hostname="echo.test")
        with client:
            client.echo(b"hello")
            client.echo(bytes(1 << 20))
            client.socket.unwrap()
        closed = daemon.wait_for("connection_closed", peer=f"{host}:{port}")
        assert (closed["reason"], closed["frames"]) == ("peer_closed", 2)
        assert closed["proxy"].startswith("127.0.0.1:")
        daemon.wait_for_count("connection_closed", 3)
        if check:  # Each of its checks is an echo over TLS; it does not take its leave.
            assert [each["frames"] for each in daemon.events("connection_closed")].count(1) >= 1
        assert not daemon.events("handshake_failed")
        if not check:
            daemon.wait_until("lpechod_tls_handshakes_total", 1, result="completed")


@contextlib.contextmanager
def behind_haproxy(tmp_path: Path, daemon: Daemon, options: str, check: str) -> Iterator[str]:
    """Run HAProxy in front of a daemon, and yield the address of its frontend."""
    haproxy = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
    assert haproxy is not None, "haproxy is missing (Debian: apt install haproxy)"
    address = free_address()
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        f"""\
defaults
    mode tcp
    timeout connect 5s
    timeout client 20s
    timeout server 20s
listen lpechod
    bind {address}
{check}    server one {daemon.address} {options} check inter 100ms
"""
    )
    process = subprocess.Popen([haproxy, "-q", "-db", "-f", config])
    try:
        yield address
    finally:
        process.send_signal(signal.SIGUSR1)
        process.terminate()
        process.wait()


def connect(address: str) -> EchoClient:
    """Connect as soon as somebody listens."""
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < give_up_at:
        with contextlib.suppress(ConnectionRefusedError):
            return EchoClient(address)
    raise AssertionError(f"nobody listens on {address}")
