"""Signals, real ones, through the pipe into the loop."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from lpechod.engine.loop import Loop
from lpechod.engine.poller import open_poller
from lpechod.engine.signals import SignalPipe
from tests.fake_time import FakeClock

_TAKEN = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


@pytest.fixture(name="loop", params=["auto", "poll", "select"])
def _loop(request: pytest.FixtureRequest) -> Iterator[Loop]:
    loop = Loop(open_poller(request.param), FakeClock())
    yield loop
    loop.close()


@pytest.fixture(name="received")
def _received() -> list[int]:
    return []


@pytest.fixture(name="pipe")
def _pipe(loop: Loop, received: list[int]) -> Iterator[SignalPipe]:
    pipe = SignalPipe(loop, _TAKEN, received.append)
    yield pipe
    pipe.close()


def _kill(*numbers: signal.Signals) -> None:
    """Send ourselves signals; each is delivered before kill(2) returns (POSIX)."""
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.usefixtures("pipe")
class TestDelivery:
    """From the kernel to the loop."""

    def test_in_order(self, loop: Loop, received: list[int]) -> None:
        """Signals reach the loop in the order in which they came, repetitions included."""
        _kill(signal.SIGUSR1, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
        assert received == []

        loop.turn()
        assert received == [signal.SIGUSR1, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]

    def test_delivered_once(self, loop: Loop, received: list[int]) -> None:
        """A delivered signal does not come again with the next one."""
        _kill(signal.SIGUSR1)
        loop.turn()
        _kill(signal.SIGUSR2)
        loop.turn()

        assert received == [signal.SIGUSR1, signal.SIGUSR2]

    def test_ends_a_wait_without_time_out(self, loop: Loop, received: list[int]) -> None:
        """A signal makes a poll return that would otherwise have waited for ever."""
        somebody = threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGUSR1))
        somebody.start()
        loop.turn()
        somebody.join()

        assert received == [signal.SIGUSR1]

    def test_others_are_ignored(self, loop: Loop, received: list[int]) -> None:
        """A signal that somebody else handles wakes the loop, and is left to its own handler."""
        handled: list[int] = []
        before = signal.signal(signal.SIGWINCH, lambda number, _frame: handled.append(number))
        try:
            _kill(signal.SIGWINCH, signal.SIGUSR2)
            loop.turn()
        finally:
            signal.signal(signal.SIGWINCH, before)

        assert received == [signal.SIGUSR2]
        assert handled == [signal.SIGWINCH]

    def test_nothing_arrived(self, pipe: SignalPipe, received: list[int]) -> None:
        """A wake-up for which there is nothing in the pipe does not block and does nothing."""
        pipe.on_ready(1, 0.0)

        assert received == []

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux can shrink a pipe")
    def test_full_pipe(
        self,
        loop: Loop,
        pipe: SignalPipe,
        received: list[int],
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        """When more signals come than the pipe holds, the first ones count and nobody complains."""
        room = fcntl.fcntl(pipe._writer, fcntl.F_SETPIPE_SZ, 4096)
        for _ in range(room):
            _kill(signal.SIGUSR1)
        for _ in range(100):
            _kill(signal.SIGUSR2)
        loop.turn()
        assert received == [signal.SIGUSR1] * room

        _kill(signal.SIGUSR2)
        loop.turn()
        assert received[room:] == [signal.SIGUSR2]
        assert capfd.readouterr() == ("", "")

    def test_more_than_one_read_takes(
        self, loop: Loop, pipe: SignalPipe, received: list[int]
    ) -> None:
        """What one read leaves in the pipe comes with the next turn."""
        os.write(pipe._writer, bytes([signal.SIGUSR1]) * 5000)
        loop.turn()
        loop.turn()

        assert received == [signal.SIGUSR1] * 5000


class TestDefects:
    """Handlers that raise."""

    def test_end_the_process(self, loop: Loop) -> None:
        """A defect in the handling of a signal leaves the loop: nobody else could be told."""

        def fail(number: int) -> None:
            raise RuntimeError(f"signal {number}")

        pipe = SignalPipe(loop, _TAKEN, fail)
        try:
            _kill(signal.SIGUSR1)
            with pytest.raises(RuntimeError, match=f"signal {signal.SIGUSR1:d}"):
                loop.turn()
        finally:
            pipe.close()


class TestClose:
    """What is left behind."""

    def test_handlers_are_restored(self, loop: Loop, received: list[int]) -> None:
        """After closing, each signal has the handler that it had before."""
        handlers: dict[signal.Signals, Callable[..., None] | signal.Handlers] = {
            signal.SIGUSR1: lambda number, _frame: received.append(-number),
            signal.SIGUSR2: signal.SIG_IGN,
            signal.SIGHUP: signal.SIG_DFL,
        }
        before = {number: signal.signal(number, how) for number, how in handlers.items()}
        try:
            pipe = SignalPipe(loop, _TAKEN, received.append)
            _kill(*_TAKEN)
            loop.turn()
            pipe.close()
            assert {number: signal.getsignal(number) for number in _TAKEN} == handlers

            _kill(signal.SIGUSR1)
        finally:
            for number, how in before.items():
                signal.signal(number, how)
        assert received == [*_TAKEN, -signal.SIGUSR1]

    def test_wake_up_descriptor_is_restored(self, loop: Loop) -> None:
        """After closing, whoever had the wake-up descriptor before has it again."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        before = signal.set_wakeup_fd(writer)
        try:
            SignalPipe(loop, _TAKEN, lambda _number: None).close()
            current = signal.set_wakeup_fd(before)
        finally:
            os.close(reader)
            os.close(writer)

        assert current == writer

    def test_descriptors_are_closed(self, loop: Loop) -> None:
        """After closing, the pipe is gone, and the loop watches nothing."""
        pipe = SignalPipe(loop, _TAKEN, lambda _number: None)
        pipe.close()

        for fd in (pipe._reader, pipe._writer):
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)
        assert not loop._sources

    def test_handler_that_python_does_not_know(self, loop: Loop) -> None:
        """A handler installed by foreign code, which can't be put back, becomes the default."""
        pipe = SignalPipe(loop, _TAKEN, lambda _number: None)
        pipe._previous[signal.SIGUSR1] = None
        pipe.close()

        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL

    def test_not_inherited(self, pipe: SignalPipe) -> None:
        """A program that the process executes gets neither end of the pipe."""
        assert not os.get_inheritable(pipe._reader)
        assert not os.get_inheritable(pipe._writer)


_BECOMES_ANOTHER = """
import os, signal
from lpechod.engine.loop import Loop
from lpechod.engine.poller import open_poller
from lpechod.engine.signals import SignalPipe

TAKEN = (signal.SIGUSR1, signal.SIGUSR2)

def become_another(number):
    print(signal.Signals(number).name)
    if number == signal.SIGUSR1:
        signal.pthread_sigmask(signal.SIG_BLOCK, TAKEN)
        pipe.hand_back()
        print(*(each.name for each in signal.sigpending()))

loop = Loop(open_poller("auto"), lambda: 0.0)
pipe = SignalPipe(loop, TAKEN, become_another)
for number in TAKEN:
    os.kill(os.getpid(), number)
loop.turn()
signal.pthread_sigmask(signal.SIG_UNBLOCK, TAKEN)
loop.turn()
"""
"""In a process of its own: a thread of somebody else's would take signals that this one blocks."""


def test_what_came_in_the_same_turn_is_handed_back() -> None:
    """A signal that arrived with the one that leads to another program waits for that program."""
    command = [sys.executable, "-c", _BECOMES_ANOTHER]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.split() == ["SIGUSR1", "SIGUSR2", "SIGUSR2"]
