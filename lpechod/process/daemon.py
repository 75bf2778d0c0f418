"""The daemon in one process: a worker, the exporter and the signals, on one loop."""

import gc
import os
import signal

from prometheus_client import CollectorRegistry, ProcessCollector

from lpechod import __version__
from lpechod.engine import clock
from lpechod.engine.signals import SignalPipe
from lpechod.net.acceptor import Acceptor
from lpechod.net.address import Address
from lpechod.net.counts import ConnectionCounts
from lpechod.net.listener import Listener, ListenError, ListenerSettings, open_listeners
from lpechod.ops.config import Config
from lpechod.ops.exporter import MAX_CLIENTS, Exporter
from lpechod.ops.logs import Log, open_log
from lpechod.ops.metrics import DaemonCollector, Standing
from lpechod.ops.pages import Pages
from lpechod.process.descriptors import occupy_standard_streams, raise_descriptor_limit
from lpechod.process.worker import Worker

_END_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Daemon:
    """Serves one configuration until it is told to end.

    Args:
        config: the configuration.
        listeners: for echo clients.
        metrics_listeners: for the exporter.
        log: where to write.
    """

    def __init__(
        self, config: Config, listeners: list[Listener], metrics_listeners: list[Listener], log: Log
    ) -> None:
        self._config = config
        self._log = log
        self._started_at = clock.wall()
        self._names = [listener.name for listener in listeners]
        self._metrics_names = [listener.name for listener in metrics_listeners]
        self._worker = Worker(config, listeners, log, clock.monotonic, self._on_drained)
        loop = self._worker.loop
        registry = CollectorRegistry(auto_describe=True)
        registry.register(DaemonCollector(self._worker.totals, self._standing))
        ProcessCollector(registry=registry)
        self._exporter = Exporter(Pages(registry, lambda: not self._worker.draining), loop, log)
        self._metrics_acceptor = Acceptor(
            metrics_listeners, self._exporter.welcome, ConnectionCounts(), loop, log
        )
        self._signals = SignalPipe(loop, _END_SIGNALS, self._on_signal)

    def run(self) -> None:
        """Serve; returns when the last connection has ended after a signal."""
        # A peer that resets while we write must be an error of that write and nothing more. Python
        # ignores the signal too, unless whoever started us has decided otherwise.
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        self._worker.start()
        self._metrics_acceptor.start()
        # What exists now lives as long as the process: no collection need look at it again.
        gc.freeze()
        self._log.info(
            "ready",
            version=__version__,
            pid=os.getpid(),
            listeners=self._names,
            metrics=self._metrics_names,
            poller=self._worker.poller,
        )
        self._worker.loop.run()
        self._metrics_acceptor.drain()
        self._exporter.close()
        self._worker.loop.close()
        for number in _END_SIGNALS:
            # One that comes now must not change the exit status. On its way out, the interpreter
            # puts back the default action of signals that it handles, but not of ignored ones.
            signal.signal(number, signal.SIG_IGN)
        self._log.info("stopped", connections=self._worker.service.counts.accepted)

    def _on_signal(self, number: int) -> None:
        self._log.info("signal", name=signal.Signals(number).name)
        if self._worker.draining:
            self._worker.cut()
        else:
            self._worker.drain()

    def _on_drained(self) -> None:
        self._worker.loop.stop()

    def _standing(self) -> Standing:
        draining = int(self._worker.draining)
        return Standing(
            workers={"ready": 1 - draining, "draining": draining},
            worker_restarts=0,
            reload_successful=True,
            reloaded_at=self._started_at,
        )


def serve(config: Config) -> int:
    """Run the daemon.

    Args:
        config: the configuration.

    Returns:
        The exit status: 0 after a drain, 1 if an address cannot be listened on.
    """
    occupy_standard_streams()
    wanted = config.log
    log = open_log(wanted.level, wanted.format, wanted.burst, wanted.rate, clock=clock.monotonic)
    if config.server.workers != 1:
        log.warning("one_worker_only", workers=config.server.workers, hint="set server.workers = 1")
    _provide_descriptors(config.limits.max_connections, log)
    metrics = config.metrics.address
    echo_listeners, problems = _listen([(table.address, table.backlog) for table in config.listen])
    metrics_listeners, more = _listen([] if metrics is None else [(metrics, MAX_CLIENTS)])
    if problems or more:
        for listener in echo_listeners + metrics_listeners:
            listener.close()
        for problem in problems + more:
            log.error("listen_failed", problem=problem)
        return 1
    Daemon(config, echo_listeners, metrics_listeners, log).run()
    return 0


def _provide_descriptors(connections: int, log: Log) -> None:
    possible = raise_descriptor_limit(connections)
    if possible < connections:
        log.warning(
            "descriptor_limit_low",
            max_connections=connections,
            enough_for=possible,
            hint="raise the hard limit (LimitNOFILE=, ulimit -Hn) or lower limits.max_connections",
        )


def _listen(addresses: list[tuple[Address, int]]) -> tuple[list[Listener], list[str]]:
    try:
        return open_listeners(ListenerSettings(*address) for address in addresses), []
    except ListenError as error:
        return [], error.problems
