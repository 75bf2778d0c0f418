"""How workers end: without a supervisor, by a signal of their own, or with the whole daemon."""

import os
import selectors
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path

import pytest

from tests.system.daemon import (
    Daemon,
    EchoClient,
    configuration,
    frame,
    free_address,
    wait_for_end,
)

HALF = frame(b"half of it")[:7]
REST = frame(b"half of it")[7:]


def workers(count: int, drain_timeout: str = "30s") -> str:
    """Write a configuration with so many workers, and every line of their log."""
    return (
        f'[server]\nworkers = {count}\ndrain_timeout = "{drain_timeout}"\n'
        "[log]\nburst = 100000\nrate = 100000.0\n"
    )


def orphaned(directory: Path, config: str) -> Daemon:
    """Start a daemon whose supervisor is going to be killed."""
    return Daemon(directory, config, status=-signal.SIGKILL, errors={"supervisor_died"})


@contextmanager
def connected(daemon: Daemon, count: int) -> Iterator[list[EchoClient]]:
    """Connect clients, of which each has had an echo; every worker gets some of many."""
    with ExitStack() as stack:
        clients = []
        for _ in range(count):
            clients.append(stack.enter_context(daemon.connect()))
            clients[-1].echo(b"hello")
        yield clients


def begin_frames(daemon: Daemon, clients: Sequence[EchoClient], greeted: int) -> None:
    """Send half a frame on each, and wait until that has arrived, after so many greetings."""
    for client in clients:
        client.send(HALF)
    received = len(frame(b"hello")) * greeted + len(HALF) * len(clients)
    daemon.wait_until("lpechod_received_bytes_total", received)


def finish_frames(clients: Sequence[EchoClient]) -> None:
    """Send the other half on each, and demand the echo and then the end."""
    for client in clients:
        client.send(REST)
        assert client.receive(len(HALF + REST)) == HALF + REST
    expect_ends(clients)


def expect_ends(clients: Sequence[EchoClient]) -> None:
    """Demand the end of each stream, and leave."""
    for client in clients:
        client.expect_end()
        client.close()


# The supervisor dies.


def test_orphans_drain_and_end(tmp_path: Path) -> None:
    """Without a supervisor, workers end idle connections, finish frames under way, and are gone."""
    with orphaned(tmp_path, workers(3)) as daemon, connected(daemon, 60) as clients:
        orphans = daemon.workers()
        busy, idle = clients[:30], clients[30:]
        begin_frames(daemon, busy, 60)
        daemon.signal(signal.SIGKILL)
        expect_ends(idle)
        finish_frames(busy)
        for pid in orphans:
            wait_for_end(pid)

        assert daemon.wait() == -signal.SIGKILL
        assert {event["worker"] for event in daemon.events("supervisor_died")} == set(orphans)
        reasons = [event["reason"] for event in daemon.events("connection_closed")]
        assert reasons == ["drained"] * 60


def test_orphans_do_not_outlive_the_drain_timeout(tmp_path: Path) -> None:
    """A client that never ends its frame does not keep an orphan beyond drain_timeout."""
    with orphaned(tmp_path, workers(2, "300ms")) as daemon:
        with connected(daemon, 30) as clients:
            orphans = daemon.workers()
            begin_frames(daemon, clients, 30)
            daemon.signal(signal.SIGKILL)

            for pid in orphans:
                wait_for_end(pid)

        daemon.wait()
        reasons = [event["reason"] for event in daemon.events("connection_closed")]
        assert reasons == ["drain_timeout"] * 30


def test_a_second_signal_ends_an_orphan_at_once(tmp_path: Path) -> None:
    """Of two SIGTERMs to an orphan, the first leaves it to its drain, and the second ends it."""
    with orphaned(tmp_path, workers(1, "1h")) as daemon, connected(daemon, 2) as clients:
        (orphan,) = daemon.workers()
        begin_frames(daemon, clients, 2)
        daemon.signal(signal.SIGKILL)
        daemon.wait_for("draining", worker=orphan)
        os.kill(orphan, signal.SIGTERM)
        daemon.wait_for("signal", worker=orphan)
        finish_frames(clients[:1])
        os.kill(orphan, signal.SIGTERM)

        wait_for_end(orphan)

        daemon.wait()
        reasons = [event["reason"] for event in daemon.events("connection_closed")]
        # The log has the one that was drained when its client has closed, too.
        assert sorted(reasons) == ["drain_timeout", "drained"]


