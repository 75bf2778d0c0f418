"""The service that the package installs: started, stopped, restarted, reloaded, and confined."""

import json
import socket
from pathlib import Path

import pytest

from tests.boot.callers import Callers, ends_cleanly
from tests.boot.guest import CONFIG, ECHO, Guest, Journal


def test_start_and_stop(guest: Guest, journal: Journal) -> None:
    """A stop ends connections with a FIN and the service with success, and a start serves again."""
    client = guest.connect()
    client.echo(b"before")
    guest.run("systemctl", "stop", "lpechod")
    ends_cleanly(client)
    assert guest.show("lpechod", "ActiveState", "Result", "ExecMainStatus") == {
        "ActiveState": "inactive",
        "Result": "success",
        "ExecMainStatus": "0",
    }
    with pytest.raises(ConnectionRefusedError):
        guest.connect()
    guest.run("systemctl", "start", "lpechod")
    guest.echo()
    journal.wait_for("stopped")
    assert not journal.errors


def test_restart_refuses_nobody(guest: Guest, journal: Journal) -> None:
    """Clients that call during restarts wait for the next daemon: systemd has kept the socket."""
    with Callers(guest):
        for _ in range(3):
            guest.run("systemctl", "restart", "lpechod")
    stored = guest.show("lpechod", "NFileDescriptorStore")["NFileDescriptorStore"]
    assert stored == "2"
    assert not journal.errors


def test_reload_applies_the_file_and_keeps_connections(guest: Guest, journal: Journal) -> None:
    """A reload returns when the new configuration serves, with the same process and no loss."""
    before = guest.show("lpechod", "MainPID")
    config = guest.path(CONFIG)
    with Callers(guest), guest.connect() as client:
        client.echo(b"before")
        config.write_text("[server]\nworkers = 3\n\n" + config.read_text())
        guest.run("systemctl", "reload", "lpechod")
        assert guest.metrics()['lpechod_workers{state="ready"}'] == 3
        client.socket.shutdown(socket.SHUT_WR)
        client.expect_end()
    assert guest.show("lpechod", "MainPID", "StatusText") == {
        **before,
        "StatusText": f"Serving {ECHO} with 3 workers",
    }
    journal.wait_for("reloaded", workers=3)
    assert not journal.errors


def test_the_journal_has_priorities_and_fields(guest: Guest, journal: Journal) -> None:
    """Lines carry the priority of their level, and everything they tell in fields."""
    guest.echo(b"12345")
    closed = journal.wait_for("connection_closed")
    assert closed["PRIORITY"] == "6"
    assert closed["SYSLOG_IDENTIFIER"] == "lpechod"
    assert closed["lpechod"]["reason"] == "peer_closed"
    assert closed["lpechod"]["sent_bytes"] == 9
    guest.path(CONFIG).write_text("[server]\nworkers = 0\n")
    guest.run("systemctl", "reload", "lpechod")
    assert journal.wait_for("reload_failed")["PRIORITY"] == "3"
    errors = guest.run(
        *("journalctl", "--identifier=lpechod", "--priority=err", "--output=cat"),
        f"--after-cursor={journal.cursor}",
    )
    assert {json.loads(line)["event"] for line in errors.splitlines()} == {"reload_failed"}


@pytest.mark.parametrize(
    ("unit", "limit"), [("lpechod.service", 11), ("lpechod-sealed.service", 2)]
)
def test_exposure(guest: Guest, unit: str, limit: int) -> None:
    """The manager finds the units as little exposed as their comments say, in tenths of a point."""
    guest.run("systemd-analyze", "security", f"--threshold={limit}", "--no-pager", unit)
    guest.run(
        *("systemd-analyze", "security", f"--threshold={limit - 1}", "--no-pager", unit), status=1
    )


def test_everything_works_in_confinement(guest: Guest) -> None:
    """Whoever the kernel turns away leaves no trace, and the metrics of the process are there."""
    guest.echo(bytes(1 << 20))
    metrics = guest.metrics()
    for name in ("open_fds", "max_fds", "start_time_seconds", "cpu_seconds_total"):
        assert metrics[f"process_{name}"] > 0
    assert metrics["process_max_fds"] >= 10_000
    (pid,) = guest.show("lpechod", "MainPID").values()
    status = guest.run("cat", f"/proc/{pid}/status").splitlines()
    facts = dict(line.split(":\t", 1) for line in status)
    assert facts["CapEff"] == facts["CapBnd"] == "0" * 16
    assert facts["NoNewPrivs"] == "1"
    assert facts["Seccomp"] == "2"
    user = guest.run("id", "--user", "_lpechod")
    assert facts["Uid"].split() == [user] * 4


def test_debians_own_test(guest: Guest) -> None:
    """The test that comes with the source package, for autopkgtest, passes on the installed one."""
    tests = Path(__file__).resolve().parents[2] / "packaging" / "debian" / "tests"
    (path,) = guest.upload(tests / "service")
    assert guest.run(path).endswith("passed")
