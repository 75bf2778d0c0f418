"""The drop-in for Debian 12, whose systemd knows no Type=notify-reload."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.boot.callers import Callers
from tests.boot.guest import CONFIG, Guest, Journal
from tests.boot.image import bookworm

ROOT = Path(__file__).resolve().parents[2]
DROP_IN = "/etc/systemd/system/lpechod.service.d/bookworm.conf"


@pytest.fixture
def old_guest(tmp_path: Path) -> Iterator[Guest]:
    """A Debian 12 with lpechod in a virtual environment, set up as the drop-in tells one to."""
    wheels = tmp_path / "wheels"
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT)], check=True)
    options = (f"--dest={wheels}", "--only-binary=:all:", "--python-version=3.11")
    subprocess.run([*pip, "download", *options, *map(str, wheels.glob("*.whl"))], check=True)
    with Guest(bookworm(), tmp_path) as guest:
        guest.run("python3", "-m", "venv", "/opt/lpechod")
        paths = guest.upload(*wheels.iterdir())
        guest.run("/opt/lpechod/bin/pip", "install", "--quiet", "--no-index", *paths)
        for source, path in (
            ("packaging/debian/config.toml", str(CONFIG)),
            ("deploy/systemd/lpechod.service", "/etc/systemd/system/lpechod.service"),
            ("deploy/systemd/bookworm.conf", DROP_IN),
            ("deploy/sysusers.d/lpechod.conf", "/etc/sysusers.d/lpechod.conf"),
        ):
            guest.path(path).parent.mkdir(exist_ok=True)
            guest.path(path).write_bytes((ROOT / source).read_bytes())
        guest.run("systemd-sysusers")
        guest.run("systemctl", "daemon-reload")
        yield guest


def test_runs_on_debian_12(old_guest: Guest) -> None:
    """With the drop-in the service starts, reloads and restarts, and no call is lost."""
    guest = old_guest
    journal = Journal(guest)
    guest.run("systemctl", "enable", "--now", "lpechod")
    before = guest.show("lpechod", "MainPID")
    config = guest.path(CONFIG)
    with Callers(guest):
        config.write_text("[server]\nworkers = 2\n\n" + config.read_text())
        guest.run("systemctl", "reload", "lpechod")
        journal.wait_for("reloaded", workers=2)
        assert guest.show("lpechod", "MainPID") == before
        guest.run("systemctl", "restart", "lpechod")
    journal.close()
    assert not journal.errors
