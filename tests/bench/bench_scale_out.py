"""Two workers against one: what a frame costs, and how evenly connections are shared out.

    python tests/bench/bench_scale_out.py [--seconds 1] [--rounds 9] [--spread]

A daemon of this checkout with one worker and one with two are loaded in turn, over and over. "cpu"
is the CPU time of the whole tree of the daemon for each frame, in microseconds, which must not be
more than 5 percent higher with two workers, as the median over pairs of the same round; frames a
second and latency are not compared, since the load would be measured too. "shares" are the sockets
of each of the two workers in the last round. They are even if the one is ahead of the other by no
more than `lpechod.process.siblings` allows. It exits with 1 if a target is missed.

On a machine of two CPUs the load competes for them. So all workers run on the first CPU, and the
load, a single process that compares every byte, on the last: what is compared is then the price of
sharing the work out, without what caches and interrupts of several CPUs add. With ``--spread``,
each worker has a CPU of its own; the load then runs beside one of them, and that is in the figures.
"""

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.clients import Address
from tests.bench.crew import Crew
from tests.bench.meters import CLIENTS_CPU, SERVERS_CPU, cpu_seconds, median_ratio, pin
from tests.bench.network import enter_own_network
from tests.bench.scale_load import Pipelined, put_first
from tests.system.daemon import Daemon, count_sockets

COST_TARGET = 1.05
WARM_UP_SECONDS = 0.2

WORKLOADS = {
    "64 B, 50 connections": (50, 64, 1),
    "64 B, 500 connections": (500, 64, 1),
    "64 B, 50 connections, 16 in flight": (50, 64, 16),
    "64 KiB, 20 connections": (20, 64 << 10, 1),
}
"""Connections, bytes of a body, and frames in flight on each."""


@dataclass(slots=True)
class Round:
    """One load of one daemon."""

    cpu_us: float
    shares: list[int]


def place(it: Daemon, *, spread: bool) -> None:
    """Pin the processes of a daemon."""
    pin(it.pid, SERVERS_CPU)
    if spread:
        for worker, cpu in zip(it.workers(), sorted(os.sched_getaffinity(0)), strict=False):
            pin(worker, cpu)
    else:
        put_first(it.pid)  # Beside the load it would interrupt that for each single frame.


def measure(crew: Crew, it: Daemon, load: tuple[int, int, int], seconds: float) -> Round:
    """Load a daemon once."""
    host, _, port = it.address.rpartition(":")
    address: Address = host, int(port)
    before = [count_sockets(worker) for worker in it.workers()]
    crew.prepare([Pipelined(address, *load, seconds)])
    shares = [count_sockets(worker) - own for worker, own in zip(it.workers(), before, strict=True)]
    used = cpu_seconds(it.pid)
    crew.begin()
    crew.await_ready()
    used = cpu_seconds(it.pid) - used
    crew.begin()
    (frames,) = crew.collect()
    it.wait_until("lpechod_connections_active", 0)
    return Round(used / frames * 1e6, shares)


def is_even(shares: Sequence[int]) -> bool:
    """Tell whether no worker is further ahead than workers may be."""
    least, most = min(shares), max(shares)
    return most <= least + 8 + least // 8


def main() -> int:
    """Print the table, and return the exit status: 1 if a target was missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="for each load of a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--spread", action="store_true", help="each worker on a CPU of its own")
    plan = parser.parse_args()
    enter_own_network()
    missed = False
    print(f"{'workload':<36}{'1 worker':>10}{'2 workers':>11}{'cpu':>8}   {'shares':<12}")
    with (
        tempfile.TemporaryDirectory() as one,
        tempfile.TemporaryDirectory() as other,
        Daemon(Path(one), "[server]\nworkers = 1\n") as single,
        Daemon(Path(other), "[server]\nworkers = 2\n") as double,
        Crew(1, CLIENTS_CPU) as crew,
    ):
        for it in (single, double):
            place(it, spread=plan.spread)
            it.wait_until("lpechod_workers", len(it.workers()), state="ready")
        for name, load in WORKLOADS.items():
            rounds = compare(crew, (single, double), load, plan)
            missed |= not show(name, *rounds)
    return 1 if missed else 0


def compare(
    crew: Crew, both: tuple[Daemon, Daemon], load: tuple[int, int, int], plan: argparse.Namespace
) -> tuple[list[Round], list[Round]]:
    """Load both in turn, and in each round the other one first."""
    rounds: tuple[list[Round], list[Round]] = [], []
    for it in both:
        measure(crew, it, load, WARM_UP_SECONDS)
    for number in range(plan.rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            rounds[which].append(measure(crew, both[which], load, plan.seconds))
    return rounds


def show(name: str, single: Sequence[Round], double: Sequence[Round]) -> bool:
    """Print a row, and tell whether it has kept its targets."""
    ones, others = [each.cpu_us for each in single], [each.cpu_us for each in double]
    ratio, shares = median_ratio(others, ones), double[-1].shares
    cheap, even = ratio <= COST_TARGET, all(is_even(each.shares) for each in double)
    print(
        f"{name:<36}{statistics.median(ones):>10.2f}{statistics.median(others):>11.2f}{ratio:>7.3f}x"
        f"   {shares[0]:>4} {shares[1]:>4}   "
        f"{'ok' if cheap else 'cpu MISSED'}{'' if even else ', shares MISSED'}",
        flush=True,
    )
    return cheap and even


if __name__ == "__main__":
    sys.exit(main())
