"""What the kernel tells of the daemon's processes: who owns which connection, what is left over."""

import os
import re
import select
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.system.daemon import children

_SOCK_DIAG = 4  # NETLINK_SOCK_DIAG, sock_diag(7).
_SOCK_DIAG_BY_FAMILY = 20
_REQUEST_DUMP = 0x301
_DONE, _ERROR = 3, 2
_SHOW_PEER = 4
_ATTRIBUTE_PEER = 2
_HEADER = struct.Struct("=IHHII")
_LOOKS = 2000
_LOOK_MILLISECONDS = 10


def looks() -> Iterator[None]:
    """Yield again and again, with little pauses, for what the kernel does not announce."""
    poll = select.poll()
    for _ in range(_LOOKS):
        yield
        poll.poll(_LOOK_MILLISECONDS)


def wait_for_state(pid: int, states: str) -> None:
    """Wait until a process is in one of the states of proc(5), such as "T" for stopped."""
    for _ in looks():
        if state(pid) in states:
            return
    raise AssertionError(f"process {pid} is {state(pid)}, never one of {states}")


def state(pid: int) -> str:
    """Return the state of a process as in proc(5); "X" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def workers(supervisor: int) -> list[int]:
    """Return the workers of a supervisor: its living children but for a rehearsal of a reload."""
    return [
        pid
        for pid in children(supervisor)
        if state(pid) not in "XZ" and b"LPECHOD_REHEARSAL=" not in _read(pid, "environ")
    ]


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def _links(pid: int) -> Iterator[str]:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            yield str(entry.readlink())
        except FileNotFoundError:
            continue


def owned_connections(pid: int, port: int) -> tuple[list[int], list[int]]:
    """Return whom a process that is stopped serves.

    Args:
        pid: the process.
        port: TCP port of its listener.

    Returns:
        Ports of its TCP clients on this machine, and inodes of the sockets of its UNIX clients.
    """
    inodes = {
        int(link.removeprefix("socket:[").rstrip("]"))
        for link in _links(pid)
        if link.startswith("socket:[")
    }
    ports = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        local, remote = (int(fields[place].rpartition(":")[2], 16) for place in (1, 2))
        if local == port and remote and int(fields[9]) in inodes:
            ports.append(remote)
    peers = _unix_peers()
    return ports, [peers[inode] for inode in inodes if inode in peers]


def _unix_peers() -> dict[int, int]:
    """Map the inode of each connected UNIX socket to its peer's."""
    peers: dict[int, int] = {}
    everything = 0xFFFFFFFF
    request = struct.pack(
        "=BBHIIIII", socket.AF_UNIX, 0, 0, everything, 0, _SHOW_PEER, everything, everything
    )
    size = _HEADER.size + len(request)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG) as diag:
        diag.send(_HEADER.pack(size, _SOCK_DIAG_BY_FAMILY, _REQUEST_DUMP, 1, 0) + request)
        while True:
            data = diag.recv(1 << 16)
            while data:
                length, kind = _HEADER.unpack_from(data)[:2]
                if kind == _DONE:
                    return peers
                assert kind != _ERROR, data
                (inode,) = struct.unpack_from("=I", data, _HEADER.size + 4)
                place = _HEADER.size + 16
                while place < length:
                    step, attribute = struct.unpack_from("=HH", data, place)
                    if attribute == _ATTRIBUTE_PEER:
                        (peers[inode],) = struct.unpack_from("=I", data, place + 4)
                    place += (step + 3) & ~3
                data = data[(length + 3) & ~3 :]


@dataclass
class Footprint:
    """What the daemon occupies; equal before and after, but for ``memory_kib``.

    Attributes:
        processes: how many run the daemon's command, by kind: also orphans, zombies, rehearsals.
        threads: of all of these.
        supervisor: its descriptors by kind.
        workers: the descriptors by kind of each worker, in order.
        files: names in the daemon's folder.
        memory_kib: private memory of the supervisor.
    """

    processes: Counter[str] = field(default_factory=Counter)
    threads: int = 0
    supervisor: list[str] = field(default_factory=list)
    workers: list[list[str]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    memory_kib: int = 0

    @classmethod
    def of(cls, supervisor: int, config: Path) -> "Footprint":
        """Take the footprint of the daemon that runs on a configuration file."""
        found = cls()
        for pid in {supervisor, *_running(config), *_below(supervisor)}:
            status = _read(pid, "status").decode()
            if not status:
                continue
            condition = state(pid)
            parent = _number(status, "PPid")
            kind = "zombie" if condition == "Z" else "stopped" if condition == "T" else "running"
            relation = "supervisor" if pid == supervisor else "child"
            if relation == "child" and parent != supervisor:
                relation = "orphan"
            if b"LPECHOD_REHEARSAL=" in _read(pid, "environ"):
                relation = "rehearsal"
            found.processes[f"{kind} {relation}"] += 1
            found.threads += _number(status, "Threads")
            if pid == supervisor:
                found.supervisor = _kinds(pid)
                found.memory_kib = _number(status, "RssAnon")
            else:
                found.workers.append(_kinds(pid))
        found.workers.sort()
        found.files = sorted(path.name for path in config.parent.iterdir())
        return found

    def difference(self, later: "Footprint") -> list[str]:
        """Say what is not as it was, memory aside."""
        found = []
        for name in ("processes", "supervisor", "files"):
            before, after = Counter(getattr(self, name)), Counter(getattr(later, name))
            if before != after:
                found.append(f"{name}: {dict(after - before)} more, {dict(before - after)} less")
        found += [
            f"{name}: {getattr(self, name)} before, {getattr(later, name)} after"
            for name in ("threads", "workers")
            if getattr(self, name) != getattr(later, name)
        ]
        return found


def _running(config: Path) -> Iterator[int]:
    """Yield who has the configuration file on its command line, wherever it has ended up."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            arguments = _read(int(entry.name), "cmdline").split(b"\0")
            if b"serve" in arguments and os.fsencode(config) in arguments:
                yield int(entry.name)


def _below(pid: int) -> Iterator[int]:
    """Yield all descendants, zombies included: those have no command line any more."""
    for child in children(pid):
        yield child
        try:
            yield from _below(child)
        except (FileNotFoundError, ProcessLookupError):
            continue


def _kinds(pid: int) -> list[str]:
    """List the descriptors of a process, without what tells two of a kind apart."""
    try:
        return sorted(re.sub(r"\[\d+\]$", "", link) for link in _links(pid))
    except (FileNotFoundError, ProcessLookupError):
        return []


def _number(status: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+)", status, re.MULTILINE)
    return int(found[1]) if found else 0
