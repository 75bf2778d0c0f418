"""The limit of connections from one address, which all workers keep together."""

import os
import signal
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import pytest

from tests.system.daemon import PATIENCE_SECONDS, Daemon, EchoClient, count_sockets, frame
from tests.system.test_balance import is_served
from tests.system.test_upgrade import FIELD, Installed

WORKERS = 4
LIMIT = 10
REFUSED = {"reason": "max_connections_per_ip"}


def config(workers: int = WORKERS, limit: int = LIMIT) -> str:
    """Write a configuration whose drains do not end by themselves."""
    return (
        f'[server]\nworkers = {workers}\ndrain_timeout = "1h"\n'
        f"[limits]\nmax_connections_per_ip = {limit}\n"
        '[log]\nburst = 1000\n[[listen]]\naddress = "127.0.0.1:0"\n'
        '[metrics]\naddress = "127.0.0.1:0"\n'
    )


class Clients:
    """Connections of one address or another, which stay until they are told to leave.

    Args:
        daemon: whose they are.
    """

    def __init__(self, daemon: Daemon) -> None:
        daemon.wait_for("ready")
        self._daemon = daemon
        self._stack = ExitStack()
        self._ended = self._begun = 0
        self.served: list[EchoClient] = []

    def dial(self, source: str = "127.0.0.1") -> EchoClient:
        """Connect from an address."""
        client = EchoClient.__new__(EchoClient)
        host, _, port = self._daemon.address.rpartition(":")
        client.socket = self._stack.enter_context(
            socket.create_connection((host, int(port)), PATIENCE_SECONDS, (source, 0))
        )
        return client

    def come(self, count: int, source: str = "127.0.0.1") -> int:
        """Connect one by one, and return how many are served."""
        clients = [client for _ in range(count) if is_served(client := self.dial(source))]
        self.served += clients
        return len(clients)

    def begin(self) -> None:
        """Begin a frame each, so that no drain ends them."""
        for client in self.served[self._begun :]:
            client.send(frame(b"12345678")[:6])
        self._begun = len(self.served)

    def drained(self, count: int) -> None:
        """End the frames of the first ones, whom that ends, and wait until they count no more."""
        for client in self.served[:count]:
            client.send(frame(b"12345678")[6:])
            assert client.receive(12) == frame(b"12345678")
            client.expect_end()
            client.close()
        self._begun -= count
        del self.served[:count]
        self._ended += count
        self._daemon.wait_for_count("connection_closed", self._ended)

    def leave(self, count: int) -> None:
        """Close the first ones, and wait until they count no more."""
        for client in self.served[:count]:
            client.close()
        del self.served[:count]
        self._ended += count
        self._daemon.wait_for_count("connection_closed", self._ended)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()


def test_all_workers_count_together(tmp_path: Path) -> None:
    """Of each address as many are served as the limit says, by whichever worker."""
    with Daemon(tmp_path, config()) as daemon, Clients(daemon) as clients:
        before = {pid: count_sockets(pid) for pid in daemon.workers()}
        assert clients.come(3 * LIMIT) == LIMIT
        assert sum(count_sockets(pid) > before[pid] for pid in before) > 1
        assert clients.come(3 * LIMIT, "127.0.0.2") == LIMIT
        rejected = "lpechod_connections_rejected_total"
        daemon.wait_until(rejected, 4 * LIMIT, **REFUSED)
        for _ in range(3):
            clients.leave(4)
            assert clients.come(20) + clients.come(20, "127.0.0.2") == 4
        assert daemon.metric("lpechod_census_overflows_total") == 0


def test_a_burst_passes_the_limit_by_one_for_each_other_worker(tmp_path: Path) -> None:
    """When many come at once, one more for each other worker may be served, and never fewer."""
    with Daemon(tmp_path, config()) as daemon, Clients(daemon) as clients:
        crowd = [clients.dial() for _ in range(100)]
        served = sum(is_served(client) for client in crowd)
        assert LIMIT <= served <= LIMIT + WORKERS - 1
        assert clients.come(20) == 0


@pytest.mark.parametrize("workers", [1, WORKERS, 6])
def test_a_generation_that_drains_is_counted(tmp_path: Path, workers: int) -> None:
    """After a reload the connections of the old workers count until they end, one by one."""
    with Daemon(tmp_path, config()) as daemon, Clients(daemon) as clients:
        assert clients.come(LIMIT) == LIMIT
        clients.begin()
        for _ in range(2):
            daemon.reload(config(workers))
            assert clients.come(20) == 0
            assert clients.come(1, "127.0.0.2") == 1
            clients.begin()
        clients.drained(4)
        assert clients.come(20) == 4
        assert daemon.metric("lpechod_workers", state="draining") > 0


def test_connections_of_a_dead_worker_are_gone(tmp_path: Path) -> None:
    """When a worker is killed, so many more are served as it held, and no more."""
    with Daemon(tmp_path, config(), errors=("worker_died",)) as daemon, Clients(daemon) as clients:
        before = {pid: count_sockets(pid) for pid in daemon.workers()}
        assert clients.come(20) == LIMIT
        for victim, own in before.items():
            lost = count_sockets(victim) - own
            os.kill(victim, signal.SIGKILL)
            daemon.wait_for("worker_died", worker=victim)
            assert clients.come(20) == lost


def test_an_upgrade_forgets_nobody(tmp_path: Path) -> None:
    """Workers of a version with other counters are seen by those of the next one."""
    installed = Installed(tmp_path)
    with (
        Daemon(tmp_path, config(), prefix=installed.prefix, environ=installed.environ) as daemon,
        Clients(daemon) as clients,
    ):
        assert clients.come(LIMIT) == LIMIT
        clients.begin()
        installed.edit("ops/counters.py", FIELD, f"    novelties: int = 0\n{FIELD}")
        daemon.reload()
        assert clients.come(20) == 0
        clients.drained(LIMIT)
        assert clients.come(20) == LIMIT


def test_a_limit_that_comes_and_goes(tmp_path: Path) -> None:
    """Without the limit nobody is refused, and with it those count that came while it was set."""
    with Daemon(tmp_path, config(limit=0)) as daemon, Clients(daemon) as clients:
        for limit, more in ((0, 20), (LIMIT, LIMIT), (0, 20), (LIMIT, 0)):
            daemon.reload(config(limit=limit))
            assert clients.come(20) == more
            clients.begin()
