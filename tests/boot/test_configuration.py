"""Mistakes in the configuration, at the start and at a reload."""

import socket

from tests.boot.guest import CONFIG, ECHO, Guest, Journal

MISTAKE = "[limits]\nmax_frame = true\n"


def test_a_mistake_at_the_start(guest: Guest, journal: Journal) -> None:
    """A wrong file ends the start with a status that systemd names, and it does not try again."""
    guest.path(CONFIG).write_text(MISTAKE)
    guest.run("systemctl", "restart", "lpechod", status=1)
    assert guest.show("lpechod", "ActiveState", "ExecMainStatus", "NRestarts") == {
        "ActiveState": "failed",
        "ExecMainStatus": "78",
        "NRestarts": "0",
    }
    journal.wait_for_manager("status=78/CONFIG")
    assert f"{CONFIG}:2: limits.max_frame" in guest.run("journalctl", "--unit=lpechod", "--boot")


def test_a_mistake_at_a_reload(guest: Guest, journal: Journal) -> None:
    """After a reload of a wrong file everything goes on as before, and status and journal tell."""
    config = guest.path(CONFIG)
    right = config.read_text()
    before = guest.show("lpechod", "MainPID", "NRestarts")
    with guest.connect() as client:
        config.write_text(MISTAKE)
        guest.run("systemctl", "reload", "lpechod")
        client.echo(b"still here")
    guest.echo()
    problem = journal.wait_for("reload_failed")["lpechod"]["problem"]
    assert problem.startswith(f"{CONFIG}:2: limits.max_frame: ")
    assert f'Status: "Reload failed, all is as before: {problem}' in guest.run(
        "systemctl", "status", "--no-pager", "--full", "lpechod"
    )
    assert guest.metrics()["lpechod_config_last_reload_successful"] == 0
    assert guest.show("lpechod", "MainPID", "NRestarts") == before

    config.write_text(right)
    guest.run("systemctl", "reload", "lpechod")
    assert guest.metrics()["lpechod_config_last_reload_successful"] == 1
    assert guest.show("lpechod", "StatusText")["StatusText"] == f"Serving {ECHO} with 1 worker"


def test_an_address_that_is_taken(guest: Guest, journal: Journal) -> None:
    """While somebody else has the address systemd tries again and again, until it is free."""
    guest.run("systemctl", "stop", "lpechod")
    with guest.network():
        holder = socket.create_server(("127.0.0.1", 9000))
    with holder:
        guest.run("systemctl", "start", "lpechod", status=1)
        problem = journal.wait_for("listen_failed")["lpechod"]["problem"]
        assert ECHO in problem
        assert "Address already in use" in problem
        assert guest.show("lpechod", "SubState")["SubState"] == "auto-restart"
    journal.wait_for("ready")
    guest.echo()
