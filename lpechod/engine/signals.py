"""Signals as bytes in a pipe: a handler may interrupt any line of ours, a byte waits its turn.

The interpreter's C handler writes the number of each signal to the pipe (signal.set_wakeup_fd),
which makes the poller return; what a signal means is decided in the loop. The Python handlers that
have to exist for it do nothing. A full pipe loses nothing that matters: 64 KiB of signals wait.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterable

from lpechod.engine.loop import Loop
from lpechod.engine.poller import READABLE


class SignalPipe:
    """Delivers signals in the loop.

    Args:
        loop: where to deliver.
        numbers: which signals to take over.
        on_signal: called in the loop with each number.
    """

    __slots__ = (
        "_arrived",
        "_loop",
        "_on_signal",
        "_previous",
        "_previous_fd",
        "_reader",
        "_writer",
    )

    def __init__(
        self, loop: Loop, numbers: Iterable[signal.Signals], on_signal: Callable[[int], None]
    ) -> None:
        self._loop = loop
        self._on_signal = on_signal
        self._arrived = bytearray()
        self._reader, self._writer = os.pipe()  # Not pipe2(2), which macOS lacks.
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, _ignore) for number in numbers}
        loop.register(self._reader, self, READABLE)

    def on_ready(self, _mask: int, _now: float) -> None:
        """Deliver what has arrived, in order."""
        self._read()
        while self._arrived:
            # One by one: what a signal leads to may be `hand_back`, which wants those behind it.
            self._on_signal(self._arrived.pop(0))

    def on_failure(self, error: Exception, _now: float) -> None:
        """Let a defect in a signal's handling end the process: there is nobody else to tell."""
        raise error

    def hand_back(self) -> None:
        """Have the kernel deliver once more what has arrived here and not been delivered.

        To be called while the signals are blocked: they then wait for whoever handles them next.
        """
        self._read()
        for number in self._arrived:
            os.kill(os.getpid(), number)
        self._arrived.clear()

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            numbers = os.read(self._reader, 4096)
            # The pipe gets every signal that has a Python handler, not only ours.
            self._arrived += bytes(number for number in numbers if number in self._previous)

    def abandon(self) -> None:
        """Close the copies that fork(2) has made; the parent's poller knows the pipe by its own."""
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._reader)
        os.close(self._writer)

    def close(self) -> None:
        """Restore the handlers that were there before."""
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python, and can't be put back from it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._loop.unregister(self._reader)
        os.close(self._reader)
        os.close(self._writer)


def _ignore(_number: int, _frame: object) -> None:
    """Exist, so that the C handler is installed."""
