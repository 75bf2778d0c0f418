"""Listening sockets that somebody else has made: which of them are taken, and what for."""

import os
import socket
from pathlib import Path

import pytest

from lpechod.net.address import parse_address
from lpechod.net.listener import serves
from lpechod.process.sockets import ECHO, METRICS, Sockets, missing
from lpechod.process.systemd import Inherited, Notifier, descriptor_name
from tests.net.harness import RecordingLog
from tests.process.listening import backlog_of, close, listening, name_of, passed, want
from tests.system.manager import Manager

pytestmark = pytest.mark.usefixtures("whole")


def is_open(fd: int) -> bool:
    """Tell whether a descriptor is in use."""
    return os.path.lexists(f"/proc/self/fd/{fd}")


@pytest.mark.parametrize(
    ("bound", "address", "fits"),
    [
        ("127.0.0.1:0", "127.0.0.1:{port}", True),
        ("127.0.0.1:0", "127.0.0.1:1", False),
        ("127.0.0.1:0", "127.0.0.1:0", False),
        ("127.0.0.1:0", "127.0.0.2:{port}", False),
        ("127.0.0.1:0", "[::1]:{port}", False),
        ("127.0.0.1:0", "localhost:{port}", True),
        ("127.0.0.1:0", ":{port}", False),
        ("127.0.0.1:0", "0.0.0.0:{port}", False),
        ("127.0.0.1:0", "no-such-host.invalid:{port}", False),
        ("127.0.0.1:0", "unix:/127.0.0.1", False),
        ("0.0.0.0:0", "0.0.0.0:{port}", True),
        ("0.0.0.0:0", ":{port}", True),
        ("0.0.0.0:0", "[::]:{port}", False),
        ("0.0.0.0:0", "127.0.0.1:{port}", False),
        ("[::]:0", "[::]:{port}", True),
        ("[::]:0", "[0:0::0]:{port}", True),
        ("[::]:0", ":{port}", True),
        ("[::]:0", "0.0.0.0:{port}", False),
        ("[::1]:0", "[::1]:{port}", True),
    ],
)
def test_a_tcp_socket_serves_its_own_address(bound: str, address: str, fits: bool) -> None:
    """A listening socket serves the address it is bound to, and no other one."""
    with listening(bound) as made:
        wanted = parse_address(address.format(port=made.getsockname()[1]))
        assert serves(made, wanted) is fits


def test_a_unix_socket_serves_while_its_file_is_there(tmp_path: Path) -> None:
    """A UNIX socket serves its path, unless its file is gone and nobody can reach it."""
    path = tmp_path / "s"
    with listening(f"unix:{path}") as made:
        assert serves(made, parse_address(f"unix:{path}"))
        assert not serves(made, parse_address(f"unix:{path}2"))
        assert not serves(made, parse_address("127.0.0.1:1"))
        path.unlink()
        assert not serves(made, parse_address(f"unix:{path}"))


def test_what_does_not_listen_serves_nothing(tmp_path: Path) -> None:
    """A socket that is only bound, is connected, or has no stream serves no address."""
    with (
        listening("127.0.0.1:0") as made,
        socket.create_connection(made.getsockname()) as connected,
        socket.socket() as bound,
        socket.socket(type=socket.SOCK_DGRAM) as datagram,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as packets,
    ):
        bound.bind(("127.0.0.1", 0))
        datagram.bind(("127.0.0.1", 0))
        packets.bind(str(tmp_path / "p"))
        packets.listen()
        for each in (connected, bound, datagram, packets):
            assert not serves(each, parse_address(name_of(each)))


