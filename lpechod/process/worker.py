"""A worker process: the data plane put together, in one loop.

It owns its connections and nothing else. Listening sockets, its slot of shared memory and the line
to the supervisor are given to it. It ends by itself when its last connection has ended after a
drain, which the supervisor, a signal or the supervisor's death begins.
"""

import os
import signal
import socket
from collections.abc import Collection

from lpechod.engine import clock
from lpechod.engine.loop import TICKS_PER_SECOND, Loop
from lpechod.engine.poller import open_poller
from lpechod.engine.signals import SignalPipe
from lpechod.engine.wheel import Timer
from lpechod.net.acceptor import Acceptor
from lpechod.net.admission import ALONE, AdmissionLimits, ClientCounts
from lpechod.net.listener import Listener
from lpechod.net.service import EchoService, ServiceSettings
from lpechod.net.spin import SpinDetector
from lpechod.ops.bulletin import Bulletin
from lpechod.ops.census import CensusRow
from lpechod.ops.config import Config
from lpechod.ops.counters import Totals, TurnWatch, gather
from lpechod.ops.logs import Log, open_log
from lpechod.ops.segment import Slot, SlotState
from lpechod.process.balance import Balance
from lpechod.process.lifeline import Lifeline, Message
from lpechod.process.privileges import drop_capabilities
from lpechod.process.shared import Shared
from lpechod.process.siblings import Siblings
from lpechod.process.signals import HANDLED_SIGNALS
from lpechod.wire.settings import EchoSettings
from lpechod.wire.tally import Tally

_END_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_REST_SECONDS = 1.5 / TICKS_PER_SECOND


class Worker(Timer):
    """Accepts connections and echoes their frames; as a timer, it is its own heartbeat.

    Args:
        config: the configuration.
        listeners: where to accept from; closed when it drains.
        shared: what all workers have in common.
        slot: its part of the shared memory.
        line: its end of the line to the supervisor.
        log: where to write.
    """

    urgent = True

    def __init__(
        self,
        config: Config,
        listeners: list[Listener],
        shared: Shared,
        slot: Slot,
        line: socket.socket,
        log: Log,
    ) -> None:
        super().__init__()
        tally = Tally()
        self._log = log
        self._slot = slot
        self._orphan_signals: int | None = None
        self._drain_timeout_s = config.server.drain_timeout
        self._watch = TurnWatch(tally)
        self._loop = Loop(open_poller(config.server.poller), clock.monotonic, self._watch.note)
        self._siblings = Siblings(shared.segment, slot)
        clients: ClientCounts = ALONE
        if shared.census is not None and slot.row is not None:
            clients = CensusRow(shared.census, slot.row)
        self._service = EchoService(
            service_settings(config),
            self._loop,
            tally,
            log,
            self._siblings.connections,
            {listener.name: listener.entrance for listener in listeners},
            clients,
        )
        self._service.on_departure = self._connection_ended
        self._service.on_count = slot.show_active
        self._acceptor = Acceptor(
            listeners,
            self._service.welcome,
            self._service.counts,
            self._loop,
            self._log,
            allowance=self._siblings.allowance,
        )
        self._balance = Balance(self._acceptor, self._siblings, slot, shared.bell, self._loop)
        self._spin = SpinDetector(self._loop, self._service, self._log)
        self._bulletin = Bulletin(slot, self._loop, self._service, self._totals)
        self._line = Lifeline(line, self._loop, self._obey, self._orphaned)
        SignalPipe(self._loop, _END_SIGNALS, self._on_signal)

    def run(self) -> None:
        """Serve until drained."""
        self._acceptor.start()
        if self._acceptor.suspended:
            # The poller has no room for the listeners: those of before a reload should go on.
            raise OSError("the listeners can't be watched")
        self._slot.state = SlotState.READY
        self.on_deadline(self._loop.now)
        self._line.send("ready")
        try:
            self._loop.run()
        finally:
            self._bulletin.show()

    def on_deadline(self, now: float) -> None:
        """Give a sign of life, and look at the others."""
        self._slot.beats += 1
        self._spin.check(now)
        self._bulletin.beat()
        self._siblings.observe()
        self._service.overload.check(now)
        self._acceptor.rejoin()
        # The next tick of the wheel, or at rest the one after it: on a machine with nothing else to
        # do, nearly all that a heartbeat costs is what it has to fetch into cold caches.
        resting = self._bulletin.at_rest and not self._acceptor.gives_way
        self._loop.schedule(self, now + _REST_SECONDS if resting else now)

    def _totals(self) -> Totals:
        totals = gather(self._service, self._loop, self._watch)
        totals.loop_spins = self._spin.spins
        totals.log_lines_suppressed = self._log.suppressed_lines
        totals.log_lines_dropped = self._log.dropped_lines
        return totals

    def _obey(self, message: Message) -> None:
        if message["type"] == "drain":
            self._drain(message.get("finish"))
        elif message["type"] == "cut":
            self._drain(None)
            self._service.cut(self._loop.now)

    def _on_signal(self, number: int) -> None:
        # Not obeyed at once: whoever signals the whole process group (a terminal, systemd) signals
        # the supervisor too, which knows better what is to happen to the queues of the listeners.
        # Whoever means this worker gets another one in its place first.
        self._log.info("signal", name=signal.Signals(number).name)
        self._line.send("leave")
        if self._orphan_signals is not None:
            # The first one is systemd's, for whatever a dead main process has left; it drains.
            self._orphan_signals += 1
            if self._orphan_signals > 1:
                self._service.cut(self._loop.now)

    def _orphaned(self) -> None:
        self._orphan_signals = 0
        self._log.error("supervisor_died", hint="this worker drains, and ends")
        self._drain(None)

    def _drain(self, finish: Collection[str] | None) -> None:
        """Stop accepting, and close each connection at a frame boundary or when its time is up.

        Args:
            finish: names of the listeners whose queue is to be served first, as nobody else will;
                None: all.
        """
        if self._service.draining:
            return
        self._slot.state = SlotState.DRAINING
        self._acceptor.drain(finish)
        self._balance.close()
        self._service.drain(self._loop.now + self._drain_timeout_s)
        self._log.info(
            "draining",
            connections=len(self._service.connections),
            timeout_s=self._drain_timeout_s,
        )
        self._check_drained()

    def _connection_ended(self) -> None:
        self._acceptor.resume()
        self._acceptor.rejoin()
        if self._service.draining:
            self._check_drained()

    def _check_drained(self) -> None:
        if not self._service.connections:
            self._loop.stop()


