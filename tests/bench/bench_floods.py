"""What hostile clients do to a healthy one: its latency undisturbed, and during some floods.

    python tests/bench/bench_floods.py [--seconds 8]

A daemon of this checkout with one worker has a plain and a TLS listener and 2,000 places. Two
healthy clients, one on each, echo 200 frames of 64 bytes a second, each on one connection that
stays through all phases; every byte is compared, and a frame that is due while the server holds the
one before it counts from when it was due. For each phase a row shows what the flood did, the CPU
share of the daemon, and for both clients the median, the 99th percentile and the maximum of the
latency in microseconds; in brackets: times what they are in the first row.

The processes that flood would also slow down the healthy clients and the daemon, by taking their
CPU. So the daemon runs on the first CPU, at niceness -10 (which takes root), and nothing of the
benchmark beside it. The floods run on the last, at niceness 10; the healthy clients run there, too,
at -10. Still the kernel does part of the work of all connections there, which no priority governs:
the row "computing only" is no flood, but as many processes that compute, and what is more in the
other rows is more than the lack of a CPU. Others that use the machine show in the 99th percentile
first.

A phase begins with the flood, so the building up of those that are held is in it: two seconds at
full speed for those who read slowly, of which there are two kinds. With windows of 4 KiB, the
daemon soon has to hold what they do not read; with the kernel's own, the kernel takes most of it.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.clients import Address, Paced, Timed
from tests.bench.crew import Crew, Job
from tests.bench.floods import Connects, Handshakes, Hellos, Silence, Spinning, Unread
from tests.bench.meters import CLIENTS_CPU, SERVERS_CPU, cpu_seconds, percentile, pin
from tests.certificates import issue
from tests.system.daemon import Daemon

PROCESSES = 4
FRAMES_PER_SECOND = 200
PLACES = 2000
SILENT = 500
UNREAD = 200
SMALL_WINDOW = 4096
FAVOURED, FLOODING = -10, 10
"""Nicenesses."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A flood by some processes.

    Args:
        name: what it is.
        jobs: for its processes.
        held: how many connections it should hold at its end; 0: what it does is a rate.
    """

    name: str
    jobs: Sequence[Job] = ()
    held: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured in a phase."""

    phase: Phase
    did: str
    cpu: float


def phases(plain: Address, tls: Address) -> list[Phase]:
    """Return all phases, the first and the last of which are undisturbed."""
    each = SILENT // PROCESSES, PLACES // PROCESSES, UNREAD // PROCESSES
    small, large = (
        [Unread(address, address == tls, each[2], window) for address in (plain, tls) * 2]
        for window in (SMALL_WINDOW, 0)
    )
    return [
        Phase("undisturbed"),
        Phase("computing only", [Spinning()] * PROCESSES),
        Phase("handshake flood", [Handshakes(tls)] * PROCESSES),
        Phase("ClientHello flood", [Hellos(tls)] * PROCESSES),
        Phase(f"{SILENT} silent on TLS", [Silence(tls, each[0])] * PROCESSES, SILENT),
        # Two places are the healthy clients'.
        Phase(f"idle flood, {PLACES}", [Silence(plain, each[1])] * PROCESSES, PLACES - 2),
        Phase(f"slow-read flood, {UNREAD}", small, UNREAD),
        Phase("with large windows", large, UNREAD),
        Phase("connect storm", [Connects(plain)] * PROCESSES),
        Phase("undisturbed"),
    ]


def play(it: Daemon, healthy: Crew, hostile: Crew, phase: Phase, seconds: float) -> Row:
    """Let a flood go on for some seconds; the healthy clients begin with it and stop before it."""
    if phase.jobs:
        hostile.prepare(phase.jobs)
    used, began = cpu_seconds(it.pid), time.monotonic()
    healthy.begin()
    hostile.begin()
    time.sleep(seconds)
    cpu = (cpu_seconds(it.pid) - used) / (time.monotonic() - began)
    healthy.begin()
    done = sum(hostile.stop()) if phase.jobs else 0
    if not phase.jobs or isinstance(phase.jobs[0], Spinning):
        return Row(phase, "", cpu)
    if done < max(phase.held * 0.9, 1):
        raise AssertionError(f"{phase.name} was none: {done}")
    it.wait_until("lpechod_connections_active", 2)
    return Row(phase, f"{done} held" if phase.held else f"{done / seconds:.0f}/s", cpu)


def show(rows: Sequence[Row], clients: Sequence[Sequence[Timed]]) -> None:
    """Print the table."""
    heads = "".join(f"{head:>8}{'':9}" for head in ("p50", "p99", "max"))
    print(f"{'':23}{'':>10}{'':>8}  {'plain, us':<{len(heads)}}TLS, us")
    print(f"{'phase':<23}{'flood':>10}{'CPU':>8}{heads}{heads}".rstrip())
    measured = [[_latencies(phase) for phase in client] for client in clients]
    for number, row in enumerate(rows):
        line = f"{row.phase.name:<23}{row.did:>10}{row.cpu:>8.0%}"
        for client in measured:
            for value, first in zip(client[number], client[0], strict=True):
                line += f"{value:>8.0f} ({value / first:5.1f}x)"
        print(line)


def _latencies(timed: Timed) -> tuple[float, float, float]:
    ordered = sorted(latency * 1e6 for latency in timed.latencies)
    return percentile(ordered, 0.5), percentile(ordered, 0.99), ordered[-1]


def main() -> None:
    """Play all phases, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="for each phase")
    seconds = parser.parse_args().seconds
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = f"[limits]\nmax_connections = {PLACES}\n"
        for more in ("", f"tls = {issue(folder).table()}\n"):
            config += f'[[listen]]\naddress = "127.0.0.1:0"\n{more}'
        with (
            Daemon(folder, config) as it,
            Crew(2, CLIENTS_CPU, FAVOURED) as healthy,
            Crew(PROCESSES, CLIENTS_CPU, FLOODING) as hostile,
        ):
            pin(it.pid, SERVERS_CPU, FAVOURED)
            plain, tls = (
                ("127.0.0.1", int(each.rpartition(":")[2])) for each in it.latest["listeners"]
            )
            plan = phases(plain, tls)
            healthy.prepare(
                [
                    Paced(address, address == tls, 64, FRAMES_PER_SECOND, len(plan), turn)
                    for address, turn in ((plain, 0.0), (tls, 0.5 / FRAMES_PER_SECOND))
                ]
            )
            rows = []
            for phase in plan:
                rows.append(play(it, healthy, hostile, phase, seconds))
                if len(rows) < len(plan):
                    healthy.await_ready()
            show(rows, healthy.collect())


if __name__ == "__main__":
    main()
