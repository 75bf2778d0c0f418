"""Listening sockets that a service manager passes to the daemon, and those that it keeps for it."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.system.daemon import Daemon, EchoClient, Event, frame
from tests.system.manager import Manager, socket_inodes

STORE = {"FDSTORE": "64"}


@pytest.fixture(name="manager")
def _manager(tmp_path: Path) -> Iterator[Manager]:
    with Manager(tmp_path / "n") as manager:
        yield manager


@pytest.fixture(name="tcp")
def _tcp() -> Iterator[socket.socket]:
    """Listen as a socket unit does."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


@pytest.fixture(name="unix")
def _unix(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{tmp_path}/unit.sock")
        listening.listen()
        yield listening


def name(listening: socket.socket) -> str:
    """Return a socket's address as the configuration has it."""
    bound = listening.getsockname()
    return f"unix:{bound}" if isinstance(bound, str) else f"{bound[0]}:{bound[1]}"


def inode(fd: int) -> str:
    """Return which socket a descriptor stands for."""
    return os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 - no path, but a name.


def listen(*addresses: str) -> str:
    """Write the tables of a configuration that listens there."""
    return "".join(f'[[listen]]\naddress = "{address}"\n' for address in addresses)


def free_address() -> str:
    """Return an address of this test process alone, so that nobody takes the port meanwhile."""
    pid = os.getpid()
    with socket.create_server((f"127.77.{pid >> 8 & 255}.{pid & 255}", 0)) as found:
        return name(found)


def request(address: str, body: bytes) -> EchoClient:
    """Connect a client that has sent a frame already."""
    client = EchoClient(address)
    client.send(frame(body))
    return client


def answered(client: EchoClient, body: bytes) -> None:
    """Demand the echo of a frame that was sent before, and another one."""
    assert client.receive(len(frame(body))) == frame(body)
    client.echo(b"and more")
    client.close()


def unused(daemon: Daemon) -> list[Event]:
    """Return the warnings of descriptors that nothing asks for, as of the start."""
    daemon.wait_for("ready")
    return daemon.events("inherited_socket_unused")


def names_stored(manager: Manager) -> list[str]:
    """Return the names under which descriptors were sent at the start."""
    if not manager.heard:
        manager.wait_for("READY")
    manager.catch_up()
    return [message.fields["FDNAME"] for message in manager.heard if "FDSTORE" in message.fields]


@pytest.mark.parametrize("named", [True, False], ids=["named", "nameless"])
def test_sockets_of_units_are_served(
    tmp_path: Path, manager: Manager, tcp: socket.socket, unix: socket.socket, named: bool
) -> None:
    """Passed sockets serve the addresses that they have, clients of before the start included."""
    addresses = [name(unix), name(tcp)]  # Another order than that of the descriptors.
    waiting = [request(address, b"early") for address in addresses]
    passed = [("echo", tcp.fileno()), ("control", unix.fileno())]
    with manager.start(
        tmp_path,
        listen(*addresses),
        passed=passed,
        names=named,
        leaves=[unix.getsockname()],
    ) as daemon:
        for client in waiting:
            answered(client, b"early")
        assert daemon.wait_for("ready")["listeners"] == addresses
        for _, fd in passed:
            for pid in (daemon.pid, *daemon.workers()):
                assert inode(fd) in socket_inodes(pid)
        assert unused(daemon) == []
    metrics = [each for each in names_stored(manager) if "127.0.0.1" in each]
    assert names_stored(manager) == metrics  # Nothing is kept that a unit keeps anyway.
    with EchoClient(addresses[0]) as late, EchoClient(addresses[1]) as later:
        late.send(b"The sockets still listen: nobody has shut them down.")
        later.send(b"Likewise.")


def test_a_unit_s_socket_survives_a_reload(
    tmp_path: Path, manager: Manager, tcp: socket.socket, unix: socket.socket
) -> None:
    """After a reload passed sockets are served as before, and one given up keeps its file."""
    passed = [("echo", tcp.fileno()), ("control", unix.fileno())]
    config = listen(name(tcp), name(unix)) + '[metrics]\naddress = "127.0.0.1:0"\n'
    with manager.start(
        tmp_path, config, passed=passed, leaves=[unix.getsockname()], environ=STORE
    ) as daemon:
        for remaining in (config, config.replace(listen(name(unix)), "")):
            daemon.reload(remaining)
            with daemon.connect() as client:
                client.echo(b"still here")
        manager.catch_up()
        told = [each.fields for each in manager.heard]
        assert not [fields for fields in told if "FDSTOREREMOVE" in fields]
        assert inode(unix.fileno()) not in socket_inodes(daemon.pid)
        EchoClient(name(unix)).close()


def test_the_metrics_socket_may_be_passed(
    tmp_path: Path, manager: Manager, tcp: socket.socket
) -> None:
    """The exporter answers on a passed socket whose address is that of the metrics."""
    config = f'[metrics]\naddress = "{name(tcp)}"\n'
    with manager.start(tmp_path, config, passed=[("metrics", tcp.fileno())]) as daemon:
        assert daemon.wait_for("ready")["metrics"] == [name(tcp)]
        assert daemon.metric("lpechod_workers", state="ready") == 1
        assert inode(tcp.fileno()) in socket_inodes(daemon.pid)
        assert inode(tcp.fileno()) not in socket_inodes(daemon.workers()[0])
        assert unused(daemon) == []


def test_a_socket_that_nothing_asks_for_is_closed(
    tmp_path: Path, manager: Manager, tcp: socket.socket
) -> None:
    """A passed socket of another address is a warning with its name, and is closed."""
    with manager.start(tmp_path, passed=[("stray", tcp.fileno())]) as daemon:
        (warning,) = unused(daemon)
        assert warning["level"] == "warning"
        assert warning["name"] == "stray"
        assert str(tcp.getsockname()[1]) in warning["problem"]
        for pid in (daemon.pid, *daemon.workers()):
            assert inode(tcp.fileno()) not in socket_inodes(pid)


@pytest.mark.parametrize("kind", ["datagram", "connected", "unconnected", "netlink"])
def test_a_socket_that_does_not_listen_is_closed(
    tmp_path: Path, manager: Manager, tcp: socket.socket, kind: str
) -> None:
    """Sockets of other kinds are a warning each, and the address is bound all the same."""
    with ExitStack() as stack:
        address = free_address()
        host, _, port = address.rpartition(":")
        match kind:
            case "datagram":
                stray = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                stray.bind((host, int(port)))
            case "connected":
                stray = socket.create_connection(tcp.getsockname())
            case "unconnected":
                stray = socket.socket()
            case _:
                stray = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
        stack.enter_context(stray)
        passed = [("stray", stray.fileno())]
        daemon = stack.enter_context(manager.start(tmp_path, listen(address), passed=passed))
        assert [warning["name"] for warning in unused(daemon)] == ["stray"]
        assert inode(stray.fileno()) not in socket_inodes(daemon.pid)
        with daemon.connect(address) as client:
            client.echo(b"served")


@pytest.mark.parametrize("kind", ["pipe", "file", "directory", "memory"])
def test_a_descriptor_that_is_no_socket_is_closed(
    tmp_path: Path, manager: Manager, tcp: socket.socket, kind: str
) -> None:
    """A passed file is a warning with its name, and does not keep the next socket from serving."""
    with ExitStack() as stack:
        match kind:
            case "pipe":
                stray, other = os.pipe()
                stack.callback(os.close, other)
            case "file":
                stray = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
            case "directory":
                stray = os.open(tmp_path, os.O_RDONLY)
            case _:
                stray = os.memfd_create("state")
        stack.callback(os.close, stray)
        passed = [("stray", stray), ("echo", tcp.fileno())]
        daemon = stack.enter_context(manager.start(tmp_path, listen(name(tcp)), passed=passed))
        assert [warning["name"] for warning in unused(daemon)] == ["stray"]
        with daemon.connect() as client:
            client.echo(b"served")


def test_own_sockets_are_stored(tmp_path: Path, manager: Manager) -> None:
    """Each socket that the daemon binds is sent to the manager once, under a name of its own."""
    config = listen("127.0.0.1:0", "[::1]:0", f"unix:{tmp_path}/e.sock")
    with manager.start(tmp_path, config) as daemon:
        assert len(names_stored(manager)) == 4
        assert len(manager.store) == 4
        for _, fd in manager.stored():
            with socket.socket(fileno=os.dup(fd)) as kept:
                assert kept.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            assert inode(fd) in socket_inodes(daemon.pid)
        for fields in (message.fields for message in manager.heard if message.descriptors):
            assert fields["FDSTORE"] == "1"
            assert ":" not in fields["FDNAME"]


def test_the_store_follows_a_reload(tmp_path: Path, manager: Manager) -> None:
    """A reload that exchanges an address has one descriptor dropped, and another one stored."""
    path = f"{tmp_path}/{{}}.sock"
    before, after = (path.format(each) for each in ("before", "after"))
    with manager.start(tmp_path, listen("127.0.0.1:0", f"unix:{before}")) as daemon:
        manager.wait_for("READY")
        manager.catch_up()
        old = set(manager.store)
        daemon.reload(daemon.path.read_text().replace(before, after))
        manager.catch_up()
        (gone,) = old - set(manager.store)
        (come,) = set(manager.store) - old
        assert gone.endswith("before.sock")
        assert come.endswith("after.sock")
        with socket.socket(fileno=os.dup(manager.store[come][0])) as kept:
            assert kept.getsockname() == after
        removed = [each.fields for each in manager.heard if "FDSTOREREMOVE" in each.fields]
        assert removed == [{"FDSTOREREMOVE": "1", "FDNAME": gone}]


@pytest.mark.parametrize("end", ["terminated", "killed"])
def test_nobody_is_refused_between_two_daemons(tmp_path: Path, manager: Manager, end: str) -> None:
    """Clients that come while no daemon runs wait in stored sockets, and the next serves them."""
    path = f"{tmp_path}/e.sock"
    addresses = [free_address(), f"unix:{path}"]
    metrics = free_address()
    config = listen(*addresses) + f'[metrics]\naddress = "{metrics}"\n'
    end_it = kill if end == "killed" else terminate
    status = -signal.SIGKILL if end == "killed" else 0
    with manager.start(tmp_path, config, status=status, leaves=[path], environ=STORE) as first:
        manager.wait_for("READY")
        early = end_it(first, addresses)
        first.wait()
    waiting = [request(address, b"wait") for address in addresses * 20] + early
    manager.catch_up()
    stored = manager.stored()
    with manager.start(tmp_path, config, passed=stored, leaves=[path], environ=STORE) as second:
        for client in waiting:
            answered(client, b"wait")
        assert unused(second) == []
        assert second.wait_for("ready")["listeners"] == addresses
        for _, fd in stored:
            assert inode(fd) in socket_inodes(second.pid)
        manager.catch_up()
        assert manager.stored() == stored  # The same ones, under the same names.


def terminate(daemon: Daemon, addresses: list[str]) -> list[EchoClient]:
    """End a daemon with clients that come while it drains; return those."""
    with daemon.connect() as last:
        last.send(frame(b"last")[:5])
        daemon.wait_until("lpechod_received_bytes_total", 5)
        daemon.signal(signal.SIGTERM)
        daemon.wait_for("draining")
        clients = [request(address, b"wait") for address in addresses * 5]
        last.send(frame(b"last")[5:])
        assert last.receive(8) == frame(b"last")
    return clients


def kill(daemon: Daemon, addresses: list[str]) -> list[EchoClient]:
    """Kill supervisor and workers, with clients in their queues; return those."""
    workers = daemon.workers()
    for pid in (daemon.pid, *workers):
        os.kill(pid, signal.SIGSTOP)
    clients = [request(address, b"wait") for address in addresses * 5]
    for pid in (*workers, daemon.pid):
        os.kill(pid, signal.SIGKILL)
    return clients


def test_without_a_store_a_socket_file_goes(tmp_path: Path, manager: Manager) -> None:
    """The file of a UNIX socket is removed at the end if the manager keeps no descriptors."""
    path = tmp_path / "e.sock"
    with manager.start(tmp_path, listen(f"unix:{path}")) as daemon, daemon.connect() as client:
        client.echo(b"local")
    assert not path.exists()


def test_a_stored_socket_of_a_removed_address_is_dropped(tmp_path: Path, manager: Manager) -> None:
    """What the configuration does not want any more after a restart goes from the store as well."""
    addresses = [free_address(), free_address()]
    with manager.start(tmp_path, listen(*addresses), environ=STORE):
        manager.wait_for("READY")
    manager.catch_up()
    stored = [(name, fd) for name, fd in manager.stored() if "127.77." in name]
    assert len(stored) == 2
    with manager.start(tmp_path, listen(addresses[0]), passed=stored, environ=STORE) as daemon:
        (warning,) = unused(daemon)
        assert warning["name"] == stored[1][0]
        manager.wait_for("FDSTOREREMOVE")
        assert stored[1][0] not in manager.store
        with pytest.raises(ConnectionRefusedError):
            daemon.connect(addresses[1])


def test_a_manager_that_is_late_hears_what_it_need_not_keep(
    tmp_path: Path, tcp: socket.socket
) -> None:
    """A manager that reads nothing during the start hears afterwards what it may drop."""
    with Manager(tmp_path / "n", reads=False) as manager:
        manager.fill()
        with manager.start(tmp_path, passed=[("stray", tcp.fileno())]) as daemon:
            assert len(unused(daemon)) == 1
            manager.read()
            manager.wait_for("READY")
            manager.catch_up()
        removed = [each.fields for each in manager.heard if "FDSTOREREMOVE" in each.fields]
        assert removed == [{"FDSTOREREMOVE": "1", "FDNAME": "stray"}]
