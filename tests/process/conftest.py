"""What the tests of listening sockets share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lpechod.process.systemd import Notifier
from tests.net.harness import RecordingLog, descriptors
from tests.system.manager import Manager


@pytest.fixture(name="whole")
def _whole() -> Iterator[None]:
    """Hold every test to leaving no descriptor behind."""
    before = descriptors()
    yield
    assert descriptors() == before


@pytest.fixture(name="manager")
def _manager(whole: None, tmp_path: Path) -> Iterator[Manager]:  # noqa: ARG001 - its order.
    with Manager(tmp_path / "n") as manager:
        yield manager


@pytest.fixture(name="notifier")
def _notifier(manager: Manager) -> Iterator[Notifier]:
    notifier = Notifier(manager.address)
    yield notifier
    notifier.close()


@pytest.fixture(name="log")
def _log() -> RecordingLog:
    return RecordingLog()
