"""The worker processes as the supervisor sees them: started, watched, replaced, told to end.

A child is *current* if it belongs to this configuration and has not asked to leave. There should
always be so many current children as the configuration says; when so many are ready, the others are
told to drain, and not before. That one rule is a start (there are no others), a reload (the others
are the generation before) and the replacement of a worker that somebody has sent SIGTERM.

A worker that dies is replaced at once. If all have died once and none of them lived long, each
further round waits twice as long as the one before. When so many rounds in a row could not even
begin to serve, and nobody else serves, it is time to give up: whoever started the daemon should
know (systemd.service(5), Restart=).
"""

import os
import signal
import socket
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from lpechod.engine.loop import Loop
from lpechod.engine.wheel import Timer
from lpechod.net.eventlog import EventLog
from lpechod.ops.census import Census
from lpechod.ops.counters import Totals
from lpechod.ops.segment import Segment, SegmentFullError, Slot, SlotState
from lpechod.process.lifeline import Lifeline, Message, open_lifeline
from lpechod.process.signals import signals_blocked

STATES = ("starting", "ready", "draining", "stalled")
"""Of ``lpechod_workers``: ``stalled`` is one that has given no sign of life for a while."""

_FIRST_DELAY_SECONDS = 0.1
_LONGEST_DELAY_SECONDS = 10.0
_LONG_LIFE_SECONDS = 10.0
"""Whoever has served for so long did not die of what it met at its start."""

MAX_FAILED_STARTS = 8
"""For each worker, in a row, before the daemon gives up: after 6 seconds, with the delays."""


@dataclass(slots=True, eq=False)
class Child:
    """A worker process; times are seconds of the loop's clock."""

    pid: int
    segment: Segment
    slot: Slot
    line: Lifeline = field(init=False)
    current: bool = True
    ready_at: float | None = None
    told: bool = False
    """Whether it has been told to drain."""
    doom: str | None = None
    """Why it was killed, if it was us."""
    beats: int = 0
    silent_s: float = 0.0

    @property
    def ready(self) -> bool:
        """Whether it is up, and has not been told to drain."""
        return self.ready_at is not None and not self.told


