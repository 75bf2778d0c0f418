"""The HAProxy configuration that is shipped, with a real HAProxy and three real daemons.

What can be lost when a host goes, and what cannot. A connection that HAProxy makes after the host
has stopped listening is refused before a byte was sent, so it is made again elsewhere and nobody
notices. One that is established belongs to its host: it ends at a frame boundary if that drains,
and breaks if that dies. Between the two lies one that the kernel has queued for a listening socket
which is closed before anybody accepts it: for HAProxy it is established, and then reset. Under the
load of these tests one stop in a hundred meets such a connection. So there are two tests of a stop:
with the host taken out of the rotation first nothing at all may be lost, and without that only
calls that were under way while the socket was closed.
"""

import os
import select
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.deploy.haproxy import SERVERS, SHIPPED, HAProxy, check, exchange
from tests.system.callers import echoes
from tests.system.daemon import (
    PATIENCE_SECONDS,
    Daemon,
    EchoClient,
    configuration,
    frame,
    free_address,
    wait_for_end,
)

CALLERS = 4
FOR_EACH = 4
HELD = FOR_EACH * len(SERVERS)
"""Connections held open, as leastconn deals them out."""

WITHOUT_ECHO = {
    "    tcp-check send-binary 0000000568656c6c6f\n": "",
    "    tcp-check expect binary 0000000568656c6c6f\n": "",
}


@dataclass
class Call:
    """A client that has connected, sent a frame, and waited for the end; times are monotonic."""

    began_at: float
    ended_at: float
    echoed: bool


class Calls:
    """Calls to an address by several clients, each of which makes one after the other."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._enough = threading.Event()
        self.ended: list[Call] = []

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """Have the calls made during the block."""
        threads = [threading.Thread(target=self._run) for _ in range(CALLERS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._enough.set()
            for thread in threads:
                thread.join()

    def _run(self) -> None:
        while not self._enough.is_set():
            began_at = time.monotonic()
            try:
                echoed = echoes(self._address, b"is anybody there?")
            except OSError:
                echoed = False
            self.ended.append(Call(began_at, time.monotonic(), echoed))

    def wait_for_more(self) -> None:
        """Wait until calls that begin from now on have ended, for each client."""
        count = len(self.ended) + 10 * CALLERS
        while len(self.ended) < count:
            self._enough.wait(0.01)

    def lost(self) -> list[Call]:
        """Return those that had no echo."""
        return [call for call in self.ended if not call.echoed]

    def lost_apart_from(self, begin: float, end: float) -> list[Call]:
        """Return those that had no echo and were not under way at any time between the two."""
        return [call for call in self.lost() if call.ended_at < begin or call.began_at > end]


class Site:
    """Three daemons behind HAProxy.

    Args:
        stack: ends all of it.
        directory: for files.
        mortal: the number of a daemon that the test kills.
    """

    def __init__(self, stack: ExitStack, directory: Path, mortal: int | None = None) -> None:
        self._stack = stack
        self._directory = directory
        self.addresses = [free_address() for _ in SERVERS]
        self.daemons = [
            self.start(number, -signal.SIGKILL if number == mortal else 0)
            for number in range(len(SERVERS))
        ]
        for daemon in self.daemons:
            daemon.wait_for("ready")
        self.haproxy = stack.enter_context(HAProxy(directory, self.addresses))

    def start(self, number: int, status: int = 0) -> Daemon:
        """Start a daemon at the address of a server, again perhaps."""
        directory = self._directory / f"{SERVERS[number]}-{time.monotonic_ns()}"
        directory.mkdir()
        config = configuration(self.addresses[number], more='server.drain_timeout = "3s"')
        return self._stack.enter_context(Daemon(directory, config, status=status))

    def deal(self, count: int, stub: bytes = b"") -> tuple[list[EchoClient], list[int]]:
        """Open connections through HAProxy, one after the other, and keep them open.

        Args:
            count: how many.
            stub: the beginning of a frame, which the daemon has when this returns: it comes in one
                piece with a frame that is echoed.

        Returns:
            the connections, and how many of them each server has got.
        """
        before = self.haproxy.count("stot")
        clients = []
        for number in range(count):
            client = self._stack.enter_context(EchoClient(self.haproxy.address))
            whole = frame(b"client %d" % number)
            client.send(whole + stub)
            assert client.receive(len(whole)) == whole
            clients.append(client)
        after = self.haproxy.count("stot")
        return clients, [now - then for now, then in zip(after, before, strict=True)]

    def hold(self, stub: bytes = b"") -> list[EchoClient]:
        """Open as many connections to each daemon and keep them open; see `deal`."""
        clients, dealt = self.deal(HELD, stub)
        assert dealt == [FOR_EACH] * len(SERVERS)
        return clients


@pytest.fixture(name="site")
def _site(tmp_path: Path) -> Iterator[Site]:
    """Three daemons to which anything may happen."""
    with ExitStack() as stack:
        yield Site(stack, tmp_path)


@pytest.fixture(name="calm", scope="module")
def _calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Three daemons to which nothing happens, for several tests."""
    with ExitStack() as stack:
        yield Site(stack, tmp_path_factory.mktemp("calm"))


