"""Children as the supervisor keeps them: real processes, in a loop whose time is a test's."""

import errno
import json
import mmap
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import pytest

from lpechod.engine.loop import Loop
from lpechod.engine.poller import EpollPoller
from lpechod.engine.wheel import Timer
from lpechod.ops.census import Census
from lpechod.ops.segment import Segment, Slot
from lpechod.process.workers import MAX_FAILED_STARTS, Child, Workers
from tests.fake_time import FakeClock, FakeTimePoller
from tests.net.harness import RecordingLog
from tests.segments import occupied

# Python 3.12 and later count threads; the only other one is pytest's, and a child is never Python's
# again once it blocks.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

Become = Callable[[Slot, socket.socket], NoReturn]


def ready(line: socket.socket) -> None:
    """Tell the supervisor that this child serves."""
    line.send(b'{"type":"ready"}')


def serve(_slot: Slot, line: socket.socket) -> NoReturn:
    """Be a child that serves until it is told to drain, or is alone."""
    try:
        ready(line)
        line.recv(4096)
    finally:
        os._exit(0)


def die(_slot: Slot, _line: socket.socket) -> NoReturn:
    """Be a child that never serves."""
    os._exit(3)


class Alarm(Timer):
    """Lets time pass."""

    def on_deadline(self, _now: float) -> None:
        """Do nothing."""


class Family:
    """Workers in a loop, and their calls.

    Args:
        count: how many there should be.
        become: what a child does.
        stack: closes what is opened here.
    """

    def __init__(self, count: int, become: Become, stack: ExitStack) -> None:
        self.clock = FakeClock()
        self.log = RecordingLog()
        self.segment = Segment.create()
        stack.callback(self.segment.close)
        self.census = Census.create()
        stack.callback(self.census.close)
        self.loop = Loop(FakeTimePoller(EpollPoller(), self.clock), self.clock)
        stack.callback(self.loop.close)
        stack.callback(self._end)
        self.become = become
        self.calls: list[str] = []
        self.workers = Workers(
            count, self.segment, self._become, self.loop, self.log, census=self.census
        )
        self.workers.on_settled = lambda: self.calls.append("settled")
        self.workers.on_hopeless = lambda: self.calls.append("hopeless")
        self.began_at = self.loop.now

    def _become(self, slot: Slot, line: socket.socket) -> NoReturn:
        self.become(slot, line)

    @property
    def children(self) -> list[Child]:
        """The children, in the order of their start."""
        return list(self.workers.children.values())

    @property
    def rows(self) -> list[int]:
        """The rows of the census that are in use."""
        page = os.pread(self.census.fd, Census.ROWS, mmap.PAGESIZE)
        return [row for row, used in enumerate(page) if used]

    @property
    def age(self) -> float:
        """How much time has passed, in seconds."""
        return self.loop.now - self.began_at

    def hear(self, *children: Child) -> None:
        """Wait until children have said that they serve; no time passes."""
        for child in children or self.children:
            while child.ready_at is None:
                select.select([child.line.fd], [], [])
                self.loop.turn()

    def reap(self, child: Child, number: int = 0) -> None:
        """Wait for the end of a child, after a signal if there is one, and tell the workers."""
        if number:
            os.kill(child.pid, number)
        _, status = os.waitpid(child.pid, 0)
        assert self.workers.ended(child.pid, os.waitstatus_to_exitcode(status))

    def wait_for_start(self) -> float:
        """Let time pass until somebody is started, and return how much it was."""
        before, began_at = self.children, self.loop.now
        while self.children == before:
            self.loop.turn()
        return self.loop.now - began_at

    def _end(self) -> None:
        for child in self.children:
            os.kill(child.pid, signal.SIGKILL)
            os.waitpid(child.pid, 0)
            child.line.close()


@pytest.fixture
def family() -> Iterator[Callable[..., Family]]:
    """Make families, whose children are gone at the end."""
    with ExitStack() as stack:
        yield lambda count=1, become=serve: Family(count, become, stack)


Make = Callable[..., Family]


def test_all_are_ready_when_the_last_one_is(family: Make) -> None:
    """So many children are started as configured, and it is told once that all of them serve."""
    reader, writer = os.pipe()

    def serve_when_told(slot: Slot, line: socket.socket) -> NoReturn:
        if slot.index == 2:
            os.read(reader, 1)
        serve(slot, line)

    it = family(3, serve_when_told)
    it.workers.start()
    assert len(it.children) == 3
    assert it.workers.states(never)["starting"] == 3
    it.hear(*it.children[:2])
    assert it.calls == []
    assert it.workers.ready == 2
    os.write(writer, b"!")
    os.close(writer)
    os.close(reader)

    it.hear()

    assert it.calls == ["settled"]
    states = {"starting": 0, "ready": 3, "draining": 0, "stalled": 0}
    assert it.workers.states(never) == states
    assert it.workers.states(lambda _: True)["stalled"] == 3
    assert it.workers.restarts == 0