def test_orphans_serve_those_who_wait(tmp_path: Path) -> None:
    """What is in the queue when the supervisor dies gets its echo before the orphans go."""
    with orphaned(tmp_path, workers(2)) as daemon:
        daemon.wait_for("ready")
        orphans = daemon.workers()
        for pid in orphans:
            os.kill(pid, signal.SIGSTOP)
        early = [daemon.connect() for _ in range(30)]
        for client in early:
            client.send(frame(b"early"))
        daemon.signal(signal.SIGKILL)
        for pid in orphans:
            os.kill(pid, signal.SIGCONT)

        for client in early:
            assert client.receive(9) == frame(b"early")
        expect_ends(early)
        for pid in orphans:
            wait_for_end(pid)


def test_the_next_daemon_takes_the_addresses_over(tmp_path: Path) -> None:
    """As soon as the orphans are gone, a new daemon can be started on the same addresses."""
    path = f"unix:{tmp_path}/echo.sock"
    tcp = free_address()
    config = configuration(tcp, path, more=workers(2))
    first = Daemon(tmp_path, config)
    first.wait_for("ready")
    orphans = first.workers()
    with first.connect(tcp) as client, first.connect(path) as other:
        client.echo(b"hello")
        other.echo(b"hello")
        first.signal(signal.SIGKILL)
        expect_ends([client, other])
    for pid in orphans:
        wait_for_end(pid)
    assert first.wait() == -signal.SIGKILL
    assert (tmp_path / "echo.sock").exists()

    with Daemon(tmp_path, config) as daemon:
        daemon.wait_for("ready")
        for address in (tcp, path):
            with daemon.connect(address) as client:
                client.echo(b"again")


# Signals to workers, and to everybody.


@pytest.mark.parametrize(("number", "count"), [(signal.SIGTERM, 1), (signal.SIGINT, 3)])
def test_a_worker_told_to_end_is_replaced_first(
    tmp_path: Path, number: signal.Signals, count: int
) -> None:
    """A signal to one worker starts another one, and then it drains; nobody is turned away."""
    with (
        Daemon(tmp_path, workers(count)) as daemon,
        connected(daemon, 30) as clients,
    ):
        leaver, *others = daemon.workers()
        begin_frames(daemon, clients, 30)
        os.kill(leaver, number)

        daemon.wait_for("signal", worker=leaver, name=number.name)
        daemon.wait_for("draining", worker=leaver)

        # It still has connections, and its successor is there already.
        assert daemon.metric("lpechod_workers", state="ready") == count
        assert daemon.metric("lpechod_workers", state="draining") == 1
        assert {leaver, *others} < set(daemon.workers())
        assert daemon.metric("lpechod_worker_restarts_total") == 0
        with connected(daemon, 30):
            pass
        ends = daemon.wait_for("draining", worker=leaver)["connections"]
        assert 0 < ends <= 30
        for client in clients:
            client.send(REST)
            assert client.receive(len(HALF + REST)) == HALF + REST
        daemon.wait_for_count("connection_closed", 30)  # Of the visitors in between.
        for client in clients:
            client.close()
        daemon.wait_for("worker_ended", worker=leaver)
        assert len(daemon.workers()) == count


def test_nobody_is_turned_away_while_all_workers_are_replaced(tmp_path: Path) -> None:
    """New connections are served all the time in which every worker leaves."""
    with Daemon(tmp_path, workers(3)) as daemon:
        daemon.wait_for("ready")
        leavers = daemon.workers()
        for pid in leavers:
            os.kill(pid, signal.SIGTERM)
        while set(leavers) & set(daemon.workers()):
            with connected(daemon, 1):
                pass
        daemon.wait_until("lpechod_workers", 3, state="ready")
        assert daemon.metric("lpechod_worker_restarts_total") == 0
        assert daemon.metric("lpechod_connections_closed_total", reason="reset") == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_is_a_clean_end(tmp_path: Path, number: signal.Signals) -> None:
    """A terminal or systemd signals all processes: who waits is served, and no worker is new."""
    with Daemon(tmp_path, workers(3), prefix=("setsid",)) as daemon:
        pids = daemon.workers()
        group = os.getpgid(daemon.pid)
        assert group != os.getpgid(0)
        os.killpg(group, signal.SIGSTOP)
        early = [EchoClient(daemon.address) for _ in range(60)]
        for client in early:
            client.send(frame(b"early"))
        os.killpg(group, number)
        os.killpg(group, signal.SIGCONT)

        for client in early:
            assert client.receive(9) == frame(b"early")
        expect_ends(early)

        assert daemon.wait() == 0
        assert {event["worker"] for event in daemon.log if "worker" in event} == set(pids)
        assert {event["worker"] for event in daemon.events("worker_ended")} == set(pids)


