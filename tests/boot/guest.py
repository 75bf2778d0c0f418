"""A Debian 13 that runs: systemd is process 1 in a container, driven from outside.

Commands run in all namespaces of the guest (nsenter(1)). Clients run in this process and only
make their sockets in the guest's network, which has a loopback device and nothing else.
"""

import contextlib
import ctypes
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.system.daemon import PATIENCE_SECONDS, EchoClient

ECHO = "127.0.0.1:9000"
METRICS = "127.0.0.1:10862"
CONFIG = Path("/etc/lpechod/config.toml")

_NETWORK = 0x40000000  # CLONE_NEWNET
_BOOT_SECONDS = 120
_libc = ctypes.CDLL(None, use_errno=True)

Event = dict[str, Any]


class Guest:
    """A container that has booted.

    Leaving the context powers it off.

    Args:
        image: a tar file with the system.
        directory: where to put the system and the console's output.
    """

    def __init__(self, image: Path, directory: Path) -> None:
        self.root = directory / "root"
        self.root.mkdir()
        subprocess.run(
            ["tar", "--extract", f"--file={image}", f"--directory={self.root}"], check=True
        )
        self._console = (directory / "console.log").open("wb")
        self.leader = self._boot(directory / "notify")
        self.journals: list[Journal] = []
        """Those that are followed. They have to end before the guest can."""
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        self._network = os.open(f"/proc/{self.leader}/ns/net", os.O_RDONLY)

    def _boot(self, address: Path) -> int:
        """Start process 1 and wait until it has started everything else.

        Returns:
            Its process id, as seen from outside.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
            told.bind(str(address))
            told.settimeout(_BOOT_SECONDS)
            self._nspawn = subprocess.Popen(
                [
                    "systemd-nspawn",
                    f"--directory={self.root}",
                    "--boot",
                    "--notify-ready=yes",
                    "--register=no",
                    "--keep-unit",
                    "--private-network",
                    "--console=pipe",
                ],
                env={
                    **os.environ,
                    "NOTIFY_SOCKET": str(address),
                    # For hosts whose own process 1 is not systemd.
                    "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
                },
                stdin=subprocess.DEVNULL,
                stdout=self._console,
                stderr=subprocess.STDOUT,
            )
            leader = 0
            while True:
                fields = dict(line.split("=", 1) for line in told.recv(4096).decode().splitlines())
                leader = int(fields.get("X_NSPAWN_LEADER_PID", leader))
                if fields.get("READY") == "1":
                    return leader

    def run(self, *command: str, status: int | None = 0) -> str:
        """Run a command in the guest as root.

        Args:
            command: program and arguments.
            status: the exit status to demand; None if any will do.

        Returns:
            What it has written, without white space at the end.
        """
        print("#", *command)
        done = subprocess.run(
            [
                *(
                    "nsenter",
                    f"--target={self.leader}",
                    "--all",
                    "--",
                    "env",
                    "--ignore-environment",
                ),
                *("PATH=/usr/sbin:/usr/bin", "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive"),
                *command,
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        print(done.stdout, end="")
        if status is not None:
            assert done.returncode == status, f"{command}: status {done.returncode}: {done.stdout}"
        return done.stdout.rstrip()

    def path(self, path: str | Path) -> Path:
        """Return where a file of the guest is, seen from outside; not for those in /run or /tmp."""
        return self.root / str(path).lstrip("/")

    def upload(self, *files: Path) -> list[str]:
        """Copy files into the guest and return their paths there."""
        place = self.root / "srv"
        return [f"/srv/{Path(shutil.copy(file, place)).name}" for file in files]

    def install(self, package: Path) -> str:
        """Have apt install a package, without a network."""
        return self.run(
            *("apt-get", "--yes", "--no-install-recommends", "install"),
            *self.upload(package),
        )

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Return properties of a unit (systemctl(1))."""
        text = self.run("systemctl", "show", f"--property={','.join(properties)}", unit)
        return dict(line.split("=", 1) for line in text.splitlines())

    # The network.

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """Make the sockets of this thread in the guest's network (setns(2)).

        A socket stays in the network that it was made in.
        """
        self._enter(self._network)
        try:
            yield
        finally:
            self._enter(self._home)

    @staticmethod
    def _enter(namespace: int) -> None:
        if _libc.setns(namespace, _NETWORK) != 0:
            raise OSError(ctypes.get_errno(), "setns")

    def connect(self, address: str = ECHO) -> EchoClient:
        """Connect an echo client."""
        with self.network():
            return EchoClient(address)

    def echo(self, body: bytes = b"hello") -> None:
        """Connect, demand one echo, and demand that the daemon closes after us."""
        with self.connect() as client:
            client.echo(body)
            client.socket.shutdown(socket.SHUT_WR)
            client.expect_end()

    def metrics(self) -> dict[str, float]:
        """Scrape; series are named as they are written, labels included."""
        with self.network():
            answer = urllib.request.urlopen(f"http://{METRICS}/metrics", timeout=PATIENCE_SECONDS)
        with answer:
            lines = answer.read().decode().splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def wait_until(self, series: str, value: float) -> None:
        """Scrape until a series has a value."""
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        while (found := self.metrics()[series]) != value:
            assert time.monotonic() < give_up_at, f"{series} is {found}, never {value}"

    def kill(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to a process, as the kernel does it, and not systemd."""
        print(f"# kill -{number.name} {pid}")
        os.kill(self._outside(pid), number)

    @staticmethod
    def _outside(pid: int) -> int:
        """Return the number that a process of the guest has outside (proc(5), NSpid)."""
        for entry in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                for line in entry.read_text().splitlines():
                    if line.startswith("NSpid:") and line.split()[1:][1:] == [str(pid)]:
                        return int(entry.parent.name)
        raise AssertionError(f"no process {pid}")

    # The end.

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        for journal in list(self.journals):
            journal.close()
        # systemd(1): SIGRTMIN+4 powers off.
        os.kill(self.leader, signal.SIGRTMIN + 4)
        try:
            self._nspawn.wait(_BOOT_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.leader, signal.SIGKILL)
            self._nspawn.wait()
            self._console.close()
            os.close(self._home)
            os.close(self._network)
        shutil.rmtree(self.root)


class Journal:
    """The journal of a unit from now on.

    Args:
        guest: whose.
        unit: a service.

    Attributes:
        cursor: where it begins (journalctl(1)).
    """

    def __init__(self, guest: Guest, unit: str = "lpechod.service") -> None:
        shown = guest.run("journalctl", "--lines=1", "--quiet", "--show-cursor", "--output=cat")
        self.cursor = shown.rpartition("-- cursor: ")[2]
        self._follow = subprocess.Popen(
            [
                *("nsenter", f"--target={guest.leader}", "--all", "--"),
                *("journalctl", "--follow", "--output=json", "--lines=all", f"--unit={unit}"),
                f"--after-cursor={self.cursor}",
            ],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.entries: list[Event] = []
        self._guest = guest
        guest.journals.append(self)

    def _read(self) -> None:
        assert self._follow.stdout is not None
        with self._follow.stdout as lines:
            for line in lines:
                self._lines.put(line)

    def wait_for(self, event: str, **fields: object) -> Event:
        """Read on until the daemon has logged an event with such fields; a past one counts too."""
        return self._wait(
            lambda each: each.get("lpechod", {}).items() >= {"event": event, **fields}.items()
        )

    def wait_for_manager(self, text: str) -> Event:
        """Read on until systemd has said something about the unit that has this text in it."""
        return self._wait(lambda each: "lpechod" not in each and text in each["MESSAGE"])

    def _wait(self, matches: Any) -> Event:
        for entry in self.entries:
            if matches(entry):
                return entry
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                line = self._lines.get(timeout=max(0, give_up_at - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"it is not in the journal: {self.entries[-20:]}") from None
            entry = _parse(line)
            self.entries.append(entry)
            if matches(entry):
                return entry

    @property
    def errors(self) -> set[str]:
        """Names of the error events that have been read so far."""
        return {
            entry["lpechod"]["event"]
            for entry in self.entries
            if entry.get("lpechod", {}).get("level") == "error"
        }

    def close(self) -> None:
        """Stop following."""
        self._guest.journals.remove(self)
        # For the process namespace nsenter(1) has forked, and stands between us.
        os.killpg(self._follow.pid, signal.SIGTERM)
        self._follow.wait()
        self._reader.join()


def _parse(line: str) -> Event:
    """Read an entry; what the daemon has logged in it goes to ``lpechod``."""
    entry: Event = json.loads(line)
    with contextlib.suppress(ValueError):
        logged = json.loads(entry["MESSAGE"])
        if isinstance(logged, dict):
            entry["lpechod"] = logged
    return entry
