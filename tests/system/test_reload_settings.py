"""What a reload changes: each part of the configuration, and the addresses above all."""

import http.client
import os
import re
import signal
import socket
import subprocess
import urllib.error
import urllib.request
from pathlib import Path
from typing import NoReturn

import pytest

from lpechod.net.address import parse_address
from lpechod.net.listener import ListenError, ListenerSettings, open_listeners
from tests.system.callers import Callers
from tests.system.daemon import (
    PATIENCE_SECONDS,
    Daemon,
    EchoClient,
    configuration,
    descriptor_kinds,
    frame,
    free_address,
)

# Every change from each of four pollers to each other one, as four round trips.
ROUND_TRIPS = (
    ("epoll", "epoll-et", "poll"),
    ("epoll", "poll", "select"),
    ("epoll", "select", "epoll-et"),
    ("epoll-et", "select", "poll"),
)


def refuses(address: str) -> bool:
    """Tell whether nobody listens on an address."""
    path = address.removeprefix("unix:")
    host, _, port = address.rpartition(":")
    with socket.socket(socket.AF_INET if path == address else socket.AF_UNIX) as client:
        return client.connect_ex((host, int(port)) if path == address else path) != 0


def backlog(address: str) -> int:
    """Return how many connections the kernel queues for a listener."""
    listed = subprocess.run(["ss", "-ltnH"], capture_output=True, check=True, text=True).stdout
    found = re.search(rf"^LISTEN +\d+ +(\d+) +{re.escape(address)} ", listed, re.MULTILINE)
    assert found, listed
    return int(found[1])


