"""A hundred thousand connections at once on one machine: memory, CPU at rest, latency, no error.

    python tests/bench/bench_scale_up.py [--connections 100000] [--workers 6] [--cycles 6] ...
    python tests/bench/bench_scale_up.py --connections 5000 --workers 2 --cycles 2 --seconds 1

Each process, of the daemon's and of the load's, may have 20,000 descriptors. One in a hundred of
the connections is active; the others have echoed a frame, and idle under the default time-outs. In
turn the active ones are timed alone and beside the idle ones, which come and go for it: in each
cycle the phases alone come first, then those beside. Latencies are medians over the phases, of
which there are many: the p99 of one alone varies fourfold with whatever else the machine does. Each
frame is 64 bytes, each different, and compared; so is one on each idle connection before it ends.

Memory is what is private to the workers: its growth over all connections, from a daemon that has
just started. The kernel's is what the slabs and socket buffers of the machine have grown by, for
both ends of each connection, by whatever else happens on the machine, too.

It prints what was measured, with "MISSED" where that misses its target, and then exits with 1. The
daemon runs on the first CPU and the load on the last one. If it is run by root, they have a network
of their own, and a real-time priority, so that others on the machine disturb them less.
"""

import argparse
import os
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from prometheus_client.parser import text_string_to_metric_families

from tests.bench.clients import Address, Timed
from tests.bench.crew import Crew
from tests.bench.meters import CLIENTS_CPU, SERVERS_CPU, cpu_seconds, percentile, pin, private_bytes
from tests.bench.network import enter_own_network, tcp_counters
from tests.bench.scale_load import Active, Idle, put_first
from tests.system.daemon import Daemon

PHASES_PER_CYCLE = 3
ACTIVE_SHARE = 100
BODY_BYTES = 64
SETTLED_SECONDS = 1.0

MEMORY_TARGET_BYTES = 1536
REST_TARGET = 0.01
LATENCY_TARGET = 1.2


@dataclass(slots=True)
class Summary:
    """What was measured, a line for each; targets that were missed are counted."""

    missed: int = 0

    def show(self, name: str, value: str, *, target: str = "", kept: bool = True) -> None:
        """Print a figure, and whether it has kept its target."""
        verdict = ("ok" if kept else "MISSED") if target else ""
        print(f"{name:<46}{value:>16}   {target:<20}{verdict}".rstrip(), flush=True)
        self.missed += not kept


@dataclass(slots=True)
class Phases:
    """Percentiles of latency in microseconds, for each phase of a kind."""

    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)

    def add(self, timed: Timed) -> None:
        """Add a phase."""
        ordered = sorted(latency * 1e6 for latency in timed.latencies)
        self.p50.append(percentile(ordered, 0.5))
        self.p99.append(percentile(ordered, 0.99))


def user_bytes(it: Daemon) -> int:
    """Return the private memory of all workers."""
    return sum(private_bytes(pid) for pid in it.workers())


def kernel_bytes() -> int:
    """Return the memory of the machine in slabs and, of this network, in buffers of TCP sockets."""
    slab = re.search(r"^Slab:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    pages = re.search(r"^TCP: .* mem (\d+)", Path("/proc/net/sockstat").read_text(), re.MULTILINE)
    assert slab
    assert pages
    return int(slab[1]) * 1024 + int(pages[1]) * os.sysconf("SC_PAGE_SIZE")


def rest(it: Daemon, seconds: float) -> float:
    """Return the CPU share of the daemon while nothing happens."""
    time.sleep(SETTLED_SECONDS)
    used, began = cpu_seconds(it.pid), time.monotonic()
    time.sleep(seconds)
    return (cpu_seconds(it.pid) - used) / (time.monotonic() - began)


def play(active: Crew, seconds: float, *, last: bool) -> list[list[Timed]]:
    """Have the active connections echo for some seconds; return their reports after the last."""
    active.begin()
    time.sleep(seconds)
    active.begin()
    if last:
        reports: list[list[Timed]] = active.collect()
        return reports
    active.await_ready()
    return []


def holders(plan: argparse.Namespace, address: Address, cycle: int) -> list[Idle]:
    """Share the idle connections out among processes, each with addresses of their own.

    New ones in each cycle: the ports of the last one are in TIME_WAIT.
    """
    idle = plan.connections - plan.connections // ACTIVE_SHARE
    each, more = divmod(idle, plan.workers)
    return [
        Idle(address, f"127.{cycle + 1}.{number}", each + (number < more), plan.descriptors)
        for number in range(plan.workers)
    ]


def judge_held(
    it: Daemon, plan: argparse.Namespace, summary: Summary, before: Sequence[int]
) -> None:
    """Show what the daemon needs while all connections are held, against before there was any."""
    count = plan.connections
    user = (user_bytes(it) - before[0]) / count
    kernel = (kernel_bytes() - before[1]) / count
    timers = it.settled("lpechod_timer_entries")
    open_files = [sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()) for pid in it.workers()]
    limits = {resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in (it.pid, *it.workers())}
    assert limits == {(plan.descriptors, plan.descriptors)}, limits
    summary.show("connections held", f"{it.metric('lpechod_connections_active'):.0f}")
    summary.show("deadlines filed", f"{timers:.0f}", target=f">= {count}", kept=timers >= count)
    summary.show(
        "descriptors of a worker, least and most",
        f"{min(open_files)}, {max(open_files)}",
        target=f"<= {plan.descriptors}",
        kept=max(open_files) <= plan.descriptors,
    )
    summary.show(
        "user memory for each connection",
        f"{user:.0f} B",
        target=f"<= {MEMORY_TARGET_BYTES} B",
        kept=user <= MEMORY_TARGET_BYTES,
    )
    summary.show("kernel memory for each, both ends", f"{kernel:.0f} B")


