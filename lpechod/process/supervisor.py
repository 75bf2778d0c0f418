"""The supervisor: parent of the workers, and the only one who knows about the daemon as a whole.

It binds, forks, watches, reaps, serves the metrics and talks to the service manager; it never
touches a client's data. It is single-threaded, and all it does is an answer to an event in its
loop: signals come as bytes in a pipe, a child's end as SIGCHLD, a reload as a rehearsal's end.

Its life in words: *starting* until all workers are ready; *serving*; *reloading* while a rehearsal
runs, and until it has become the new program, which begins as *starting* with the workers of the
old one beside its own; and *stopping*, from the first signal to end until no worker is left.
"""

import gc
import os
import signal
import socket
import traceback
from enum import Enum, auto
from typing import Any, NoReturn

from lpechod import __version__
from lpechod.engine import clock
from lpechod.engine.loop import Loop
from lpechod.engine.poller import best, open_poller
from lpechod.engine.signals import SignalPipe
from lpechod.ops.config import Config
from lpechod.ops.counters import Totals
from lpechod.ops.credentials import Credentials, metrics_token
from lpechod.ops.endpoint import MetricsEndpoint
from lpechod.ops.logs import Log
from lpechod.ops.metrics import Standing
from lpechod.ops.segment import Slot
from lpechod.ops.validity import certificate_expiry
from lpechod.process.ending import Ending
from lpechod.process.handover import Handover, hand_over
from lpechod.process.rehearsal import Rehearsal
from lpechod.process.shared import Shared
from lpechod.process.signals import HANDLED_SIGNALS
from lpechod.process.sockets import ECHO, METRICS, Bound, Sockets
from lpechod.process.systemd import Notifier, ServiceManager
from lpechod.process.watchdog import Watchdog
from lpechod.process.worker import run_worker
from lpechod.process.workers import Workers

_END_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Phase(Enum):
    STARTING = auto()
    SERVING = auto()
    RELOADING = auto()
    STOPPING = auto()