def page(address: str) -> str:
    """Return the metrics that an address serves."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=PATIENCE_SECONDS) as answer:
        text: str = answer.read().decode()
    return text


def keep_scraping(address: str) -> NoReturn:
    """Scrape until an error; while the program is replaced, one scrape waits in the queue."""
    while True:
        assert "lpechod_build_info" in page(address)


def reload_quietly(daemon: Daemon, config: str) -> None:
    """Reload into a configuration that does not log that: success shows in the metrics only."""
    name = "lpechod_config_last_reload_success_timestamp_seconds"
    before = daemon.metric(name)
    daemon.path.write_text(config)
    daemon.signal(signal.SIGHUP)
    while daemon.metric(name) == before or daemon.metric("lpechod_workers", state="draining"):
        pass


def test_limits(tmp_path: Path) -> None:
    """A new limit holds for the connections that come after the reload."""
    with Daemon(tmp_path, configuration()) as daemon:
        with daemon.connect() as client:
            client.echo(bytes(1025))
        daemon.reload(configuration(more='[limits]\nmax_frame = "1KiB"\n'))
        with daemon.connect() as client:
            client.echo(bytes(1024))
            client.send(frame(bytes(1025)))
            client.expect_end()
        daemon.wait_for("connection_closed", reason="frame_too_large")


def test_time_outs(tmp_path: Path) -> None:
    """A new time-out holds after the reload, and one that is turned off does not any more."""
    with Daemon(tmp_path, configuration()) as daemon:
        daemon.reload(configuration(more='[timeouts]\nidle = "100ms"\n'))
        with daemon.connect() as client:
            client.expect_end()
        daemon.wait_for("connection_closed", reason="idle_timeout")
        daemon.reload(configuration(more='[timeouts]\nidle = "off"\nlifetime = "100ms"\n'))
        with daemon.connect() as client:
            client.expect_end()
        daemon.wait_for("connection_closed", reason="lifetime")


def test_the_log_s_level(tmp_path: Path) -> None:
    """Lines below a raised level are not written after the reload, and come back with it."""
    with Daemon(tmp_path, configuration()) as daemon:
        daemon.wait_for("ready")
        reload_quietly(daemon, configuration(more='[log]\nlevel = "warning"\n'))
        with daemon.connect() as client:
            client.echo(b"unheard of")
        daemon.wait_until("lpechod_connections_active", 0)
        daemon.reload(configuration())
        with daemon.connect() as client:
            client.echo(b"heard of, by its other length")
        daemon.wait_for("connection_closed")

        assert [event["received_bytes"] for event in daemon.events("connection_closed")] == [33]


def test_the_log_s_format(tmp_path: Path) -> None:
    """Lines are for people after a reload to console, and JSON again after one back."""
    with Daemon(tmp_path, configuration(), errors=["unparsable"]) as daemon:
        daemon.wait_for("ready")
        reload_quietly(daemon, configuration(more='[log]\nformat = "console"\n'))
        daemon.reload(configuration())
        lines = [event["line"] for event in daemon.events("unparsable")]
        assert any(re.search(r"\breloaded\b.*\bworkers=1\b", line) for line in lines)


@pytest.mark.parametrize("pollers", ROUND_TRIPS)
def test_pollers(tmp_path: Path, pollers: tuple[str, ...]) -> None:
    """A worker of each poller is replaced by one of another, and the descriptors tell which."""

    def using(poller: str) -> str:
        return configuration(
            more=f'[server]\npoller = "{poller}"\n[limits]\nmax_connections = 900\n'
        )

    with Daemon(tmp_path, using(pollers[0])) as daemon:
        for poller in (*pollers[1:], pollers[0]):
            (old,) = daemon.workers()
            assert daemon.reload(using(poller))["poller"] == poller
            daemon.wait_for("worker_ended", worker=old)
            with daemon.connect() as client:
                client.echo(bytes(100_000))
            (worker,) = daemon.workers()
            # One hears the workers' bell, whatever the poller.
            instances = descriptor_kinds(worker).count("anon_inode:[eventpoll]")
            assert instances == 1 + poller.startswith("epoll")


def test_numbers_of_workers(tmp_path: Path) -> None:
    """More workers, fewer, and one for each CPU: so many serve after each reload."""
    with Daemon(tmp_path, configuration()) as daemon:
        before = set(daemon.workers())
        for written, count in (("3", 3), ("1", 1), ('"auto"', len(os.sched_getaffinity(0)))):
            event = daemon.reload(configuration(more=f"[server]\nworkers = {written}\n"))
            for old in before:
                daemon.wait_for("worker_ended", worker=old)
            assert event["workers"] == count
            assert daemon.metric("lpechod_workers", state="ready") == count
            after = set(daemon.workers())
            assert len(after) == count
            assert not after & before
            before = after
        assert daemon.metric("lpechod_worker_restarts_total") == 0


def test_the_watchdog(tmp_path: Path) -> None:
    """A worker that hangs is killed once the watchdog has been made less patient."""
    patient = configuration(more='[server]\nwatchdog = "off"\n')
    with Daemon(tmp_path, patient, errors=["worker_hung", "worker_died"]) as daemon:
        daemon.reload(configuration(more='[server]\nwatchdog = "1s"\n'))
        (worker,) = {*daemon.workers()} - {daemon.wait_for("worker_ended")["worker"]}
        os.kill(worker, signal.SIGSTOP)
        daemon.wait_for("worker_hung", worker=worker)
        daemon.wait_for("worker_died", worker=worker)
        with daemon.connect() as client:
            client.echo(b"another worker")


def test_the_drain_timeout(tmp_path: Path) -> None:
    """A worker drains for as long as the configuration says that it was started with."""
    short = configuration(more='[server]\ndrain_timeout = "100ms"\n')
    with Daemon(tmp_path, configuration(more='[server]\ndrain_timeout = "1h"\n')) as daemon:
        daemon.reload(short)
        with daemon.connect() as client:
            client.send(b"\0")
            daemon.wait_until("lpechod_received_bytes_total", 1)
            daemon.reload()
            daemon.wait_for("connection_closed", reason="drain_timeout")


def test_the_backlog(tmp_path: Path) -> None:
    """A new backlog is in force for a socket that stays."""
    with Daemon(tmp_path, configuration()) as daemon:
        for count in (7, 300):
            tables = configuration().replace(":0", f':0"\nbacklog = {count} #', 1)
            daemon.reload(tables)
            assert backlog(daemon.address) == count


def test_an_added_address(tmp_path: Path) -> None:
    """An address that is added is served, and the one before stays what it was."""
    added = free_address()
    with Daemon(tmp_path, configuration()) as daemon:
        kept = daemon.address
        assert daemon.reload(configuration("127.0.0.1:0", added))["listeners"] == [kept, added]
        for address in (kept, added):
            with daemon.connect(address) as client:
                client.echo(address.encode())


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_removed_address(tmp_path: Path, kind: str) -> None:
    """Who waits in the queue of a removed listener is served, and then it refuses."""
    removed = free_address() if kind == "tcp" else f"unix:{tmp_path}/removed.sock"
    with Daemon(tmp_path, configuration("127.0.0.1:0", removed)) as daemon:
        kept = daemon.address
        (worker,) = daemon.workers()
        os.kill(worker, signal.SIGSTOP)
        waiting = [EchoClient(removed) for _ in range(40)]
        staying = [EchoClient(kept) for _ in range(40)]
        for client in waiting + staying:
            client.send(frame(b"early"))

        assert daemon.reload(configuration())["listeners"] == [kept]

        os.kill(worker, signal.SIGCONT)
        for client in waiting + staying:
            assert client.receive(9) == frame(b"early")
            client.socket.shutdown(socket.SHUT_WR)
            client.expect_end()
            client.close()
        daemon.wait_for("worker_ended", worker=worker)
        assert refuses(removed)
        assert not refuses(kept)
        daemon.wait_until("lpechod_connections_accepted_total", 81)


def test_an_address_that_stays_refuses_nobody_while_another_goes(tmp_path: Path) -> None:
    """A listener that stays takes connections at every moment from the signal to the end."""
    removed = free_address()
    with Daemon(tmp_path, configuration("127.0.0.1:0", removed)) as daemon:
        kept = daemon.address
        (worker,) = daemon.workers()
        daemon.path.write_text(configuration())
        daemon.signal(signal.SIGHUP)
        while not refuses(removed):
            assert not refuses(kept)
        daemon.wait_for("worker_ended", worker=worker)
        assert not refuses(kept)


@pytest.mark.parametrize("wider", ["0.0.0.0:{port}", ":{port}", "[::]:{port}"])
def test_addresses_that_overlap(tmp_path: Path, wider: str) -> None:
    """A daemon is opened to every interface and closed again, and nobody is refused meanwhile."""
    narrow = free_address()
    port = int(narrow.rpartition(":")[2])
    with Daemon(tmp_path, configuration(narrow)) as daemon:
        callers = Callers(narrow)
        daemon.wait_for("ready")
        with callers.calling():
            daemon.reload(configuration(wider.format(port=port)))
            daemon.reload(configuration(narrow))
        assert callers.errors == []
        assert callers.turned_away == 0
        # A second daemon is still refused the port.
        with pytest.raises(ListenError, match="in use"):
            open_listeners([ListenerSettings(parse_address(narrow))])


def test_several_addresses_at_once(tmp_path: Path) -> None:
    """Addresses of every kind come and go in one reload."""
    old = [free_address(), f"unix:{tmp_path}/old.sock"]
    new = ["[::1]:0", ":0", free_address(), f"unix:{tmp_path}/a.sock", f"unix:{tmp_path}/b.sock"]
    with Daemon(tmp_path, configuration("127.0.0.1:0", *old)) as daemon:
        (worker,) = daemon.workers()
        listeners = daemon.reload(configuration(new[0], "127.0.0.1:0", *new[1:]))["listeners"]
        daemon.wait_for("worker_ended", worker=worker)
        assert len(listeners) == 6
        for address in listeners:
            with daemon.connect(address) as client:
                client.echo(address.encode())
        assert all(refuses(address) for address in old)
        assert not (tmp_path / "old.sock").exists()


def test_an_address_that_becomes_the_metrics_and_back(tmp_path: Path) -> None:
    """An address keeps its socket when it moves from [[listen]] to [metrics] and back."""
    moved, other = free_address(), free_address()
    before = configuration("127.0.0.1:0", moved, metrics=other)
    with Daemon(tmp_path, before) as daemon:
        for _ in range(2):
            (worker,) = daemon.workers()
            daemon.reload(configuration(metrics=moved))
            daemon.wait_for("worker_ended", worker=worker)
            assert "lpechod_build_info" in page(moved)
            assert refuses(other)
            (worker,) = daemon.workers()
            daemon.reload(before)
            daemon.wait_for("worker_ended", worker=worker)
            assert "lpechod_build_info" in page(other)
            with daemon.connect(moved) as client:
                client.echo(b"back")


def test_unix_sockets_and_their_files(tmp_path: Path) -> None:
    """The file of a UNIX socket comes with it, stays the same while it stays, and goes with it."""
    path = tmp_path / "echo.sock"
    both = configuration("127.0.0.1:0", f"unix:{path}")
    with Daemon(tmp_path, configuration()) as daemon:
        daemon.reload(both)
        inode = path.stat().st_ino
        with daemon.connect(f"unix:{path}") as client:
            client.echo(b"added")
        daemon.reload(both)
        assert path.stat().st_ino == inode
        with daemon.connect(f"unix:{path}") as client:
            client.echo(b"stayed")
        daemon.reload(configuration())
        assert not path.exists()
        daemon.reload(both)
        with daemon.connect(f"unix:{path}") as client:
            client.echo(b"again")


def test_metrics_elsewhere_off_and_on(tmp_path: Path) -> None:
    """The metrics move to another address, are turned off, and are back on with all counts."""
    first, second = free_address(), free_address()
    with Daemon(tmp_path, configuration(metrics=first)) as daemon:
        with daemon.connect() as client:
            client.echo(b"counted")
        daemon.wait_until("lpechod_connections_active", 0)
        assert daemon.reload(configuration(metrics=second))["metrics"] == [second]
        assert daemon.metric("lpechod_frames_total") == 1
        assert refuses(first)
        assert daemon.reload(configuration(metrics="off"))["metrics"] == []
        assert refuses(second)
        with daemon.connect() as client:
            client.echo(b"counted as well")
        daemon.reload(configuration(metrics=first))
        daemon.wait_until("lpechod_frames_total", 2)


def test_who_waits_at_an_address_that_the_metrics_leave(tmp_path: Path) -> None:
    """Scrapes are answered at the address of before until that refuses, also one that waits."""
    before, after = free_address(), free_address()
    with Daemon(tmp_path, configuration(metrics=before)) as daemon:
        daemon.wait_for("ready")
        daemon.path.write_text(configuration(metrics=after))
        daemon.signal(signal.SIGHUP)
        with pytest.raises(urllib.error.URLError, match="refused"):
            keep_scraping(before)
        daemon.wait_for("reloaded", metrics=[after])


def test_metrics_on_a_unix_socket(tmp_path: Path) -> None:
    """The metrics move to a UNIX socket, whose file is there as long as they are."""
    path = tmp_path / "metrics.sock"
    with Daemon(tmp_path, configuration()) as daemon:
        for _ in range(2):
            daemon.reload(configuration(metrics=f"unix:{path}"))
            with EchoClient(f"unix:{path}") as client:
                client.send(b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n")
                answer = http.client.HTTPResponse(client.socket)
                answer.begin()
                assert b"lpechod_build_info" in answer.read()
        daemon.reload(configuration())
        assert not path.exists()
        assert daemon.metric("lpechod_connections_active") == 0
