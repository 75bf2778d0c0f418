"""What an echo costs: lpechod against echo servers on asyncio and on uvloop, over plain TCP.

    python tests/bench/bench_echo.py [--seconds 0.5] [--rounds 5] [--markdown]

It starts ``lpechod serve`` of this checkout, with one worker and every other key at its default,
the servers of `tests.bench.peer`, and "bare", the least that Python can do (`tests.bench.bare`); it
loads one after the other, in turns. A row is a median over the rounds:

- "cpu": microseconds of CPU for each frame, of the whole process tree of the server. This is the
  figure to look at: the clients are slower than the servers, so they limit all others;
- "frames/s", "p50" and "p99" (of the latency, in microseconds, see `tests.bench.clients`);
- in brackets: times lpechod's, the median over pairs of the same round. More than 1 is good for
  lpechod in the columns of costs, less than 1 in "frames/s".

For "new connections", a frame is a connection: connect(2), one echo, close(2), 20 at a time.

Of each loop there are two servers, `asyncio.Protocol` and, "buffered", `asyncio.BufferedProtocol`:
the first is better for small frames, the second for large ones. ``--markdown`` prints the table as
it stands in README.md, which has the better one for each workload.

Servers run on the first CPU, clients on the last, both at niceness -10 if that is allowed, and
every byte of every echo is compared. What other programs do on the machine shows nevertheless:
quote ratios of one run. The kernel should use cubic, since bbr paces what it sends
(``sysctl net.ipv4.tcp_congestion_control=cubic``). Without uvloop, or with a server left out
(``--servers lpechod,asyncio``), the others are measured.
"""

import argparse
import resource
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.crew import Crew
from tests.bench.meters import CLIENTS_CPU, surroundings
from tests.bench.rounds import (
    PROCESSES,
    Figures,
    Workload,
    median,
    play,
    show,
    show_head,
    times_ours,
)
from tests.bench.servers import BARE, FAVOURED, OURS, PEERS, installed, servers

WORKLOADS = (
    Workload("64 B, 1 connection", 1, 64),
    Workload("64 B, 50 connections", 50, 64),
    Workload("64 B, 500 connections", 500, 64),
    Workload("64 B, 50 and 2,000 idle", 50, 64, idle=2000),
    Workload("64 B, 50 with 16 in flight", 50, 64, in_flight=16),
    Workload("4 KiB, 50 connections", 50, 4096),
    Workload("64 KiB, 20 connections", 20, 64 << 10),
    Workload("256 KiB, 10 connections", 10, 256 << 10),
    Workload("1 MiB, 4 connections", 4, 1 << 20),
    Workload("64 B, new connections", 20, 64, churn=True),
)


def best_by_loop(figures: Mapping[str, list[Figures]]) -> dict[str, list[Figures]]:
    """Return the figures of lpechod, and of each loop those of the protocol that costs less CPU."""
    best: dict[str, list[Figures]] = {}
    for name, rounds in figures.items():
        loop = _loop_of(name)
        if loop not in best or median(rounds, "cpu") < median(best[loop], "cpu"):
            best[loop] = rounds
    return best


def markdown_head(loops: Iterable[str]) -> str:
    """Return the first two lines of the table of README.md."""
    names = list(loops)
    cells = ["workload", *(f"{name}, CPU" for name in names)]
    cells.extend(f"{name}, p50" for name in names if name != BARE)
    return f"| {' | '.join(cells)} |\n|---|{'---:|' * (len(cells) - 1)}"


def markdown_row(workload: Workload, by_loop: Mapping[str, list[Figures]]) -> str:
    """Return a workload's line of the table of README.md."""
    cells = [workload.name]
    for name, rounds in by_loop.items():
        ratio = times_ours(by_loop, name, "cpu")
        cells.append(f"{_shown(median(rounds, 'cpu'))}{f' ({ratio:.2f}x)' if ratio else ''}")
    cells.extend(_shown(median(rounds, "p50")) for name, rounds in by_loop.items() if name != BARE)
    return f"| {' | '.join(cells)} |"


def _loop_of(name: str) -> str:
    return name.removesuffix("-buffered")


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="for each row of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--servers", default=",".join((OURS, *PEERS)), help="which")
    parser.add_argument("--only", default="", help="workloads whose names hold this")
    parser.add_argument("--markdown", action="store_true", help="print it for README.md")
    arguments = parser.parse_args()
    names = installed(arguments.servers.split(","))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with servers(names) as up, Crew(PROCESSES, CLIENTS_CPU, FAVOURED) as crew:
        print(surroundings(), end="\n\n")
        if arguments.markdown:
            loops = dict.fromkeys(_loop_of(name) for name in names)
            print(markdown_head(loops), flush=True)
        else:
            show_head("workload, over TCP")
        for workload in WORKLOADS:
            if arguments.only in workload.name:
                figures = play(crew, up, workload, arguments.rounds, arguments.seconds)
                if arguments.markdown:
                    print(markdown_row(workload, best_by_loop(figures)), flush=True)
                else:
                    show(workload, figures)


if __name__ == "__main__":
    main()
