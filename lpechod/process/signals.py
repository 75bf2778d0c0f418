"""The signals that the daemon handles, and how they are held back while nobody can."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

HANDLED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)

IGNORED_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)
"""What other daemons reopen their logs by, or upgrade. By default they would end this one."""


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Hold back the signals that we handle; the kernel keeps them.

    Around fork(2): the handlers of the parent are the child's, too, and write into the same pipe,
    so a SIGTERM that met the child before it has its own would end the daemon. And around
    execve(2): before the new program has its handlers, a SIGHUP would end it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