def run_worker(
    config: Config,
    listeners: list[Listener],
    shared: Shared,
    slot: Slot,
    line: socket.socket,
) -> int:
    """Be a worker; called in a process of its own, in which the signals are still blocked.

    Args:
        config: the configuration.
        listeners: where to accept from.
        shared: what all workers have in common.
        slot: its part of the shared memory.
        line: its end of the line to the supervisor.

    Returns:
        The exit status: 0 after a drain, 1 after a defect.
    """
    # A terminal that closes tells everybody; what a hang-up means, the supervisor decides.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    own_log = open_worker_log(config)
    try:
        drop_capabilities(own_log)
        worker = Worker(config, listeners, shared, slot, line, own_log)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)
        worker.run()
    except Exception as error:  # noqa: BLE001 - the process ends, and its log says why.
        own_log.error("worker_failed", exc_info=error)
        return 1
    finally:
        own_log.close()
    return 0


def open_worker_log(config: Config) -> Log:
    """Open the log of a worker; each line carries the worker's process id."""
    log = config.log
    return open_log(
        log.level,
        log.format,
        log.burst,
        log.rate,
        clock=clock.monotonic,
        context={"worker": os.getpid()},
    )


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
            handshake_s=timeouts.handshake,
            lifetime_s=timeouts.lifetime,
            overload_idle_s=timeouts.overload_idle,
            overload_frame_s=timeouts.overload_frame,
        ),
        admission=AdmissionLimits(
            max_connections=limits.max_connections,
            max_connections_per_ip=limits.max_connections_per_ip,
            ipv4_prefix_bits=limits.ipv4_prefix,
            ipv6_prefix_bits=limits.ipv6_prefix,
            connection_rate=limits.connection_rate,
            connection_burst=limits.connection_burst,
        ),
        max_buffered_bytes=limits.max_buffered,
        overload_percent=limits.overload_threshold,
        max_handshakes=limits.max_handshakes,
    )
