"""The end of the daemon: sees that it comes, and tells the service manager how far it is.

Workers keep ``drain_timeout`` themselves. Here is what happens to those that do not: the ones of
before a reload, which may have been given more time, are told to cut, and whoever still does not
end, because it is stopped or has a defect, is killed.
"""

from collections.abc import Callable

from lpechod.engine.loop import Loop
from lpechod.engine.wheel import Timer
from lpechod.process.systemd import Notifier
from lpechod.process.workers import Workers

_REPORT_SECONDS = 1.0
_EXTENSION_SECONDS = 5.0
"""Asked of the service manager with each report: time for several more of them."""

_GRACE_SECONDS = 5.0
"""Between the cut, when ``drain_timeout`` is over, and the kill: a worker takes a moment to hear of
it, to close and log what is left, and to exit."""


class Ending(Timer):
    """Ends the workers.

    Args:
        workers: who is to end.
        connections: returns how many connections are left.
        notifier: talks to the service manager.
        loop: where to wait.
    """

    __slots__ = ("_connections", "_kill_at", "_loop", "_notifier", "_workers")

    def __init__(
        self,
        workers: Workers,
        connections: Callable[[], int],
        notifier: Notifier,
        loop: Loop,
    ) -> None:
        super().__init__()
        self._workers = workers
        self._connections = connections
        self._notifier = notifier
        self._loop = loop
        self._kill_at = 0.0

    def begin(self, drain_timeout_s: float) -> None:
        """Have all workers drain, and report until they are gone."""
        self._workers.drain(None)
        self._kill_at = self._loop.now + drain_timeout_s + _GRACE_SECONDS
        self.on_deadline(self._loop.now)

    def hurry(self) -> None:
        """Have all workers end at once; who does not is killed a second later."""
        self._workers.cut()
        # A third signal does not put off what the second has ordered.
        self._kill_at = min(self._kill_at, self._loop.now + _REPORT_SECONDS)
        self._loop.hasten(self, self._kill_at)

    def on_deadline(self, now: float) -> None:
        """Report, and end those whose time is over."""
        left = self._connections()
        self._notifier.extend_timeout(_EXTENSION_SECONDS)
        self._notifier.status(f"Draining, {left} connection{'s' * (left != 1)} left")
        if now >= self._kill_at:
            for child in self._workers.children.values():
                self._workers.kill(child, "did not end in time")
        elif now >= self._kill_at - _GRACE_SECONDS:
            self._workers.cut()
        due = (now + _REPORT_SECONDS, self._kill_at - _GRACE_SECONDS, self._kill_at)
        self._loop.schedule(self, min(at for at in due if at > now))