def test_a_hang_up_is_nothing_to_a_worker(tmp_path: Path) -> None:
    """SIGHUP to a worker neither ends it nor has any other effect."""
    with Daemon(tmp_path, workers(1)) as daemon, connected(daemon, 1) as clients:
        pids = daemon.workers()
        os.kill(pids[0], signal.SIGHUP)
        clients[0].echo(b"and now?")
        assert daemon.workers() == pids
        assert not daemon.events("signal")
        assert daemon.metric("lpechod_worker_restarts_total") == 0


# The whole daemon ends.


def test_all_connections_of_all_workers_get_a_fin(tmp_path: Path) -> None:
    """SIGTERM to the supervisor drains every worker."""
    with Daemon(tmp_path, workers(3)) as daemon, connected(daemon, 90) as clients:
        pids = daemon.workers()
        daemon.signal(signal.SIGTERM)
        expect_ends(clients)

        assert daemon.wait() == 0
        closed = daemon.events("connection_closed")
        assert [event["reason"] for event in closed] == ["drained"] * 90
        assert {event["worker"] for event in closed} == set(pids)
        assert daemon.wait_for("stopped")["connections"] == 90


def test_a_second_signal_ends_all_workers_at_once(tmp_path: Path) -> None:
    """A second signal cuts the connections of every worker, whatever time is left."""
    with Daemon(tmp_path, workers(3, "1h")) as daemon, connected(daemon, 60) as clients:
        begin_frames(daemon, clients, 60)
        daemon.signal(signal.SIGTERM)
        daemon.wait_for_count("draining", 3)
        daemon.signal(signal.SIGTERM)

        assert daemon.wait() == 0
        reasons = [event["reason"] for event in daemon.events("connection_closed")]
        assert reasons == ["drain_timeout"] * 60


def test_a_stopped_worker_does_not_keep_the_daemon(tmp_path: Path) -> None:
    """Further signals, however many, have a worker killed that does not end by itself."""
    with Daemon(tmp_path, workers(3, "1h"), errors={"worker_died"}) as daemon:
        daemon.wait_for("ready")
        victim = daemon.workers()[1]
        os.kill(victim, signal.SIGSTOP)
        daemon.signal(signal.SIGTERM)
        daemon.wait_for_count("worker_ended", 2)
        status = None
        for _ in range(100):  # Somebody who has lost patience.
            daemon.process.terminate()
            try:
                status = daemon.process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
            break

        assert status == 0
        daemon.wait()
        daemon.wait_for("worker_died", worker=victim, reason="did not end in time")


def closing_seconds(daemon: Daemon, clients: list[EchoClient]) -> float:
    """End the daemon, close each client at its end, and return how long that took by the log."""
    daemon.signal(signal.SIGTERM)
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client.socket, selectors.EVENT_READ, client)
        while selector.get_map():
            for key, _ in selector.select():
                selector.unregister(key.fileobj)
                expect_ends([key.data])
    assert daemon.wait() == 0
    times = [
        datetime.fromisoformat(event["timestamp"]) for event in daemon.events("connection_closed")
    ]
    assert len(times) == len(clients)
    return (max(times) - min(times)).total_seconds()


def test_a_drain_of_many_is_spread(tmp_path: Path) -> None:
    """Hundreds of idle connections are not ended in the same moment, but over a while."""
    with Daemon(tmp_path, workers(1, "6s")) as daemon, connected(daemon, 300) as clients:
        # They are told over two seconds.
        assert closing_seconds(daemon, clients) > 1


def test_a_drain_of_few_wastes_no_time(tmp_path: Path) -> None:
    """A handful of idle connections is ended at once."""
    with Daemon(tmp_path, workers(1, "1h")) as daemon, connected(daemon, 5) as clients:
        assert closing_seconds(daemon, clients) < 1
