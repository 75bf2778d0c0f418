"""``lpechod serve``: a fresh start, the rehearsal of a reload, or the other half of one."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

from lpechod.engine import clock
from lpechod.net.listener import ListenError
from lpechod.ops.census import Census
from lpechod.ops.config import Config
from lpechod.ops.counters import Totals
from lpechod.ops.credentials import Credentials, Loaded, load, tls_contexts
from lpechod.ops.logs import Log, open_log
from lpechod.ops.segment import Segment
from lpechod.ops.toml import format_path
from lpechod.ops.validity import concerns
from lpechod.process.bell import Bell
from lpechod.process.descriptors import occupy_standard_streams, raise_descriptor_limit
from lpechod.process.handover import Handover, take_over
from lpechod.process.privileges import forgo_new_privileges
from lpechod.process.rehearsal import rehearse, rehearsing
from lpechod.process.shared import Shared
from lpechod.process.signals import IGNORED_SIGNALS
from lpechod.process.sockets import ECHO, METRICS, Bound, Sockets, wanted_by
from lpechod.process.supervisor import Supervisor, worker_count
from lpechod.process.systemd import Notifier, ServiceManager, take_environment


def serve(path: Path) -> int:
    """Run the daemon.

    Args:
        path: the configuration file.

    Returns:
        The exit status: 0 after a drain, 1 if an address cannot be listened on or no worker can be
        started.

    Raises:
        ConfigError: the file can't be read or can't be used.
    """
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    occupy_standard_streams()
    channel = rehearsing(os.environ)
    if channel is not None:
        return rehearse(load(path), channel)
    handover = take_over(os.environ)
    if handover is not None:
        return _go_on(handover)
    return _start(load(path), take_environment(os.environ, os.getpid()))


def _start(loaded: Loaded, manager: ServiceManager) -> int:
    config, credentials = loaded.config, loaded.credentials
    log = _open_log(config)
    _warn(config, credentials, log)
    sockets = Sockets()
    try:
        supervisor = _set_up(loaded, manager, sockets, log)
    except ListenError as error:
        log.errors("listen_failed", ({"problem": problem} for problem in error.problems))
    except OSError as error:
        log.error("start_failed", problem=str(error), hint="see the limits of the process")
    else:
        return supervisor.run()
    if manager.keeps_descriptors:
        sockets.keep_files()
    sockets.close(ECHO)
    sockets.close(METRICS)
    return 1


def _set_up(loaded: Loaded, manager: ServiceManager, sockets: Sockets, log: Log) -> Supervisor:
    """Make all that a supervisor needs, and the supervisor.

    Raises:
        ListenError: an address cannot be listened on.
        OSError: there are no descriptors, or there is no memory.
    """
    config, credentials = loaded.config, loaded.credentials
    capacity = _provide_descriptors(config, log)
    wanted = wanted_by(config, tls_contexts(config, credentials))
    notifier = Notifier(manager.notify_socket)
    sockets.inherit(manager.inherited, wanted, notifier, log)
    sockets.bind_missing(wanted)
    sockets.assign(wanted)
    forgo_new_privileges(log)
    shared = Shared(Segment.create(), _census(config), Bell())
    return Supervisor(config, credentials, sockets, manager, notifier, shared, log, capacity)


def _go_on(handover: Handover) -> int:
    """Take everything over from the program that this process was."""
    config = Config.model_validate(handover.config)
    credentials = Credentials.restore(handover.credentials)
    log = _open_log(config)
    _warn(config, credentials, log)
    capacity = _provide_descriptors(config, log)
    sockets = Sockets(Bound.restore(each) for each in handover.sockets)
    sockets.assign(wanted_by(config, tls_contexts(config, credentials)))
    segments = [Segment.adopt(fd) for fd in handover.segments]
    shared = Shared(_current(segments), _census(config, handover.census), Bell(handover.bell))
    manager = ServiceManager(
        notify_socket=handover.notify_socket,
        watchdog_s=handover.watchdog_s,
        keeps_descriptors=handover.keeps_descriptors,
    )
    notifier = Notifier(handover.notify_socket)
    notifier.go_on_with(handover.unsent)
    supervisor = Supervisor(
        config,
        credentials,
        sockets,
        manager,
        notifier,
        shared,
        log,
        capacity,
        restarts=handover.restarts,
        reloaded_at=handover.reloaded_at,
    )
    for each in handover.workers:
        segment = segments[each["segment"]]
        slot = segment.slot(each["slot"])
        supervisor.workers.adopt(
            each["pid"], segment, slot, each["line"], each["told"], each["silent_s"]
        )
    return supervisor.run()


def _current(segments: Sequence[Segment]) -> Segment:
    """Return the segment to go on with: the latest, or a new one if it lacks what we count."""
    latest = segments[0]
    if latest.is_current:
        return latest
    segment = Segment.create()
    segment.retired = latest.retired
    latest.retired = Totals()
    return segment


def _census(config: Config, fd: int | None = None) -> Census | None:
    """Return the census to go on with; there is none before there is a limit that needs it."""
    wanted = config.limits.max_connections_per_ip > 0
    if fd is not None:
        return Census.adopt(fd, wanted)
    return Census.create() if wanted else None


def _open_log(config: Config) -> Log:
    log = config.log
    return open_log(log.level, log.format, log.burst, log.rate, clock=clock.monotonic)


def _warn(config: Config, credentials: Credentials, log: Log) -> None:
    """Log what is no mistake yet, see `lpechod.ops.validity`."""
    for concern in concerns(config, credentials, clock.wall()):
        log.warning(concern.event, key=format_path(concern.key), **concern.fields)


def _provide_descriptors(config: Config, log: Log) -> int:
    """Return how many connections a worker has descriptors for, at most `max_connections`."""
    connections = config.limits.max_connections
    workers = worker_count(config)
    # While a reload is under way, there are those of before, too.
    possible = raise_descriptor_limit(connections, lines=2 * workers)
    together = possible * workers
    if together < connections:
        log.warning(
            "descriptor_limit_low",
            max_connections=connections,
            enough_for=together,
            hint="raise the hard limit (LimitNOFILE=, ulimit -Hn) or lower limits.max_connections",
        )
    return possible
