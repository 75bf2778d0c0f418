"""The page of metrics: a fixed set of series, there from the start, that Prometheus can read."""

import math
import platform
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from lpechod import __version__
from lpechod.net.counts import ConnectionCounts
from lpechod.ops.counters import Totals, TurnWatch
from lpechod.ops.metrics import DaemonCollector, Standing
from lpechod.wire.frames import encode_header, scan
from lpechod.wire.tally import Tally
from tests.system.daemon import Daemon

CLOSE_REASONS = {
    "peer_closed",
    "truncated_frame",
    "frame_too_large",
    "reset",
    "idle_timeout",
    "frame_timeout",
    "write_timeout",
    "handshake_timeout",
    "lifetime",
    "drained",
    "drain_timeout",
    "overload",
    "tls_error",
    "missing_close_notify",
    "proxy_error",
    "rejected",
    "internal_error",
}
REJECT_REASONS = {
    "max_connections",
    "max_connections_per_ip",
    "connection_rate",
    "denied",
    "untrusted_proxy",
    "aborted",
    "other",
}
HANDSHAKE_RESULTS = {"completed", "failed", "timed_out", "abandoned"}
PAUSE_REASONS = {"emfile", "enfile", "enobufs", "enomem", "other", "balance"}

FAMILIES: dict[str, tuple[str, str | None, set[str]]] = {
    "lpechod_build_info": ("gauge", "version", {__version__}),
    "lpechod_workers": ("gauge", "state", {"starting", "ready", "draining", "stalled"}),
    "lpechod_worker_restarts_total": ("counter", None, set()),
    "lpechod_connections_accepted_total": ("counter", None, set()),
    "lpechod_connections_active": ("gauge", None, set()),
    "lpechod_connections_limit": ("gauge", None, set()),
    "lpechod_connections_closed_total": ("counter", "reason", CLOSE_REASONS),
    "lpechod_connections_rejected_total": ("counter", "reason", REJECT_REASONS),
    "lpechod_tls_handshakes_total": ("counter", "result", HANDSHAKE_RESULTS),
    "lpechod_tls_handshakes_delayed_total": ("counter", None, set()),
    "lpechod_tls_certificate_expiry_timestamp_seconds": ("gauge", "address", {"[::]:9000"}),
    "lpechod_frames_total": ("counter", None, set()),
    "lpechod_received_bytes_total": ("counter", None, set()),
    "lpechod_sent_bytes_total": ("counter", None, set()),
    "lpechod_frame_size_bytes": ("histogram", None, set()),
    "lpechod_echo_duration_seconds": ("histogram", None, set()),
    "lpechod_connection_duration_seconds": ("histogram", None, set()),
    "lpechod_loop_turn_seconds": ("histogram", None, set()),
    "lpechod_buffered_bytes": ("gauge", None, set()),
    "lpechod_overload_seconds_total": ("counter", "resource", {"connections", "memory"}),
    "lpechod_backpressure_pauses_total": ("counter", None, set()),
    "lpechod_accept_pauses_total": ("counter", "reason", PAUSE_REASONS),
    "lpechod_rate_limit_evictions_total": ("counter", None, set()),
    "lpechod_census_overflows_total": ("counter", None, set()),
    "lpechod_loop_spins_total": ("counter", None, set()),
    "lpechod_timer_entries": ("gauge", None, set()),
    "lpechod_log_lines_suppressed_total": ("counter", None, set()),
    "lpechod_log_lines_dropped_total": ("counter", None, set()),
    "lpechod_config_last_reload_successful": ("gauge", None, set()),
    "lpechod_config_last_reload_success_timestamp_seconds": ("gauge", None, set()),
}
"""What operators write their rules against: name, type, and the values of the one label."""

PROCESS_FAMILIES = {
    "process_cpu_seconds_total",
    "process_max_fds",
    "process_open_fds",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "process_virtual_memory_bytes",
}

HISTOGRAMS = sorted(name for name, (kind, _, _) in FAMILIES.items() if kind == "histogram")
STANDING = Standing(
    dict.fromkeys(("starting", "ready", "draining", "stalled"), 0),
    0,
    0,
    False,
    reloaded_at=0,
    certificate_expiry={"[::]:9000": 0},
)


def page(totals: Totals, standing: Standing = STANDING) -> str:
    """Return the page that would be scraped."""
    registry = CollectorRegistry()
    registry.register(DaemonCollector(lambda: totals, lambda: standing))
    return generate_latest(registry).decode()


