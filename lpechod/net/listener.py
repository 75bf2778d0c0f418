"""Listening sockets: from an address in the configuration to descriptors that accept.

Names are looked up here, once, before the loop runs: getaddrinfo(3) blocks. Every address is tried
before anything is reported, so an operator sees all that is wrong with one start.
"""

import contextlib
import errno
import fcntl
import os
import socket
import stat
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lpechod.net.address import Address, TcpAddress, UnixAddress
from lpechod.net.entrance import OPEN_TO_ALL, Entrance

_WILDCARD_V6 = "::"
_WILDCARD_V4 = "0.0.0.0"  # noqa: S104 - compared with, not bound to.

_TCP_HINTS = {
    errno.EADDRINUSE: "see who has it: ss -ltnp 'sport = :{port}'",
    errno.EADDRNOTAVAIL: "no interface of this machine has it",
    errno.EACCES: "ports below 1024 need CAP_NET_BIND_SERVICE",
    errno.EAFNOSUPPORT: 'no IPv6 here? ":{port}" takes what there is',
}
_UNIX_HINTS = {
    errno.EADDRINUSE: "another process listens on it",
    errno.ENOENT: "the directory has to exist",
}

_SO_BINDTOIFINDEX = getattr(socket, "SO_BINDTOIFINDEX", 62)
"""Python has it from 3.14 on."""

_NO_INTERFACE = 0x7FFF_FFFF


@dataclass(frozen=True, slots=True)
class ListenerSettings:
    """Where to listen, and how many connections may wait to be accepted.

    The kernel caps ``backlog`` at net.core.somaxconn without a word (listen(2)).
    """

    address: Address
    backlog: int = 4096


class ListenError(Exception):
    """Some addresses could not be listened on; one line for each in ``problems``."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = problems


class ListeningSocket(socket.socket):
    """A listening socket that makes no object of what it accepts.

    Of the time that `socket.socket.accept` takes, accept(2) is a third. The rest makes an object in
    Python, with enumerations for its family and its type.
    """

    def accept_descriptor(self) -> tuple[int, object]:
        """Accept a connection, and return its descriptor and the peer's address; see accept(2)."""
        return self._accept()  # type: ignore[attr-defined,no-any-return]  # What `accept` calls.


class Listener:
    """One listening socket.

    Args:
        listening: the socket; made non-blocking here and owned from now on.
        path: its file, if it is a UNIX socket that we have made.
        inode: device and number of that file; by default, of the one that is there now.

    Attributes:
        entrance: what it demands of clients.
        inode: as above. A file of another is somebody else's.
    """

    __slots__ = ("_path", "entrance", "inode", "name", "socket")

    def __init__(
        self,
        listening: socket.socket,
        path: str | None = None,
        inode: Sequence[int] | None = None,
    ) -> None:
        self.socket = ListeningSocket(fileno=listening.detach())
        self.socket.setblocking(False)
        if self.socket.family != socket.AF_UNIX:
            # Connections inherit it: one system call less for each of them (tcp(7)).
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.entrance: Entrance = OPEN_TO_ALL
        self.name = _name(self.socket)
        self._path = path
        if inode is None and path is not None:
            inode = _inode(path)
        self.inode = None if inode is None else tuple(inode)

    @property
    def path(self) -> str | None:
        """The file that goes with the socket when that is closed, if there is one."""
        return self._path

    def keep_file(self) -> None:
        """Leave the file alone from now on: somebody else goes on with the socket."""
        self._path = None

    def listen(self, backlog: int) -> None:
        """Have the kernel accept connections; once more only changes the backlog."""
        self.socket.listen(backlog)
        self.share_port(False)

    def withdraw(self) -> None:
        """Leave new clients to a wider address, if somebody listens on one; keep those that wait.

        Whoever the kernel queues between the last accept(2) and close(2) is reset. So before the
        queue is emptied for the last time, the socket is bound to an interface that does not exist,
        on which no packet comes. That holds for every process that has the socket, and can't be
        taken back. Linux only; no privilege is needed.
        """
        if sys.platform == "linux" and self.socket.family != socket.AF_UNIX:
            with contextlib.suppress(OSError):  # Before Linux 5.7, it took a privilege.
                self.socket.setsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX, _NO_INTERFACE)

    def share_port(self, shared: bool) -> None:
        """Let an overlapping address be bound, such as ``[::]`` beside ``127.0.0.1``, or not.

        Linux looks at SO_REUSEPORT of both sockets at the moment of the bind (socket(7)). It is not
        left on: a second daemon on the same address should fail, and not share its clients.
        """
        if self.socket.family != socket.AF_UNIX:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)

    def close(self) -> None:
        """Close the socket, and remove its file if that is still ours.

        The file goes first. While the socket is open its inode number belongs to nobody else, and
        whoever starts at this moment finds a socket that answers and leaves the file alone.
        """
        if self._path is not None and _inode(self._path) == self.inode:
            with contextlib.suppress(OSError):  # The directory may be closed to us by now.
                Path(self._path).unlink()
        self.socket.close()


