"""Listening: every form of address, what an operator reads when it fails, and who owns the file."""

import errno
import os
import shutil
import socket
import stat
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from lpechod.net.address import TcpAddress, UnixAddress, parse_address
from lpechod.net.listener import Listener, ListenError, ListenerSettings, open_listeners
from tests.net.harness import descriptors

Listen = Callable[..., list[Listener]]

NOBODY = 65534

_TCP_INFO_BACKLOG = 28
"""Offset of ``tcpi_sacked``, which is the backlog of a listening socket (tcp_diag of Linux)."""


@pytest.fixture(name="listen")
def _listen() -> Iterator[Listen]:
    """Listen on addresses; what is opened is closed again, and nothing else stays open either."""
    before = descriptors()
    listeners: list[Listener] = []

    def listen(*addresses: str, backlog: int = 16) -> list[Listener]:
        opened = [
            listener
            for each in open_listeners(
                ListenerSettings(parse_address(address), backlog) for address in addresses
            )
            for listener in each
        ]
        listeners.extend(opened)
        return opened

    yield listen
    for listener in listeners:
        listener.close()
    assert before == descriptors()


@pytest.fixture(name="resolver")
def _resolver(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Stand in for the resolver: names and their addresses. Literals are looked up as always."""
    names: dict[str, list[str]] = {}
    real = socket.getaddrinfo

    def getaddrinfo(host: str, port: int, **options: int) -> Sequence[object]:
        if not host.isalpha():
            return real(host, port, **options)
        if host not in names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [found for literal in names[host] for found in real(literal, port, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return names


def problems(*addresses: str) -> list[str]:
    """Return what is wrong with addresses, without those that are."""
    with pytest.raises(ListenError) as caught:
        open_listeners(ListenerSettings(parse_address(address)) for address in addresses)
    return caught.value.problems


def connect(listener: Listener, host: str | None = None) -> str:
    """Connect to a listener, and return the address from which it accepts."""
    address = listener.socket.getsockname()
    if host is not None:
        address = (host, address[1])
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    if isinstance(address, tuple) and ":" in address[0]:
        family = socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM) as client:
        client.connect(address)
        accepted, peer = listener.socket.accept()
        accepted.close()
    return peer[0] if peer else "unix"


class TestTcp:
    """IPv4 and IPv6."""

    def test_ipv4(self, listen: Listen) -> None:
        """An IPv4 address is listened on, and named with the port that it got."""
        (listener,) = listen("127.0.0.1:0")
        port = listener.socket.getsockname()[1]

        assert port > 0
        assert listener.name == f"127.0.0.1:{port}"
        assert connect(listener) == "127.0.0.1"

    def test_ipv6(self, listen: Listen) -> None:
        """An IPv6 address is listened on, by that family alone."""
        (listener,) = listen("[::1]:0")
        port = listener.socket.getsockname()[1]

        assert listener.name == f"[::1]:{port}"
        assert connect(listener) == "::1"
        with pytest.raises(ConnectionRefusedError):
            connect(listener, "127.0.0.1")

    @pytest.mark.parametrize("address", ["[::]:0", ":0"])
    def test_dual_stack(self, listen: Listen, address: str) -> None:
        """The IPv6 wildcard, and no host at all, serve both families with one socket."""
        (listener,) = listen(address)

        assert listener.name.startswith("[::]:")
        assert connect(listener, "::1") == "::1"
        assert connect(listener, "127.0.0.1") == "::ffff:127.0.0.1"

    def test_ipv4_wildcard(self, listen: Listen) -> None:
        """The IPv4 wildcard is for IPv4."""
        (listener,) = listen("0.0.0.0:0")

        assert connect(listener, "127.0.0.1") == "127.0.0.1"
        with pytest.raises(ConnectionRefusedError):
            connect(listener, "::1")

    @pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
    def test_no_host_without_ipv6(
        self, listen: Listen, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        """On a machine without IPv6, no host means every IPv4 interface."""
        without_ipv6(monkeypatch, number)
        (listener,) = listen(":0")

        assert listener.name.startswith("0.0.0.0:")
        assert connect(listener, "127.0.0.1") == "127.0.0.1"

    def test_name_with_several_addresses(
        self, listen: Listen, resolver: dict[str, list[str]]
    ) -> None:
        """A name stands for all its addresses, each listened on once."""
        resolver["localhost"] = ["127.0.0.1", "::1", "127.0.0.1"]
        listeners = listen("localhost:0")

        assert [connect(listener) for listener in listeners] == ["127.0.0.1", "::1"]

    def test_nodelay_is_inherited(self, listen: Listen) -> None:
        """Accepted sockets do not delay small echoes, without a call for each of them."""
        for listener in listen("127.0.0.1:0", "[::1]:0"):
            with socket.create_connection(listener.socket.getsockname()[:2]):
                accepted, _ = listener.socket.accept()
                with accepted:
                    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    def test_never_blocks(self, listen: Listen) -> None:
        """Accepting from an empty queue says so."""
        (listener,) = listen("127.0.0.1:0")

        with pytest.raises(BlockingIOError):
            listener.socket.accept()

    @pytest.mark.skipif(not hasattr(socket, "TCP_INFO"), reason="Linux only")
    def test_backlog(self, listen: Listen) -> None:
        """The kernel is told how many connections may wait."""
        (listener,) = listen("127.0.0.1:0", backlog=77)
        info = listener.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)

        assert struct.unpack_from("I", info, _TCP_INFO_BACKLOG) == (77,)

    def test_time_wait_is_no_obstacle(self, listen: Listen) -> None:
        """A restart can listen where connections of the last run have just ended."""
        (first,) = listen("127.0.0.1:0")
        address = first.socket.getsockname()
        with socket.create_connection(address):
            accepted, _ = first.socket.accept()
            accepted.close()  # The side that closes first keeps the port in TIME_WAIT.
        first.close()

        (second,) = listen(f"127.0.0.1:{address[1]}")
        assert second.socket.getsockname() == address


def without_ipv6(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the kernel have no IPv6: no such sockets, or no address to bind them to."""

    class NoIpv6(socket.socket):
        def __init__(self, family: int = -1, *args: int, **kwargs: int) -> None:
            if family == socket.AF_INET6 and number == errno.EAFNOSUPPORT:
                raise OSError(number, os.strerror(number))
            super().__init__(family, *args, **kwargs)

        def bind(self, address: object) -> None:
            if self.family == socket.AF_INET6:
                raise OSError(number, os.strerror(number))
            super().bind(address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "socket", NoIpv6)


class TestTcpProblems:
    """What an operator reads, and what is left behind: nothing."""

    def test_in_use(self, listen: Listen) -> None:
        """The message names the address and how to find who has it."""
        (listener,) = listen("127.0.0.1:0")
        port = listener.socket.getsockname()[1]

        (problem,) = problems(f"127.0.0.1:{port}")
        assert problem == (
            f"cannot listen on 127.0.0.1:{port}: Address already in use "
            f"(see who has it: ss -ltnp 'sport = :{port}')"
        )

    @pytest.mark.parametrize("taken", ["0.0.0.0", "127.0.0.1"])
    def test_in_use_for_one_family_only(self, listen: Listen, taken: str) -> None:
        """A port that is half free is not free: or else IPv4 clients would talk to a stranger."""
        (listener,) = listen(f"{taken}:0")
        port = listener.socket.getsockname()[1]

        assert "Address already in use" in problems(f":{port}")[0]

    @pytest.mark.usefixtures("resolver")
    def test_unknown_name(self) -> None:
        """A name that nobody knows is most likely a mistyped one."""
        assert problems("nosuchhost:9000") == [
            "cannot listen on nosuchhost:9000: Name or service not known (is the host name right?)"
        ]

    def test_address_of_another_machine(self) -> None:
        """An address that is not ours is refused by the kernel, and named."""
        (problem,) = problems("192.0.2.1:0")
        assert problem == (
            "cannot listen on 192.0.2.1:0: Cannot assign requested address "
            "(no interface of this machine has it)"
        )

    def test_no_ipv6(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without IPv6, an IPv6 address is an error that shows what works everywhere."""
        without_ipv6(monkeypatch, errno.EAFNOSUPPORT)

        (problem,) = problems("[::]:9000")
        assert problem == (
            "cannot listen on [::]:9000: Address family not supported by protocol "
            '(no IPv6 here? ":9000" takes what there is)'
        )

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs to give up root")
    @pytest.mark.skipif(not Path("/proc/sys/net/ipv4").exists(), reason="Linux only")
    def test_low_port(self) -> None:
        """A privileged port is refused to an ordinary user, who reads what it takes."""
        start = int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text())
        if start <= 9:
            pytest.skip("ports are not privileged here")

        assert as_nobody("127.0.0.1:9") == (
            "cannot listen on 127.0.0.1:9: Permission denied "
            "(ports below 1024 need CAP_NET_BIND_SERVICE)"
        )

    @pytest.mark.usefixtures("resolver")
    def test_all_at_once(self, listen: Listen, tmp_path: Path) -> None:
        """Every problem is reported, in order, and what could be opened is closed again."""
        (taken,) = listen("127.0.0.1:0")
        before = descriptors()
        found = problems(
            "127.0.0.1:0",
            taken.name,
            f"unix:{tmp_path}/good",
            "nosuchhost:1",
            f"unix:{tmp_path}/missing/socket",
        )

        assert [problem.split()[3].rstrip(":") for problem in found] == [
            taken.name,
            "nosuchhost:1",
            f"unix:{tmp_path}/missing/socket",
        ]
        assert list(tmp_path.iterdir()) == []
        assert before == descriptors()

    def test_one_address_of_a_name(self, listen: Listen, resolver: dict[str, list[str]]) -> None:
        """A name is listened on altogether or not at all."""
        (taken,) = listen("[::1]:0")
        port = taken.socket.getsockname()[1]
        resolver["localhost"] = ["127.0.0.1", "::1"]
        assert "Address already in use" in problems(f"localhost:{port}")[0]

        (listener,) = listen(f"127.0.0.1:{port}")  # It has been given back.
        assert connect(listener) == "127.0.0.1"

    def test_error_is_one_text(self) -> None:
        """The exception itself reads as one line, for whoever prints just that."""
        with pytest.raises(ListenError, match=r"^cannot listen on 192.0.2.1:0: .*; cannot"):
            open_listeners([ListenerSettings(TcpAddress("192.0.2.1", 0))] * 2)


class TestUnix:
    """UNIX sockets and their files."""

    @pytest.fixture(name="path")
    def _path(self, tmp_path: Path) -> Path:
        return tmp_path / "socket"

    def test_fresh(self, listen: Listen, path: Path) -> None:
        """The file appears with the listener, and goes with it."""
        (listener,) = listen(f"unix:{path}")
        assert stat.S_ISSOCK(path.stat().st_mode)
        assert listener.name == f"unix:{path}"
        assert connect(listener) == "unix"
        listener.close()

        assert not path.exists()

    def test_stale_file_is_replaced(self, listen: Listen, path: Path) -> None:
        """A file that a crash has left behind is no reason not to start."""
        leave_stale(path)
        (listener,) = listen(f"unix:{path}")

        assert connect(listener) == "unix"

    def test_live_socket_is_left_alone(self, listen: Listen, path: Path) -> None:
        """A socket that somebody listens on stays theirs, even if its queue is full."""
        (other,) = listen(f"unix:{path}", backlog=1)
        expected = [
            f"cannot listen on unix:{path}: Address already in use (another process listens on it)"
        ]
        assert problems(f"unix:{path}") == expected
        waiting = []
        for _ in range(4):
            client = socket.socket(socket.AF_UNIX)
            client.setblocking(False)
            waiting.append(client)
            client.connect_ex(str(path))
        assert problems(f"unix:{path}") == expected
        for client in waiting:
            client.close()

        assert path.exists()
        other.close()

    @pytest.mark.parametrize("kind", ["file", "directory", "link", "dangling link"])
    def test_other_files_are_left_alone(self, tmp_path: Path, path: Path, kind: str) -> None:
        """What is no socket is not ours to remove, be it what it may."""
        if kind == "file":
            path.write_text("precious")
        elif kind == "directory":
            path.mkdir()
        else:
            target = tmp_path / "target"
            if kind == "link":
                leave_stale(target)
            path.symlink_to(target)
        before = path.lstat()

        assert problems(f"unix:{path}") == [
            f"cannot listen on unix:{path}: a file that is not a socket is in the way"
        ]
        assert path.lstat().st_ino == before.st_ino

    def test_socket_of_another_type(self, path: Path) -> None:
        """A datagram socket, such as a log's, is not stale because streams can't connect to it."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.bind(str(path))

            assert problems(f"unix:{path}") == [
                f"cannot listen on unix:{path}: Protocol wrong type for socket"
            ]
            assert path.exists()

    def test_missing_directory(self, tmp_path: Path) -> None:
        """Directories are made by whoever knows who may enter them."""
        (problem,) = problems(f"unix:{tmp_path}/missing/socket")
        assert problem == (
            f"cannot listen on unix:{tmp_path}/missing/socket: No such file or directory "
            "(the directory has to exist)"
        )

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs to give up root")
    def test_no_permission(self) -> None:
        """Without leave to write into the directory, it says so, and nothing changes."""
        directory = Path(tempfile.mkdtemp())  # The fixture's own is closed to everybody else.
        try:
            directory.chmod(0o755)

            assert as_nobody(f"unix:{directory}/socket") == (
                f"cannot listen on unix:{directory}/socket: Permission denied"
            )
            assert list(directory.iterdir()) == []
        finally:
            shutil.rmtree(directory)

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs to give up root")
    def test_stale_file_of_another_user(self) -> None:
        """A stale file in a sticky directory belongs to its owner."""
        directory = Path(tempfile.mkdtemp())
        try:
            directory.chmod(0o1777)
            leave_stale(directory / "socket")

            assert as_nobody(f"unix:{directory}/socket").startswith(
                f"cannot listen on unix:{directory}/socket: "
            )
            assert (directory / "socket").exists()
        finally:
            shutil.rmtree(directory)

    def test_file_of_a_successor_is_left_alone(self, listen: Listen, path: Path) -> None:
        """A file that has taken the place of ours stays when we close."""
        (first,) = listen(f"unix:{path}")
        path.unlink()
        (second,) = listen(f"unix:{path}")
        first.close()

        assert connect(second) == "unix"

    def test_file_is_gone_before_the_socket(
        self, listen: Listen, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whoever finds the file finds somebody who answers: it can't be taken for a stale one."""
        # With the socket closed first, a starter in between would replace the file by its own,
        # whose inode may have the same number: we would remove that.
        (listener,) = listen(f"unix:{path}")
        found = []

        class Observed(socket.socket):
            def close(self) -> None:
                found.append(path.exists())
                super().close()

        monkeypatch.setattr(listener, "socket", Observed(fileno=listener.socket.detach()))
        listener.close()

        assert found == [False]

    def test_file_that_can_not_be_removed(self, listen: Listen, path: Path) -> None:
        """A directory that is gone by now does not keep the socket from being closed."""
        (listener,) = listen(f"unix:{path}")
        shutil.rmtree(path.parent)
        listener.close()

        assert listener.socket.fileno() == -1

    @pytest.mark.parametrize("stale", [False, True])
    def test_two_that_start_at_once(self, path: Path, *, stale: bool) -> None:
        """Of two that start at the same moment one wins, and its file is there."""
        for _ in range(100):
            if stale:
                leave_stale(path)
            winners = race(path)
            assert len(winners) == 1
            assert connect(winners[0]) == "unix"
            winners[0].close()
            assert not path.exists()


def leave_stale(path: Path) -> None:
    """Leave a socket file behind that nobody listens on."""
    with socket.socket(socket.AF_UNIX) as crashed:
        crashed.bind(str(path))


def race(path: Path) -> list[Listener]:
    """Listen on a path twice at the same time, and return those who could."""
    winners: list[Listener] = []
    start = threading.Barrier(2)

    def run() -> None:
        start.wait()
        try:
            (listeners,) = open_listeners([ListenerSettings(UnixAddress(str(path)))])
            winners.extend(listeners)
        except ListenError as error:
            assert "Address already in use" in str(error)  # noqa: PT017 - in another thread.

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return winners


def as_nobody(address: str) -> str:
    """Listen on an address in a child without privileges, and return what is wrong with it."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            open_listeners([ListenerSettings(parse_address(address))])
            os.write(writer, b"nothing")
        except ListenError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        found = answer.read()
    os.waitpid(child, 0)
    return found
