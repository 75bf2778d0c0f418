"""Worker processes that die, hang or cannot start, seen from outside."""

import os
import select
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.system.daemon import (
    Daemon,
    EchoClient,
    count_sockets,
    descriptor_kinds,
    frame,
    wait_for_sleeps,
)

ALL_LINES = "[log]\nburst = 100000\nrate = 100000.0\n"


def workers(count: int | str, more: str = "") -> str:
    """Write a configuration with so many workers."""
    return f"[server]\nworkers = {count!r}\n{more}\n{ALL_LINES}"


def failing(trace: Path, inject: str) -> Sequence[str]:
    """Return a prefix under which system calls fail, or kill their caller."""
    calls = inject.partition(":")[0]
    fault = f"inject={inject}"
    return ("strace", "-f", "-qq", "-o", str(trace), "-e", f"trace={calls}", "-e", fault)


def wait_until_ready(daemon: Daemon, count: int) -> None:
    """Wait until so many workers serve, and there are no others."""
    daemon.wait_until("lpechod_workers", count, state="ready")
    assert len(daemon.workers()) == count


def still_served(client: EchoClient) -> bool:
    """Tell whether a connection has outlived the death of a worker."""
    try:
        client.echo(b"still there?")
    except (AssertionError, ConnectionError):
        return False
    return True


@pytest.mark.parametrize("count", [1, 3, "auto"])
def test_as_many_workers_as_configured_serve(tmp_path: Path, count: int | str) -> None:
    """So many workers are started, each serves, and each marks its log lines with its pid."""
    expected = len(os.sched_getaffinity(0)) if count == "auto" else int(count)
    with Daemon(tmp_path, workers(count)) as daemon:
        assert daemon.wait_for("ready")["workers"] == expected
        pids = daemon.workers()
        assert len(pids) == expected
        assert daemon.metric("lpechod_workers", state="ready") == expected
        clients = [daemon.connect() for _ in range(30 * expected)]
        for client in clients:
            client.echo(b"hello")
            client.close()
        daemon.wait_for_count("connection_closed", len(clients))

        assert {event["worker"] for event in daemon.events("connection_closed")} == set(pids)


def test_no_process_has_a_second_thread(tmp_path: Path) -> None:
    """Supervisor and workers have one thread each, also when scraped and after a reload."""
    with Daemon(tmp_path, workers(2)) as daemon:
        wait_until_ready(daemon, 2)
        for _ in range(2):
            assert daemon.get()
            for pid in (daemon.pid, *daemon.workers()):
                assert len(list(Path(f"/proc/{pid}/task").iterdir())) == 1
            daemon.reload()
            daemon.wait_until("lpechod_workers", 0, state="draining")


def test_a_killed_worker_loses_its_own_connections_only(tmp_path: Path) -> None:
    """After kill -9 the connections of the other workers go on, and a new one takes its place."""
    with Daemon(tmp_path, workers(3), errors={"worker_died"}) as daemon:
        daemon.wait_for("ready")
        victim, *others = daemon.workers()
        before = count_sockets(victim)
        clients = [daemon.connect() for _ in range(60)]
        for client in clients:
            client.echo(b"hello")
        lost = count_sockets(victim) - before
        os.kill(victim, signal.SIGKILL)

        died = daemon.wait_for("worker_died", worker=victim, signal="SIGKILL")

        assert died["level"] == "error"
        assert "reason" not in died
        assert lost > 0
        assert [still_served(client) for client in clients].count(False) == lost
        wait_until_ready(daemon, 3)
        assert set(others) < set(daemon.workers())
        with daemon.connect() as client:
            client.echo(b"welcome")
        for client in clients:
            client.close()


def test_what_a_killed_worker_has_counted_stays(tmp_path: Path) -> None:
    """No counter goes back at a worker's death, and its connections count as internal errors."""
    with Daemon(tmp_path, workers(3), errors={"worker_died"}) as daemon:
        daemon.wait_for("ready")
        victim = daemon.workers()[0]
        before = count_sockets(victim)
        clients = [daemon.connect() for _ in range(60)]
        for client in clients:
            client.echo(b"hello")
        lost = count_sockets(victim) - before
        daemon.wait_until("lpechod_connections_active", 60)
        daemon.wait_until("lpechod_frames_total", 60)
        os.kill(victim, signal.SIGKILL)
        daemon.wait_for("worker_died")

        while daemon.metric("lpechod_workers", state="ready") < 3:
            assert daemon.metric("lpechod_frames_total") == 60
        assert daemon.metric("lpechod_connections_accepted_total") == 60
        assert daemon.metric("lpechod_connections_active") == 60 - lost
        closed = daemon.metric("lpechod_connections_closed_total", reason="internal_error")
        assert closed == lost
        assert daemon.metric("lpechod_worker_restarts_total") == 1
        for client in clients:
            client.close()
        daemon.wait_until("lpechod_connections_active", 0)
        gone = daemon.metric("lpechod_connections_closed_total", reason="peer_closed")
        assert gone == 60 - lost


