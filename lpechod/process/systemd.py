"""The service manager: what it tells in the environment, and what it wants to hear.

Hand-written: the protocol is lines of text in a datagram, and systemd documents it as stable for
those who implement it (sd_notify(3), "Standalone Implementations"). A library would be one more
thing to trust, and the pure ones do not pass descriptors.

Invariants: nothing here blocks, or raises for what the manager or the environment does. A message
that the manager's queue has no room for waits, in order and with its own copy of the descriptor. A
message to a manager that is gone is dropped. Children do not inherit the variables.

The socket is not connected: a manager that binds its address anew has to get what follows. So
poll(2) can't tell when there is room, and what waits goes out with the next call, or with `flush`.
"""

import array
import contextlib
import hashlib
import os
import re
import socket
from collections import deque
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from urllib.parse import quote

MAX_WAITING = 256
"""Messages that may wait: enough to store each listener at the start while the queue is full."""

MAX_STATUS = 512
"""Characters of a status. systemd reads up to 4096 bytes, and a character may need four."""

MAX_NAME = 255
"""Characters of a descriptor's name (sd_pid_notify_with_fds(3))."""

_VARIABLES = (
    "NOTIFY_SOCKET",
    *("LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES"),
    *("WATCHDOG_PID", "WATCHDOG_USEC", "FDSTORE"),
)
_NUMBER = re.compile(r"[0-9]{1,20}")  # int() takes "+1", "1_0", other scripts, and is slow at 1 MB.
_NAME = re.compile(rf"[ -9;-~]{{0,{MAX_NAME}}}")
_NEVER = 2**64 - 1  # USEC_INFINITY
_SUPERSEDED = {"STATUS", "WATCHDOG", "EXTEND_TIMEOUT_USEC"}

_Message = tuple[str, int | None]
"""Assignments, and the descriptor that goes with them."""


@dataclass(frozen=True, slots=True)
class Inherited:
    """A descriptor that the service manager has passed to us (sd_listen_fds(3))."""

    name: str
    fd: int


@dataclass(frozen=True, slots=True)
class ServiceManager:
    """What the environment tells of the service manager.

    Attributes:
        notify_socket: the address for `Notifier`.
        watchdog_s: seconds within which the watchdog must be fed (sd_watchdog_enabled(3)), or None.
        keeps_descriptors: whether it stores descriptors over a restart. It tells since systemd 254.
        inherited: what it has passed to us. Names may repeat.
    """

    notify_socket: str | None = None
    watchdog_s: float | None = None
    keeps_descriptors: bool = False
    inherited: tuple[Inherited, ...] = ()


def take_environment(
    environ: MutableMapping[str, str], pid: int, *, first: int = 3
) -> ServiceManager:
    """Read the service manager's variables and remove them: they are not meant for children.

    Each inherited descriptor gets FD_CLOEXEC.

    Args:
        environ: the environment.
        pid: of this process.
        first: number of the first inherited descriptor (SD_LISTEN_FDS_START).

    Returns:
        What they say. What is invalid, or meant for another process, counts as absent.
    """
    told = {name: environ.pop(name) for name in _VARIABLES if name in environ}
    usec = _number(told.get("WATCHDOG_USEC", ""))
    watched = 0 < usec < _NEVER and _number(told.get("WATCHDOG_PID", str(pid))) == pid
    listens = _number(told.get("LISTEN_PID", "")) == pid
    count = _number(told.get("LISTEN_FDS", "")) if listens else 0
    return ServiceManager(
        notify_socket=told.get("NOTIFY_SOCKET") or None,
        watchdog_s=usec / 1e6 if watched else None,
        keeps_descriptors=_number(told.get("FDSTORE", "")) > 0,
        inherited=_inherit(first, count, told.get("LISTEN_FDNAMES", "")),
    )


def descriptor_name(listener: str) -> str:
    """Turn a listener's name into a valid name of a descriptor, a different one for each.

    Args:
        listener: any text, such as "[::]:9000" or "unix:/run/x.sock".

    Returns:
        At most 255 ASCII characters, no controls, no colons (sd_pid_notify_with_fds(3)).
    """
    # A path that is no UTF-8 has lone surrogates; surrogatepass keeps also those apart.
    name = quote(listener, safe="/[]", errors="surrogatepass")
    if len(name) <= MAX_NAME:
        return name
    # No short name has a "#": quote() leaves none.
    digest = "#" + hashlib.sha256(name.encode()).hexdigest()[:32]
    return name[: MAX_NAME - len(digest)] + digest