def judge_rest(summary: Summary, empty: float, held: float) -> None:
    """Show the CPU share at rest."""
    summary.show("CPU at rest without connections", f"{empty:.2%}")
    summary.show(
        "CPU at rest with all of them",
        f"{held:.2%}",
        target=f"< {REST_TARGET:.0%} of a core",
        kept=held < REST_TARGET,
    )


def judge_latency(summary: Summary, alone: Phases, beside: Phases) -> None:
    """Show the latency of the active ones, alone and beside the idle ones."""
    for name, ones, others in (("p50", alone.p50, beside.p50), ("p99", alone.p99, beside.p99)):
        one, other = statistics.median(ones), statistics.median(others)
        summary.show(f"{name} alone, by phase", " ".join(f"{each:.0f}" for each in ones))
        summary.show(f"{name} beside, by phase", " ".join(f"{each:.0f}" for each in others))
        target, kept = "", True
        if name == "p99":
            target, kept = f"<= {LATENCY_TARGET:.2f}x", other / one <= LATENCY_TARGET
        figures = f"{one:.0f} -> {other:.0f} us, {other / one:.2f}x"
        summary.show(f"{name}, medians", figures, target=target, kept=kept)


def judge_errors(it: Daemon, summary: Summary, served: int) -> None:
    """Show what went wrong by the daemon's count and the kernel's; clients have raised an error."""
    ended, bad = 0, 0
    for family in text_string_to_metric_families(it.get()):
        for sample in family.samples:
            if sample.name == "lpechod_connections_closed_total":
                good = sample.labels["reason"] == "peer_closed"
                ended += int(sample.value) if good else 0
                bad += 0 if good else int(sample.value)
            elif sample.name in (
                "lpechod_connections_rejected_total",
                "lpechod_overload_seconds_total",
            ):
                bad += int(sample.value)
    summary.show(
        "connections that their clients ended",
        str(ended),
        target=f"= {served}",
        kept=ended == served,
    )
    summary.show("rejected, or ended otherwise", str(bad), target="= 0", kept=not bad)
    names = ("ListenOverflows", "ListenDrops", "EstabResets", "AttemptFails")
    counters = tcp_counters(*names)
    summary.show(
        "TCP: " + ", ".join(names).replace("Listen", ""),
        " ".join(map(str, counters)),
        target="= 0",
        kept=not any(counters),
    )


def measure(it: Daemon, plan: argparse.Namespace, summary: Summary) -> None:
    """Run all cycles, and judge."""
    host, _, port = it.address.rpartition(":")
    address = host, int(port)
    count = plan.connections // ACTIVE_SHARE
    pin(it.pid, SERVERS_CPU)
    put_first(it.pid)
    alone, beside = Phases(), Phases()
    empty, before = rest(it, plan.rest), (user_bytes(it), kernel_bytes())
    with Crew(1, CLIENTS_CPU) as active, Crew(plan.workers, CLIENTS_CPU) as idle:
        rounds = 2 * PHASES_PER_CYCLE * plan.cycles
        active.prepare([Active(address, "127.0.1.1", count, BODY_BYTES, plan.rate, rounds)])
        reports: list[list[Timed]] = []
        verified = 0
        for cycle in range(plan.cycles):
            for _ in range(PHASES_PER_CYCLE):
                play(active, plan.seconds, last=False)
            began = time.monotonic()
            idle.prepare(holders(plan, address, cycle))
            idle.begin()
            it.wait_until("lpechod_connections_active", plan.connections)
            if not cycle:
                summary.show("time to connect them", f"{time.monotonic() - began:.1f} s")
                judge_held(it, plan, summary, before)
                judge_rest(summary, empty, rest(it, plan.rest))
            for number in range(PHASES_PER_CYCLE):
                last = cycle + 1 == plan.cycles and number + 1 == PHASES_PER_CYCLE
                reports = play(active, plan.seconds, last=last)
            verified += sum(idle.stop())
        it.wait_until("lpechod_connections_active", 0)
    for number, timed in enumerate(reports[0]):
        (beside if number // PHASES_PER_CYCLE % 2 else alone).add(timed)
        verified += len(timed.latencies)
    judge_latency(summary, alone, beside)
    summary.show("echoes verified, byte by byte", str(verified))
    judge_errors(it, summary, count + plan.cycles * (plan.connections - count))


def main() -> int:
    """Measure, and return the exit status: 1 if a target was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--connections", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=6, help="and as many processes of load")
    parser.add_argument("--descriptors", type=int, default=20_000, help="limit of each process")
    parser.add_argument("--rate", type=float, default=2000, help="frames a second, of all active")
    parser.add_argument("--cycles", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each phase")
    parser.add_argument("--rest", type=float, default=10.0, help="seconds of measuring it")
    plan = parser.parse_args()
    enter_own_network()
    resource.setrlimit(resource.RLIMIT_NOFILE, (plan.descriptors, plan.descriptors))
    # From 90 percent of the limit on, idle connections would have to make room for others.
    places = plan.connections * 6 // 5
    config = f"[server]\nworkers = {plan.workers}\n[limits]\nmax_connections = {places}\n"
    summary = Summary()
    with tempfile.TemporaryDirectory() as folder, Daemon(Path(folder), config) as it:
        measure(it, plan, summary)
    return 1 if summary.missed else 0


if __name__ == "__main__":
    sys.exit(main())
