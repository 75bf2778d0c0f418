"""The metrics endpoint put together: what is shown, and the sockets it is shown on."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, ProcessCollector

from lpechod.engine.loop import Loop
from lpechod.engine.wheel import Timer
from lpechod.net.acceptor import Acceptor
from lpechod.net.counts import ConnectionCounts
from lpechod.net.eventlog import EventLog
from lpechod.net.listener import Listener
from lpechod.ops.counters import Totals
from lpechod.ops.exporter import Exporter
from lpechod.ops.metrics import DaemonCollector, Standing
from lpechod.ops.pages import Pages

_PAUSE_SECONDS = 0.1
_PATIENCE_SECONDS = 1.0
"""For answers that are under way when the process is about to be replaced. They take milliseconds;
a client that is slower than this reads the page of a process that is gone."""


class MetricsEndpoint(Timer):
    """Serves the exporter's pages.

    Args:
        listeners: where.
        totals: returns the sum over all workers.
        standing: returns how the daemon stands.
        ready: tells whether connections are being served.
        token: what a scraper has to send, None if nothing.
        loop: where it lives.
        log: gets defects of ours.
    """

    def __init__(
        self,
        listeners: list[Listener],
        totals: Callable[[], Totals],
        standing: Callable[[], Standing],
        ready: Callable[[], bool],
        token: str | None,
        loop: Loop,
        log: EventLog,
    ) -> None:
        super().__init__()
        registry = CollectorRegistry(auto_describe=True)
        registry.register(DaemonCollector(totals, standing))
        ProcessCollector(registry=registry)
        self._loop = loop
        self._log = log
        contexts = {
            listener.name: listener.entrance.tls
            for listener in listeners
            if listener.entrance.tls is not None
        }
        self._exporter = Exporter(Pages(registry, ready, token), loop, log, contexts)
        self._acceptor = self._accept_from(listeners)
        self._give_up_at = 0.0
        self._on_quiet: Callable[[], None] | None = None

    def start(self) -> None:
        """Begin to accept, or go on; takes a `pause` back."""
        self._on_quiet = None
        self._loop.cancel(self)
        self._acceptor.start()

    def finish(self, listeners: list[Listener]) -> None:
        """Serve what waits in the queues of other listeners, and close those."""
        self._accept_from(listeners).drain()

    def pause(self, on_quiet: Callable[[], None]) -> None:
        """Accept nobody until `start`, and see the present clients off.

        Args:
            on_quiet: called when nobody is left, or after a second at most.
        """
        self._acceptor.stop()
        self._on_quiet = on_quiet
        self._give_up_at = self._loop.now + _PATIENCE_SECONDS
        self.on_deadline(self._loop.now)

    def on_deadline(self, now: float) -> None:
        """Look whether somebody is left."""
        if self._exporter.clients and now < self._give_up_at:
            self._loop.schedule(self, now + _PAUSE_SECONDS)
        elif self._on_quiet is not None:
            on_quiet, self._on_quiet = self._on_quiet, None
            on_quiet()

    def close(self) -> None:
        """Serve what waits to be accepted as far as that is possible at once, and close all."""
        self._acceptor.drain()
        self._exporter.close()

    def abandon(self) -> None:
        """Close the copies of its clients that fork(2) has made; listeners are their owner's."""
        self._exporter.abandon()

    def _accept_from(self, listeners: list[Listener]) -> Acceptor:
        # Counted apart: these are no connections of the service.
        return Acceptor(
            listeners, self._exporter.welcome, ConnectionCounts(), self._loop, self._log
        )