class Notifier:
    """Sends state changes to the service manager; without an address every method does nothing.

    After fork(2) a child closes its copy, lest both send what waits.

    Args:
        address: as in NOTIFY_SOCKET: an absolute path, or "@" and an abstract name. Anything else,
            such as "vsock:2:1234", counts as no address.

    Raises:
        OSError: no socket can be made.
    """

    __slots__ = ("_address", "_socket", "_waiting")

    def __init__(self, address: str | None) -> None:
        self._waiting: deque[_Message] = deque()
        self._address = b""
        self._socket: socket.socket | None = None
        if address is not None and address.startswith(("/", "@")):
            encoded = os.fsencode(address)
            self._address = b"\0" + encoded[1:] if address.startswith("@") else encoded
            kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
            self._socket = socket.socket(socket.AF_UNIX, kind)

    def ready(self, status: str) -> None:
        """Say that the start, or the reload, is complete."""
        self._send(f"READY=1\nSTATUS={_one_line(status)}")

    def reloading(self, now: float, status: str) -> None:
        """Say that a reload has begun. `ready` has to follow.

        Args:
            now: seconds of CLOCK_MONOTONIC, read after the request has arrived: systemd compares
                them with its own (systemd.service(5), Type=notify-reload).
            status: one line for people.
        """
        assignments = f"RELOADING=1\nMONOTONIC_USEC={int(now * 1e6)}"
        self._send(f"{assignments}\nSTATUS={_one_line(status)}")

    def stopping(self, status: str) -> None:
        """Say that the end has begun."""
        self._send(f"STOPPING=1\nSTATUS={_one_line(status)}")

    def status(self, text: str) -> None:
        """Tell people the state in one line."""
        self._send(f"STATUS={_one_line(text)}")

    def extend_timeout(self, seconds: float) -> None:
        """Ask not to be given up for so many seconds from now, and promise a message until then."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}")

    def feed_watchdog(self) -> None:
        """Say that all is well. Due at half of `ServiceManager.watchdog_s`."""
        self._send("WATCHDOG=1")

    def store(self, name: str, fd: int) -> None:
        """Have the manager keep a copy of a descriptor, and pass it on after a restart.

        Args:
            name: of `descriptor_name`.
            fd: stays the caller's, who may close it at once.

        Raises:
            ValueError: the name is not valid.
        """
        self._send(f"FDSTORE=1\nFDNAME={_checked(name)}", fd)

    def remove(self, name: str) -> None:
        """Have the manager close all its descriptors of a name.

        Args:
            name: of `descriptor_name` or `Inherited`.

        Raises:
            ValueError: the name is not valid.
        """
        self._send(f"FDSTOREREMOVE=1\nFDNAME={_checked(name)}")

    @property
    def unsent(self) -> list[_Message]:
        """What the manager's queue had no room for."""
        return list(self._waiting)

    def go_on_with(self, unsent: Iterable[_Message]) -> None:
        """Take over what the program before had not sent, descriptors included."""
        self._waiting.extend((text, fd) for text, fd in unsent)

    def flush(self) -> None:
        """Send what the manager's queue had no room for, as far as it has now."""
        while self._waiting and self._settles(self._waiting[0]):
            self._drop(self._waiting[0])

    def close(self) -> None:
        """Drop what waits and let go of the socket; later calls do nothing."""
        while self._waiting:
            self._drop(self._waiting[0])
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, text: str, fd: int | None = None) -> None:
        self.flush()
        if self._waiting or not self._settles((text, fd)):
            self._keep(text, fd)

    def _settles(self, message: _Message) -> bool:
        """Send a message, unless it has to wait."""
        if self._socket is None:
            return True
        text, fd = message
        rights = array.array("i", [] if fd is None else [fd])
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
        # Not socket.send_fds(), which does not pass on the address in Python 3.11.
        with contextlib.suppress(OSError):  # ECONNREFUSED, ENOENT: nobody is there to be told.
            try:
                self._socket.sendmsg([text.encode()], ancillary, 0, self._address)
            except BlockingIOError:
                return False
        return True

    def _keep(self, text: str, fd: int | None) -> None:
        """Let a message wait, and drop what it supersedes or, beyond the bound, what is oldest."""
        if (key := _key(text)) in _SUPERSEDED:
            for older in [each for each in self._waiting if _key(each[0]) == key]:
                self._drop(older)
        if len(self._waiting) >= MAX_WAITING:
            # The start waits for READY. If nothing else is left, any later one says the same.
            others = (each for each in self._waiting if _key(each[0]) != "READY")
            self._drop(next(others, self._waiting[0]))
        with contextlib.suppress(OSError):  # EBADF, EMFILE: no descriptor, no message.
            self._waiting.append((text, None if fd is None else os.dup(fd)))

    def _drop(self, message: _Message) -> None:
        self._waiting.remove(message)
        if message[1] is not None:
            os.close(message[1])


def _number(text: str) -> int:
    return int(text) if _NUMBER.fullmatch(text) else -1


def _inherit(first: int, count: int, names: str) -> tuple[Inherited, ...]:
    """Take over descriptors, or none if one is not open, as sd_listen_fds(3) does.

    A name that is not valid is "unknown", and so is every name if there are not as many as
    descriptors. libsystemd fails then, but the sockets are there, and so may be clients in queues.
    """
    fds = range(first, first + count)
    for fd in fds:  # However many are claimed, the first that is not open ends it.
        try:
            os.set_inheritable(fd, False)
        except OSError:
            return ()
    labels = [label if _NAME.fullmatch(label) else "unknown" for label in names.split(":")]
    if not names or len(labels) != count:
        labels = ["unknown"] * len(fds)
    return tuple(map(Inherited, labels, fds))


def _one_line(text: str) -> str:
    return "".join(each if each.isprintable() else " " for each in text[:MAX_STATUS])


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"no name for a descriptor: {name!r}")
    return name


def _key(text: str) -> str:
    return text.partition("=")[0]
