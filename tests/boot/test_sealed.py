"""The sealed pair: a daemon without a network, and sockets that systemd makes for it."""

from collections.abc import Iterator

import pytest

from tests.boot.callers import Callers
from tests.boot.guest import CONFIG, ECHO, Guest, Journal

SEALED = "lpechod-sealed.service"
SOCKETS = ("lpechod-sealed.socket", "lpechod-sealed-metrics.socket")


@pytest.fixture
def sealed(guest: Guest) -> Iterator[Guest]:
    """A guest with the sealed pair enabled, as its comments tell one to."""
    guest.run("systemctl", "disable", "--now", "lpechod.service")
    guest.run("systemctl", "enable", "--now", *SOCKETS)
    yield guest
    guest.run("systemctl", "disable", "--now", *SOCKETS, SEALED)
    guest.run("systemctl", "enable", "--now", "lpechod.service")


def test_is_off_by_default(guest: Guest) -> None:
    """Nobody gets the sealed pair who has not asked for it."""
    for unit in (SEALED, *SOCKETS):
        assert guest.run("systemctl", "is-enabled", unit, status=1) == "disabled"
        assert guest.show(unit, "ActiveState")["ActiveState"] == "inactive"


@pytest.mark.parametrize("first", ["echo", "scrape"])
def test_the_first_client_starts_it(sealed: Guest, first: str) -> None:
    """The first connection to either socket starts the daemon, which serves both of them."""
    assert sealed.show(SEALED, "ActiveState")["ActiveState"] == "inactive"
    if first == "echo":
        sealed.echo()
    else:
        sealed.metrics()
    sealed.echo(bytes(1 << 20))
    assert sealed.metrics()["process_open_fds"] > 0
    assert sealed.show(SEALED, "StatusText")["StatusText"] == f"Serving {ECHO} with 1 worker"


def test_has_no_network(sealed: Guest) -> None:
    """The daemon is in a network namespace of its own, where none of its sockets was made."""
    sealed.echo()
    (pid,) = sealed.show(SEALED, "MainPID").values()
    networks = sealed.run("readlink", f"/proc/{pid}/ns/net", "/proc/1/ns/net").split()
    assert len(set(networks)) == 2
    assert sealed.run("sh", "-c", f"tail --lines=+2 /proc/{pid}/net/tcp") == ""


def test_restart_and_reload_refuse_nobody(sealed: Guest) -> None:
    """Clients that call during restarts and reloads are all served."""
    with Callers(sealed):
        sealed.run("systemctl", "restart", SEALED)
        sealed.run("systemctl", "reload", SEALED)
        sealed.run("systemctl", "restart", SEALED)


def test_an_address_that_no_socket_unit_has(sealed: Guest) -> None:
    """A start with an address that only the file has fails, and names it."""
    journal = Journal(sealed, SEALED)
    config = sealed.path(CONFIG)
    config.write_text(config.read_text().replace("127.0.0.1:9000", "127.0.0.1:9001"))
    sealed.run("systemctl", "start", SEALED, status=1)
    problem = journal.wait_for("listen_failed")["lpechod"]["problem"]
    journal.close()
    assert "127.0.0.1:9001" in problem
    sealed.run("systemctl", "stop", SEALED)


def test_does_not_run_beside_the_other(sealed: Guest) -> None:
    """Starting the ordinary service stops the sealed one and takes its addresses over."""
    sealed.echo()
    sealed.run("systemctl", "start", "lpechod.service")
    assert sealed.show(SEALED, "ActiveState")["ActiveState"] == "inactive"
    assert sealed.show(SOCKETS[0], "ActiveState")["ActiveState"] == "inactive"
    sealed.echo()
