"""A worker: the data plane put together, in one loop.

It owns its connections and nothing else: listeners are given to it, signals and metrics belong to
whoever runs it.
"""

from collections.abc import Callable

from lpechod.engine.clock import Clock
from lpechod.engine.loop import Loop
from lpechod.engine.poller import best, open_poller
from lpechod.net.acceptor import Acceptor
from lpechod.net.admission import AdmissionLimits
from lpechod.net.listener import Listener
from lpechod.net.service import EchoService, ServiceSettings
from lpechod.ops.config import Config
from lpechod.ops.counters import Totals, TurnWatch, gather
from lpechod.ops.logs import Log
from lpechod.wire.settings import EchoSettings
from lpechod.wire.tally import Tally


class Worker:
    """Accepts connections and echoes their frames.

    Args:
        config: the configuration.
        listeners: where to accept from; closed when it drains.
        log: where to write.
        clock: seconds that never go back.
        on_drained: called when the last connection has ended after `drain`.
    """

    def __init__(
        self,
        config: Config,
        listeners: list[Listener],
        log: Log,
        clock: Clock,
        on_drained: Callable[[], None],
    ) -> None:
        tally = Tally()
        self._log = log
        self._on_drained = on_drained
        self._drain_timeout_s = config.server.drain_timeout
        self._watch = TurnWatch(tally)
        self.poller = best() if config.server.poller == "auto" else config.server.poller
        self.loop = Loop(open_poller(self.poller), clock, self._watch)
        self.service = EchoService(service_settings(config), self.loop, tally, log)
        self.service.on_departure = self._connection_ended
        self._acceptor = Acceptor(
            listeners, self.service.welcome, self.service.counts, self.loop, log
        )

    @property
    def draining(self) -> bool:
        """Whether it is on its way out."""
        return self.service.draining

    def start(self) -> None:
        """Begin to accept."""
        self._acceptor.start()

    def drain(self) -> None:
        """Stop to accept, and close each connection at a frame boundary or when its time is up."""
        self._acceptor.drain()
        self.service.drain(self.loop.now + self._drain_timeout_s)
        self._log.info(
            "draining",
            connections=len(self.service.connections),
            timeout_s=self._drain_timeout_s,
        )
        self._check_drained()

    def cut(self) -> None:
        """Close every connection at once."""
        self.service.cut(self.loop.now)

    def totals(self) -> Totals:
        """Return what it has counted so far."""
        totals = gather(self.service, self.loop, self._watch)
        totals.log_lines_suppressed = self._log.suppressed_lines
        totals.log_lines_dropped = self._log.dropped_lines
        return totals

    def _connection_ended(self) -> None:
        self._acceptor.resume()
        self._check_drained()

    def _check_drained(self) -> None:
        if self.service.draining and not self.service.connections:
            self._on_drained()


def service_settings(config: Config) -> ServiceSettings:
    """Translate the configuration into the plain values that the inner rings take."""
    limits, timeouts = config.limits, config.timeouts
    return ServiceSettings(
        echo=EchoSettings(
            max_frame_bytes=limits.max_frame,
            high_watermark_bytes=limits.high_watermark,
            low_watermark_bytes=limits.low_watermark,
            idle_s=timeouts.idle,
            frame_s=timeouts.frame,
            min_rate_bytes_per_s=timeouts.min_rate,
            write_s=timeouts.write,
            lifetime_s=timeouts.lifetime,
        ),
        admission=AdmissionLimits(
            max_connections=limits.max_connections,
            max_connections_per_ip=limits.max_connections_per_ip,
        ),
        max_buffered_bytes=limits.max_buffered,
    )
