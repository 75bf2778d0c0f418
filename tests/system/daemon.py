"""A daemon as a process, for tests that see it from outside only."""

import contextlib
import json
import os
import queue
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prometheus_client.parser import text_string_to_metric_families

PATIENCE_SECONDS = 20
"""How long a test waits for what must come. It turns a hang into a failure, and that is all."""

Event = dict[str, Any]


class Daemon:
    """Runs ``lpechod serve`` and reads its log.

    Leaving the context ends the daemon with SIGTERM, if it still runs, and holds it to what every
    run must keep: the exit status is the expected one, no error or traceback was logged that the
    test has not named, and no socket file and no worker is left.

    Args:
        directory: for the configuration file.
        config: TOML after the addresses; ``listen`` and ``[metrics]`` come from this class unless
            they are in it.
        status: the exit status expected at the end.
        errors: names of error events that the test provokes.
        prefix: a command to run the daemon under, such as ``prlimit``.
        environ: variables to add.
        pass_fds: descriptors to leave open.
        leaves: files of UNIX sockets that are somebody else's, so they must be there at the end.
    """

    def __init__(
        self,
        directory: Path,
        config: str = "",
        *,
        status: int = 0,
        errors: Iterable[str] = (),
        prefix: Sequence[str] = (),
        environ: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        leaves: Iterable[str] = (),
    ) -> None:
        if "[[listen]]" not in config:
            config += '\n[[listen]]\naddress = "127.0.0.1:0"\n'
        if "[metrics]" not in config:
            config += '\n[metrics]\naddress = "127.0.0.1:0"\n'
        self.path = directory / "config.toml"
        self.path.write_text(config)
        self._status = status
        self._errors = set(errors)
        self._sockets = re.findall(r'"unix:(.*?)"', config)
        self._leaves = set(leaves)
        self.log: list[Event] = []
        self._ended = False
        self._lines: queue.Queue[str | None] = queue.Queue()
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "lpechod", "serve", "--config", str(self.path)],
            stderr=subprocess.PIPE,
            env={**os.environ, **(environ or {})},
            pass_fds=pass_fds,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        stream = self.process.stderr
        assert stream is not None
        with stream:
            for line in stream:
                self._lines.put(line)
        self._lines.put(None)

    def wait_for(self, event: str, **fields: object) -> Event:
        """Read the log until an event has come, with such fields; a past one counts too."""
        for seen in self.log:
            if seen["event"] == event and seen.items() >= fields.items():
                return seen
        while (line := self._next_line()) is not None:
            seen = self._parse(line)
            if seen["event"] == event and seen.items() >= fields.items():
                return seen
        raise AssertionError(f"the log ended without {event} {fields}: {self.log}")

    def _next_line(self) -> str | None:
        if self._ended:
            return None
        try:
            line = self._lines.get(timeout=PATIENCE_SECONDS)
        except queue.Empty:
            raise AssertionError(f"nothing more was logged after {self.log}") from None
        self._ended = line is None
        return line

    def _parse(self, line: str) -> Event:
        try:
            event: Event = json.loads(line)
        except ValueError:
            event = {"event": "unparsable", "level": "error", "line": line}
        self.log.append(event)
        return event

    def wait_for_count(self, event: str, count: int) -> Event:
        """Read the log until an event has come so many times; return the last one."""
        while len(self.events(event)) < count:
            line = self._next_line()
            assert line is not None, f"the log ended without {count} times {event}: {self.log}"
            self._parse(line)
        return self.events(event)[count - 1]

    def reload(self, config: str | None = None) -> Event:
        """Reload, with another configuration if one is given, and wait until that has succeeded."""
        if config is not None:
            self.path.write_text(config)
            self._sockets += re.findall(r'"unix:(.*?)"', config)
        count = len(self.events("reloaded"))
        self.signal(signal.SIGHUP)
        return self.wait_for_count("reloaded", count + 1)

    def events(self, name: str) -> list[Event]:
        """Return the events of a name that have been read so far."""
        return [event for event in self.log if event["event"] == name]

    @property
    def address(self) -> str:
        """The first echo address, as ``host:port``."""
        listeners: list[str] = self.latest["listeners"]
        return listeners[0]

    @property
    def latest(self) -> Event:
        """What the daemon has said of itself at its start, or after the latest reload read of."""
        self.wait_for("ready")
        return [event for event in self.log if event["event"] in ("ready", "reloaded")][-1]

    def connect(self, address: str | None = None) -> "EchoClient":
        """Connect an echo client."""
        return EchoClient(address or self.address)

    def get(self, path: str = "/metrics") -> str:
        """Return a page of the exporter."""
        base = self.latest["metrics"][0]
        with urllib.request.urlopen(f"http://{base}{path}", timeout=PATIENCE_SECONDS) as answer:
            text: str = answer.read().decode()
        return text

    def metric(self, name: str, **labels: str) -> float:
        """Return the present value of a series."""
        for family in text_string_to_metric_families(self.get()):
            for sample in family.samples:
                if sample.name == name and sample.labels == labels:
                    return sample.value
        raise AssertionError(f"no series {name} {labels}")

    def settled(self, name: str, **labels: str) -> float:
        """Return the value of a series that was published after this call.

        Every publication is a turn of the worker's loop. The first one that shows may have been
        under way already.
        """
        turns = self.metric("lpechod_loop_turn_seconds_count")
        for _ in range(2):
            before = turns
            for _ in range(2000):
                turns = self.metric("lpechod_loop_turn_seconds_count")
                if turns != before:
                    break
        return self.metric(name, **labels)

    def wait_until(self, name: str, value: float, **labels: str) -> None:
        """Scrape until a series has a value, which workers publish within a fifth of a second."""
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < give_up_at:
            if self.metric(name, **labels) == value:
                return
        raise AssertionError(f"{name} {labels} is {self.metric(name, **labels)}, never {value}")

    @property
    def pid(self) -> int:
        """The supervisor."""
        pid: int = self.wait_for("ready")["pid"]
        return pid

    def workers(self) -> list[int]:
        """Return the children of the supervisor."""
        return children(self.pid)

    def descriptors(self) -> int:
        """Return how many descriptors supervisor and workers have open."""
        return sum(
            sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()) for pid in (self.pid, *self.workers())
        )

    def wait_for_descriptors(self, count: int) -> None:
        """Wait until so many descriptors are open: the last scrape may be closing its own."""
        for _ in range(100_000):
            if self.descriptors() == count:
                return
        raise AssertionError(f"{self.descriptors()} descriptors are open, never {count}")

    def resident_kib(self) -> int:
        """Return the resident set of the workers, without what is shared with files."""
        resident = 0
        for pid in self.workers():
            status = Path(f"/proc/{pid}/status").read_text()
            found = re.search(r"^RssAnon:\s+(\d+)", status, re.MULTILINE)
            assert found
            resident += int(found[1])
        return resident

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the supervisor, whatever it runs under."""
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Wait for the end, read the rest of the log, and return the exit status."""
        status = self.process.wait(PATIENCE_SECONDS)
        while (line := self._next_line()) is not None:
            self._parse(line)
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._kill_all()
            return
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
        status = self.wait()
        unexpected = [
            event
            for event in self.log
            if event["level"] == "error" and event["event"] not in self._errors
        ]
        assert not unexpected
        assert status == self._status, self.log[-3:]
        assert {path for path in self._sockets if Path(path).exists()} == self._leaves
        processes = {event["worker"] for event in self.log if "worker" in event}
        assert not [pid for pid in processes if is_alive(pid)]

    def _kill_all(self) -> None:
        """Kill whatever runs with this configuration: supervisor, workers, and orphans."""
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.fsencode(self.path) in (entry / "cmdline").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)
        self.process.wait()