def processes(daemon: Daemon) -> list[int]:
    """Return the supervisor and its workers."""
    return [daemon.pid, *daemon.workers()]


@contextmanager
def frozen(daemon: Daemon) -> Iterator[None]:
    """Stop all processes of a daemon during the block: it hangs."""
    hanging = processes(daemon)
    for pid in hanging:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in hanging:
            os.kill(pid, signal.SIGCONT)


def wait_for_ends(clients: list[EchoClient], count: int) -> list[EchoClient]:
    """Wait until so many connections have something to read; return those."""
    poll = select.poll()
    by_fd = {client.socket.fileno(): client for client in clients}
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    ended: list[EchoClient] = []
    while len(ended) < count:
        ready = poll.poll(PATIENCE_SECONDS * 1000)
        assert ready, f"{len(ended)} of {count} have ended"
        for fd, _ in ready:
            poll.unregister(fd)
            ended.append(by_fd[fd])
    return ended


def test_the_file_is_valid() -> None:
    """HAProxy checks the file as it is shipped, and has neither a warning nor a diagnostic."""
    run = check(SHIPPED)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_warning_is_a_failure(tmp_path: Path) -> None:
    """The check that the file has to pass fails for a file without a time-out."""
    file = tmp_path / "haproxy.cfg"
    file.write_text(exchange(SHIPPED.read_text(), {"    timeout client 6m\n": ""}))
    run = check(file)
    assert run.returncode == 1
    assert "WARNING" in run.stderr


def test_the_check_is_an_echo_that_resets_nothing(calm: Site) -> None:
    """A daemon sees checks as clients that echo a frame and close in good order."""
    for daemon in calm.daemons:
        daemon.settled("lpechod_frames_total")
        closed = daemon.metric("lpechod_connections_closed_total", reason="peer_closed")
        assert closed >= 1
        assert daemon.metric("lpechod_frames_total") >= closed
        assert daemon.metric("lpechod_connections_closed_total", reason="reset") == 0


def test_echoes_pass_through_to_every_server(calm: Site) -> None:
    """Each daemon has its share of the connections, and frames of any length come back whole."""
    for client in calm.hold():
        client.echo(b"")
        client.echo(bytes(range(256)) * 4096)  # 1 MiB, the longest.
        client.close()
    assert echoes(calm.haproxy.address, b"an end behind it")
    assert calm.haproxy.count("wretr", ["BACKEND"]) == [0]


def test_a_server_that_is_taken_out_first_loses_nothing(site: Site) -> None:
    """With the two steps of the file's comment a stop costs no connection, not even a retry."""
    haproxy, calls = site.haproxy, Calls(site.haproxy.address)
    held = site.hold()
    with calls.going_on():
        calls.wait_for_more()
        haproxy.order("set server lpechod/lpechod1 state drain")
        calls.wait_for_more()
        before = haproxy.count("stot")
        calls.wait_for_more()
        after = haproxy.count("stot")
        assert after[0] == before[0]
        assert sum(after) > sum(before)
        for client in held:
            client.echo(b"in the rotation or not")
        site.daemons[0].signal(signal.SIGTERM)
        for client in wait_for_ends(held, FOR_EACH):
            client.expect_end()
            client.close()
        assert site.daemons[0].wait() == 0
        calls.wait_for_more()
    assert calls.lost() == []
    assert haproxy.count("stot", ["FRONTEND"]) == [len(calls.ended) + HELD]
    assert haproxy.count("wredis", ["BACKEND"]) == haproxy.count("wretr", ["BACKEND"]) == [0]


