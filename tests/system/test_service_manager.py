"""The daemon and a service manager: what it says, when, and what it hears no more of."""

import os
import re
import secrets
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.daemon import Daemon, children, frame
from tests.system.manager import Manager, Message

THREE = "[server]\nworkers = 3\n"
BROKEN = "[server]\nworkers = 0\n"
VARIABLES = re.compile(rb"(?:^|\0)(NOTIFY_|LISTEN_|WATCHDOG_|FDSTORE)")


@pytest.fixture(name="manager", params=["path"])
def _manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    abstract = request.param == "abstract"
    with Manager(f"@lpechod-{secrets.token_hex(8)}" if abstract else tmp_path / "n") as manager:
        yield manager


def status(message: Message) -> str:
    """Return what a message tells people."""
    return message.fields["STATUS"]


def environment(pid: int) -> bytes:
    """Return the environment that a process was started with."""
    return Path(f"/proc/{pid}/environ").read_bytes()


class Pipe:
    """A FIFO in the place of the configuration file: who reads it waits for the test.

    Args:
        daemon: whose file.
    """

    def __init__(self, daemon: Daemon) -> None:
        self._path = daemon.path
        self._config = self._path.read_text()
        self._path.unlink()
        os.mkfifo(self._path)

    def wait_for_reader(self) -> None:
        """Wait until somebody has opened the file; others find none until `write`."""
        self._writer = self._path.open("w")
        self._path.unlink()

    def write(self) -> None:
        """Let the reader have the configuration as it was, and put the file back for others."""
        self._path.write_text(self._config)
        with self._writer as writer:
            writer.write(self._config)


@pytest.mark.parametrize("manager", ["path", "abstract"], indirect=True)
def test_ready_means_that_clients_are_served(tmp_path: Path, manager: Manager) -> None:
    """At READY all workers accept, and the status names the addresses and counts the workers."""
    with manager.start(tmp_path, THREE) as daemon:
        ready = manager.wait_for("READY", "1")
        with daemon.connect() as client:
            client.echo(b"at once")
        assert daemon.metric("lpechod_workers", state="ready") == 3
        assert status(ready) == f"Serving {daemon.address} with 3 workers"
        assert {message.sender for message in manager.heard} == {daemon.pid}
    manager.catch_up()
    assert {message.sender for message in manager.heard} == {daemon.pid}


def test_ready_waits_for_the_last_worker(tmp_path: Path, manager: Manager) -> None:
    """While one of three workers can't be started yet there is no READY, then all three serve."""
    # The third fork(2) fails, and so do the next two, which come after ever longer delays.
    inject = "inject=clone:error=EAGAIN:when=3..5"
    prefix = ("strace", "-f", "-o", str(tmp_path / "trace"), "-e", "trace=clone", "-e", inject)
    errors = ["worker_start_failed"]
    with manager.start(tmp_path, THREE, prefix=prefix, errors=errors) as daemon:
        for _ in range(3):
            daemon.wait_for("worker_start_failed")
        ready = manager.wait_for("READY")
        assert daemon.metric("lpechod_workers", state="ready") == 3
        assert status(ready).endswith(" with 3 workers")
        assert len(daemon.events("worker_start_failed")) == 3


def test_no_ready_without_workers(tmp_path: Path, manager: Manager) -> None:
    """While no worker can be started the daemon is never ready, and a signal ends it."""
    inject = "inject=clone:error=EAGAIN"
    prefix = ("strace", "-f", "-o", str(tmp_path / "trace"), "-e", "trace=clone", "-e", inject)
    with manager.start(tmp_path, prefix=prefix, errors=["worker_start_failed"]) as daemon:
        daemon.wait_for_count("worker_start_failed", 3)
        (supervisor,) = children(daemon.process.pid)  # Under strace.
        os.kill(supervisor, signal.SIGTERM)
        assert daemon.wait() == 0
    manager.catch_up()
    assert not [message for message in manager.heard if "READY" in message.fields]
    assert [message for message in manager.heard if "STOPPING" in message.fields]


def test_the_status_tells_of_a_lost_worker(tmp_path: Path, manager: Manager) -> None:
    """The status counts one worker less when one has died, and all when it is replaced."""
    with manager.start(tmp_path, THREE, errors=["worker_died"]) as daemon:
        serving = status(manager.wait_for("READY"))
        os.kill(daemon.workers()[0], signal.SIGKILL)
        manager.wait_for("STATUS", f"Serving {daemon.address} with 2 of 3 workers")
        manager.wait_for("STATUS", serving)


