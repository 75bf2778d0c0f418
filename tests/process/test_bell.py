"""The bell that wakes those workers who wait: who hears a ring, and how often."""

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from lpechod.engine.loop import Loop
from lpechod.process.bell import Bell, BellListener
from tests.fake_time import FakeClock, FakeTimePoller
from tests.net.harness import POLLERS


class Ear:
    """A listener in a loop of its own, with a clock that only waiting moves.

    Args:
        bell: what to listen to.
        poller: a key of `POLLERS`.
        stack: closes what is opened here.

    Attributes:
        heard: how often it was told of rings.
    """

    def __init__(self, bell: Bell, poller: str, stack: ExitStack) -> None:
        clock = FakeClock()
        self.loop = Loop(FakeTimePoller(POLLERS[poller](), clock), clock)
        stack.callback(self.loop.close)
        self.heard = 0
        self.listener = BellListener(bell, self.loop, self._hear)
        stack.callback(self.listener.close)

    def _hear(self) -> None:
        self.heard += 1

    def turn(self) -> int:
        """Turn until nothing is left to do, and return how often it has heard the bell in all."""
        for _ in range(100):
            self.loop.again(self, 0)  # So no turn waits.
            self.loop.turn()
        return self.heard

    def on_ready(self, _mask: int, _now: float) -> None:
        """Do nothing."""

    def on_failure(self, error: Exception, _now: float) -> None:
        """Let the test fail."""
        raise error


@pytest.fixture(name="stack")
def _stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(name="bell")
def _bell(stack: ExitStack) -> Bell:
    bell = Bell()
    stack.callback(os.close, bell.fd)
    return bell


@pytest.mark.parametrize("poller", POLLERS)
def test_each_ring_wakes_all_who_listen(stack: ExitStack, bell: Bell, poller: str) -> None:
    """A ring is heard once by everybody who listens, and so is the next one."""
    ears = [Ear(bell, poller, stack) for _ in range(3)]
    for ear in ears:
        ear.listener.listen()
    assert [ear.turn() for ear in ears] == [0, 0, 0]
    bell.ring()
    assert [ear.turn() for ear in ears] == [1, 1, 1]
    bell.ring()
    bell.ring()
    assert [ear.turn() for ear in ears] == [2, 2, 2]


@pytest.mark.parametrize("poller", POLLERS)
def test_who_does_not_listen_sleeps(stack: ExitStack, bell: Bell, poller: str) -> None:
    """Whoever rests is not woken, and what has been rung meanwhile wakes nobody later."""
    ear = Ear(bell, poller, stack)
    bell.ring()
    assert ear.turn() == 0
    ear.listener.listen()
    assert ear.turn() == 0
    ear.listener.rest()
    bell.ring()
    assert ear.turn() == 0
    ear.listener.listen()
    ear.listener.listen()
    assert ear.turn() == 0
    bell.ring()
    assert ear.turn() == 1
    ear.listener.rest()
    ear.listener.rest()


def test_another_process_rings(stack: ExitStack, bell: Bell) -> None:
    """A bell that was forked is the same bell, also if who rings has died since."""
    ear = Ear(bell, "epoll", stack)
    ear.listener.listen()
    pid = os.fork()
    if pid == 0:
        bell.ring()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert ear.turn() == 1


def test_not_for_other_programs(bell: Bell) -> None:
    """The bell is closed by execve(2): the program that follows makes another."""
    assert not os.get_inheritable(bell.fd)
