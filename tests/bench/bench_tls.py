"""What TLS costs: lpechod against echo servers on asyncio and on uvloop, with one certificate.

    python tests/bench/bench_tls.py [--seconds 1] [--rounds 5]

It starts ``lpechod serve`` of this checkout with one worker and a TLS listener, and the servers of
`tests.bench.tls_peer`, and loads one after the other, in turns. A row is a median over the rounds:

- "cpu": microseconds of CPU for each frame, of the whole process tree of the server. This is the
  figure to look at, as it does not depend on how fast the clients are;
- "frames/s", "p50" and "p99" (of the latency, in microseconds, see `tests.bench.clients.PingPong`);
- in brackets: times lpechod's, the median over pairs of the same round. More than 1 is good for
  lpechod in the columns of costs, less than 1 in "frames/s".

Servers run on the first CPU, clients on the last, both at niceness -10 if that is allowed, and
every byte of every echo is compared. What other programs do on the machine shows nevertheless:
quote ratios of one run. The kernel should use cubic, since bbr paces what it sends
(``sysctl net.ipv4.tcp_congestion_control=cubic``). Without uvloop, or with a server left out
(``--servers lpechod,asyncio``), the others are measured.
"""

import argparse
import contextlib
import importlib.util
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.clients import Address, PingPong
from tests.bench.crew import Crew
from tests.bench.meters import (
    CLIENTS_CPU,
    SERVERS_CPU,
    cpu_seconds,
    median_ratio,
    percentile,
    pin,
)
from tests.certificates import Issued, issue
from tests.system.daemon import Daemon

PROCESSES = 4

FAVOURED = -10
"""Niceness of servers and clients, against whatever else runs on the machine."""

WARM_UP_SECONDS = 0.3
"""Load before the first round: malloc(3) of a server whose connections have come and gone no longer
gives large blocks back to the kernel each time (M_MMAP_THRESHOLD), which doubles uvloop's speed."""

OURS = "lpechod"
PEERS: Mapping[str, tuple[str, str]] = {
    "asyncio": ("asyncio", "protocol"),
    "asyncio-buffered": ("asyncio", "buffered"),
    "uvloop": ("uvloop", "protocol"),
    "uvloop-buffered": ("uvloop", "buffered"),
}

WORKLOADS: Mapping[str, tuple[int, int]] = {
    "64 B, 1 connection": (1, 64),
    "64 B, 50 connections": (50, 64),
    "4 KiB, 50 connections": (50, 4096),
    "256 KiB, 4 connections": (4, 256 << 10),
    "1 MiB, 4 connections": (4, 1 << 20),
}


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is up."""

    pid: int
    address: Address


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one round: microseconds, and frames in a second."""

    cpu: float
    rate: float
    p50: float
    p99: float


def installed(names: list[str]) -> list[str]:
    """Leave out servers on uvloop if it is not there, and say so."""
    if importlib.util.find_spec("uvloop") is None and any("uvloop" in name for name in names):
        print("uvloop is not installed: going on without it")
        return [name for name in names if "uvloop" not in name]
    return names


@contextlib.contextmanager
def lpechod(folder: Path, issued: Issued, more: str) -> Iterator[Server]:
    """Run the daemon of this checkout."""
    config = f'{more}[[listen]]\naddress = "127.0.0.1:0"\ntls = {issued.table()}\n'
    with Daemon(folder, config) as it:
        host, _, port = it.address.rpartition(":")
        yield Server(it.pid, (host, int(port)))


@contextlib.contextmanager
def peer(loop: str, kind: str, issued: Issued) -> Iterator[Server]:
    """Run a server of `tests.bench.tls_peer`."""
    script = Path(__file__).with_name("tls_peer.py")
    process = subprocess.Popen(
        [sys.executable, str(script), loop, kind, str(issued.certificate), str(issued.key)],
        stdout=subprocess.PIPE,
    )
    with process:
        try:
            assert process.stdout is not None
            yield Server(process.pid, ("127.0.0.1", int(process.stdout.readline())))
        finally:
            process.kill()


@contextlib.contextmanager
def servers(names: Sequence[str], more: str = "") -> Iterator[dict[str, Server]]:
    """Run servers, on the CPU that is theirs.

    Args:
        names: which.
        more: TOML for the configuration of lpechod.
    """
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        issued = issue(folder)
        up = {}
        for each in names:
            start = lpechod(folder, issued, more) if each == OURS else peer(*PEERS[each], issued)
            server = up[each] = stack.enter_context(start)
            pin(server.pid, SERVERS_CPU, FAVOURED)
        yield up


def measure(crew: Crew, server: Server, connections: int, size: int, seconds: float) -> Figures:
    """Load a server once."""
    busy = min(connections, PROCESSES)
    shares = [connections // busy + (number < connections % busy) for number in range(busy)]
    crew.prepare([PingPong(server.address, True, share, size, seconds) for share in shares])
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


def show(workload: str, figures: dict[str, list[Figures]]) -> None:
    """Print a workload's part of the table."""
    for name, rounds in figures.items():
        cells = ""
        for key in ("cpu", "rate", "p50", "p99"):
            values = [getattr(each, key) for each in rounds]
            cells += f"{statistics.median(values):>10.1f}"
            if name == OURS or OURS not in figures:
                cells += " " * 9
            else:
                ratio = median_ratio(values, [getattr(each, key) for each in figures[OURS]])
                cells += f" ({ratio:5.2f}x)"
        print(f"{workload:<24}{name:<18}{cells}", flush=True)
        workload = ""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--servers", default="lpechod,asyncio,uvloop", help=", ".join(PEERS))
    arguments = parser.parse_args()
    names = installed(arguments.servers.split(","))
    heads = "".join(f"{head:>10}{'':9}" for head in ("cpu us", "frames/s", "p50 us", "p99 us"))
    with servers(names) as up, Crew(PROCESSES, CLIENTS_CPU, FAVOURED) as crew:
        print(f"{'workload, over TLS':<24}{'server':<18}{heads}".rstrip())
        for workload, (connections, size) in WORKLOADS.items():
            for server in up.values():
                measure(crew, server, connections, size, WARM_UP_SECONDS)
            figures: dict[str, list[Figures]] = {name: [] for name in up}
            for _ in range(arguments.rounds):
                for name, server in up.items():
                    figures[name].append(
                        measure(crew, server, connections, size, arguments.seconds)
                    )
            show(workload, figures)


if __name__ == "__main__":
    main()