class EchoClient:
    """A blocking client of the echo protocol.

    Args:
        address: ``host:port``, ``[v6]:port`` or ``unix:/path``.
    """

    def __init__(self, address: str) -> None:
        if address.startswith("unix:"):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(address.removeprefix("unix:"))
        else:
            host, _, port = address.rpartition(":")
            self.socket = socket.create_connection((host.strip("[]"), int(port)))
        self.socket.settimeout(PATIENCE_SECONDS)

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.socket.sendall(data)

    def receive(self, count: int) -> bytes:
        """Receive exactly so many bytes."""
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            assert more, f"the stream ended after {len(data)} of {count} bytes"
            data += more
        return data

    def echo(self, body: bytes) -> None:
        """Send a frame and demand it back."""
        sent = frame(body)
        self.send(sent)
        assert self.receive(len(sent)) == sent

    def expect_end(self) -> None:
        """Demand the end of the stream, and not a reset."""
        assert self.socket.recv(1) == b""

    def reset(self) -> None:
        """Close with a reset instead of a FIN."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def close(self) -> None:
        """Close."""
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


def configuration(*listen: str, metrics: str = "127.0.0.1:0", more: str = "") -> str:
    """Write a configuration with these addresses; a port of 0 keeps its socket over reloads."""
    tables = "".join(f'[[listen]]\naddress = "{each}"\n' for each in listen or ("127.0.0.1:0",))
    return f'{more}\n{tables}[metrics]\naddress = "{metrics}"\n'


def free_address() -> str:
    """Return an address that nobody listens on, of a host that only this process uses."""
    high, low = divmod(os.getpid(), 256)
    with socket.create_server((f"127.{1 + high // 256}.{high % 256}.{low}", 0)) as server:
        host, port = server.getsockname()
    return f"{host}:{port}"


def wait_for_end(pid: int) -> None:
    """Wait until a process has ended, somebody else's child too."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    ended = poll.poll(PATIENCE_SECONDS * 1000)
    os.close(handle)
    assert ended, f"process {pid} goes on"


def descriptor_kinds(pid: int) -> list[str]:
    """Return what the descriptors of a process are, without the numbers of inodes."""
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # Closed meanwhile.
            links.append(str(entry.readlink()))
    return sorted(re.sub(r":\[\d+\]", "", link) for link in links)


def count_sockets(pid: int) -> int:
    """Return how many sockets a process has open."""
    return descriptor_kinds(pid).count("socket")


def wait_for_sleeps(pid: int, count: int) -> None:
    """Wait until a process has gone to sleep so often, as loops do that have nothing to do."""
    status = Path(f"/proc/{pid}/status")
    goal = None
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < give_up_at:
        slept = int(status.read_text().partition("\nvoluntary_ctxt_switches:")[2].split()[0])
        goal = slept + count if goal is None else goal
        if slept >= goal:
            return
    raise AssertionError(f"process {pid} does not wake up")


def children(pid: int) -> list[int]:
    """Return the children of a process that has one thread."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    """Tell whether a process exists and has not ended: a zombie is its parent's affair."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def frame(body: bytes) -> bytes:
    """Put the header in front of a body."""
    return struct.pack(">I", len(body)) + body
