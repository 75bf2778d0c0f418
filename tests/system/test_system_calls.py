"""How many system calls a frame costs a worker, counted by strace(1).

Most of what a frame costs is spent in the kernel, so a call too many is what a slip in the hot path
would look like. Calls are counted and not timed. Clients send when the worker has gone to sleep, so
that what it does in vain is not rewarded by a frame that has come meanwhile, and a busy machine
makes these tests slower and nothing else.
"""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from lpechod.engine.loop import TICKS_PER_SECOND
from tests.system.daemon import PATIENCE_SECONDS, Daemon, EchoClient, frame, wait_for_sleeps

CROWD = 50
PING = frame(bytes(64))

WAITS = {"epoll_wait", "epoll_pwait", "poll", "ppoll", "select", "pselect6", "restart_syscall"}
"""What a wait may be called: by libraries, by architectures, and by a wait that goes on after the
tracer has come in between (restart_syscall(2))."""


class Trace:
    """The system calls of a process, from the beginning of a block to its end.

    Whoever is not root must be allowed to trace more than descendants (Yama's ``ptrace_scope``).

    Args:
        pid: the process.
        path: where strace writes.

    Attributes:
        calls: how often each was made; known at the end.
        ticks: how many heartbeats fell into the block at most, each of which is a wait in vain.
    """

    def __init__(self, pid: int, path: Path) -> None:
        self._pid = pid
        self._path = path
        self._began_at = time.monotonic()
        # Whether reading the clock takes a system call is up to the machine (vdso(7)).
        options = ("-e", "trace=!clock_gettime", "-o", str(path), "-p", str(pid))
        self._strace = subprocess.Popen(["strace", *options], stderr=subprocess.PIPE, text=True)
        self.calls: Counter[str] = Counter()
        self.ticks = 0

    def __enter__(self) -> Self:
        assert self._strace.stderr is not None
        # From here on no call escapes: the process stops before it makes the next one.
        said = self._strace.stderr.readline()
        assert said.endswith(" attached\n"), said
        return self

    def wait_for_sleep(self) -> None:
        """Wait until the process has nothing more to do: it sleeps, and not for its tracer."""
        stat = Path(f"/proc/{self._pid}/stat")
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        while stat.read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < give_up_at, "it never sleeps"

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the process, once it sleeps, at the end of the call in which it does.

        There it stops for its tracer, who is stopped as well. A signal to the process itself would
        end its wait, and nobody could tell when it has taken effect.
        """
        self.wait_for_sleep()
        self._strace.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._strace.pid, os.WSTOPPED)
        try:
            yield
        finally:
            self._strace.send_signal(signal.SIGCONT)

    def exchange(self, client: EchoClient, data: bytes, times: int) -> None:
        """Send frames so many times, and each time receive them when they have come back."""
        for _ in range(times):
            self.wait_for_sleep()
            client.send(data)
            assert client.receive(len(data)) == data

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._strace.send_signal(signal.SIGTERM)  # It detaches, and the process goes on.
        self._strace.communicate(timeout=PATIENCE_SECONDS)
        self.ticks = int((time.monotonic() - self._began_at) * TICKS_PER_SECOND) + 1
        self.calls.update(re.findall(r"^(\w+)\(", self._path.read_text(), re.MULTILINE))

    def assert_frugal(self, frames: int, most: float, *, together: int = 1) -> None:
        """Demand that echoing has taken few calls, and that nothing was watched in another way.

        Args:
            frames: how many were echoed.
            most: calls for each of them, without heartbeats.
            together: how many of them a client has sent with one call.
        """
        assert self.calls["epoll_ctl"] == 0, self.calls
        assert self.calls.total() - self.ticks <= most * frames, self.calls
        assert self.calls.total() >= 2 * frames // together, "calls have escaped the trace"


@dataclass
class Busy:
    """A daemon with one worker, and clients that it knows well.

    Attributes:
        pid: the worker.
        clients: `CROWD` of them.
        path: for the trace.
    """

    pid: int
    clients: list[EchoClient]
    path: Path

    def trace(self) -> Trace:
        """Trace the worker."""
        return Trace(self.pid, self.path)


@pytest.fixture(name="busy", scope="module", params=["epoll", "epoll-et", "poll", "select"])
def _busy(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Busy]:
    directory = tmp_path_factory.mktemp("busy")
    # As many connections as select(2) can watch.
    config = f'[server]\npoller = "{request.param}"\n[limits]\nmax_connections = 500\n'
    with Daemon(directory, config) as daemon, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(daemon.connect()) for _ in range(CROWD)]
        for client in clients:
            client.echo(b"warm-up")
        (pid,) = daemon.workers()
        yield Busy(pid, clients, directory / "trace")


def test_an_idle_worker_only_wakes_up_for_its_heartbeat(busy: Busy) -> None:
    """With no frame to echo, a worker waits from tick to tick and makes no other call."""
    wait_for_sleeps(busy.pid, 8)  # What is done for the first time may take memory: its coverage.
    with busy.trace() as trace:
        wait_for_sleeps(busy.pid, 8)

    # What is allocated and freed again may cross the end of an arena (obmalloc) or of the heap.
    memory = [trace.calls.pop(call, 0) for call in ("mmap", "munmap", "brk")]
    assert max(memory) <= 1
    assert trace.calls.keys() <= WAITS
    assert 0 < trace.calls.total() <= trace.ticks + 1  # The last wait had not ended.


def test_a_frame_at_a_time(busy: Busy) -> None:
    """A frame on its own takes a wait, a receive and a send, and no change of interest."""
    rounds = 1000
    with busy.trace() as trace:
        trace.exchange(busy.clients[0], PING, rounds)

    trace.assert_frugal(rounds, 3.05)


def test_a_crowd_that_is_ready_at_once(busy: Busy) -> None:
    """Clients whose frames have come together share a wait; each has its receive and its send."""
    rounds = 20
    with busy.trace() as trace:
        for _ in range(rounds):
            with trace.hold():
                for client in busy.clients:
                    client.send(PING)
            for client in busy.clients:
                assert client.receive(len(PING)) == PING

    # Two waits: the one that the first frame has ended, and one that finds all the others.
    trace.assert_frugal(rounds * CROWD, 2.1)


def test_frames_in_flight(busy: Busy) -> None:
    """Frames that a client sends together share a wait, a receive and a send."""
    rounds, depth = 200, 16
    with busy.trace() as trace:
        trace.exchange(busy.clients[0], PING * depth, rounds)

    # Three calls for all of them; a fourth would make it a quarter of a call for each.
    trace.assert_frugal(rounds * depth, 0.2, together=depth)


def test_large_frames(busy: Busy) -> None:
    """A frame of 64 KiB takes no more calls than a small one, and no change of interest."""
    rounds = 200
    large = frame(bytes(65536))
    client = busy.clients[0]
    for _ in range(20):  # Until the kernel has grown its buffers, and the worker has its own.
        client.send(large)
        assert client.receive(len(large)) == large
    with busy.trace() as trace:
        trace.exchange(client, large, rounds)

    # It comes in two segments, since those of loopback are a little shorter. One call sends both,
    # so both are there when the worker reads; a wait and a receive more for each that was alone.
    trace.assert_frugal(rounds, 3.5)