def open_listeners(
    settings: Iterable[ListenerSettings], shared_ports: Collection[int] = ()
) -> list[list[Listener]]:
    """Listen on every address, each of which a name may stand for several of.

    All are bound before any listens. From then on, the kernel gives an address the clients of a
    wider one, such as ``[::]``; and if another could not be bound, or its name took time to look
    up, these would be reset, or would wait.

    Args:
        settings: the addresses.
        shared_ports: ports on which somebody listens who has called `Listener.share_port`.

    Returns:
        The listeners of each address.

    Raises:
        ListenError: at least one cannot be listened on; all others have been closed again.
    """
    wanted = list(settings)
    opened: list[list[Listener]] = []
    problems: list[str] = []
    for each in wanted:
        opened.append([])
        with _noting(problems, each.address):
            opened[-1] += _open(each, shared_ports)
    for each, listeners in zip(wanted, opened if not problems else (), strict=False):
        with _noting(problems, each.address):
            for listener in listeners:
                listener.listen(each.backlog)
    if problems:
        for listeners in opened:
            for listener in listeners:
                listener.close()
        raise ListenError(problems)
    return opened


@contextlib.contextmanager
def _noting(problems: list[str], address: Address) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problems.append(f"cannot listen on {address}: {_explain(error, address)}")


def serves(listening: socket.socket, address: Address) -> bool:
    """Tell whether a socket that somebody else has bound is what an address asks for.

    Args:
        listening: any socket.
        address: as in the configuration. A port of 0 asks for a new one, so nothing serves it; nor
            does a UNIX socket whose file has gone, as nobody can reach it.
    """
    if listening.type != socket.SOCK_STREAM or not _accepts(listening):
        return False
    bound = listening.getsockname()
    if isinstance(address, UnixAddress):
        return bound == address.path and _inode(address.path) is not None
    if listening.family == socket.AF_UNIX or bound[1] != address.port:
        return False
    if address.host is None:
        return bound[0] in (_WILDCARD_V6, _WILDCARD_V4)
    try:
        return any(_is_place(bound, sockaddr) for _, sockaddr in _resolve(address))
    except socket.gaierror:
        return False


def _is_place(bound: tuple[object, ...], wanted: tuple[object, ...]) -> bool:
    """Tell whether a socket is bound to an address, and its interface if that is said.

    The kernel keeps the interface for link-local addresses only, and says 0 for others.
    """
    scopes = {*bound[3:], *wanted[3:]} - {0}
    return bound[0] == wanted[0] and len(scopes) <= 1


def _accepts(listening: socket.socket) -> bool:
    # Linux and the BSDs have it; a socket of another kind says 0 (socket(7)).
    return bool(listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _open(wanted: ListenerSettings, shared_ports: Collection[int]) -> list[Listener]:
    address = wanted.address
    if isinstance(address, UnixAddress):
        return [_open_unix(address.path, wanted.backlog)]
    shared = address.port in shared_ports
    if address.host is None:
        try:
            return [_open_tcp(socket.AF_INET6, (_WILDCARD_V6, address.port), shared)]
        except OSError as error:
            # Every interface of a machine without IPv6.
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
            return [_open_tcp(socket.AF_INET, ("", address.port), shared)]
    listeners: list[Listener] = []
    try:
        for family, sockaddr in _resolve(address):
            listeners.append(_open_tcp(family, sockaddr, shared))
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def _resolve(address: TcpAddress) -> list[tuple[socket.AddressFamily, tuple[object, ...]]]:
    found = socket.getaddrinfo(
        address.host,
        address.port,
        type=socket.SOCK_STREAM,
        flags=socket.AI_PASSIVE | socket.AI_NUMERICSERV,
    )
    # A name with several entries in the hosts file may bring the same address twice.
    return list(dict.fromkeys((family, sockaddr) for family, _, _, _, sockaddr in found))


def _open_tcp(family: socket.AddressFamily, sockaddr: tuple[object, ...], shared: bool) -> Listener:
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Only for connections in TIME_WAIT; two listeners still exclude each other (socket(7)).
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            dual_stack = sockaddr[0] == _WILDCARD_V6
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual_stack)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
        listening.bind(sockaddr)
        return Listener(listening)
    except OSError:
        listening.close()
        raise


def _open_unix(path: str, backlog: int) -> Listener:
    # Two daemons that start at once must not both find the same stale file: the second would
    # then remove the socket that the first has just made. A lock on the directory admits one.
    directory = os.open(Path(path).parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        try:
            listening.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _remove_stale(path)
            listening.bind(path)
        listening.listen(backlog)
        return Listener(listening, path)
    except OSError:
        listening.close()
        raise
    finally:
        os.close(directory)


def _remove_stale(path: str) -> None:
    """Remove a socket file that nobody listens on any more; leave everything else alone.

    Raises:
        OSError: it is no socket, or somebody listens.
    """
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise FileExistsError(errno.EEXIST, "a file that is not a socket is in the way")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
            return
        except BlockingIOError:
            pass  # A full backlog: somebody is there.
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _explain(error: OSError, address: Address) -> str:
    """Say what went wrong and, where there is one, the way out."""
    reason = error.strerror or str(error)
    if isinstance(error, socket.gaierror):
        hint = "is the host name right?"
    elif isinstance(address, TcpAddress):
        hint = _TCP_HINTS.get(error.errno or 0, "").format(port=address.port)
    else:
        hint = _UNIX_HINTS.get(error.errno or 0, "")
    return f"{reason} ({hint})" if hint else reason


def _inode(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _name(listening: socket.socket) -> str:
    bound = listening.getsockname()
    if listening.family == socket.AF_UNIX:
        return f"unix:{bound}"
    if listening.family == socket.AF_INET:
        return f"{bound[0]}:{bound[1]}"
    # Each interface has its own fe80::1 (RFC 4007, 11.2). By its number, since it may be renamed
    # while workers know the listener by this name.
    scope = f"%{bound[3]}" if bound[3] else ""
    return f"[{bound[0]}{scope}]:{bound[1]}"