def parsed(text: str) -> dict[str, Metric]:
    """Parse a page; counters get back the suffix that the parser takes from their names."""
    families = list(text_string_to_metric_families(text))
    named = {
        f"{each.name}_total" if each.type == "counter" else each.name: each for each in families
    }
    assert len(named) == len(families), "a family comes twice"
    return named


def values(family: Metric) -> dict[str, float]:
    """Return the values of a family by the value of its only label."""
    found = {"".join(sample.labels.values()): sample.value for sample in family.samples}
    assert len(found) == len(family.samples), "a series comes twice"
    return found


def buckets(family: Metric) -> dict[float, float]:
    """Return the cumulative counts of a histogram by their upper bounds."""
    return {
        float(sample.labels["le"]): sample.value
        for sample in family.samples
        if sample.name.endswith("_bucket")
    }


def sample(family: Metric, suffix: str) -> float:
    """Return the sum or the count of a histogram."""
    (found,) = [each.value for each in family.samples if each.name == family.name + suffix]
    return found


# Names and labels.


def check_names(families: dict[str, Metric], *absent: str) -> None:
    """Demand exactly the families there should be, with their types, labels and label values."""
    assert families.keys() == FAMILIES.keys()
    for name, (kind, label, wanted) in FAMILIES.items():
        family = families[name]
        assert family.type == kind, name
        assert family.documentation.endswith("."), name
        if kind == "histogram":
            assert {key for each in family.samples for key in each.labels} == {"le"}
            continue
        assert {each.name for each in family.samples} == {name} - {*absent}
        if name in absent:
            continue
        if name == "lpechod_build_info":
            (info,) = family.samples
            expected = {"version": __version__, "python_version": platform.python_version()}
            assert info.labels == expected
        elif label is None:
            assert [each.labels for each in family.samples] == [{}], name
        else:
            assert {tuple(each.labels) for each in family.samples} == {(label,)}, name
            assert values(family).keys() == wanted, name


def test_every_series_exists_from_the_start() -> None:
    """Before anything has happened all series are there, each label value included, at zero."""
    families = parsed(page(Totals()))
    check_names(families)
    for name, family in families.items():
        nonzero = [each for each in family.samples if each.value]
        assert [each.name for each in nonzero] == [name] * (name == "lpechod_build_info")


def test_no_series_tells_when_it_was_created() -> None:
    """There are no `_created` series: they would double the counters and say nothing."""
    assert "_created" not in page(Totals())


@given(data=st.data())
def test_numbers_change_no_names(data: st.DataObject) -> None:
    """Whatever has been counted, the series are the same, and each number is in its place."""
    totals = Totals()
    number = st.integers(0, 2**53)
    for each in fields(Totals):
        zero = getattr(totals, each.name)
        drawn = data.draw(number) if isinstance(zero, int) else [data.draw(number) for _ in zero]
        setattr(totals, each.name, drawn)
    families = parsed(page(totals))
    check_names(families)
    for name, field in {
        "lpechod_connections_accepted_total": "connections_accepted",
        "lpechod_connections_active": "connections_active",
        "lpechod_frames_total": "frames",
        "lpechod_received_bytes_total": "received_bytes",
        "lpechod_sent_bytes_total": "sent_bytes",
        "lpechod_buffered_bytes": "buffered_bytes",
        "lpechod_backpressure_pauses_total": "backpressure_pauses",
        "lpechod_timer_entries": "timer_entries",
        "lpechod_rate_limit_evictions_total": "rate_limit_evictions",
        "lpechod_census_overflows_total": "census_overflows",
        "lpechod_tls_handshakes_delayed_total": "tls_handshakes_delayed",
        "lpechod_log_lines_suppressed_total": "log_lines_suppressed",
        "lpechod_log_lines_dropped_total": "log_lines_dropped",
    }.items():
        assert values(families[name]) == {"": getattr(totals, field)}
    for name, field in {
        "lpechod_connections_closed_total": "connections_closed",
        "lpechod_connections_rejected_total": "connections_rejected",
        "lpechod_accept_pauses_total": "accept_pauses",
        "lpechod_tls_handshakes_total": "tls_handshakes",
    }.items():
        assert list(values(families[name]).values()) == getattr(totals, field)
    seconds = list(values(families["lpechod_overload_seconds_total"]).values())
    assert seconds == [nanoseconds / 1e9 for nanoseconds in totals.overload_ns]


