"""Workers that share one queue: who takes how many, and what happens while one stands still."""

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

import pytest

from tests.system.daemon import (
    PATIENCE_SECONDS,
    Daemon,
    EchoClient,
    count_sockets,
    wait_for_sleeps,
)

POLLERS = ("epoll", "epoll-et", "poll", "select")


class Crowd:
    """Clients of a daemon that stay until all leave.

    Args:
        daemon: one that has no connection yet.
    """

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._clients: list[EchoClient] = []
        daemon.wait_for("ready")
        self._own = {pid: count_sockets(pid) for pid in daemon.workers()}

    @property
    def workers(self) -> list[int]:
        """Those that were there before the first client."""
        return list(self._own)

    def of(self, worker: int) -> int:
        """Count the connections that a worker holds."""
        return count_sockets(worker) - self._own[worker]

    def arrive(self, count: int, patience: float = PATIENCE_SECONDS) -> None:
        """Connect one by one, and demand an echo of each in time, before the next one comes."""
        for _ in range(count):
            client = self._daemon.connect()
            self._clients.append(client)
            client.socket.settimeout(patience)
            client.echo(b"now")
            client.socket.settimeout(PATIENCE_SECONDS)

    def connect(self, count: int) -> list[bool]:
        """Connect one by one, and tell of each whether it is served or closed at once."""
        clients = [self._daemon.connect() for _ in range(count)]
        self._clients += clients
        return [is_served(client) for client in clients]

    def burst(
        self, count: int, patience: float = PATIENCE_SECONDS, *, staying: bool = True
    ) -> None:
        """Connect all before anybody says anything, without waiting in between."""
        host, _, port = self._daemon.address.rpartition(":")
        for _ in range(count):
            client = EchoClient.__new__(EchoClient)
            client.socket = socket.socket()
            client.socket.setblocking(False)
            client.socket.connect_ex((host, int(port)))
            self._clients.append(client)
        deadline = time.monotonic() + patience
        for client in self._clients[-count:]:
            client.socket.settimeout(max(0.001, deadline - time.monotonic()))
            client.echo(b"all at once")
            if not staying:
                client.close()

    def look_around(self) -> None:
        """Wait until each worker has seen twice who is there; nobody comes or goes meanwhile.

        Each sleep of an idle worker ends with a heartbeat.
        """
        for worker in self.workers * 2:
            wait_for_sleeps(worker, 2)

    def echo(self) -> None:
        """Demand an echo of each."""
        for client in self._clients:
            client.echo(b"still")

    def leave(self) -> None:
        """Close all connections."""
        for client in self._clients:
            client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.leave()


class Bell(NamedTuple):
    """An eventfd(2) that a process holds: which one it is, and how often it was rung."""

    number: int
    rings: int


def bells(pid: int) -> list[Bell]:
    """List those of a process (proc_pid_fdinfo(5))."""
    found = []
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            lines = path.read_text().splitlines()
        except FileNotFoundError:  # Closed meanwhile.
            continue
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        if "eventfd-id" in fields:
            found.append(Bell(int(fields["eventfd-id"]), int(fields["eventfd-count"], 16)))
    return found


def is_served(client: EchoClient) -> bool:
    """Tell whether a connection is served, or closed at once."""
    try:
        client.echo(b"may I?")
    except (AssertionError, ConnectionError):
        return False
    return True