def never(_child: Child) -> bool:
    """Say that a child is not stalled."""
    return False


def is_about(delay: float, least: float) -> bool:
    """Tell whether a delay is no shorter than it should be, and at most two ticks longer."""
    return least - 1e-6 < delay < least + 0.2


def test_who_dies_soon_waits_longer_each_time(family: Make) -> None:
    """The first successor starts at once, each further one after twice the time, up to 10 s."""
    it = family()
    it.workers.start()
    delays = []
    for _ in range(12):
        it.hear()
        victim = it.children[0]
        it.reap(victim, signal.SIGKILL)
        delays.append(0.0 if it.children else it.wait_for_start())

    expected = [0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10, 10, 10]
    for delay, least in zip(delays, expected, strict=True):
        assert is_about(delay, least)
    assert it.workers.restarts == 12
    assert it.log.of("worker_died")[0]["signal"] == "SIGKILL"
    assert "hopeless" not in it.calls


def test_a_long_life_makes_up_for_deaths(family: Make) -> None:
    """Who has served for ten seconds is replaced at once, whatever happened before."""
    it = family()
    it.workers.start()
    for _ in range(3):
        it.hear()
        it.reap(it.children[0], signal.SIGKILL)
        if not it.children:
            it.wait_for_start()
    it.hear()
    it.loop.schedule(Alarm(), it.loop.now + 10)
    it.loop.turn()

    it.reap(it.children[0], signal.SIGKILL)

    assert len(it.children) == 1


def test_each_round_of_deaths_is_one_attempt(family: Make) -> None:
    """Delays grow with each round in which all workers die, not with each of the deaths."""
    it = family(5)
    it.workers.start()
    for delay in (0, 0.1, 0.2, 0.4):
        it.hear()
        for child in it.children:
            it.reap(child, signal.SIGKILL)
        assert is_about(0 if it.children else it.wait_for_start(), delay)
        assert len(it.children) == 5
    assert it.workers.restarts == 20


@pytest.mark.parametrize("count", [1, 4, 12])
def test_hope_ends_after_so_many_attempts(family: Make, count: int) -> None:
    """When so many attempts in a row have not come to serve, and never before, that is told."""
    it = family(count, die)
    it.workers.start()
    deaths = 0
    while it.calls == []:
        assert it.age < 60
        if it.children:
            it.reap(it.children[0])
            deaths += 1
        else:
            it.wait_for_start()

    assert it.calls == ["hopeless"]
    assert 6 <= it.age <= 16
    assert MAX_FAILED_STARTS <= deaths <= MAX_FAILED_STARTS * count
    assert it.log.of("worker_died")[0]["status"] == 3


def test_hope_returns_with_one_that_serves(family: Make) -> None:
    """Failures before a child that serves count no more."""
    it = family(1, die)
    it.workers.start()
    for _ in range(MAX_FAILED_STARTS - 1):
        if not it.children:
            it.wait_for_start()
        it.reap(it.children[0])
    it.become = serve
    it.wait_for_start()
    it.hear()
    it.become = die
    it.reap(it.children[0], signal.SIGKILL)
    it.wait_for_start()
    it.reap(it.children[0])

    assert "hopeless" not in it.calls


