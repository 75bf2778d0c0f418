"""A service manager, for tests of a daemon that believes to be a service of systemd."""

import contextlib
import fcntl
import os
import queue
import socket
import struct
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.system.daemon import PATIENCE_SECONDS, Daemon

_END = "X_END"
_MARK = "X_MARK"
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid.
_MAX_DESCRIPTORS = 253  # SCM_MAX_FD

_LAUNCHER = """\
import os, sys
fds = [int(fd) for fd in sys.argv[1].split(",") if fd]
for place, fd in enumerate(fds, 3):
    os.dup2(fd, place)
for fd in fds:
    os.close(fd)
if fds:
    os.environ["LISTEN_FDS"] = str(len(fds))
    os.environ["LISTEN_PID"] = str(os.getpid())
if "WATCHDOG_USEC" in os.environ:
    os.environ["WATCHDOG_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Puts descriptors where sd_listen_fds(3) has them, and the process id into the environment."""

_OUT_OF_THE_WAY = 200
"""Above the places that the launcher fills."""


@dataclass(frozen=True)
class Message:
    """A datagram of the daemon's.

    Attributes:
        fields: the assignments, in order.
        sender: the process that has sent it, as the kernel says.
        descriptors: what came with it; they belong to the `Manager`.
    """

    fields: Mapping[str, str]
    sender: int
    descriptors: tuple[int, ...] = ()


class Manager:
    """Listens at an address for NOTIFY_SOCKET, keeps descriptors, and starts daemons.

    Args:
        address: an absolute path, or "@" and an abstract name.
        reads: whether it reads what it is sent from the start; if not, see `read`.

    Attributes:
        heard: all messages that a test has asked for or passed over.
        store: the descriptors that it keeps, by name, as FileDescriptorStoreMax= has them kept.
    """

    def __init__(self, address: str | Path, *, reads: bool = True) -> None:
        self.address = str(address)
        bound = self.address
        self._bound = "\0" + bound[1:] if bound.startswith("@") else bound
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.bind(self._bound)
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        # Without it the daemon would wait for us: the kernel keeps ten datagrams and no more.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self.heard: list[Message] = []
        self.store: dict[str, list[int]] = {}
        if reads:
            self.read()

    def read(self) -> None:
        """Begin to read."""
        self._reader.start()

    def _read(self) -> None:
        space = socket.CMSG_SPACE(_MAX_DESCRIPTORS * 4) + socket.CMSG_SPACE(_CREDENTIALS.size)
        ended = False
        while not ended:
            data, ancillary, _, _ = self._socket.recvmsg(4096, space, socket.MSG_CMSG_CLOEXEC)
            sender, descriptors = 0, b""
            for _, kind, content in ancillary:
                if kind == socket.SCM_RIGHTS:
                    descriptors = content
                else:
                    sender = _CREDENTIALS.unpack(content)[0]
            fds = struct.unpack(f"{len(descriptors) // 4}i", descriptors)
            fields = dict(line.split("=", 1) for line in data.decode().split("\n"))
            self._messages.put(Message(fields, sender, fds))
            ended = _END in fields

    def _next(self) -> Message:
        try:
            return self._messages.get(timeout=PATIENCE_SECONDS)
        except queue.Empty:
            raise AssertionError(f"nothing more was heard after {self.heard}") from None

    def hear(self) -> Message:
        """Return the next message."""
        message = self._next()
        self.heard.append(message)
        name = message.fields.get("FDNAME", "stored")
        if message.fields.get("FDSTORE") == "1":
            self._keep(name, message.descriptors)
        elif message.fields.get("FDSTOREREMOVE") == "1":
            for fd in self.store.pop(name, []):
                os.close(fd)
        return message

    def _keep(self, name: str, fds: Iterable[int]) -> None:
        """Keep descriptors, but for those that are here already (sd_notify(3))."""
        kept = {os.fstat(fd).st_ino for each in self.store.values() for fd in each}
        for fd in fds:
            if os.fstat(fd).st_ino in kept:
                os.close(fd)
            else:
                self.store.setdefault(name, []).append(fd)

    def wait_for(self, key: str, value: str | None = None) -> Message:
        """Return the next message that assigns this to a key; None: whatever it assigns."""
        while True:
            fields = (message := self.hear()).fields
            if key in fields and value in (None, fields[key]):
                return message

    def catch_up(self) -> list[Message]:
        """Return the messages that have been sent until now and were not heard yet."""
        self._say(_MARK)
        before = len(self.heard)
        self.wait_for(_MARK)
        self.heard.pop()
        return self.heard[before:]

    def _say(self, key: str) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
            own.sendto(f"{key}=1".encode(), self._bound)

    def start(
        self,
        directory: Path,
        config: str = "",
        *,
        passed: Sequence[tuple[str, int]] = (),
        names: bool = True,
        environ: Mapping[str, str] | None = None,
        **options: Any,
    ) -> Daemon:
        """Start a daemon.

        Args:
            directory: as for `Daemon`.
            config: likewise.
            passed: names of descriptors, and the descriptors, in order.
            names: whether the daemon is told the names.
            environ: variables to add.
            options: for `Daemon`.
        """
        variables = {"NOTIFY_SOCKET": self.address, **(environ or {})}
        if passed and names:
            variables["LISTEN_FDNAMES"] = ":".join(name for name, _ in passed)
        first = _OUT_OF_THE_WAY
        fds = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, first) for _, fd in passed]
        launcher = (sys.executable, "-c", _LAUNCHER, ",".join(map(str, fds)))
        try:
            return Daemon(
                directory,
                config,
                prefix=(*options.pop("prefix", ()), *launcher),
                environ=variables,
                pass_fds=fds,
                **options,
            )
        finally:
            for fd in fds:
                os.close(fd)

    def fill(self) -> None:
        """Leave no room in the queue, before anybody reads it."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
            own.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    own.sendto(b"X_NOISE=1", self._bound)

    def stored(self) -> list[tuple[str, int]]:
        """Return what is kept, to be passed to the next daemon."""
        return [(name, fd) for name, fds in self.store.items() for fd in fds]

    def go(self) -> None:
        """Stop listening, for good."""
        if self._reader.is_alive():
            self._say(_END)
            self._reader.join(PATIENCE_SECONDS)
        self._socket.close()
        if not self.address.startswith("@"):
            Path(self.address).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.go()
        for _, fd in self.stored():
            os.close(fd)


def socket_inodes(pid: int) -> set[str]:
    """Return the sockets that a process has open, as ``socket:[INODE]``."""
    links = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # It has been closed since.
            links.add(os.readlink(path))  # noqa: PTH115
    return {link for link in links if link.startswith("socket:")}
