"""The package: installed, upgraded, removed and purged by apt."""

import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.boot.callers import Callers
from tests.boot.guest import CONFIG, Guest, Journal

PYTHON = "usr/lib/python3/dist-packages/lpechod/__init__.py"


@pytest.fixture
def older(package: Path, tmp_path: Path) -> Path:
    """The same package, but for its version."""
    tree = tmp_path / "older"
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    for file, pattern in (
        (tree / "DEBIAN/control", r"(?<=^Version: )[0-9.]+"),
        (tree / PYTHON, r'(?<=^__version__ = ")[0-9.]+'),
    ):
        text, count = re.subn(pattern, "0.0.1", file.read_text(), flags=re.MULTILINE)
        assert count == 1
        file.write_text(text)
    built = tmp_path / "lpechod_0.0.1_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, built], check=True)
    shutil.rmtree(tree)
    return built


def version(guest: Guest) -> str:
    """Return the version that runs."""
    (series,) = (name for name in guest.metrics() if name.startswith("lpechod_build_info{"))
    found = re.search(r'[{,]version="(.*?)"', series)
    assert found
    return found[1]


def test_install_and_purge(empty_guest: Guest, package: Path) -> None:
    """Installing enables and starts the service on loopback, and purging leaves nothing behind."""
    guest = empty_guest
    before = files(guest)
    guest.install(package)
    assert guest.run("systemctl", "is-enabled", "lpechod") == "enabled"
    assert guest.run("systemctl", "is-active", "lpechod") == "active"
    guest.echo()
    assert guest.run("lpechod", "check") == "OK"
    assert version(guest) in package.name
    listening = re.findall(r": (\w+):\w+ 0+:0000 0A ", guest.run("cat", "/proc/net/tcp"))
    assert set(listening) == {"0100007F"}
    assert guest.run("cat", "/proc/net/tcp6").count("\n") == 0
    for page in ("man8/lpechod.8", "man5/lpechod.toml.5"):
        guest.run("test", "-s", f"/usr/share/man/{page}.gz")

    with guest.connect() as client:
        client.echo(b"before the removal")
        guest.run("apt-get", "--yes", "remove", "lpechod")
        client.expect_end()
        client.socket.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionRefusedError):
        guest.connect()
    guest.run("test", "-e", str(CONFIG))
    guest.run("apt-get", "--yes", "purge", "--autoremove", "lpechod")
    assert files(guest) == before
    guest.run("id", "_lpechod", status=1)


def files(guest: Guest) -> set[str]:
    """List what is in the guest, but for the records of the tools that change it.

    /etc/hosts is left by a dependency, netbase.
    """
    records = (
        r"/(proc|sys|dev|run|tmp|srv|var/(cache|log|lib/(dpkg|apt|systemd))|etc/(\w+-|hosts))(/|$)"
    )
    found = guest.run("find", "/", "-xdev").splitlines()
    return {path for path in found if not re.match(records, path)}


def test_upgrade_under_traffic(empty_guest: Guest, package: Path, older: Path) -> None:
    """An upgrade goes on as the new version in the same process, and no call is lost."""
    guest = empty_guest
    guest.install(older)
    assert version(guest) == "0.0.1"
    before = guest.show("lpechod", "MainPID", "NRestarts", "ExecMainStartTimestamp")
    journal = Journal(guest)
    with Callers(guest) as callers, guest.connect() as client:
        client.echo(b"before")
        guest.install(package)
        client.socket.shutdown(socket.SHUT_WR)
        client.expect_end()
    assert version(guest) in package.name
    assert guest.show("lpechod", "MainPID", "NRestarts", "ExecMainStartTimestamp") == before
    guest.wait_until("lpechod_frames_total", callers.calls + 1)
    journal.wait_for("reloaded")
    journal.close()
    assert not journal.errors


def test_upgrade_with_a_wrong_configuration(empty_guest: Guest, package: Path, older: Path) -> None:
    """If the new version can't use the file the upgrade succeeds, and the old daemon goes on."""
    guest = empty_guest
    guest.install(older)
    guest.path(CONFIG).write_text("[server]\nworker = 1\n")
    guest.install(package)
    guest.echo()
    assert version(guest) == "0.0.1"
    assert "Reload failed" in guest.show("lpechod", "StatusText")["StatusText"]
