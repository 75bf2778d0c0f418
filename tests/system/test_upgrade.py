"""A reload is an upgrade: the code on disk replaces what runs, and the counters outlive that."""

import os
import shutil
import signal
from pathlib import Path

import pytest

import lpechod
from tests.system.daemon import Daemon, EchoClient, children, configuration, descriptor_kinds, frame

COUNTED = {
    "lpechod_connections_accepted_total": 1,
    "lpechod_frames_total": 2,
    "lpechod_received_bytes_total": 18,
    "lpechod_sent_bytes_total": 18,
    "lpechod_frame_size_bytes_sum": 10,
    "lpechod_connection_duration_seconds_count": 1,
    "lpechod_echo_duration_seconds_count": 2,
}
ENDLESS_DRAIN = configuration(more='[server]\ndrain_timeout = "1h"\n')
FIELD = "    frames: int = 0\n"


class Installed:
    """A copy of the package that a test may edit, and how to run a daemon from it."""

    def __init__(self, directory: Path) -> None:
        self._package = directory / "site" / "lpechod"
        elsewhere = directory / "elsewhere"
        elsewhere.mkdir()
        shutil.copytree(
            Path(lpechod.__file__).parent,
            self._package,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        self.prefix = ("env", "-C", str(elsewhere))
        # The compiled files are told from the sources by seconds, which is too coarse here.
        self.environ = {"PYTHONPATH": str(directory / "site"), "PYTHONDONTWRITEBYTECODE": "1"}

    def edit(self, module: str, old: str, new: str) -> None:
        """Replace the one place of a module that reads so."""
        path = self._package / module
        text = path.read_text()
        assert text.count(old) == 1
        # As package managers do: never half a file.
        fresh = path.with_suffix(".new")
        fresh.write_text(text.replace(old, new))
        fresh.replace(path)

    def release(self, version: str) -> None:
        """Give the package another version."""
        path = self._package / "__init__.py"
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if not line.startswith("__version__")]
        path.write_text("".join([*kept, f'__version__ = "{version}"\n']))


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    return Installed(tmp_path)


def start(
    directory: Path, installed: Installed, config: str = "", errors: tuple[str, ...] = ()
) -> Daemon:
    return Daemon(
        directory, config, errors=errors, prefix=installed.prefix, environ=installed.environ
    )


def be_counted(daemon: Daemon) -> None:
    """Add what is in `COUNTED` to the counters."""
    with daemon.connect() as client:
        client.echo(b"hello")
        client.echo(b"again")


def expect_counted(daemon: Daemon, times: int) -> None:
    """Wait until so many clients have been counted, and demand that all counters say so."""
    daemon.wait_until("lpechod_connection_duration_seconds_count", times)
    assert {name: daemon.metric(name) for name in COUNTED} == {
        name: value * times for name, value in COUNTED.items()
    }


def version(daemon: Daemon) -> str:
    """Return the version that the metrics name."""
    line = next(line for line in daemon.get().splitlines() if line.startswith("lpechod_build_info"))
    return line.partition('version="')[2].rpartition(',version="')[2].partition('"')[0]


def segments(daemon: Daemon) -> int:
    """Return how many descriptors of shared memory the supervisor holds."""
    return sum("lpechod-counters" in kind for kind in descriptor_kinds(daemon.pid))


def wait_for_problem(daemon: Daemon, problem: str, times: int) -> None:
    """Read the log until a failed reload has been put down to a problem so many times."""
    while sum(problem in event["problem"] for event in daemon.events("reload_failed")) < times:
        daemon.wait_for_count("reload_failed", len(daemon.events("reload_failed")) + 1)


def test_the_version_on_disk_takes_over(tmp_path: Path, installed: Installed) -> None:
    """After a reload, the version that was installed meanwhile runs, in the same process."""
    with start(tmp_path, installed) as daemon:
        pid = daemon.pid
        for times, release in enumerate(("7.8.9", "7.9.0"), 1):
            be_counted(daemon)
            expect_counted(daemon, times)
            installed.release(release)
            event = daemon.reload()
            assert (event["version"], event["pid"]) == (release, pid)
            assert version(daemon) == release
            expect_counted(daemon, times)
        assert daemon.metric("lpechod_worker_restarts_total") == 0


def test_a_new_counter_moves_none(tmp_path: Path, installed: Installed) -> None:
    """With a field more in the middle, what was counted before keeps its name and value."""
    with start(tmp_path, installed) as daemon:
        be_counted(daemon)
        expect_counted(daemon, 1)
        installed.edit("ops/counters.py", FIELD, f"    novelties: int = 0\n{FIELD}")
        for times in (1, 2, 3):
            daemon.reload()
            expect_counted(daemon, times)
            be_counted(daemon)
            expect_counted(daemon, times + 1)


def test_a_counter_less_moves_none(tmp_path: Path, installed: Installed) -> None:
    """Going back to a version with a field less keeps all others, too."""
    more = f"    novelties: int = 0\n{FIELD}"
    installed.edit("ops/counters.py", FIELD, more)
    with start(tmp_path, installed) as daemon:
        be_counted(daemon)
        expect_counted(daemon, 1)
        for times, (old, new) in enumerate([(more, FIELD), (FIELD, more), (more, FIELD)], 1):
            installed.edit("ops/counters.py", old, new)
            daemon.reload()
            expect_counted(daemon, times)
            be_counted(daemon)
            expect_counted(daemon, times + 1)