def test_standing() -> None:
    """Workers, the limit, the last reload and the ends of certificates are shown as given."""
    expiry = {":1": 1.8e9, "unix:/x": 1.9e9}
    standing = Standing({"ready": 3, "draining": 2}, 7, 500, True, 1.75e9, expiry)
    families = parsed(page(Totals(), standing))
    assert values(families["lpechod_workers"]) == {"ready": 3, "draining": 2}
    assert values(families["lpechod_worker_restarts_total"]) == {"": 7}
    assert values(families["lpechod_connections_limit"]) == {"": 500}
    assert values(families["lpechod_config_last_reload_successful"]) == {"": 1}
    timestamp = values(families["lpechod_config_last_reload_success_timestamp_seconds"])
    assert timestamp == {"": 1.75e9}
    assert values(families["lpechod_tls_certificate_expiry_timestamp_seconds"]) == expiry


def test_described_families_are_the_collected_ones() -> None:
    """What the collector announces is what it brings, so that filters and clashes are found."""
    collector = DaemonCollector(Totals, lambda: STANDING)
    described = [(each.name, each.type) for each in collector.describe()]
    assert described == [(each.name, each.type) for each in collector.collect()]
    registry = CollectorRegistry()
    registry.register(collector)
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(DaemonCollector(Totals, lambda: STANDING))


# Histograms.


def check_histogram(family: Metric, count: int) -> None:
    """Demand what Prometheus takes for granted about a histogram."""
    cumulative = buckets(family)
    bounds = list(cumulative)
    assert bounds == sorted(set(bounds))
    assert bounds[-1] == math.inf
    assert list(cumulative.values()) == sorted(cumulative.values())
    assert cumulative[math.inf] == sample(family, "_count") == count


CLASSES = {
    "lpechod_frame_size_bytes": "frame_sizes",
    "lpechod_echo_duration_seconds": "echo_delays",
    "lpechod_connection_duration_seconds": "connection_durations",
    "lpechod_loop_turn_seconds": "turns",
}


@pytest.mark.parametrize("name", HISTOGRAMS)
@given(data=st.data())
def test_histograms_are_consistent(name: str, data: st.DataObject) -> None:
    """Buckets are cumulative, and the sum of all classes is +Inf and the count."""
    zeros = getattr(Totals(), CLASSES[name])
    counts = data.draw(st.lists(st.integers(0, 10**6), min_size=len(zeros), max_size=len(zeros)))
    totals = Totals()
    setattr(totals, CLASSES[name], counts)
    check_histogram(parsed(page(totals))[name], sum(counts))


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_each_class_is_in_the_bucket_of_its_bound(name: str) -> None:
    """An observation of any class is in every bucket from its own upper bound on, and no other."""
    first = {"frame_sizes": 1.0, "connection_durations": 0.01}.get(CLASSES[name], 50e-6)
    zeros = getattr(Totals(), CLASSES[name])
    for place in range(len(zeros)):
        totals = Totals()
        setattr(totals, CLASSES[name], [int(k == place) for k in range(len(zeros))])
        # The last class is open: it takes everything larger, too.
        upper = math.inf if place == len(zeros) - 1 else first * 2**place
        for bound, count in buckets(parsed(page(totals))[name]).items():
            assert count == (bound >= upper * (1 - 1e-9)), (place, bound)


def test_sums_of_histograms_are_in_base_units() -> None:
    """Sums are seconds and bytes, whatever they are counted in."""
    families = parsed(
        page(
            Totals(
                frame_sizes_bytes=12345,
                echo_delays_ns=1_500_000,
                connection_durations_ns=3_600_000_000_000,
                turns_ns=1,
            )
        )
    )
    sums = {name: sample(families[name], "_sum") for name in HISTOGRAMS}
    assert sums == {
        "lpechod_frame_size_bytes": 12345,
        "lpechod_echo_duration_seconds": 0.0015,
        "lpechod_connection_duration_seconds": 3600,
        "lpechod_loop_turn_seconds": 1e-9,
    }


def check_place(cumulative: dict[float, float], value: float) -> None:
    """Demand that one observation is in each bucket whose bound is not below it."""
    assert cumulative == {bound: float(value <= bound) for bound in cumulative}


def around(bounds: Iterable[int]) -> st.SearchStrategy[int]:
    """Draw a bound, or a number next to it."""
    return st.sampled_from([value for bound in bounds for value in (bound - 1, bound, bound + 1)])