@pytest.mark.parametrize("count", [1, 4, 12])
def test_fork_that_fails_is_tried_again(
    family: Make, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When fork(2) has failed, it is tried again later, and that is no restart of anybody."""
    it = family(count)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fork", out_of_processes)
        it.workers.start()
        assert it.children == []
        assert len(it.log.of("worker_start_failed")) == count

    it.wait_for_start()

    it.hear()
    assert len(it.children) == count
    assert it.calls == ["settled"]
    assert it.workers.restarts == 0
    assert len(occupied(it.segment)) == count


def out_of_processes() -> int:
    """Fail as fork(2) does under a limit of processes."""
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def test_fork_that_always_fails_is_hopeless(family: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """When no fork(2) has worked for several attempts, that is told, and nobody starts later."""
    it = family(3)

    def give_up() -> None:
        it.calls.append("hopeless")
        it.workers.drain(None)

    it.workers.on_hopeless = give_up
    with monkeypatch.context() as patch:
        patch.setattr(os, "fork", out_of_processes)
        it.workers.start()
        while it.calls == []:
            it.loop.turn()
        assert 6 <= it.age <= 16

    assert it.loop.timers == 0
    assert it.children == []
    assert occupied(it.segment) == []


def test_one_death_is_one_restart_even_if_fork_fails(
    family: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A successor that could only be started at the second attempt counts once."""
    it = family()
    it.workers.start()
    it.hear()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fork", out_of_processes)
        it.reap(it.children[0], signal.SIGKILL)
        assert it.workers.restarts == 0

    it.wait_for_start()

    assert it.workers.restarts == 1


def test_nobody_is_replaced_after_a_drain(family: Make) -> None:
    """After the order to drain, those who end or die are reported and nothing else happens."""
    it = family(2)
    it.workers.start()
    it.hear()
    for _ in range(3):
        it.reap(it.children[0], signal.SIGKILL)
    last = it.children[0]
    assert it.loop.timers == 1  # Somebody's successor waits for its time.
    it.workers.drain(None)

    it.reap(last)

    assert it.loop.timers == 0
    assert it.children == []
    assert it.log.of("worker_ended") == [{"worker": last.pid}]
    assert occupied(it.segment) == []


def test_who_asks_to_leave_is_told_to_drain_after_its_successor_is_ready(family: Make) -> None:
    """A worker that somebody has told to end stays until another one serves in its place."""
    it = family(1, leave_once_ready)
    it.workers.start()
    leaver = it.children[0]
    it.workers.on_settled = lambda: it.workers.retire([])
    it.hear()
    while leaver.current:
        select.select([leaver.line.fd], [], [])
        it.loop.turn()
    it.become = serve
    it.wait_for_start()
    successor = it.children[1]
    assert it.workers.states(never)["draining"] == 0

    it.hear(successor)

    assert it.workers.states(never)["draining"] == 1
    it.reap(leaver)
    assert it.children == [successor]
    assert it.workers.restarts == 0, "it has not died"
    assert it.log.of("worker_ended") == [{"worker": leaver.pid}]


def leave_once_ready(_slot: Slot, line: socket.socket) -> NoReturn:
    """Be a child that asks to leave, twice, and ends when it is told to and leave the queue."""
    status = 1
    try:
        ready(line)
        line.send(b'{"type":"leave"}')
        line.send(b'{"type":"leave"}')
        told = json.loads(line.recv(4096))
        status = 0 if told == {"type": "drain", "finish": []} else 1
    finally:
        os._exit(status)


def test_a_long_line_of_deaths_leaves_nothing_open(family: Make) -> None:
    """Each child that has gone takes its descriptors and its slot along."""
    it = family(2)
    it.workers.start()
    it.hear()
    before = set(Path("/proc/self/fd").iterdir())
    for _ in range(10):
        it.reap(it.children[0], signal.SIGKILL)
        while len(it.children) < 2:
            it.wait_for_start()
        it.hear()
    assert set(Path("/proc/self/fd").iterdir()) == before
    assert len(occupied(it.segment)) == 2


def test_each_child_has_a_row_of_the_census(family: Make) -> None:
    """All rows are there before the first child is, and each goes when its child is reaped."""
    born: list[list[int]] = []
    it = family(3)

    def note(slot: Slot, line: socket.socket) -> NoReturn:
        status = 1
        try:
            line.send(json.dumps({"type": "ready", "rows": it.rows, "own": slot.row}).encode())
            line.recv(4096)
            status = 0
        finally:
            os._exit(status)

    it.become = note
    it.workers.start()
    for child in it.children:
        select.select([child.line.fd], [], [])
        told = json.loads(os.read(child.line.fd, 4096))
        assert told["own"] == child.slot.row
        born.append(told["rows"])
    assert born == [[0, 1, 2]] * 3
    victim = it.children[1]
    it.become = serve
    it.workers.drain([])  # Nobody comes in its place.

    it.reap(victim, signal.SIGKILL)

    assert victim.slot.index == 1
    assert it.rows == [0, 2]


def test_without_a_need_children_have_no_row(family: Make) -> None:
    """Without the limit new children have no row, and those of before give theirs back."""
    it = family(2)
    it.workers.start()
    it.hear()
    it.census.wanted = False
    for child in it.children:
        it.reap(child, signal.SIGKILL)

    assert [child.slot.row for child in it.children] == [None, None]
    assert it.rows == []


def test_a_census_without_room_is_a_failed_start(family: Make) -> None:
    """A child for which there is no row is not born, and holds no slot."""
    it = family(1)
    os.pwrite(it.census.fd, b"\1" * Census.ROWS, mmap.PAGESIZE)
    it.workers.start()

    assert it.children == []
    assert occupied(it.segment) == []
    assert "census" in str(it.log.of("worker_start_failed")[0]["problem"])
    os.pwrite(it.census.fd, bytes(Census.ROWS), mmap.PAGESIZE)
    it.wait_for_start()
    assert it.rows == [0]