def test_what_serves_is_inherited(notifier: Notifier, log: RecordingLog, tmp_path: Path) -> None:
    """Sockets are taken by their address, whatever their order, and stay what they are."""
    made = [listening("127.0.0.1:0"), listening(f"unix:{tmp_path}/s"), listening("[::1]:0")]
    addresses = [name_of(each) for each in made]
    fds = [each.fileno() for each in made]
    wanted = want(*addresses[:2]) + want(addresses[2], purpose=METRICS)
    sockets = Sockets()
    sockets.inherit([passed(each) for each in reversed(made)], wanted, notifier, log)
    assert log.lines == []
    assert {bound.address for bound in sockets.bound} == set(addresses)
    assert all(bound.foreign for bound in sockets.bound)
    assert missing(wanted, sockets.addresses) == []
    sockets.assign(wanted)
    assert [each.socket.fileno() for each in sockets.listeners(ECHO)] == fds[:2]
    assert [each.socket.fileno() for each in sockets.listeners(METRICS)] == fds[2:]
    close(sockets)
    assert (tmp_path / "s").exists()


def test_what_comes_from_the_store_is_ours(
    notifier: Notifier, log: RecordingLog, tmp_path: Path
) -> None:
    """A socket under the name that we store it by is ours again, and so is its file."""
    path = tmp_path / "s"
    made = listening(f"unix:{path}")
    sockets = Sockets()
    stored = passed(made, descriptor_name(f"unix:{path}"))
    sockets.inherit([stored], want(f"unix:{path}"), notifier, log)
    (bound,) = sockets.bound
    assert not bound.foreign
    assert bound.listeners[0].path == str(path)
    close(sockets)
    assert not path.exists()


def test_a_name_with_several_addresses_takes_several_sockets(
    notifier: Notifier, log: RecordingLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sockets of all the addresses that a host name stands for serve it together."""
    real = socket.getaddrinfo
    first = listening("127.0.0.1:0")
    port = first.getsockname()[1]
    second = listening(f"127.0.0.2:{port}")

    def getaddrinfo(host: str, *arguments: object, **options: object) -> list[object]:
        hosts = ["127.0.0.1", "127.0.0.2"] if host == "both" else [host]
        return [found for each in hosts for found in real(each, *arguments, **options)]  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    sockets = Sockets()
    sockets.inherit([passed(first), passed(second)], want(f"both:{port}"), notifier, log)
    (bound,) = sockets.bound
    assert [each.name for each in bound.listeners] == [f"127.0.0.1:{port}", f"127.0.0.2:{port}"]
    close(sockets)


def test_what_serves_nothing_is_closed(
    manager: Manager, notifier: Notifier, log: RecordingLog
) -> None:
    """A socket that nobody wants is a warning, is closed, and need not be kept any longer."""
    made = listening("127.0.0.1:0")
    stray = passed(made, "stray")
    sockets = Sockets()
    sockets.inherit([stray], want("127.0.0.1:0"), notifier, log)
    assert sockets.bound == []
    assert not is_open(stray.fd)
    (line,) = log.lines
    assert (line.level, line.event) == ("warning", "inherited_socket_unused")
    assert line.fields["name"] == "stray"
    (message,) = manager.catch_up()
    assert message.fields == {"FDSTOREREMOVE": "1", "FDNAME": "stray"}


def test_what_is_no_socket_is_closed(notifier: Notifier, log: RecordingLog) -> None:
    """A descriptor of another kind is a warning, is closed, and does not hinder the others."""
    made = listening("127.0.0.1:0")
    address = name_of(made)
    stray = Inherited("stray", os.memfd_create("x"))
    sockets = Sockets()
    try:
        sockets.inherit([stray, passed(made)], want(address), notifier, log)
        assert sockets.addresses == [address]
        assert not is_open(stray.fd)
        assert [line.fields["name"] for line in log.lines] == ["stray"]
    finally:
        close(sockets)


def test_a_unit_decides_on_its_backlog(notifier: Notifier, log: RecordingLog) -> None:
    """The backlog of a socket that belongs to a unit is left alone."""
    made = listening("127.0.0.1:0")
    made.listen(5)
    wanted = want(name_of(made), backlog=99)
    sockets = Sockets()
    sockets.inherit([passed(made)], wanted, notifier, log)
    sockets.assign(wanted)
    assert backlog_of(sockets.listeners(ECHO)[0].socket) == 5
    close(sockets)
