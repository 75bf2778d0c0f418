"""Watches the heartbeats of the workers: kills who hangs, and feeds the service manager's.

A worker that hangs in a system call or an endless loop keeps its connections and serves none of
them; no time-out of its own can help it. Silence is counted in looks of ours, not read off a clock:
if the whole machine, or all of our processes, stood still, the first look afterwards blames nobody.

systemd is given its sign of life from here, so from the supervisor's loop, and only while every
worker gives one, too. The supervisor kills a hanging worker well before systemd, which would end
them all, runs out of patience (systemd.service(5), WatchdogSec=).
"""

from lpechod.engine.loop import Loop
from lpechod.engine.wheel import Timer
from lpechod.net.eventlog import EventLog
from lpechod.process.systemd import Notifier
from lpechod.process.workers import Child, Workers

_LOOK_SECONDS = 0.5
_LOOKS = 5
"""Least number of looks before somebody is killed."""

_STALLED_SECONDS = 1.0

_LEAST_LIMIT_SECONDS = 1.0
"""However impatient the manager is: a worker that is only busy must not be killed."""


class Watchdog(Timer):
    """Looks at the workers' heartbeats again and again.

    Args:
        workers: who is watched.
        limit_s: silence after which a worker is killed; infinity for never.
        manager_s: time within which the service manager wants a sign of life; None if it does not.
        notifier: talks to the service manager.
        loop: where to wait.
        log: gets a line for each that is killed.
    """

    __slots__ = (
        "_due_at", "_fed_at", "_limit_s", "_log", "_loop", "_manager_s", "_notifier", "_workers",
    )  # fmt: skip

    def __init__(
        self,
        workers: Workers,
        limit_s: float,
        manager_s: float | None,
        notifier: Notifier,
        loop: Loop,
        log: EventLog,
    ) -> None:
        super().__init__()
        self._workers = workers
        if manager_s is not None:
            limit_s = min(limit_s, max(_LEAST_LIMIT_SECONDS, manager_s / 2))
        self._limit_s = limit_s
        self._manager_s = manager_s
        self._notifier = notifier
        self._loop = loop
        self._log = log
        self._fed_at = self._due_at = loop.now
        if self._manager_s is not None:
            # A reload begins here anew, and one may follow the other for longer than its patience.
            notifier.feed_watchdog()
        self._schedule(loop.now)

    def on_deadline(self, now: float) -> None:
        """Look at everybody."""
        stalled = False
        for child in self._workers.children.values():
            self._look_at(child)
            stalled = stalled or self.stalled(child)
        if (
            self._manager_s is not None
            and not stalled
            and now - self._fed_at >= self._manager_s / 4
        ):
            self._fed_at = now
            self._notifier.feed_watchdog()
        self._notifier.flush()
        self._schedule(now)

    def stalled(self, child: Child) -> bool:
        """Tell whether a worker has given no sign of life for a while."""
        return child.silent_s >= min(_STALLED_SECONDS, self._limit_s)

    def _look_at(self, child: Child) -> None:
        beats = child.slot.beats
        child.silent_s = child.silent_s + self._interval() if beats == child.beats else 0.0
        child.beats = beats
        if child.silent_s >= self._limit_s and child.doom is None:
            self._log.error("worker_hung", worker=child.pid, silent_s=round(child.silent_s, 1))
            self._workers.kill(child, "no sign of life")

    def _interval(self) -> float:
        wanted = min(self._limit_s, self._manager_s or self._limit_s)
        return max(0.1, min(_LOOK_SECONDS, wanted / _LOOKS))

    def _schedule(self, now: float) -> None:
        """Look again an interval after the present look was due; it is late, if only by a tick.

        Else the delays would add up: to a kill after 12 seconds of silence instead of 10. But two
        looks in short order, after everything stood still, would count as much as any two.
        """
        interval = self._interval()
        due_at = self._due_at + interval
        self._due_at = due_at if due_at >= now + interval / 2 else now + interval
        self._loop.schedule(self, self._due_at)
