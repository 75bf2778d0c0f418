"""Guests: one with the package installed, which most tests share, and empty ones."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.boot.guest import CONFIG, Guest, Journal
from tests.boot.image import trixie

DIST = Path(__file__).resolve().parents[2] / "dist"
DROP_INS = Path("/run/systemd/system/lpechod.service.d")


def pytest_configure() -> None:
    """Fail early, and say what is missing: nothing here is ever skipped."""
    for program, package in (
        ("mmdebstrap", "mmdebstrap"),
        ("systemd-nspawn", "systemd-container"),
        ("nsenter", "util-linux"),
        ("dpkg-deb", "dpkg"),
    ):
        if shutil.which(program) is None:
            pytest.exit(f"{program} is missing: apt install {package}", returncode=2)


@pytest.fixture(scope="session")
def package() -> Path:
    """The package under test."""
    built = list(DIST.glob("lpechod_*_all.deb"))
    assert len(built) == 1, "make deb builds the package"
    return built[0]


@pytest.fixture(scope="session")
def image(package: Path) -> Path:
    return trixie(package)


@pytest.fixture
def empty_guest(image: Path, tmp_path: Path) -> Iterator[Guest]:
    """A guest of its own, without the package."""
    with Guest(image, tmp_path) as guest:
        yield guest


@pytest.fixture(scope="session")
def installed(
    image: Path, package: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Guest]:
    """A guest with the package installed."""
    with Guest(image, tmp_path_factory.mktemp("guest")) as guest:
        guest.install(package)
        yield guest


@pytest.fixture
def guest(installed: Guest) -> Iterator[Guest]:
    """The guest with the package installed, freshly started on its default configuration."""
    default = installed.path(CONFIG).read_text()
    installed.run("systemctl", "restart", "lpechod.service")
    yield installed
    installed.path(CONFIG).write_text(default)
    installed.run("rm", "--recursive", "--force", str(DROP_INS))
    installed.run("systemctl", "daemon-reload")
    installed.run("systemctl", "reset-failed")


@pytest.fixture
def journal(guest: Guest) -> Iterator[Journal]:
    """The journal of the service, from after its start to the end of the test."""
    journal = Journal(guest)
    yield journal
    journal.close()