@contextmanager
def stopped(worker: int) -> Iterator[None]:
    """Stop a worker for a while."""
    os.kill(worker, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(worker, signal.SIGCONT)


@pytest.mark.parametrize("arrive", [Crowd.arrive, Crowd.burst])
@pytest.mark.parametrize("poller", POLLERS)
def test_workers_share_connections_evenly(
    tmp_path: Path, poller: str, arrive: Callable[[Crowd, int], object]
) -> None:
    """Four workers that have just become ready hold a hundred of 400 connections each, or so."""
    config = f'[server]\nworkers = 4\npoller = "{poller}"\n[limits]\nmax_connections = 900\n'
    with Daemon(tmp_path, config) as daemon, Crowd(daemon) as crowd:
        arrive(crowd, 400)

        held = [crowd.of(worker) for worker in crowd.workers]

        assert sum(held) == 400
        assert all(80 <= each <= 120 for each in held), held


def test_connections_are_served_in_time_beside_a_stopped_worker(tmp_path: Path) -> None:
    """While one of four workers stands still, each new connection is served within a second."""
    with Daemon(tmp_path, "[server]\nworkers = 4\n") as daemon, Crowd(daemon) as crowd:
        victim = crowd.workers[0]
        crowd.arrive(40)
        before = crowd.of(victim)
        with stopped(victim):
            crowd.arrive(50, patience=1)
            assert crowd.of(victim) == before
        crowd.echo()


def test_nobody_waits_long_for_the_least_loaded_worker(tmp_path: Path) -> None:
    """Workers far ahead of one that has just stopped let no connection wait for a second."""
    with Daemon(tmp_path, "[server]\nworkers = 4\n") as daemon, Crowd(daemon) as crowd:
        victim = crowd.workers[-1]
        with stopped(victim):
            crowd.arrive(90, patience=1)
        crowd.look_around()
        with stopped(victim):
            crowd.arrive(50, patience=1)
            assert crowd.of(victim) == 0
        crowd.echo()


def test_a_worker_catches_up_after_a_stop(tmp_path: Path) -> None:
    """A worker that goes on after a stop gets the next connections, which others leave to it."""
    with Daemon(tmp_path, "[server]\nworkers = 4\n") as daemon, Crowd(daemon) as crowd:
        victim = crowd.workers[2]
        with stopped(victim):
            crowd.arrive(120, patience=1)
        crowd.look_around()
        assert crowd.of(victim) == 0

        crowd.arrive(15, patience=1)

        assert crowd.of(victim) == 15


def test_short_connections_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """Of 1,000 clients that come at once and leave after their echo, each is served in time."""
    with Daemon(tmp_path, "[server]\nworkers = 2\n") as daemon, Crowd(daemon) as crowd:
        crowd.look_around()
        crowd.burst(1000, patience=1, staying=False)


@pytest.mark.parametrize("workers", [2, 4])
def test_who_stays_does_not_wait_either(tmp_path: Path, workers: int) -> None:
    """Of 1,500 clients that come at once and stay, each is served in time."""
    config = f"[server]\nworkers = {workers}\n"
    with Daemon(tmp_path, config) as daemon, Crowd(daemon) as crowd:
        crowd.look_around()
        crowd.burst(1500, patience=1)


def test_giving_way_is_counted(tmp_path: Path) -> None:
    """A worker that leaves a connection to others counts a pause for balance."""
    pauses = "lpechod_accept_pauses_total"
    with Daemon(tmp_path, "[server]\nworkers = 2\n") as daemon, Crowd(daemon) as crowd:
        assert daemon.metric(pauses, reason="balance") == 0
        busy, victim = crowd.workers
        with stopped(victim):
            crowd.arrive(30)
        crowd.look_around()
        before = daemon.settled(pauses, reason="balance")
        # Nobody else is there to take it, so the busy worker wakes, and leaves it for a while.
        with stopped(victim):
            crowd.arrive(1)

        assert crowd.of(busy) >= 31
        daemon.wait_until(pauses, before + 1, reason="balance")


def test_max_connections_counts_all_workers(tmp_path: Path) -> None:
    """Of 60 connections to four workers that have just started, 40 are served if 40 are allowed."""
    config = "[server]\nworkers = 4\n[limits]\nmax_connections = 40\n"
    with Daemon(tmp_path, config) as daemon, Crowd(daemon) as crowd:
        served = [crowd.connect(1)[0] for _ in range(60)]

        assert served == [True] * 40 + [False] * 20

        daemon.wait_until("lpechod_connections_active", 40)
        daemon.wait_until("lpechod_connections_rejected_total", 20, reason="max_connections")
        assert daemon.metric("lpechod_connections_accepted_total") == 40


def test_connections_of_a_dead_worker_do_not_count(tmp_path: Path) -> None:
    """What a killed worker held may be taken by others under max_connections, and no more."""
    config = "[server]\nworkers = 2\n[limits]\nmax_connections = 30\n"
    with Daemon(tmp_path, config, errors={"worker_died"}) as daemon, Crowd(daemon) as crowd:
        crowd.arrive(30)
        victim = crowd.workers[0]
        free = crowd.of(victim)
        assert 0 < free < 30
        os.kill(victim, signal.SIGKILL)
        daemon.wait_for("worker_died", worker=victim)

        served = [crowd.connect(1)[0] for _ in range(free + 5)]

        assert served == [True] * free + [False] * 5


def test_nobody_waits_for_the_dead(tmp_path: Path) -> None:
    """Each end of a worker wakes those who have left connections to it."""
    config = "[server]\nworkers = 2\n"
    with Daemon(tmp_path, config, errors={"worker_died"}) as daemon:
        daemon.wait_for("ready")
        (before,) = bells(daemon.pid)
        assert before.rings == 0
        victim = daemon.workers()[0]
        os.kill(victim, signal.SIGKILL)
        daemon.wait_for("worker_died", worker=victim)
        wait_for_sleeps(daemon.pid, 1)

        assert bells(daemon.pid) == [Bell(before.number, 1)]


def test_two_generations_hear_one_bell(tmp_path: Path) -> None:
    """A reload keeps the bell, since old and new workers share the queues for a while."""
    with Daemon(tmp_path, "[server]\nworkers = 2\n") as daemon:
        daemon.wait_for("ready")
        (first,) = bells(daemon.pid)
        assert [bells(worker) for worker in daemon.workers()] == [[first]] * 2
        daemon.reload()
        daemon.wait_until("lpechod_workers", 0, state="draining")

        (second,) = bells(daemon.pid)

        assert second.number == first.number
        assert {bell.number for worker in daemon.workers() for bell in bells(worker)} == {
            first.number
        }
