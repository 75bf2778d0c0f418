"""The probe: the real blackbox exporter tells a daemon that echoes from whatever does not."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.prometheus import Server, blackbox_exporter
from tests.system.daemon import Daemon, free_address

HURRY = {"X-Prometheus-Scrape-Timeout-Seconds": "1.5"}
"""What Prometheus says of its patience: the exporter gives up half a second before that is over."""


@pytest.fixture
def exporter() -> Iterator[Server]:
    with blackbox_exporter() as running:
        yield running


def probe(exporter: Server, target: str) -> str:
    """Return the value of `probe_success` for a target."""
    page = exporter.get("/probe", {"module": "lpechod", "target": target}, HURRY)
    (success,) = [line for line in page.splitlines() if line.startswith("probe_success ")]
    return success.split()[1]


def test_a_daemon_that_echoes(exporter: Server, tmp_path: Path) -> None:
    """The probe of a daemon succeeds, sends one frame, and ends as a client should."""
    with Daemon(tmp_path) as daemon:
        assert probe(exporter, daemon.address) == "1"
        daemon.wait_until("lpechod_connections_closed_total", 1, reason="peer_closed")
        assert daemon.metric("lpechod_frames_total") == 1
        assert daemon.metric("lpechod_frame_size_bytes_sum") == 5


def test_a_listener_that_does_not_echo(exporter: Server) -> None:
    """The probe fails where a connection is made and nothing comes back."""
    with socket.create_server(("127.0.0.1", 0)) as silent:  # The kernel connects whoever comes.
        assert probe(exporter, f"127.0.0.1:{silent.getsockname()[1]}") == "0"


@pytest.mark.parametrize("answer", [b"ping\n", b"\0\0\0\x04ping\n", b"\0\0\0\x05ping"])
def test_a_listener_that_echoes_something_else(exporter: Server, answer: bytes) -> None:
    """The probe fails if the header or the end of the frame lacks, or the length is another."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            client, _ = server.accept()
            with client:
                client.sendall(answer)
                while client.recv(100):
                    pass

        peer = threading.Thread(target=serve)
        peer.start()
        assert probe(exporter, f"127.0.0.1:{server.getsockname()[1]}") == "0"
        peer.join()


def test_a_closed_port(exporter: Server) -> None:
    """The probe fails where nobody listens."""
    assert probe(exporter, free_address()) == "0"
