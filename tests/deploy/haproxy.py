"""HAProxy as a real process, on the configuration that is shipped, in front of real daemons.

Only what cannot be the same on every machine is exchanged in the file, and each replacement must
happen exactly once, or the test would run something else than what is shipped. What HAProxy thinks
of a server is asked for on its statistics socket until it says so.
"""

import csv
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.deploy.prometheus import DEPLOY, program
from tests.system.daemon import PATIENCE_SECONDS, free_address

SHIPPED = DEPLOY / "haproxy" / "haproxy.cfg"
SERVERS = ("lpechod1", "lpechod2", "lpechod3")

_SHIPPED_ADDRESSES = ("192.0.2.11:9000", "192.0.2.12:9000", "192.0.2.13:9000")

_FAST = {
    "inter 2s fastinter 500ms downinter 1s": "inter 250ms fastinter 50ms downinter 50ms",
    "timeout check 2s": "timeout check 500ms",
}
"""So that a test need not wait for what takes seconds in production; ``fall`` and ``rise`` stay."""

_FEW = {"maxconn 30000": "maxconn 3000"}
"""HAProxy wants two descriptors for each, and a container may not have so many."""

_NOT_ROOT = {
    "    user haproxy\n": "",
    "    group haproxy\n": "",
    "    chroot /var": "    # chroot ",
}


def exchange(text: str, replacements: Mapping[str, str]) -> str:
    """Replace each key by its value, and demand that it is there, and there once."""
    for old, new in replacements.items():
        assert text.count(old) == 1, f"{text.count(old)} times {old!r}"
        text = text.replace(old, new)
    return text


def check(file: Path) -> "subprocess.CompletedProcess[str]":
    """Have HAProxy check a file, with its diagnostics; a warning makes it fail."""
    return subprocess.run(
        [program("haproxy", "haproxy"), "-dD", "-dW", "-c", "-f", file],
        capture_output=True,
        text=True,
        check=False,
    )


class HAProxy:
    """Runs HAProxy in front of three addresses, of which each must pass a check first.

    Args:
        directory: for its configuration, its log and its socket.
        backends: the addresses, in the order of `SERVERS`.
        replacements: more to exchange in the file that is shipped.
        passed: what the statistics call a check that has passed.
    """

    def __init__(
        self,
        directory: Path,
        backends: Sequence[str],
        replacements: Mapping[str, str] | None = None,
        passed: str = "L7OK",
    ) -> None:
        self.address = free_address()
        self.statistics = free_address()
        self._socket = directory / "admin.sock"
        self._log = directory / "haproxy.log"
        file = directory / "haproxy.cfg"
        file.write_text(
            exchange(
                SHIPPED.read_text(),
                {
                    **dict(zip(_SHIPPED_ADDRESSES, backends, strict=True)),
                    "bind :9000\n": f"bind {self.address}\n",
                    "bind 127.0.0.1:8405\n": f"bind {self.statistics}\n",
                    "stats socket /run/haproxy/admin.sock": f"stats socket {self._socket}",
                    **_FAST,
                    **_FEW,
                    **({} if os.geteuid() == 0 else _NOT_ROOT),
                    **(replacements or {}),
                },
            )
        )
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [program("haproxy", "haproxy"), "-dW", "-db", "-f", file],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            for server in SERVERS:
                # It believes in "UP" before the first check already, and fails if only that fails.
                self.wait_until(
                    server,
                    lambda state: (state["check_status"], state["status"]) == (passed, "UP"),
                )
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def ask(self, command: str) -> str:
        """Give a command on the statistics socket, and return the answer."""
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(PATIENCE_SECONDS)
            asking.connect(str(self._socket))
            asking.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: asking.recv(65536), b"")).decode()

    def order(self, command: str) -> None:
        """Give a command that has nothing to answer unless it fails."""
        answer = self.ask(command)
        assert answer.strip() == "", answer

    def state(self, name: str) -> dict[str, str]:
        """Return the line of statistics of a server, or of ``FRONTEND`` or ``BACKEND``."""
        table = self.ask("show stat").removeprefix("# ").splitlines()
        for line in csv.DictReader(table):
            if (line["pxname"], line["svname"]) == ("lpechod", name):
                return line
        raise AssertionError(f"no {name}")

    def count(self, field: str, names: Iterable[str] = SERVERS) -> list[int]:
        """Return a number of the statistics for several servers, or what else has a line."""
        return [int(self.state(name)[field]) for name in names]

    def wait_until(self, name: str, condition: Callable[[dict[str, str]], bool]) -> None:
        """Ask for the state of a server until it is so."""
        state: object = None
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < give_up_at:
            assert self.process.poll() is None, f"haproxy ended: {self._tail()}"
            try:
                state = self.state(name)
            except (FileNotFoundError, ConnectionRefusedError):
                continue  # It has not started yet.
            if condition(state):
                return
        raise AssertionError(f"{name} is {state}")

    def wait_until_up(self, name: str) -> None:
        """Wait until a server is in the rotation, and sure of it."""
        self.wait_until(name, lambda state: state["status"] == "UP")

    def wait_until_down(self, name: str) -> None:
        """Wait until a server is out of the rotation."""
        self.wait_until(name, lambda state: state["status"].startswith("DOWN"))

    def _tail(self) -> str:
        return self._log.read_text()[-1000:]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        alive = self.process.poll() is None
        self.process.kill()
        self.process.wait()
        # HAProxy leaves it to its next start to remove the file.
        self._socket.unlink(missing_ok=True)
        if kind is None:
            assert alive, self._tail()
            assert "ALERT" not in self._log.read_text()
