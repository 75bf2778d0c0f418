"""What idle connections cost those that are busy, by the poller that lpechod asks.

    python tests/bench/bench_pollers.py [--seconds 0.8] [--rounds 5] [--output build]

A daemon of this checkout for each poller, with one worker, gets more and more idle connections,
each of which has echoed once. Beside them, 20 connections each have one frame of 64 bytes under
way, on one daemon after the other, in turns, and every byte of every echo is compared. The table
has microseconds of CPU for each frame, of the whole process tree: the median over the rounds.
Servers and clients run apart, see `tests.bench.bench_echo`.

select(2) ends at descriptor 1,023. The hard limit of descriptors of this process is used; where it
is too low for the last rows, they are left out. In the folder of ``--output`` there are then

- ``idle_connections.csv``: the table. ``--draw`` reads it there, and measures nothing;
- ``idle_connections.svg``: a chart of it.
"""

import argparse
import contextlib
import csv
import resource
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.chart import Line, Titles, draw
from tests.bench.crew import Crew
from tests.bench.meters import CLIENTS_CPU, surroundings
from tests.bench.rounds import PROCESSES, Workload, idling, median, play
from tests.bench.servers import FAVOURED, lpechod

BUSY = Workload("64 B, 20 connections", 20, 64)
IDLE = (0, 100, 300, 900, 2000, 4000, 8000)
POLLERS: Mapping[str, int] = {"poll": 10_000, "select": 960, "epoll": 10_000, "epoll-et": 10_000}
"""With limits.max_connections."""

COLUMNS = ("poller", "idle_connections", "cpu_us_per_frame")
ROOT = Path(__file__).resolve().parents[2]

Table = dict[str, dict[int, float]]
"""Microseconds by poller and number of idle connections."""


def fitting(counts: Sequence[int], descriptors: int) -> list[int]:
    """Leave out numbers of connections for which there are too few descriptors, and say so."""
    fit = [count for count in counts if count + BUSY.connections + 100 <= descriptors]
    if len(fit) < len(counts):
        left_out = ", ".join(f"{count:,}" for count in counts[len(fit) :])
        print(f"{descriptors} descriptors are too few for {left_out} idle connections")
    return fit


def measured(counts: Sequence[int], rounds: int, seconds: float) -> Table:
    """Measure all pollers, and print a row for each number of idle connections."""
    table: Table = {name: {} for name in POLLERS}
    print(f"{'CPU us for each frame':<24}{''.join(f'{name:>10}' for name in POLLERS)}")
    with contextlib.ExitStack() as stack:
        crew = stack.enter_context(Crew(PROCESSES, CLIENTS_CPU, FAVOURED))
        up = {}
        for name, most in POLLERS.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            config = f'[server]\npoller = "{name}"\n'
            # Nobody is to be closed who is idle.
            config += f"[limits]\nmax_connections = {most}\noverload_threshold = 100\n"
            up[name] = stack.enter_context(lpechod(folder, config))
        for before, count in zip((0, *counts), counts, strict=False):
            able = {name: up[name] for name in up if count + BUSY.connections <= POLLERS[name]}
            if count > before:
                stack.enter_context(idling(list(able.values()), count - before))
            cells = ""
            for name, figures in play(crew, able, BUSY, rounds, seconds).items():
                table[name][count] = median(figures, "cpu")
            for row in table.values():
                cells += f"{row[count]:>10.1f}" if count in row else f"{'-':>10}"
            print(f"{f'{count:,} idle connections':<24}{cells}", flush=True)
    return table


def save(table: Table, path: Path) -> None:
    """Write a table, in one line for each figure."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for poller, row in table.items():
            writer.writerows((poller, idle, f"{cpu:.2f}") for idle, cpu in row.items())


def load(path: Path) -> Table:
    """Read what `save` has written."""
    table: Table = {}
    with path.open(newline="") as file:
        for poller, idle, cpu in list(csv.reader(file))[1:]:
            table.setdefault(poller, {})[int(idle)] = float(cpu)
    return table


def chart(table: Table) -> str:
    """Draw a table."""
    most = max(table["epoll"])
    poll, epoll = table["poll"], table["epoll"]
    titles = Titles(
        "Idle connections take no CPU with epoll; poll and select pay for each",
        f"CPU for an echo beside {most:,} idle connections: "
        f"{poll[most]:.0f} \u00b5s with poll ({poll[0]:.0f} without them), "
        f"{epoll[most]:.0f} \u00b5s with epoll ({epoll[0]:.0f})",
        f"idle connections, beside {BUSY.connections} busy ones with a frame of 64 bytes under way",
        "CPU for each frame, in \u00b5s, logarithmic",
    )
    lines = [Line(name, sorted(row.items())) for name, row in table.items()]
    # All connections count for the place on the axis, since a logarithm of none is nowhere.
    return draw(titles, lines, x_shift=BUSY.connections)


def main() -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=0.8, help="for each figure of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "build", help="folder")
    parser.add_argument("--draw", action="store_true", help="only draw what is there")
    arguments = parser.parse_args()
    arguments.output.mkdir(exist_ok=True)
    data = arguments.output / "idle_connections.csv"
    if not arguments.draw:
        print(surroundings(), end="\n\n")
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        save(measured(fitting(IDLE, hard), arguments.rounds, arguments.seconds), data)
    picture = data.with_suffix(".svg")
    picture.write_text(chart(load(data)))
    print(f"{data}\n{picture}")


if __name__ == "__main__":
    main()
