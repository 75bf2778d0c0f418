"""Names, help and shape of every metric, and the collector that fills them at scrape time.

A custom collector instead of prometheus_client's own counters: those cost the data plane a lock for
each increment, and know nothing of several processes. Every series exists from the start.
Histograms are kept in classes that double, where every second bound is enough to be shown.
"""

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from lpechod import __version__
from lpechod.net.counts import (
    HANDSHAKE_RESULTS,
    PAUSE_REASONS,
    REJECT_REASONS,
    SCARCE_RESOURCES,
)
from lpechod.ops.counters import Totals
from lpechod.wire.states import CloseReason

_CLOSE_REASONS = [reason.value for reason in CloseReason]


@dataclass(frozen=True, slots=True)
class Standing:
    """How the daemon as a whole stands; times are Unix time in seconds."""

    workers: dict[str, int]
    """How many workers there are, by state."""
    worker_restarts: int
    connections_limit: int
    """How many connections may be open at once, all workers together: limits.max_connections, or
    for how many the descriptors of all workers suffice (`raise_descriptor_limit`), if less."""
    reload_successful: bool
    reloaded_at: float
    certificate_expiry: Mapping[str, float] = field(default_factory=dict)
    """When the first certificate of a chain expires, for each address with TLS."""


class DaemonCollector(Collector):
    """Turns totals into metric families.

    Args:
        totals: returns the sum over all workers.
        standing: returns how the daemon stands.
    """

    def __init__(self, totals: Callable[[], Totals], standing: Callable[[], Standing]) -> None:
        self._totals = totals
        self._standing = standing

    def describe(self) -> Iterator[Metric]:
        """Yield every family at zero: a registry filters by name only what has been described."""
        return _families(Totals(), Standing({}, 0, 0, reload_successful=False, reloaded_at=0))

    def collect(self) -> Iterator[Metric]:
        """Yield every family with its present values."""
        return _families(self._totals(), self._standing())


def _families(totals: Totals, standing: Standing) -> Iterator[Metric]:
    yield from _daemon(standing)
    yield from _connections(totals, standing.connections_limit)
    yield from _tls(totals, standing.certificate_expiry)
    yield from _traffic(totals)
    yield from _internals(totals)


def _daemon(standing: Standing) -> Iterator[Metric]:
    build = GaugeMetricFamily(
        "lpechod_build_info",
        "Always 1; the labels tell what is running.",
        labels=["version", "python_version"],
    )
    build.add_metric([__version__, platform.python_version()], 1)
    yield build
    workers = GaugeMetricFamily("lpechod_workers", "Worker processes by state.", labels=["state"])
    for state, count in standing.workers.items():
        workers.add_metric([state], count)
    yield workers
    yield _counter(
        "lpechod_worker_restarts",
        "Workers started in place of one that had died.",
        standing.worker_restarts,
    )
    yield _gauge(
        "lpechod_config_last_reload_successful",
        "Whether the last attempt to load the configuration succeeded.",
        standing.reload_successful,
    )
    yield _gauge(
        "lpechod_config_last_reload_success_timestamp_seconds",
        "Unix time of the last successful load of the configuration.",
        standing.reloaded_at,
    )


def _connections(totals: Totals, limit: int) -> Iterator[Metric]:
    yield _counter(
        "lpechod_connections_accepted",
        "Connections accepted and served.",
        totals.connections_accepted,
    )
    yield _gauge("lpechod_connections_active", "Connections open now.", totals.connections_active)
    yield _gauge(
        "lpechod_connections_limit",
        "Connections that may be open at once: limits.max_connections, or fewer for want of "
        "descriptors.",
        limit,
    )
    yield _by_label(
        "lpechod_connections_closed",
        "Connections that have ended, by reason.",
        _CLOSE_REASONS,
        totals.connections_closed,
    )
    yield _by_label(
        "lpechod_connections_rejected",
        "Connections that were not served, by reason.",
        REJECT_REASONS,
        totals.connections_rejected,
    )
    yield _by_label(
        "lpechod_accept_pauses",
        "Times that accepting was suspended, by reason: an error of accept(2), other, or balance.",
        PAUSE_REASONS,
        totals.accept_pauses,
    )
    yield _counter(
        "lpechod_rate_limit_evictions",
        "Addresses that limits.connection_rate has forgotten early: so many come at once.",
        totals.rate_limit_evictions,
    )
    yield _counter(
        "lpechod_census_overflows",
        "Connections that other workers do not count for limits.max_connections_per_ip: so many "
        "addresses are there at once.",
        totals.census_overflows,
    )
    yield _histogram(
        "lpechod_connection_duration_seconds",
        "Time from accept to close.",
        totals.connection_durations,
        [0.01 * 2**k for k in range(24)],
        totals.connection_durations_ns / 1e9,
        shown=slice(0, None, 2),
    )