def test_a_reload_is_framed(tmp_path: Path, manager: Manager) -> None:
    """A reload is told with its time by the monotonic clock, and its end with the new status."""
    with manager.start(tmp_path) as daemon:
        manager.wait_for("READY")
        before = time.monotonic_ns() // 1000
        daemon.path.write_text(THREE + daemon.path.read_text())
        daemon.signal(signal.SIGHUP)
        reloading = manager.wait_for("RELOADING", "1")
        assert before <= int(reloading.fields["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
        ready = manager.wait_for("READY", "1")
        assert "Serving " in status(ready)
        assert "with 3 workers" in status(ready)
        assert daemon.metric("lpechod_workers", state="starting") == 0
    manager.catch_up()
    assert {message.sender for message in manager.heard} == {daemon.pid}


def test_a_failed_reload_is_told(tmp_path: Path, manager: Manager) -> None:
    """After a reload of a broken configuration the daemon is ready, and says where it is broken."""
    with manager.start(tmp_path, errors=["reload_failed"]) as daemon:
        manager.wait_for("READY")
        daemon.path.write_text(BROKEN)
        daemon.signal(signal.SIGHUP)
        manager.wait_for("RELOADING", "1")
        ready = manager.wait_for("READY", "1")
        assert f"{daemon.path}:2: server.workers: " in status(ready)
        assert {message.sender for message in manager.heard} == {daemon.pid}


def test_two_reloads_are_told_in_order(tmp_path: Path, manager: Manager) -> None:
    """A second request during a reload makes a second reload, which begins after the first one."""
    with manager.start(tmp_path) as daemon:
        manager.wait_for("READY")
        manager.catch_up()
        pipe = Pipe(daemon)
        daemon.signal(signal.SIGHUP)
        pipe.wait_for_reader()
        daemon.signal(signal.SIGHUP)
        daemon.wait_for_count("signal", 2)
        first = len(manager.heard)
        pipe.write()
        for _ in range(2):
            manager.wait_for("READY")
        manager.catch_up()
        told = [key for message in manager.heard[first:] for key in message.fields]
        assert [key for key in told if key in {"RELOADING", "READY"}] == ["RELOADING", "READY"] * 2


def test_a_drain_asks_for_time(tmp_path: Path, manager: Manager) -> None:
    """While a connection is inside a frame the manager is asked for more time again and again."""
    config = '[server]\ndrain_timeout = "1h"\n'
    with manager.start(tmp_path, config) as daemon, daemon.connect() as client:
        client.send(frame(b"late")[:3])
        daemon.wait_until("lpechod_received_bytes_total", 3)
        assert "STOPPING" not in {key for each in manager.catch_up() for key in each.fields}
        daemon.signal(signal.SIGTERM)
        manager.wait_for("STOPPING", "1")
        for _ in range(3):
            assert int(manager.wait_for("EXTEND_TIMEOUT_USEC").fields["EXTEND_TIMEOUT_USEC"]) > 2e6
            assert re.search(r"\b1 connection", status(manager.wait_for("STATUS")))
        client.send(frame(b"late")[3:])
        assert client.receive(8) == frame(b"late")
        client.expect_end()
        client.close()
        assert daemon.wait() == 0


def test_a_watchdog_is_fed(tmp_path: Path, manager: Manager) -> None:
    """A manager that wants signs of life gets them from the supervisor, after a reload as well."""
    with manager.start(tmp_path, environ={"WATCHDOG_USEC": "1000000"}) as daemon:
        manager.wait_for("READY")
        for _ in range(3):
            manager.wait_for("WATCHDOG", "1")
        daemon.reload()
        manager.wait_for("RELOADING")
        manager.wait_for("READY")
        for _ in range(2):
            assert manager.wait_for("WATCHDOG", "1").sender == daemon.pid


def test_nobody_is_fed_without_a_watchdog(tmp_path: Path, manager: Manager) -> None:
    """A manager that has not asked for signs of life gets none, nor for another process."""
    environ = {"WATCHDOG_USEC": "100000"}
    with (
        Manager(tmp_path / "clock") as clock,
        manager.start(tmp_path),
        Daemon(tmp_path, environ={"NOTIFY_SOCKET": clock.address, **environ}),
        Manager(tmp_path / "other") as other,
        Daemon(tmp_path, environ={"NOTIFY_SOCKET": other.address, "WATCHDOG_PID": "1", **environ}),
    ):
        manager.wait_for("READY")
        other.wait_for("READY")
        for _ in range(5):
            clock.wait_for("WATCHDOG")
        for each in (manager, other):
            each.catch_up()
            assert not [message for message in each.heard if "WATCHDOG" in message.fields]


def test_a_hanging_worker_is_killed_in_time(tmp_path: Path, manager: Manager) -> None:
    """A worker that hangs is replaced within half of the manager's patience, whatever is set."""
    config = '[server]\nwatchdog = "1h"\n'
    with manager.start(
        tmp_path,
        config,
        errors=["worker_hung", "worker_died"],
        environ={"WATCHDOG_USEC": "2000000"},
    ) as daemon:
        manager.wait_for("WATCHDOG")
        (worker,) = daemon.workers()
        os.kill(worker, signal.SIGSTOP)
        manager.wait_for("STATUS", f"Serving {daemon.address} with 0 of 1 worker")
        hung = daemon.wait_for("worker_hung", worker=worker)
        assert hung["silent_s"] == pytest.approx(1.0)
        manager.wait_for("STATUS", f"Serving {daemon.address} with 1 worker")
        manager.wait_for("WATCHDOG")


def test_a_stalled_worker_is_not_covered_up(tmp_path: Path, manager: Manager) -> None:
    """From the moment a worker counts as stalled until it is replaced, nobody feeds the manager."""
    with manager.start(
        tmp_path,
        "[server]\nworkers = 2\n",
        errors=["worker_hung", "worker_died"],
        environ={"WATCHDOG_USEC": "5000000"},
    ) as daemon:
        manager.wait_for("READY")
        os.kill(daemon.workers()[0], signal.SIGSTOP)
        while daemon.metric("lpechod_workers", state="stalled") == 0:
            pass
        manager.catch_up()
        stalled = len(manager.heard)
        manager.wait_for("STATUS", f"Serving {daemon.address} with 1 of 2 workers")
        assert not [each for each in manager.heard[stalled:] if "WATCHDOG" in each.fields]
        manager.wait_for("WATCHDOG")


def test_the_environment_is_not_passed_on(tmp_path: Path, manager: Manager) -> None:
    """What the daemon executes does not see the manager's variables, and still it is told."""
    environ = {"WATCHDOG_USEC": "30000000", "FDSTORE": "16", "LISTEN_FDS": "0"}
    with manager.start(tmp_path, environ=environ) as daemon:
        manager.wait_for("READY")
        assert VARIABLES.search(environment(daemon.pid))
        pipe = Pipe(daemon)
        workers = daemon.workers()
        daemon.signal(signal.SIGHUP)
        pipe.wait_for_reader()
        (rehearsal,) = set(children(daemon.pid)) - set(workers)

        assert not VARIABLES.search(environment(rehearsal))

        pipe.write()
        manager.wait_for("RELOADING")
        assert manager.wait_for("READY").sender == daemon.pid
        assert not VARIABLES.search(environment(daemon.pid))


def test_a_manager_that_has_gone_is_not_missed(tmp_path: Path) -> None:
    """Without a manager, whose address is still in the environment, the daemon serves and ends."""
    with Manager(tmp_path / "n") as manager:
        daemon = manager.start(tmp_path, environ={"WATCHDOG_USEC": "200000"})
        manager.wait_for("WATCHDOG")
    with daemon, daemon.connect() as client:
        client.echo(b"alone")
        daemon.reload()
        with daemon.connect() as other:
            other.echo(b"still alone")


def test_a_manager_that_does_not_read_is_waited_for(tmp_path: Path) -> None:
    """While the manager reads nothing clients are served, and it gets its messages afterwards."""
    with Manager(tmp_path / "n", reads=False) as manager:
        manager.fill()
        with manager.start(tmp_path) as daemon, daemon.connect() as client:
            client.echo(b"unheard")
            manager.read()
            assert status(manager.wait_for("READY")).startswith("Serving ")


def test_a_reload_is_framed_for_a_manager_that_is_late(tmp_path: Path) -> None:
    """A manager that reads nothing during a reload hears afterwards of its beginning and end."""
    with Manager(tmp_path / "n", reads=False) as manager:
        manager.fill()
        with manager.start(tmp_path) as daemon:
            daemon.wait_for("ready")
            daemon.reload()
            manager.read()
            manager.wait_for("RELOADING")
            manager.wait_for("READY")
