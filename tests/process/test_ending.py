"""When the end of the daemon cuts and kills: in a loop whose time is a test's."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NoReturn

import pytest

from lpechod.engine.loop import Loop
from lpechod.engine.poller import EpollPoller
from lpechod.ops.segment import Segment
from lpechod.process.ending import Ending
from lpechod.process.lifeline import Lifeline, open_lifeline
from lpechod.process.systemd import Notifier
from lpechod.process.workers import Child, Workers
from tests.fake_time import FakeClock, FakeTimePoller
from tests.net.harness import RecordingLog

_ROUNDING = 1e-6

SLEEP = [sys.executable, "-c", "import signal; signal.pause()"]


def _nobody(*_: object) -> NoReturn:
    raise AssertionError("nobody is to be started")


class Stubborn:
    """An end, and a worker that does nothing of what it is told.

    Args:
        stack: closes what is opened here.
    """

    def __init__(self, stack: ExitStack) -> None:
        self.clock = FakeClock(1000.0)
        self.loop = Loop(FakeTimePoller(EpollPoller(), self.clock), self.clock)
        stack.callback(self.loop.close)
        segment = Segment.create()
        stack.callback(segment.close)
        workers = Workers(1, segment, _nobody, self.loop, RecordingLog())
        self.process = stack.enter_context(subprocess.Popen(SLEEP))
        stack.callback(self.process.kill)
        self.child = Child(self.process.pid, segment, segment.claim())
        ours, self.theirs = open_lifeline()
        stack.callback(self.theirs.close)
        self.theirs.setblocking(False)
        self.child.line = Lifeline(ours, self.loop, _nobody, _nobody)
        stack.callback(self.child.line.close)
        workers.children[self.process.pid] = self.child
        notifier = Notifier(None)
        stack.callback(notifier.close)
        self.ending = Ending(workers, lambda: 1, notifier, self.loop)

    def told(self) -> list[str]:
        """Return what the worker has been told since the last time."""
        kinds = []
        try:
            while True:
                kinds.append(json.loads(self.theirs.recv(1000))["type"])
        except BlockingIOError:
            return kinds

    def turn_until_told(self, kind: str) -> float:
        """Let time pass until the worker is told something, and return how much."""
        began = self.clock.now
        while kind not in self.told():
            self.loop.turn()
        return self.clock.now - began

    def turn_until_killed(self) -> float:
        """Let time pass until the worker is killed, and return how much."""
        began = self.clock.now
        while self.child.doom is None:
            self.loop.turn()
        assert self.process.wait() == -signal.SIGKILL
        return self.clock.now - began


@pytest.fixture(name="stubborn")
def _stubborn() -> Iterator[Stubborn]:
    with ExitStack() as stack:
        yield Stubborn(stack)


@pytest.mark.parametrize("drain_timeout_s", [0.3, 1.2, 20.0])
def test_a_drain_is_cut_in_time(stubborn: Stubborn, drain_timeout_s: float) -> None:
    """The cut comes when the time to drain is over, give or take a tick, and the kill later."""
    stubborn.ending.begin(drain_timeout_s)
    assert -_ROUNDING <= stubborn.turn_until_told("cut") - drain_timeout_s <= 0.2
    assert stubborn.turn_until_killed() == pytest.approx(5.0, abs=0.2)


@pytest.mark.parametrize("moment", [0.1, 0.5, 0.95])
def test_a_second_signal_is_obeyed_in_time(stubborn: Stubborn, moment: float) -> None:
    """Who does not end at a second signal is killed a second after that, whenever it comes."""
    stubborn.ending.begin(20.0)
    stubborn.clock.advance(moment)
    stubborn.loop.now = stubborn.clock.now  # As in a turn, which a signal has begun.
    stubborn.ending.hurry()
    assert stubborn.told() == ["drain", "cut"]
    assert 1.0 - _ROUNDING <= stubborn.turn_until_killed() <= 1.2
