"""Processes that are killed or hang, under the eyes of systemd."""

import signal

from tests.boot.callers import Callers
from tests.boot.conftest import DROP_INS
from tests.boot.guest import CONFIG, Guest, Journal


def workers(guest: Guest) -> list[int]:
    """Return the workers' process ids."""
    (supervisor,) = guest.show("lpechod", "MainPID").values()
    text = guest.run("cat", f"/proc/{supervisor}/task/{supervisor}/children")
    return [int(pid) for pid in text.split()]


def test_a_killed_worker_is_replaced(guest: Guest, journal: Journal) -> None:
    """The supervisor replaces a worker that is killed, and systemd need not do anything."""
    before = guest.show("lpechod", "MainPID", "NRestarts")
    (worker,) = workers(guest)
    guest.kill(worker, signal.SIGKILL)
    journal.wait_for("worker_died", worker=worker)
    guest.echo()
    guest.wait_until('lpechod_workers{state="ready"}', 1)
    assert guest.metrics()["lpechod_worker_restarts_total"] == 1
    assert guest.show("lpechod", "MainPID", "NRestarts") == before


def test_a_killed_supervisor_is_restarted(guest: Guest, journal: Journal) -> None:
    """A killed supervisor is replaced by systemd, and who calls meanwhile is not refused."""
    before = guest.show("lpechod", "MainPID", "NRestarts")
    guest.kill(int(before["MainPID"]), signal.SIGKILL)
    journal.wait_for_manager("Scheduled restart job")
    guest.echo()
    after = guest.show("lpechod", "MainPID", "NRestarts")
    assert after["MainPID"] != before["MainPID"]
    assert int(after["NRestarts"]) == int(before["NRestarts"]) + 1
    journal.wait_for("ready")


def test_a_hanging_worker_is_killed(guest: Guest, journal: Journal) -> None:
    """A worker that gives no sign of life is killed and replaced, while the other one serves."""
    config = guest.path(CONFIG)
    config.write_text('[server]\nworkers = 2\nwatchdog = "1s"\n\n' + config.read_text())
    guest.run("systemctl", "reload", "lpechod")
    before = guest.show("lpechod", "MainPID", "NRestarts")
    hung = workers(guest)[0]
    guest.kill(hung, signal.SIGSTOP)
    with Callers(guest):
        journal.wait_for("worker_hung", worker=hung)
        journal.wait_for("worker_died", worker=hung)
        guest.wait_until('lpechod_workers{state="ready"}', 2)
    assert hung not in workers(guest)
    assert guest.show("lpechod", "MainPID", "NRestarts") == before


def test_a_hanging_supervisor_is_restarted(guest: Guest, journal: Journal) -> None:
    """The watchdog of systemd ends a daemon whose supervisor hangs, and starts another."""
    drop_in = DROP_INS / "watchdog.conf"
    guest.run("mkdir", "--parents", str(DROP_INS))
    guest.run("sh", "-c", f"printf '[Service]\\nWatchdogSec=2s\\n' >{drop_in}")
    guest.run("systemctl", "daemon-reload")
    guest.run("systemctl", "restart", "lpechod")
    (before,) = guest.show("lpechod", "MainPID").values()
    guest.kill(int(before), signal.SIGSTOP)
    journal.wait_for_manager("Watchdog timeout")
    journal.wait_for_manager("Scheduled restart job")
    guest.echo()
    (after,) = guest.show("lpechod", "MainPID").values()
    assert after != before