def test_a_server_that_is_just_stopped_loses_nothing_new(site: Site) -> None:
    """On SIGTERM those established end when whole, and who comes afterwards is echoed elsewhere."""
    haproxy, calls = site.haproxy, Calls(site.haproxy.address)
    last = frame(b"begun before the signal, completed after it")
    held = site.hold(last[:10])
    with calls.going_on():
        calls.wait_for_more()
        stopped_at = time.monotonic()
        site.daemons[0].signal(signal.SIGTERM)
        site.daemons[0].wait_for("draining")  # It does not listen any more.
        closed_at = time.monotonic()
        calls.wait_for_more()
        for client in held:
            client.send(last[10:])
            assert client.receive(len(last)) == last
        ended = wait_for_ends(held, FOR_EACH)
        for client in ended:
            client.expect_end()
            client.close()
        assert site.daemons[0].wait() == 0
        haproxy.wait_until_down(SERVERS[0])
        calls.wait_for_more()
    for client in set(held) - set(ended):
        client.echo(b"not concerned")
    assert calls.lost_apart_from(stopped_at, closed_at) == []
    assert_redispatched(haproxy)


def test_a_server_that_dies_loses_only_what_it_has(tmp_path: Path) -> None:
    """After kill -9 each new connection is echoed, and who was not connected to it goes on."""
    with ExitStack() as stack:
        site = Site(stack, tmp_path, mortal=0)
        haproxy, calls = site.haproxy, Calls(site.haproxy.address)
        held = site.hold()
        dying = processes(site.daemons[0])
        with calls.going_on():
            calls.wait_for_more()
            killed_at = time.monotonic()
            for number in (signal.SIGSTOP, signal.SIGKILL):  # None may react to another's end.
                for pid in dying:
                    os.kill(pid, number)
            for pid in dying:
                wait_for_end(pid)
            dead_at = time.monotonic()
            calls.wait_for_more()
            haproxy.wait_until_down(SERVERS[0])
            calls.wait_for_more()
        lost = wait_for_ends(held, FOR_EACH)
        for client in set(held) - set(lost):
            client.echo(b"not concerned")
        assert calls.lost_apart_from(killed_at, dead_at) == []
        assert_redispatched(haproxy)


def assert_redispatched(haproxy: HAProxy) -> None:
    """Demand that calls were refused and made elsewhere, and that each found another server."""
    assert haproxy.count("wredis", ["BACKEND"])[0] > 0
    assert haproxy.count("wretr", ["BACKEND"]) == haproxy.count("econ", ["BACKEND"]) == [0]


def test_a_server_that_hangs_is_noticed_by_its_echo(site: Site, tmp_path: Path) -> None:
    """A daemon that hangs passes a check that only connects, but not one that wants an echo."""
    held = site.hold()
    with frozen(site.daemons[2]):
        for client in held:
            client.send(frame(b"has time"))
        naive = tmp_path / "naive"
        naive.mkdir()
        with HAProxy(naive, site.addresses, WITHOUT_ECHO, passed="L4OK") as other:
            other.wait_until_up(SERVERS[2])
        site.haproxy.wait_until_down(SERVERS[2])
        assert site.haproxy.state(SERVERS[2])["check_status"] == "L7TOUT"
        for _ in range(50):
            assert echoes(site.haproxy.address, b"not there, please")
    site.haproxy.wait_until_up(SERVERS[2])
    for client in held:  # Those of the server that hung have waited, and lost nothing.
        assert client.receive(len(frame(b"has time"))) == frame(b"has time")


def test_a_server_that_comes_back_is_used_again(site: Site) -> None:
    """A daemon that is started again gets the next connections, until it has as many as others."""
    site.daemons[1].signal(signal.SIGTERM)
    site.daemons[1].wait()
    site.haproxy.wait_until_down(SERVERS[1])
    assert site.deal(HELD)[1] == [HELD // 2, 0, HELD // 2]
    site.start(1).wait_for("ready")
    site.haproxy.wait_until_up(SERVERS[1])
    assert site.deal(HELD // 2)[1] == [0, HELD // 2, 0]
    assert site.deal(HELD)[1] == [FOR_EACH] * len(SERVERS)


def test_prometheus_and_people_find_the_statistics(calm: Site) -> None:
    """The statistics are a page, and metrics for Prometheus with a state for each server."""
    base = f"http://{calm.haproxy.statistics}"
    with urllib.request.urlopen(f"{base}/metrics", timeout=PATIENCE_SECONDS) as answer:  # noqa: S310
        metrics = answer.read().decode()
    for server in SERVERS:
        series = f'haproxy_server_status{{proxy="lpechod",server="{server}",state="UP"}}'
        assert f"{series} 1\n" in metrics
    with urllib.request.urlopen(f"{base}/", timeout=PATIENCE_SECONDS) as answer:  # noqa: S310
        assert answer.headers["Content-Type"] == "text/html"
        assert SERVERS[0] in answer.read().decode()