TURN_BOUNDS_NS = [50_000 * 2**k for k in range(20)]
CONNECTION_BOUNDS_NS = [10_000_000 * 4**k for k in range(12)]
FRAME_BOUNDS = [4**k for k in range(2, 13)]


@given(nanoseconds=st.integers(0, 10**14) | around(TURN_BOUNDS_NS))
def test_place_of_a_duration(nanoseconds: int) -> None:
    """A turn, and the echo in it, are in all buckets whose bound is not below their duration."""
    seconds = nanoseconds / 1e9
    tally = Tally()
    watch = TurnWatch(tally)
    tally.frames = 1
    watch.note(seconds, 1)
    totals = Totals(turns=watch.settle().counts, echo_delays=tally.echo_delays.counts)
    families = parsed(page(totals))
    check_place(buckets(families["lpechod_loop_turn_seconds"]), seconds)
    check_place(buckets(families["lpechod_echo_duration_seconds"]), seconds)


@given(nanoseconds=st.integers(0, 10**15) | around(CONNECTION_BOUNDS_NS))
def test_place_of_a_connection(nanoseconds: int) -> None:
    """A connection is in all buckets whose bound is not below its duration."""
    seconds = nanoseconds / 1e9
    durations = ConnectionCounts().durations
    durations.observe(seconds)
    families = parsed(page(Totals(connection_durations=durations.counts)))
    check_place(buckets(families["lpechod_connection_duration_seconds"]), seconds)


@given(size=st.integers(0, 2**25) | st.integers(0, 3) | around(FRAME_BOUNDS))
def test_place_of_a_frame(size: int) -> None:
    """A frame is in all buckets whose bound is not below its length."""
    tally = Tally()
    frame = memoryview(encode_header(size) + bytes(size))
    scan(frame, len(frame), size, 1, tally.frame_sizes)
    families = parsed(page(Totals(frame_sizes=tally.frame_sizes)))
    check_place(buckets(families["lpechod_frame_size_bytes"]), size)


def test_bounds_are_those_that_rules_are_written_for() -> None:
    """The bounds of all histograms are fixed, and written without rounding errors."""
    families = parsed(page(Totals()))
    found = {name: list(buckets(families[name]))[:-1] for name in HISTOGRAMS}
    assert found == {
        "lpechod_frame_size_bytes": FRAME_BOUNDS,
        "lpechod_echo_duration_seconds": [n / 1e9 for n in TURN_BOUNDS_NS],
        "lpechod_connection_duration_seconds": [n / 1e9 for n in CONNECTION_BOUNDS_NS],
        "lpechod_loop_turn_seconds": [n / 1e9 for n in TURN_BOUNDS_NS],
    }


# The real thing.


def promtool(text: str) -> subprocess.CompletedProcess[str]:
    """Have Prometheus' own linter look at a page, or skip the test."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed (Debian: apt install prometheus)")
    return subprocess.run(
        [program, "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )


def test_promtool_finds_nothing_at_zero() -> None:
    """`promtool check metrics` has nothing to say about a page of zeros."""
    checked = promtool(page(Totals()))
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_a_real_page(tmp_path: Path) -> None:
    """A daemon that has served shows its families and the process's, and promtool is silent."""
    with Daemon(tmp_path) as daemon:
        with daemon.connect() as client:
            client.echo(b"hello")
        daemon.wait_until("lpechod_connections_closed_total", 1, reason="peer_closed")
        text = daemon.get()
    families = parsed(text)
    process = {name: family for name, family in families.items() if name.startswith("process_")}
    assert process.keys() == PROCESS_FAMILIES
    assert all(values(family)[""] > 0 for family in process.values())
    check_names(
        {name: family for name, family in families.items() if name not in process},
        "lpechod_tls_certificate_expiry_timestamp_seconds",
    )
    check_histogram(families["lpechod_frame_size_bytes"], 1)
    check_histogram(families["lpechod_echo_duration_seconds"], 1)
    check_histogram(families["lpechod_connection_duration_seconds"], 1)
    assert values(families["lpechod_workers"]) == {
        "starting": 0,
        "ready": 1,
        "draining": 0,
        "stalled": 0,
    }
    assert "_created" not in text
    checked = promtool(text)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["lpechod_frames_total", "process_open_fds"])
def test_a_real_page_can_be_filtered(tmp_path: Path, name: str) -> None:
    """A scrape of a daemon may ask for some names only, its own and those of the process."""
    with Daemon(tmp_path) as daemon:
        assert parsed(daemon.get(f"/metrics?name[]={name}")).keys() == {name}