class Supervisor:
    """Runs the daemon.

    Args:
        config: the configuration.
        credentials: the contents of the files that it names; they are not kept.
        sockets: all that it asks for, and those that a reload has made superfluous.
        manager: what the service manager wants.
        notifier: talks to it, and may have messages that wait.
        shared: what all workers have in common.
        log: where to write.
        worker_capacity: how many connections the descriptor limit of a worker suffices for.
        restarts: how many workers were started before a reload in place of ones that had died.
        reloaded_at: when the configuration before that was loaded, in Unix time.
    """

    def __init__(
        self,
        config: Config,
        credentials: Credentials,
        sockets: Sockets,
        manager: ServiceManager,
        notifier: Notifier,
        shared: Shared,
        log: Log,
        worker_capacity: int,
        restarts: int | None = None,
        reloaded_at: float | None = None,
    ) -> None:
        self._config = config
        self._workers_wanted = worker_count(config)  # The CPUs may change, and these will not.
        self._sockets = sockets
        self._manager = manager
        self._shared = shared
        self._log = log
        self._notifier = notifier
        self._worker_capacity = worker_capacity
        loop = self._loop = Loop(open_poller("auto"), clock.monotonic)
        self._phase = _Phase.STARTING
        self._reloaded = restarts is not None
        self._unsettled, self._reload_wanted = True, False
        self._reload_successful = True
        self._reloaded_at = clock.wall() if reloaded_at is None else reloaded_at
        self._rehearsal: Rehearsal | None = None
        self._status = 0
        self.workers = Workers(
            self._workers_wanted, shared.segment, self._become_worker, loop, log, restarts or 0,
            shared.census,
        )  # fmt: skip
        self.workers.on_settled = self._settled
        self.workers.on_hopeless = self._hopeless
        self.workers.on_change = self._changed
        self._ending = Ending(
            self.workers, lambda: self._totals().connections_active, notifier, loop
        )
        self._watchdog = Watchdog(
            self.workers, config.server.watchdog, manager.watchdog_s, notifier, loop, log
        )
        self._certificate_expiry = certificate_expiry(config, credentials)
        token = metrics_token(config, credentials)
        listeners = sockets.listeners(METRICS)
        self._endpoint = MetricsEndpoint(
            listeners, self._totals, self._standing, self._is_ready, token, loop, log
        )
        self._signals = SignalPipe(loop, HANDLED_SIGNALS, self._on_signal)

    def run(self) -> int:
        """Supervise until the last worker has ended.

        Returns:
            The exit status.
        """
        # A peer that resets while we write must be an error of that write and nothing more.
        # That is said here, and not left to the interpreter's habit.
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED_SIGNALS)
        self._endpoint.start()
        # What exists now lives as long as the process: no collection need look at it again, and
        # none in a worker writes to memory that it shares with us until then.
        gc.freeze()
        self.workers.start()
        self._reap()  # Who has ended while nobody was there to be told.
        self._loop.run()
        self._endpoint.close()
        self._sockets.close(METRICS)  # A reload that has not settled leaves some.
        self._loop.close()
        self._notifier.flush()
        for number in HANDLED_SIGNALS:
            # One that comes now must not change the exit status. On its way out, the interpreter
            # puts back the default action of signals that it handles, but not of ignored ones.
            signal.signal(number, signal.SIG_IGN)
        self._log.info("stopped", connections=self._totals().connections_accepted)
        return self._status

    # Signals.

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGCHLD:
            self._reap()
            return
        self._log.info("signal", name=signal.Signals(number).name)
        if number == signal.SIGHUP:
            self._want_reload()
        elif self._phase is _Phase.STOPPING:
            self._ending.hurry()
        else:
            self._stop()

    def _reap(self) -> None:
        """Wait for every child that has ended; also for strangers', as process 1 has to."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            code = os.waitstatus_to_exitcode(status)
            if self._rehearsal is not None and pid == self._rehearsal.pid:
                self._rehearsal.ended(code)
            else:
                self.workers.ended(pid, code)
                self._shared.bell.ring()  # Others may have left connections to that one.

    # Workers.

    def _become_worker(self, slot: Slot, line: socket.socket) -> NoReturn:
        code = 1
        try:
            self._abandon()
            code = run_worker(
                self._config,
                self._sockets.listeners(ECHO),
                self._shared,
                slot,
                line,
            )
        except BaseException:  # noqa: BLE001 - the stack below is the supervisor's.
            traceback.print_exc()
        finally:
            os._exit(code)

    def _abandon(self) -> None:
        """Close, after fork(2), the copies of what belongs to the supervisor."""
        self._signals.abandon()
        self._loop.close()
        self._endpoint.abandon()
        self.workers.abandon()
        self._notifier.close()
        self._sockets.abandon()
        self._log.abandon()
        if self._rehearsal is not None:
            self._rehearsal.abandon()

    def _settled(self) -> None:
        """So many workers as there should be are ready: the others may go."""
        if not self._unsettled:
            self.workers.retire([])
            return
        if self._phase is _Phase.RELOADING:
            return  # A rehearsal counts on what is held; the new program settles all, or its end.
        self._unsettled = False
        gone = self._sockets.gone
        self._sockets.withdraw_gone()
        self._endpoint.finish(
            [each for bound in gone if bound.purpose == METRICS for each in bound.listeners]
        )
        self.workers.retire(self._sockets.close_gone(self._notifier))
        if self._phase is _Phase.STARTING:
            self._phase = _Phase.SERVING
        self._reload_successful = True
        self._reloaded_at = clock.wall()
        self._sockets.store(self._notifier)
        self._notifier.ready(self._describe())
        self._log.info(
            "reloaded" if self._reloaded else "ready",
            version=__version__,
            pid=os.getpid(),
            listeners=[listener.name for listener in self._sockets.listeners(ECHO)],
            metrics=[listener.name for listener in self._sockets.listeners(METRICS)],
            workers=self._workers_wanted,
            poller=best() if self._config.server.poller == "auto" else self._config.server.poller,
        )
        if self._reload_wanted:
            self._want_reload()

    def _hopeless(self) -> None:
        """Give up if nobody serves; with the workers of before a reload, go on with those."""
        problem = "workers end before they are ready, again and again"
        if self._phase is _Phase.STOPPING:
            return
        if self.workers.ready == 0:
            self._log.error("gave_up", problem=problem, hint="see the errors logged before")
            self._status = 1
            self._stop()
        elif self._phase is _Phase.STARTING:
            self._reload_failed([problem], "the workers of before go on, new addresses wait")

    def _changed(self) -> None:
        if self._phase is _Phase.SERVING:
            self._notifier.status(self._describe())
        self._check_ended()

    # Reload.

    def _want_reload(self) -> None:
        """Reload now, or when what is under way has come to its end."""
        if self._phase is not _Phase.SERVING:
            self._reload_wanted = self._phase is not _Phase.STOPPING
            return
        self._reload_wanted = False
        self._phase = _Phase.RELOADING
        self._notifier.reloading(clock.monotonic(), "Checking the configuration")
        self._sockets.share_ports(True)
        try:
            self._rehearsal = Rehearsal(self._sockets.addresses, self._loop, self._rehearsed)
        except OSError as error:
            self._sockets.share_ports(False)
            self._reload_failed([f"cannot start a check: {error.strerror}"])

    def _rehearsed(
        self, checked: dict[str, Any] | None, bound: list[Bound], problems: list[str]
    ) -> None:
        self._rehearsal = None
        if self._phase is _Phase.STOPPING:
            for each in bound:
                each.close()
            self._check_ended()
            return
        self._sockets.share_ports(False)
        if checked is None:
            self._reload_failed(problems)
        else:
            self._sockets.coming = bound
            self._endpoint.pause(lambda: self._hand_over(checked))

    def _hand_over(self, checked: dict[str, Any]) -> None:
        """Become the new program, with what a rehearsal has checked."""
        segment, census = self._shared.segment, self._shared.census
        retired = segment.retired
        # Ours, too, are counters that must not go back.
        segment.retired = Totals.sum([retired, self._own_totals()])
        segments = self.workers.segments()
        self._notifier.flush()
        handover = Handover(
            config=checked["config"],
            credentials=checked["credentials"],
            sockets=[each.describe() for each in self._sockets.all],
            segments=[each.fd for each in segments],
            census=None if census is None else census.fd,
            bell=self._shared.bell.fd,
            workers=self.workers.describe(segments),
            restarts=self.workers.restarts,
            reloaded_at=self._reloaded_at,
            notify_socket=self._manager.notify_socket,
            watchdog_s=self._manager.watchdog_s,
            keeps_descriptors=self._manager.keeps_descriptors,
            unsent=self._notifier.unsent,
        )
        if self._reload_wanted:
            self._reload_wanted = False
            os.kill(os.getpid(), signal.SIGHUP)
        try:
            hand_over(handover, self._signals.hand_back)
        except OSError as error:
            segment.retired = retired
            self._sockets.drop_coming()
            self._endpoint.start()
            self._reload_failed([f"cannot execute the new program: {error.strerror}"])

    def _reload_failed(self, problems: list[str], standing: str = "all is as before") -> None:
        self._phase = _Phase.SERVING
        wanted, self._reload_wanted = self._reload_wanted, False
        self.workers.settle()  # Those of a reload before may have become ready meanwhile.
        self._reload_successful = False
        self._log.errors("reload_failed", ({"problem": problem} for problem in problems))
        self._notifier.ready(f"Reload failed, {standing}: {problems[0]}")
        if wanted:
            self._want_reload()

    # The end.

    def _stop(self) -> None:
        self._phase = _Phase.STOPPING
        self._notifier.stopping("Draining")
        if self._rehearsal is not None:
            self._rehearsal.kill()
            self._sockets.share_ports(False)
        self._sockets.drop_coming()
        self._endpoint.start()  # It may have paused for a handover, which does not happen now.
        # First ours: so the last worker to close a socket is one that has just emptied its queue.
        if self._manager.keeps_descriptors:
            self._sockets.keep_files()
        self._sockets.close(ECHO)
        self._ending.begin(self._config.server.drain_timeout)
        self._check_ended()

    def _check_ended(self) -> None:
        if self._phase is _Phase.STOPPING and not self.workers.children and not self._rehearsal:
            self._loop.stop()

    # What is shown.

    def _describe(self) -> str:
        names = ", ".join(listener.name for listener in self._sockets.listeners(ECHO))
        wanted = self._workers_wanted
        ready = min(self.workers.ready, wanted)
        workers = f"{wanted} worker{'s' * (wanted != 1)}"
        return f"Serving {names} with {workers if ready == wanted else f'{ready} of {workers}'}"

    def _is_ready(self) -> bool:
        return self._phase is not _Phase.STOPPING and self.workers.ready > 0

    def _own_totals(self) -> Totals:
        return Totals(
            log_lines_suppressed=self._log.suppressed_lines,
            log_lines_dropped=self._log.dropped_lines,
        )

    def _totals(self) -> Totals:
        return Totals.sum(
            [self._shared.segment.retired, *self.workers.totals(), self._own_totals()]
        )

    def _standing(self) -> Standing:
        return Standing(
            workers=self.workers.states(self._watchdog.stalled),
            worker_restarts=self.workers.restarts,
            connections_limit=min(
                self._config.limits.max_connections,
                self._workers_wanted * self._worker_capacity,
            ),
            reload_successful=self._reload_successful,
            reloaded_at=self._reloaded_at,
            certificate_expiry=self._certificate_expiry,
        )


def worker_count(config: Config) -> int:
    """Return how many workers a configuration asks for: ``auto`` is one for each CPU we may use."""
    wanted = config.server.workers
    return len(os.sched_getaffinity(0)) if wanted == "auto" else int(wanted)