def test_a_worker_of_the_old_version_is_counted_to_its_end(
    tmp_path: Path, installed: Installed
) -> None:
    """Workers that drain in older layouts are shown while they last, and kept when they end."""
    layouts = [FIELD, f"    novelties: int = 0\n{FIELD}", f"    gone: int = 0\n{FIELD}"]
    clients: list[EchoClient] = []
    owners: list[int] = []
    with start(tmp_path, installed, ENDLESS_DRAIN) as daemon:
        for_one = segments(daemon)
        for before, after in zip(layouts, layouts[1:] + layouts[:1], strict=True):
            owners += {*daemon.workers()} - {*owners}
            clients.append(daemon.connect())
            clients[-1].send(frame(b"12345678")[:6])
            daemon.wait_until("lpechod_received_bytes_total", 6 * len(clients))
            installed.edit("ops/counters.py", before, after)
            daemon.reload()
            assert daemon.metric("lpechod_connections_accepted_total") == len(clients)
            assert daemon.metric("lpechod_connections_active") == len(clients)
            assert daemon.metric("lpechod_workers", state="draining") == len(clients)
            assert segments(daemon) == for_one * (1 + len(clients))
        received = 6 * len(clients)
        for client, owner in zip(clients, owners, strict=True):
            client.send(frame(b"12345678")[6:])
            assert client.receive(12) == frame(b"12345678")
            client.expect_end()
            client.close()
            daemon.wait_for("worker_ended", worker=owner)
            received += 6
            assert daemon.metric("lpechod_received_bytes_total") == received
        assert daemon.metric("lpechod_frames_total") == len(clients)
        assert daemon.metric("lpechod_connections_closed_total", reason="drained") == len(clients)
        daemon.reload()
        assert daemon.metric("lpechod_received_bytes_total") == received
        assert daemon.metric("lpechod_connections_active") == 0


def test_segments_do_not_add_up(tmp_path: Path, installed: Installed) -> None:
    """Shared memory of an older layout is let go of once nobody counts in it any more."""
    more = f"    novelties: int = 0\n{FIELD}"
    with start(tmp_path, installed) as daemon:
        (worker,) = daemon.workers()
        before = segments(daemon)
        for old, new in ((FIELD, more), (more, FIELD)):
            installed.edit("ops/counters.py", old, new)
            for _ in range(2):
                daemon.reload()
                daemon.wait_for("worker_ended", worker=worker)
                (worker,) = children(daemon.pid)
            assert segments(daemon) == before


def test_broken_code_does_not_take_over(tmp_path: Path, installed: Installed) -> None:
    """An installation that can't be executed fails the reload with its error; mended, it works."""
    with start(tmp_path, installed, errors=("reload_failed",)) as daemon:
        (worker,) = daemon.workers()
        be_counted(daemon)
        installed.edit("process/supervisor.py", "import gc\n", "import gc (\n")
        for attempt in (1, 2, 3):
            daemon.signal(signal.SIGHUP)
            wait_for_problem(daemon, "SyntaxError: invalid syntax", attempt)
        daemon.wait_until("lpechod_config_last_reload_successful", 0)
        assert daemon.workers() == [worker]
        be_counted(daemon)
        expect_counted(daemon, 2)
        installed.edit("process/supervisor.py", "import gc (\n", "import gc\n")
        installed.release("7.8.9")
        daemon.reload()
        assert version(daemon) == "7.8.9"
        expect_counted(daemon, 2)
        assert daemon.metric("lpechod_config_last_reload_successful") == 1


def test_workers_that_cannot_start_leave_the_old_ones_serving(
    tmp_path: Path, installed: Installed
) -> None:
    """When the new version passes its check but not its start, the old workers go on."""
    errors = ("reload_failed", "worker_died")
    loaded_at = "lpechod_config_last_reload_success_timestamp_seconds"
    marker = "    own_log = open_worker_log(config)\n"
    broken = f"    os.abort()\n{marker}"
    with start(tmp_path, installed, errors=errors) as daemon, daemon.connect() as client:
        client.echo(b"before")
        (worker,) = daemon.workers()
        before = daemon.metric(loaded_at)
        installed.edit("process/worker.py", marker, broken)
        daemon.signal(signal.SIGHUP)
        daemon.wait_for("reload_failed")
        assert worker in daemon.workers()
        client.echo(b"after")
        be_counted(daemon)
        assert daemon.metric("lpechod_config_last_reload_successful") == 0
        assert daemon.metric(loaded_at) == before
        installed.edit("process/worker.py", broken, marker)
        daemon.reload()
        client.expect_end()
        client.close()
        daemon.wait_for("worker_ended", worker=worker)
        assert daemon.metric("lpechod_config_last_reload_successful") == 1
        be_counted(daemon)
        daemon.wait_until("lpechod_connections_accepted_total", 3)


def test_the_command_stays(tmp_path: Path, installed: Installed) -> None:
    """Options of the interpreter and the arguments are the same after a reload."""
    with start(tmp_path, installed) as daemon:
        before = Path(f"/proc/{daemon.pid}/cmdline").read_bytes().split(b"\0")
        daemon.reload()
        assert Path(f"/proc/{daemon.pid}/cmdline").read_bytes().split(b"\0")[1:] == before[1:]
        assert Path(f"/proc/{daemon.pid}/cwd").readlink() == tmp_path / "elsewhere"
        environ = Path(f"/proc/{daemon.pid}/environ").read_bytes().split(b"\0")
        assert os.fsencode(f"PYTHONPATH={installed.environ['PYTHONPATH']}") in environ
