"""Rounds of load: each server gets the same in turn, so that a ratio is of the same moment."""

import contextlib
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.bench.clients import Churn, Kept, PingPong
from tests.bench.crew import Crew, Job
from tests.bench.meters import CLIENTS_CPU, cpu_seconds, median_ratio, percentile
from tests.bench.servers import FAVOURED, OURS, Server

PROCESSES = 4
"""Of clients."""

WARM_UP_SECONDS = 0.3
"""Load before the first round: malloc(3) of a server whose connections have come and gone no longer
gives large blocks back to the kernel each time (M_MMAP_THRESHOLD), which doubles uvloop's speed."""


_KEYS = ("cpu", "rate", "p50", "p99")
"""Figures that tables show."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What clients do.

    Args:
        name: what the table calls it.
        connections: that have frames under way.
        body_bytes: of each frame, without its header.
        in_flight: frames under way on each of them.
        idle: further connections, which have echoed once and then do nothing.
        churn: whether each connection ends after one frame, and another takes its place.
        processes: of clients, at most.
    """

    name: str
    connections: int
    body_bytes: int
    in_flight: int = 1
    idle: int = 0
    churn: bool = False
    processes: int = PROCESSES

    def jobs(self, server: Server, seconds: float) -> Sequence[Job]:
        """Return what the processes of a crew do, without the idle connections."""
        busy = min(self.connections, self.processes)
        jobs: list[Job] = []
        for number in range(busy):
            share = self.connections // busy + (number < self.connections % busy)
            each = (server.address, server.tls, share, self.body_bytes, seconds)
            jobs.append(Churn(*each) if self.churn else PingPong(*each, self.in_flight))
        return jobs


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one round: microseconds, and frames in a second."""

    cpu: float
    rate: float
    p50: float
    p99: float


def measure(crew: Crew, server: Server, workload: Workload, seconds: float) -> Figures:
    """Load a server once."""
    crew.prepare(workload.jobs(server, seconds))
    before = cpu_seconds(server.pid)
    crew.begin()
    crew.await_ready()
    used = cpu_seconds(server.pid) - before
    crew.begin()
    frames = sorted(latency for report in crew.collect() for latency in report.latencies)
    return Figures(
        used / len(frames) * 1e6,
        len(frames) / seconds,
        percentile(frames, 0.5) * 1e6,
        percentile(frames, 0.99) * 1e6,
    )


@contextlib.contextmanager
def idling(servers: Sequence[Server], connections: int) -> Iterator[None]:
    """Keep idle connections to each of some servers, by processes of their own."""
    if not connections:
        yield
        return
    with Crew(len(servers), CLIENTS_CPU, FAVOURED) as crew:
        crew.prepare([Kept(each.address, each.tls, connections) for each in servers])
        yield
        crew.begin()
        crew.stop()


def play(
    crew: Crew, up: Mapping[str, Server], workload: Workload, rounds: int, seconds: float
) -> dict[str, list[Figures]]:
    """Load each server in turn, so many rounds long, and return the figures of each."""
    figures: dict[str, list[Figures]] = {name: [] for name in up}
    with idling(list(up.values()), workload.idle):
        for server in up.values():
            measure(crew, server, workload, WARM_UP_SECONDS)
        for _ in range(rounds):
            for name, server in up.items():
                figures[name].append(measure(crew, server, workload, seconds))
    return figures


def median(rounds: Sequence[Figures], key: str) -> float:
    """Return the median of a figure over the rounds."""
    return statistics.median(_values(rounds, key))


def times_ours(figures: Mapping[str, Sequence[Figures]], name: str, key: str) -> float | None:
    """Return how many times lpechod's a figure is; None if there is nothing to compare."""
    if name == OURS or OURS not in figures:
        return None
    return median_ratio(_values(figures[name], key), _values(figures[OURS], key))


def together(
    measured: Sequence[Mapping[str, Sequence[Figures]]], name: str, key: str
) -> float | None:
    """Return the same over several workloads, each of which weighs the same (geometric mean)."""
    ratios = [times_ours(figures, name, key) for figures in measured]
    known = [ratio for ratio in ratios if ratio is not None]
    return statistics.geometric_mean(known) if known else None


def _values(rounds: Sequence[Figures], key: str) -> list[float]:
    return [getattr(each, key) for each in rounds]


def show_head(title: str) -> None:
    """Print the head of the table."""
    heads = "".join(f"{head:>10}{'':9}" for head in ("cpu us", "frames/s", "p50 us", "p99 us"))
    print(f"{title:<28}{'server':<18}{heads}".rstrip())


def show(workload: Workload, figures: Mapping[str, Sequence[Figures]]) -> None:
    """Print a workload's part of the table."""
    title = workload.name
    for name, rounds in figures.items():
        cells = "".join(
            f"{median(rounds, key):>10.1f}{_times(times_ours(figures, name, key))}" for key in _KEYS
        )
        print(f"{title:<28}{name:<18}{cells}", flush=True)
        title = ""


def show_together(title: str, measured: Sequence[Mapping[str, Sequence[Figures]]]) -> None:
    """Print what several workloads come to, which is ratios and nothing else."""
    for name in measured[0]:
        ratios = [together(measured, name, key) for key in _KEYS]
        if any(ratios):
            cells = "".join(f"{'':10}{_times(ratio)}" for ratio in ratios)
            print(f"{title:<28}{name:<18}{cells}", flush=True)
            title = ""


def _times(ratio: float | None) -> str:
    return " " * 9 if ratio is None else f" ({ratio:5.2f}x)"
