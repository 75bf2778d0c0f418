"""The daemon from start to end: signals, drain, exit status, what it leaves behind."""

import os
import signal
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest

from tests.system.daemon import Daemon, EchoClient, frame

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_closes_an_idle_connection_with_a_fin(
    tmp_path: Path, number: signal.Signals
) -> None:
    """SIGTERM and SIGINT end idle connections with a FIN and the process with status 0."""
    with Daemon(tmp_path) as daemon, daemon.connect() as client:
        client.echo(b"hello")
        daemon.signal(number)
        client.expect_end()
        client.close()
        assert daemon.wait() == 0
        daemon.wait_for("connection_closed", reason="drained", frames=1)


def test_a_drain_waits_for_the_frame_in_flight(tmp_path: Path) -> None:
    """A frame that has begun when the drain begins is still echoed whole."""
    sent = frame(b"x" * 1000)
    with Daemon(tmp_path) as daemon, daemon.connect() as client:
        client.echo(b"hello")
        client.send(sent[:500])
        daemon.wait_until("lpechod_received_bytes_total", 9 + 500)
        daemon.signal(signal.SIGTERM)
        daemon.wait_for("draining", connections=1)
        client.send(sent[500:])

        assert client.receive(len(sent)) == sent

        client.expect_end()
        client.close()
        daemon.wait_for("connection_closed", reason="drained", frames=2)


def test_a_drain_refuses_new_connections(tmp_path: Path) -> None:
    """While draining, the port is closed and readiness is 503, but metrics are still served."""
    with Daemon(tmp_path) as daemon, daemon.connect() as client:
        client.send(b"\0")
        daemon.wait_until("lpechod_received_bytes_total", 1)
        assert daemon.get("/-/ready") == "Ready.\n"
        daemon.signal(signal.SIGTERM)
        daemon.wait_for("draining")

        with pytest.raises(ConnectionRefusedError):
            EchoClient(daemon.address)
        with pytest.raises(urllib.error.HTTPError, match="503"):
            daemon.get("/-/ready")
        assert daemon.metric("lpechod_workers", state="draining") == 1
        assert daemon.get("/-/healthy") == "Healthy.\n"


def test_a_drain_ends_at_its_time_out(tmp_path: Path) -> None:
    """A client that never comes to a frame boundary is cut off after drain_timeout."""
    config = '[server]\ndrain_timeout = "200ms"\n'
    with Daemon(tmp_path, config) as daemon, daemon.connect() as client:
        client.send(b"\0\0")
        daemon.wait_until("lpechod_received_bytes_total", 2)
        daemon.signal(signal.SIGTERM)

        assert daemon.wait() == 0

        daemon.wait_for("connection_closed", reason="drain_timeout")


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    """A second signal closes what is still open without waiting for the drain."""
    config = '[server]\ndrain_timeout = "1h"\n'
    with Daemon(tmp_path, config) as daemon, daemon.connect() as client:
        client.send(b"\0\0")
        daemon.wait_until("lpechod_received_bytes_total", 2)
        daemon.signal(signal.SIGTERM)
        daemon.wait_for("draining")
        daemon.signal(signal.SIGINT)

        assert daemon.wait() == 0

        daemon.wait_for("connection_closed", reason="drain_timeout")


def test_connections_that_wait_to_be_accepted_are_served_before_the_drain(tmp_path: Path) -> None:
    """What is in the listener's queue at the signal gets its echo, not a reset."""
    with Daemon(tmp_path) as daemon:
        address = daemon.address
        daemon.signal(signal.SIGSTOP)
        clients = [EchoClient(address) for _ in range(50)]
        for client in clients:
            client.send(frame(b"early"))
        daemon.signal(signal.SIGTERM)
        daemon.signal(signal.SIGCONT)
        for client in clients:
            assert client.receive(9) == frame(b"early")
            client.expect_end()
            client.close()


def test_a_thousand_connections_drain(tmp_path: Path) -> None:
    """Many connections are told over a while, and all end cleanly."""
    with Daemon(tmp_path, '[server]\ndrain_timeout = "3s"\n') as daemon:
        clients = [daemon.connect() for _ in range(1000)]
        daemon.wait_until("lpechod_connections_active", 1000)
        daemon.signal(signal.SIGTERM)
        for client in clients:
            client.expect_end()
            client.close()
        daemon.wait_for("stopped", connections=1000)