def test_those_who_wait_are_served_by_the_successor(tmp_path: Path) -> None:
    """Connections in the queue of the only worker survive its death."""
    with Daemon(tmp_path, workers(1), errors={"worker_died"}) as daemon:
        daemon.wait_for("ready")
        victim = daemon.workers()[0]
        os.kill(victim, signal.SIGSTOP)
        clients = [daemon.connect() for _ in range(20)]
        for client in clients:
            client.send(frame(b"early"))
        os.kill(victim, signal.SIGKILL)

        for client in clients:
            assert client.receive(9) == frame(b"early")
            client.close()

        daemon.wait_for_count("connection_closed", 20)
        successors = {event["worker"] for event in daemon.events("connection_closed")}
        assert successors == set(daemon.workers())
        assert daemon.metric("lpechod_worker_restarts_total") == 1


def test_deaths_in_a_row_are_all_made_good(tmp_path: Path) -> None:
    """Workers that die soon after their start are replaced each time, and counted."""
    with Daemon(tmp_path, workers(2), errors={"worker_died"}) as daemon:
        daemon.wait_for("ready")
        victims = []
        for restarts in (1, 2, 3):
            victims.append(max(daemon.workers()))
            os.kill(victims[-1], signal.SIGKILL)
            daemon.wait_for("worker_died", worker=victims[-1])
            wait_until_ready(daemon, 2)
            assert daemon.metric("lpechod_worker_restarts_total") == restarts
            assert not set(victims) & set(daemon.workers())


def test_twenty_deaths_leave_no_descriptor(tmp_path: Path) -> None:
    """Workers that die all at once, twice, are replaced soon, and the supervisor keeps nothing."""
    with Daemon(tmp_path, workers(10), errors={"worker_died"}) as daemon:
        daemon.wait_for("ready")
        descriptors = descriptor_kinds(daemon.pid)  # Before the first scrape.
        for deaths in (10, 20):
            for pid in daemon.workers():
                os.kill(pid, signal.SIGKILL)
            daemon.wait_for_count("worker_died", deaths)
            wait_until_ready(daemon, 10)
            assert daemon.metric("lpechod_worker_restarts_total") == deaths

        for _ in range(10_000):
            if descriptor_kinds(daemon.pid) == descriptors:
                break  # The last scrape has closed its own.
        assert descriptor_kinds(daemon.pid) == descriptors
        with daemon.connect() as client:
            client.echo(b"all new")


@pytest.mark.parametrize(
    ("number", "name"),
    [(signal.SIGSEGV, "SIGSEGV"), (signal.SIGRTMIN + 6, "SIGRTMIN+6")],
    ids=["named", "real-time"],
)
def test_any_signal_that_kills_a_worker_is_named(tmp_path: Path, number: int, name: str) -> None:
    """The log tells which signal a worker died of, and the daemon outlives it whatever it was."""
    with Daemon(tmp_path, workers(1), errors={"worker_died"}) as daemon:
        daemon.wait_for("ready")
        os.kill(daemon.workers()[0], number)
        daemon.wait_for("worker_died", signal=name)
        wait_until_ready(daemon, 1)
        with daemon.connect() as client:
            client.echo(b"after all")


def test_workers_that_cannot_start_end_the_daemon(tmp_path: Path) -> None:
    """If every worker dies before it serves, the daemon says that it gives up, and fails."""
    address = f"unix:{tmp_path}/echo.sock"
    # A worker's first message is that it is ready; the supervisor never has anybody to send one to.
    prefix = failing(tmp_path / "trace", "sendto:error=EPIPE:signal=SIGKILL")
    config = workers(1) + f'[[listen]]\naddress = "{address}"\n'
    with Daemon(
        tmp_path, config, status=1, errors={"worker_died", "gave_up"}, prefix=prefix
    ) as daemon:
        assert daemon.wait() == 1

        assert not daemon.events("ready")
        assert len(daemon.events("gave_up")) == 1
        assert len({event["worker"] for event in daemon.events("worker_died")}) == 8
        assert daemon.log[-1]["event"] == "stopped"


