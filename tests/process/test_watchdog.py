"""When the watchdog kills: by its looks, in a loop whose time is a test's."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

import pytest

from lpechod.engine.loop import Loop
from lpechod.engine.poller import EpollPoller
from lpechod.ops.segment import Segment
from lpechod.process.systemd import Notifier
from lpechod.process.watchdog import Watchdog
from lpechod.process.workers import Child, Workers
from tests.fake_time import FakeClock, FakeTimePoller
from tests.net.harness import RecordingLog

SLEEP = [sys.executable, "-c", "import signal; signal.pause()"]


class Hung:
    """A watchdog, and one worker that gives no sign of life: a process that only waits.

    Args:
        limit_s: the watchdog's patience, in seconds.
        stack: closes what is opened here.
    """

    def __init__(self, limit_s: float, stack: ExitStack) -> None:
        # The time of a real clock is never that of a tick, or looks would be late by chance only.
        self.clock = FakeClock(1000.0004)
        self.loop = Loop(FakeTimePoller(EpollPoller(), self.clock), self.clock)
        stack.callback(self.loop.close)
        segment = Segment.create()
        stack.callback(segment.close)
        self.log = RecordingLog()
        self.workers = Workers(1, segment, self._become, self.loop, self.log)
        self.process = stack.enter_context(subprocess.Popen(SLEEP))
        stack.callback(self.process.kill)
        self.child = Child(self.process.pid, segment, segment.claim())
        self.workers.children[self.process.pid] = self.child
        notifier = Notifier(None)
        stack.callback(notifier.close)
        self.watchdog = Watchdog(self.workers, limit_s, None, notifier, self.loop, self.log)
        # The first look finds a beat that there has never been one before.
        self.child.slot.beats = 1

    def _become(self, *_: object) -> NoReturn:
        raise AssertionError("nobody is to be started")

    def wait_for_kill(self) -> float:
        """Let time pass until the worker is killed, and return for how long it was silent."""
        while not self.child.beats:
            self.loop.turn()
        began = self.loop.now
        while self.child.doom is None:
            self.loop.turn()
        assert self.process.wait() == -signal.SIGKILL
        return self.loop.now - began


@pytest.fixture(name="stack")
def _stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("limit_s", [1.0, 2.0, 10.0, 60.0])
def test_patience_does_not_grow_with_its_looks(stack: ExitStack, limit_s: float) -> None:
    """However often it looks, and late each time, it kills after the limit and a tick or two."""
    assert limit_s - 0.1 <= Hung(limit_s, stack).wait_for_kill() <= limit_s + 0.2


def test_who_stood_still_itself_blames_nobody(stack: ExitStack) -> None:
    """After the supervisor has been stopped for long, its looks are as far apart as ever."""
    hung = Hung(2.0, stack)
    while not hung.child.beats:
        hung.loop.turn()
    hung.clock.advance(1000.0)
    looks = []
    for _ in range(3):
        silent = hung.child.silent_s
        while hung.child.silent_s == silent:
            hung.loop.turn()
        looks.append(hung.loop.now)

    assert hung.child.doom is None
    assert all(later - earlier >= 0.35 for earlier, later in pairwise(looks))


def test_it_begins_with_a_sign_of_life(stack: ExitStack, tmp_path: Path) -> None:
    """A program that has just begun, as after each reload, does not wait to give one."""
    manager = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    manager.bind(str(tmp_path / "notify"))
    manager.setblocking(False)
    hung = Hung(10.0, stack)
    notifier = Notifier(str(tmp_path / "notify"))
    stack.callback(notifier.close)
    Watchdog(hung.workers, 10.0, 30.0, notifier, hung.loop, hung.log)
    assert manager.recv(100) == b"WATCHDOG=1"