class Workers(Timer):
    """Keeps the worker processes; as a timer, it starts those whose delay is over.

    Args:
        count: how many there should be.
        segment: the shared memory for new ones.
        become: called in a new process with its slot and its end of the line; neither returns nor
            raises, as there would be two supervisors then.
        loop: where to wait.
        log: gets a line for each that ends.
        restarts: how many were started in place of ones that had died before.
        census: where workers count their clients for each other, if any do.
    """

    __slots__ = (
        "_become",
        "_bereaved",
        "_census",
        "_count",
        "_delayed",
        "_failed_starts",
        "_log",
        "_loop",
        "_segment",
        "_short_lives",
        "_stopping",
        "children",
        "on_change",
        "on_hopeless",
        "on_settled",
        "restarts",
    )

    def __init__(
        self,
        count: int,
        segment: Segment,
        become: Callable[[Slot, socket.socket], NoReturn],
        loop: Loop,
        log: EventLog,
        restarts: int = 0,
        census: Census | None = None,
    ) -> None:
        super().__init__()
        self._count = count
        self._segment = segment
        self._census = census
        self._become = become
        self._loop = loop
        self._log = log
        self._stopping = False
        self._bereaved = 0
        self._short_lives = 0
        self._failed_starts = 0
        self._delayed = 0
        self.restarts = restarts
        self.children: dict[int, Child] = {}
        self.on_settled: Callable[[], None] = _nothing
        """Called each time that all current children are ready after a change."""
        self.on_hopeless: Callable[[], None] = _nothing
        """Called each time that one more start has failed, after too many in a row."""
        self.on_change: Callable[[], None] = _nothing
        """Called when a child has become ready or has ended."""

    @property
    def ready(self) -> int:
        """How many accept connections, whatever their generation."""
        return sum(child.ready for child in self.children.values())

    def adopt(
        self, pid: int, segment: Segment, slot: Slot, line: int, told: bool, silent_s: float
    ) -> None:
        """Take over a child of the configuration before.

        Args:
            pid: its process id.
            segment: the shared memory that its slot is in.
            slot: where it counts.
            line: the descriptor of our end of the line.
            told: whether it has been told to drain.
            silent_s: for how long it has given no sign of life, in seconds.
        """
        child = Child(pid, segment, slot, current=False, told=told)
        child.ready_at = None if slot.state is SlotState.STARTING else self._loop.now
        child.beats, child.silent_s = slot.beats, silent_s
        self._connect(child, socket.socket(fileno=line))
        self.children[child.pid] = child

    def start(self) -> None:
        """Start as many as there should be."""
        # All slots first: so the first worker knows that it is not alone, and leaves connections to
        # those that are about to be born.
        slots = [self._claim() for _ in range(self._count - self._currents())]
        for slot in slots:
            self._fork(slot)
        self.settle()

    def drain(self, finish: Collection[str] | None) -> None:
        """Tell all to drain, and replace nobody any more.

        Args:
            finish: as for the message: names of the listeners whose queue is to be served first;
                None: all.
        """
        self._stopping = True
        self._loop.cancel(self)
        for child in self.children.values():
            self._tell(child, finish)

    def retire(self, finish: Collection[str]) -> None:
        """Tell those to drain who are not current."""
        for child in self.children.values():
            if not child.current:
                self._tell(child, finish)

    def cut(self) -> None:
        """Tell all to end at once."""
        for child in self.children.values():
            child.line.send("cut")

    def kill(self, child: Child, reason: str) -> None:
        """Kill a child that would not end otherwise; also one that is stopped (signal(7))."""
        child.doom = reason
        os.kill(child.pid, signal.SIGKILL)

    def states(self, stalled: Callable[[Child], bool]) -> dict[str, int]:
        """Count the children by state."""
        states = dict.fromkeys(STATES, 0)
        for child in self.children.values():
            if stalled(child):
                states["stalled"] += 1
            elif child.told or child.slot.state is SlotState.DRAINING:
                states["draining"] += 1
            else:
                states["starting" if child.ready_at is None else "ready"] += 1
        return states

    def segments(self) -> list[Segment]:
        """List the shared memory in use, that for new workers first."""
        used = [self._segment, *(child.segment for child in self.children.values())]
        return list(dict.fromkeys(used))

    def describe(self, segments: Sequence[Segment]) -> list[dict[str, Any]]:
        """Return what `adopt` needs of each child; segments by their place in a list."""
        return [
            {
                "pid": child.pid,
                "segment": segments.index(child.segment),
                "slot": child.slot.index,
                "line": child.line.fd,
                "told": child.told,
                "silent_s": child.silent_s,
            }
            for child in self.children.values()
        ]

    def totals(self) -> Iterable[Totals]:
        """Return what the living have counted."""
        return [child.slot.totals() for child in self.children.values()]

    def ended(self, pid: int, code: int) -> bool:
        """Take note of a process that has been waited for.

        Args:
            pid: the process.
            code: its exit status, or a signal's number, negated.

        Returns:
            Whether it was one of these.
        """
        child = self.children.pop(pid, None)
        if child is None:
            return False
        child.line.close()
        self._retire_totals(child)
        self._report(child, code)
        if child.current and not self._stopping:
            self._replace(child)
        self.settle()
        self.on_change()
        return True

    def abandon(self) -> None:
        """Close, after fork(2), what belongs to the supervisor and its other children."""
        for child in self.children.values():
            child.line.abandon()

    def on_deadline(self, _now: float) -> None:
        """Start those whose delay is over."""
        delayed, self._delayed = self._delayed, 0
        for _ in range(delayed):
            self._fork(self._claim())

    def _currents(self) -> int:
        return sum(child.current for child in self.children.values())

    def _claim(self) -> Slot | None:
        slot = None
        try:
            slot = self._segment.claim()
            if self._census is not None and self._census.wanted:
                slot.row = self._census.claim()
        except (SegmentFullError, OSError) as error:
            if slot is not None:
                self._release(self._segment, slot)
            self._cannot_start(error)
            return None
        return slot

    def _release(self, segment: Segment, slot: Slot) -> None:
        if self._census is not None and slot.row is not None:
            self._census.release(slot.row)
        segment.release(slot)

    def _fork(self, slot: Slot | None) -> None:
        if slot is None:
            return
        if self._stopping:  # It was given up while the first ones were started.
            self._release(self._segment, slot)
            return
        try:
            ours, theirs = open_lifeline()
        except OSError as error:
            self._release(self._segment, slot)
            self._cannot_start(error)
            return
        child = Child(0, self._segment, slot)
        with theirs, signals_blocked():
            try:
                self._connect(child, ours)  # Before the fork: the poller may have no room.
                child.pid = _fork_from(child.line)
            except OSError as error:
                self._release(self._segment, slot)
                self._cannot_start(error)
                return
            if child.pid == 0:
                child.line.abandon()
                self._become(slot, theirs)
        if self._bereaved:
            self._bereaved -= 1
            self.restarts += 1
        self.children[child.pid] = child

    def _connect(self, child: Child, line: socket.socket) -> None:
        child.line = Lifeline(
            line, self._loop, lambda message: self._hear(child, message), _nothing
        )

    def _cannot_start(self, error: Exception) -> None:
        self._log.error("worker_start_failed", problem=str(error))
        self._failed_starts += 1
        self._delay(max(1, self._failed_starts - self._count))
        self._despair()

    def _hear(self, child: Child, message: Message) -> None:
        if message["type"] == "ready":
            child.ready_at = self._loop.now
            self._failed_starts = 0
            self.on_change()
            self.settle()
        elif message["type"] == "leave" and child.current and not self._stopping:
            child.current = False
            self._delay(1)

    def _tell(self, child: Child, finish: Collection[str] | None) -> None:
        if not child.told or finish is None:
            child.told = True
            child.line.send("drain", finish=None if finish is None else list(finish))

    def settle(self) -> None:
        """Tell if there are as many as there should be, as each time when that may have changed."""
        ready = sum(child.current and child.ready for child in self.children.values())
        if ready >= self._count and not self._stopping:
            self.on_settled()

    def _retire_totals(self, child: Child) -> None:
        ours = self._segment
        ours.retired = Totals.sum([ours.retired, child.slot.totals().retire()])
        self._release(child.segment, child.slot)

    def _report(self, child: Child, code: int) -> None:
        if code == 0 and child.doom is None:
            self._log.info("worker_ended", worker=child.pid)
            return
        how = {"status": code} if code >= 0 else {"signal": _signal_name(-code)}
        why = {} if child.doom is None else {"reason": child.doom}
        self._log.error("worker_died", worker=child.pid, **how, **why)

    def _replace(self, child: Child) -> None:
        if child.ready_at is None:
            self._failed_starts += 1
        elif self._loop.now - child.ready_at >= _LONG_LIFE_SECONDS:
            self._short_lives = 0
        self._short_lives += 1
        self._bereaved += 1
        if self._short_lives <= self._count:
            self._fork(self._claim())
        else:
            self._delay(self._short_lives - self._count)
        self._despair()

    def _delay(self, failures: int) -> None:
        """Start one more child later, after so many failures over all workers."""
        rounds = (failures - 1) // self._count
        delay = min(_FIRST_DELAY_SECONDS * 2 ** min(rounds, 10), _LONGEST_DELAY_SECONDS)
        self._delayed += 1
        self._loop.hasten(self, self._loop.now + delay)

    def _despair(self) -> None:
        if self._failed_starts >= MAX_FAILED_STARTS * self._count:
            self.on_hopeless()


def _fork_from(line: Lifeline) -> int:
    try:
        return os.fork()
    except OSError:
        line.close()
        raise


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # Real-time signals are numbered (signal(7)).
        return f"SIGRTMIN+{number - signal.SIGRTMIN}"


def _nothing() -> None:
    """Tell nobody."""