def _tls(totals: Totals, certificate_expiry: Mapping[str, float]) -> Iterator[Metric]:
    yield _by_label(
        "lpechod_tls_handshakes",
        "TLS handshakes that have ended, by result.",
        HANDSHAKE_RESULTS,
        totals.tls_handshakes,
        label="result",
    )
    yield _counter(
        "lpechod_tls_handshakes_delayed",
        "TLS handshakes that waited for a place, of limits.max_handshakes for each worker.",
        totals.tls_handshakes_delayed,
    )
    expiry = GaugeMetricFamily(
        "lpechod_tls_certificate_expiry_timestamp_seconds",
        "Unix time at which the first certificate of the chain of an address expires.",
        labels=["address"],
    )
    for address, moment in certificate_expiry.items():
        expiry.add_metric([address], moment)
    yield expiry


def _traffic(totals: Totals) -> Iterator[Metric]:
    yield _counter("lpechod_frames", "Whole frames received.", totals.frames)
    yield _counter("lpechod_received_bytes", "Bytes received from clients.", totals.received_bytes)
    yield _counter(
        "lpechod_sent_bytes", "Bytes of echoes that the kernel has taken.", totals.sent_bytes
    )
    yield _histogram(
        "lpechod_frame_size_bytes",
        "Size of frame bodies, without the header.",
        totals.frame_sizes,
        [2**k for k in range(32)],
        totals.frame_sizes_bytes,
        shown=slice(4, 25, 2),
    )
    yield _histogram(
        "lpechod_echo_duration_seconds",
        "Time from the last byte read to the last byte taken by the kernel.",
        totals.echo_delays,
        [50e-6 * 2**k for k in range(20)],
        totals.echo_delays_ns / 1e9,
    )


def _internals(totals: Totals) -> Iterator[Metric]:
    yield _histogram(
        "lpechod_loop_turn_seconds",
        "Time from the return of one poll to the next one.",
        totals.turns,
        [50e-6 * 2**k for k in range(20)],
        totals.turns_ns / 1e9,
    )
    yield _gauge(
        "lpechod_buffered_bytes",
        "Memory held for bytes that wait, of limits.max_buffered for each worker.",
        totals.buffered_bytes,
    )
    yield _by_label(
        "lpechod_overload_seconds",
        "Time that workers have spent short of a resource, all together.",
        SCARCE_RESOURCES,
        [nanoseconds / 1e9 for nanoseconds in totals.overload_ns],
        label="resource",
    )
    yield _counter(
        "lpechod_backpressure_pauses",
        "Times that reading from a client was paused.",
        totals.backpressure_pauses,
    )
    yield _counter(
        "lpechod_loop_spins",
        "Seconds in which a loop turned without doing any work, thousands of times.",
        totals.loop_spins,
    )
    yield _gauge("lpechod_timer_entries", "Timers in the wheel.", totals.timer_entries)
    yield _counter(
        "lpechod_log_lines_suppressed",
        "Log lines withheld by the rate limit.",
        totals.log_lines_suppressed,
    )
    yield _counter(
        "lpechod_log_lines_dropped",
        "Log lines lost because they could not be written at once.",
        totals.log_lines_dropped,
    )


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _by_label(
    name: str, text: str, keys: Sequence[str], values: Sequence[float], label: str = "reason"
) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for key, value in zip(keys, values, strict=True):
        family.add_metric([key], value)
    return family


def _histogram(
    name: str,
    text: str,
    counts: Sequence[int],
    bounds: Sequence[float],
    total: float,
    shown: slice = slice(None),
) -> Metric:
    """Build a histogram family.

    Args:
        name: its name.
        text: its help.
        counts: observations for each class; those past the last bound are larger than it.
        bounds: upper end of each class.
        total: sum of all observed values.
        shown: which of the bounds become buckets.
    """
    cumulative = 0
    buckets: list[tuple[str, float]] = []
    for bound, count in zip(bounds, counts, strict=False):
        cumulative += count
        buckets.append((f"{bound:.10g}", cumulative))
    family = HistogramMetricFamily(name, text)
    family.add_metric([], [*buckets[shown], ("+Inf", sum(counts))], sum_value=total)
    return family
