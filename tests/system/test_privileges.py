"""What the daemon may do: it needs no privilege, and its workers keep none."""

import os
import re
import socket
import tempfile
from pathlib import Path

import pytest

from tests.system.daemon import Daemon, configuration

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give up")
LOW_PORT = 61


def status(pid: int) -> dict[str, str]:
    """Return what the kernel says of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    return dict(re.findall(r"^(\w+):\t(.*)$", text, re.MULTILINE))


def test_no_program_gets_new_privileges(tmp_path: Path) -> None:
    """Supervisor and workers forgo new privileges, before a reload and after it."""
    with Daemon(tmp_path) as daemon:
        for _ in range(2):
            assert {status(pid)["NoNewPrivs"] for pid in (daemon.pid, *daemon.workers())} == {"1"}
            daemon.reload()


@as_root
def test_started_as_root(tmp_path: Path) -> None:
    """Started as root, the daemon warns once, serves, and leaves its workers no capability."""
    with Daemon(tmp_path) as daemon:
        with daemon.connect() as client:
            client.echo(b"hello")
        assert len(daemon.events("running_as_root")) == 1
        (worker,) = daemon.workers()
        for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(status(worker)[name], 16) == 0
        assert int(status(daemon.pid)["CapEff"], 16) != 0
        assert not daemon.events("capabilities_kept")


@as_root
def test_low_ports_of_root(tmp_path: Path) -> None:
    """The supervisor of root still binds low ports, at the start and at a reload."""
    with socket.create_server(("127.0.0.1", LOW_PORT)):
        pass  # It is free, and this is allowed.
    with Daemon(tmp_path) as daemon:
        daemon.reload(configuration(f"127.0.0.1:{LOW_PORT}"))
        with daemon.connect() as client:
            client.echo(b"hello")


@as_root
def test_started_as_somebody() -> None:
    """An ordinary user can run it, and gets no warning."""
    # Its coverage is not measured: nobody may not write the data.
    unset = [f"--unset={name}" for name in os.environ if name.startswith("COVERAGE_")]
    prefix = ("env", *unset, "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    # A directory of pytest's is closed to others.
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        with Daemon(Path(name), prefix=prefix) as daemon:
            with daemon.connect() as client:
                client.echo(b"hello")
            assert not daemon.events("running_as_root")
            assert status(daemon.pid)["Uid"].split() == ["65534"] * 4