def test_a_unix_socket_serves_and_leaves_no_file(tmp_path: Path) -> None:
    """A UNIX socket is served like TCP, and its file is gone at the end."""
    address = f"unix:{tmp_path}/echo.sock"
    with Daemon(tmp_path, f'[[listen]]\naddress = "{address}"\n') as daemon:
        assert daemon.address == address
        with daemon.connect() as client:
            client.echo(b"local")
        daemon.wait_for("connection_closed", peer="unix", frames=1)


def test_a_stale_unix_socket_is_replaced(tmp_path: Path) -> None:
    """A daemon that was killed leaves its socket file; the next one takes the address over."""
    address = f"unix:{tmp_path}/echo.sock"
    config = f'[[listen]]\naddress = "{address}"\n'
    first = Daemon(tmp_path, config)
    first.wait_for("ready")
    first.signal(signal.SIGKILL)
    first.wait()
    assert (tmp_path / "echo.sock").exists()

    with Daemon(tmp_path, config) as daemon, daemon.connect() as client:
        client.echo(b"again")


def test_every_listener_serves(tmp_path: Path) -> None:
    """Several addresses of several kinds are served by one daemon."""
    config = "".join(
        f'[[listen]]\naddress = "{address}"\n'
        for address in ("127.0.0.1:0", "[::1]:0", f"unix:{tmp_path}/a.sock", ":0")
    )
    with Daemon(tmp_path, config) as daemon:
        listeners = daemon.wait_for("ready")["listeners"]
        assert len(listeners) == 4
        for address in listeners:
            with daemon.connect(address) as client:
                client.echo(address.encode())


@pytest.mark.parametrize("poller", ["auto", "epoll", "epoll-et", "poll", "select"])
def test_every_poller_serves(tmp_path: Path, poller: str) -> None:
    """Each poller of the configuration echoes small, large and pipelined frames."""
    config = f'[server]\npoller = "{poller}"\n[limits]\nmax_connections = 900\n'
    pipelined = frame(b"p") * 5000
    with Daemon(tmp_path, config) as daemon, daemon.connect() as client:
        client.echo(b"")
        client.echo(bytes(range(256)) * 4096)
        client.send(pipelined)
        assert client.receive(len(pipelined)) == pipelined


def test_a_default_sigpipe_is_no_danger(tmp_path: Path) -> None:
    """Started with SIGPIPE at its default action, the daemon survives clients that reset."""
    reset = "import os, signal as s, sys; s.signal(s.SIGPIPE, s.SIG_DFL)"
    launcher = (sys.executable, "-c", f"{reset}; os.execv(sys.argv[1], sys.argv[1:])")
    with Daemon(tmp_path, prefix=launcher) as daemon:
        client = daemon.connect()
        for _ in range(64):
            client.send(frame(bytes(65536)))
        client.reset()
        daemon.wait_for("connection_closed", reason="reset")
        with daemon.connect() as other:
            other.echo(b"still here")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_signals_of_other_daemons_mean_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """What reopens logs or upgrades elsewhere ends neither the supervisor nor a worker."""
    with Daemon(tmp_path) as daemon, daemon.connect() as client:
        client.echo(b"before")
        for pid in (daemon.pid, *daemon.workers()):
            os.kill(pid, number)
        client.echo(b"after")
        assert daemon.metric("lpechod_worker_restarts_total") == 0


def test_a_daemon_without_standard_error_serves(tmp_path: Path) -> None:
    """Nobody reads the log any more, and the echo service goes on."""
    config = tmp_path / "config.toml"
    path = tmp_path / "echo.sock"
    config.write_text(
        f'[[listen]]\naddress = "unix:{path}"\n[metrics]\naddress = "off"\n'
        "[log]\nlevel = 'debug'\nburst = 1000\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "lpechod", "serve", "--config", str(config)],
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    assert any(b'"ready"' in line for line in process.stderr)
    process.stderr.close()
    for _ in range(20):
        with EchoClient(f"unix:{path}") as client:
            client.echo(b"no reader")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    assert not path.exists()
