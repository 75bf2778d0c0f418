"""Processes that put load on a server: all get ready, begin at the same time, and report.

A job is an object that can be pickled. Its process stays for the next job, so that rounds of
several servers can be interleaved without the price of new processes.
"""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Protocol, Self

PATIENCE_SECONDS = 120
"""How long to wait for a process: turns a hang into a failure."""


class Signals:
    """What a job tells, and is told."""

    def __init__(self, pipe: "Connection[Any, Any]") -> None:
        self._pipe = pipe

    def ready(self) -> None:
        """Tell that all is prepared, and wait for the others."""
        self._pipe.send(None)
        self._pipe.recv()

    @property
    def over(self) -> bool:
        """Whether the job is to end; for jobs that have no end of their own."""
        return self._pipe.poll()

    def wait(self) -> None:
        """Wait until the job is to end."""
        self._pipe.poll(None)

    def go_on(self) -> None:
        """Take what told that the job is to end as the end of a part of it only."""
        self._pipe.recv()


class Job(Protocol):
    """Something that a process of a crew does."""

    def run(self, signals: Signals) -> object:
        """Prepare, call `Signals.ready`, work, and return what is to be reported.

        Whoever calls it several times, or `Signals.go_on`, has parts; `Crew.begin` begins each, and
        ends one that has no end of its own.
        """


class Crew:
    """Some processes for jobs.

    Args:
        size: how many.
        cpu: where they run.
        nice: their niceness; less than that of this process only if the system allows it.
    """

    def __init__(self, size: int, cpu: int, nice: int = 0) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection[Any, Any]] = []
        self._processes = []
        self._busy = 0
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, cpu, nice), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def prepare(self, jobs: Sequence[Job]) -> None:
        """Hand out jobs, one for each process, and wait until all are ready."""
        assert not self._busy
        assert len(jobs) <= len(self._pipes)
        self._busy = len(jobs)
        for pipe, job in zip(self._pipes, jobs, strict=False):
            pipe.send(job)
        self.await_ready()

    def await_ready(self) -> None:
        """Wait until all are ready, once more."""
        self._gather()

    def begin(self) -> None:
        """Have all that are ready begin."""
        for pipe in self._pipes[: self._busy]:
            pipe.send(None)

    def stop(self) -> list[Any]:
        """Have jobs end that have no end of their own, and return what they report."""
        self.begin()
        return self.collect(stopped=True)

    def collect(self, *, stopped: bool = False) -> list[Any]:
        """Wait until all have ended, and return what they report."""
        reports = self._gather()
        if not stopped:
            self.begin()
        self._busy = 0
        return reports

    def _gather(self) -> list[Any]:
        reports = []
        give_up_at = time.monotonic() + PATIENCE_SECONDS
        for pipe in self._pipes[: self._busy]:
            if not pipe.poll(max(give_up_at - time.monotonic(), 0)):
                raise AssertionError("a load process does not answer")
            try:
                report = pipe.recv()
            except EOFError:
                raise AssertionError("a load process has died; see above") from None
            if isinstance(report, Exception):
                raise report
            reports.append(report)
        return reports

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()


def _work(pipe: "Connection[Any, Any]", cpu: int, nice: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent ends us.
    os.sched_setaffinity(0, {cpu})
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, nice)
    with contextlib.suppress(EOFError):  # The parent is gone.
        while True:
            job = pipe.recv()
            try:
                pipe.send(job.run(Signals(pipe)))
            except Exception as error:  # noqa: BLE001 - raised in the parent.
                pipe.send(error)
            pipe.recv()