@pytest.mark.parametrize(("count", "failures"), [(2, 3), (12, 10)], ids=["again", "at once"])
def test_a_start_that_fails_for_a_while_succeeds(tmp_path: Path, count: int, failures: int) -> None:
    """If fork(2) fails for a moment, even for many workers, the daemon comes up all the same."""
    fault = f"clone,clone3,fork:error=EAGAIN:when=1..{failures}"
    prefix = failing(tmp_path / "trace", fault)
    with Daemon(tmp_path, workers(count), errors={"worker_start_failed"}, prefix=prefix) as daemon:
        daemon.wait_for("ready")

        assert len(daemon.events("worker_start_failed")) == failures
        wait_until_ready(daemon, count)
        # Nobody has died.
        assert daemon.metric("lpechod_worker_restarts_total") == 0
        with daemon.connect() as client:
            client.echo(b"at last")


def test_a_hung_worker_is_killed_and_replaced(tmp_path: Path) -> None:
    """A worker without a sign of life shows as stalled, is killed with a reason, and replaced."""
    errors = {"worker_hung", "worker_died"}
    with Daemon(tmp_path, workers(3, 'watchdog = "2s"'), errors=errors) as daemon:
        daemon.wait_for("ready")
        victim = daemon.workers()[1]
        os.kill(victim, signal.SIGSTOP)
        daemon.wait_until("lpechod_workers", 1, state="stalled")
        assert daemon.metric("lpechod_workers", state="ready") == 2
        for _ in range(30):
            with daemon.connect() as client:
                client.echo(b"served meanwhile")

        daemon.wait_for("worker_hung", worker=victim)
        daemon.wait_for("worker_died", worker=victim, signal="SIGKILL", reason="no sign of life")

        wait_until_ready(daemon, 3)
        assert daemon.metric("lpechod_workers", state="stalled") == 0
        assert daemon.metric("lpechod_worker_restarts_total") == 1


def test_silence_goes_on_over_a_reload(tmp_path: Path) -> None:
    """Reloads do not begin to count anew: a worker that was stalled before is so afterwards."""
    with Daemon(tmp_path, workers(1, 'watchdog = "1h"')) as daemon:
        daemon.wait_for("ready")
        (victim,) = daemon.workers()
        os.kill(victim, signal.SIGSTOP)
        daemon.wait_until("lpechod_workers", 1, state="stalled")
        daemon.reload()

        assert daemon.metric("lpechod_workers", state="stalled") == 1

        os.kill(victim, signal.SIGCONT)
        daemon.wait_for("worker_ended", worker=victim)


@pytest.mark.parametrize("watchdog", ["10s", "off"])
def test_a_short_stop_kills_nobody(tmp_path: Path, watchdog: str) -> None:
    """A worker that stands still for less than the watchdog's time goes on as if nothing was."""
    with Daemon(tmp_path, workers(2, f'watchdog = "{watchdog}"')) as daemon:
        daemon.wait_for("ready")
        pids = daemon.workers()
        os.kill(pids[0], signal.SIGSTOP)
        daemon.wait_until("lpechod_workers", 1, state="stalled")
        os.kill(pids[0], signal.SIGCONT)

        wait_until_ready(daemon, 2)

        assert daemon.workers() == pids
        assert daemon.metric("lpechod_worker_restarts_total") == 0


def test_a_stop_of_the_whole_daemon_kills_nobody(tmp_path: Path) -> None:
    """If all processes stood still, longer than the watchdog's time, no worker is blamed."""
    with Daemon(tmp_path, workers(2, 'watchdog = "2s"')) as daemon:
        daemon.wait_for("ready")
        pids = daemon.workers()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        # It wakes for each of the two that stop, and then to look at their heartbeats.
        wait_for_sleeps(daemon.pid, 3)
        os.kill(daemon.pid, signal.SIGSTOP)
        # That time passes, and nothing else, is what this is about.
        select.poll().poll(2100)
        os.kill(daemon.pid, signal.SIGCONT)
        wait_for_sleeps(daemon.pid, 1)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

        wait_until_ready(daemon, 2)
        assert daemon.workers() == pids
        assert daemon.metric("lpechod_worker_restarts_total") == 0
