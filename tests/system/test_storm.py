"""The life cycle of the daemon under load: reloads, kills, stops and mistakes, in any order."""

from pathlib import Path

import pytest

from tests.system.storm import reloads, storm

RELOADS = 25
"""More of them, by hand: ``python tests/system/storm.py --reloads 200``."""

pytestmark = pytest.mark.timeout(180)


def test_a_storm_breaks_nothing_but_what_is_killed(tmp_path: Path) -> None:
    """Whatever happens to the daemon, only connections of a killed worker end before their time."""
    result = storm(tmp_path, seed=1, events=20, count=2)
    assert result.wrong == []
    assert result.kills >= 3


def test_counters_agree_exactly_with_the_clients(tmp_path: Path) -> None:
    """Over reloads, stops and other numbers of workers, not a byte is counted too much or lost."""
    result = storm(tmp_path, seed=2, events=12, count=2, kills=False)
    assert result.wrong == []


def test_reloads_leave_nothing_behind(tmp_path: Path) -> None:
    """After many reloads the daemon has the processes, descriptors, files and memory of before."""
    result = reloads(tmp_path, seed=3, times=RELOADS, count=2)
    assert result.wrong == []
