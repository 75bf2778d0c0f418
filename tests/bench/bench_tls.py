"""What TLS costs: lpechod against echo servers on asyncio and on uvloop, with one certificate.

    python tests/bench/bench_tls.py [--seconds 1] [--rounds 5]

It starts ``lpechod serve`` of this checkout with one worker and a TLS listener, and the servers of
`tests.bench.peer`, and loads one after the other, in turns. A row is a median over the rounds:

- "cpu": microseconds of CPU for each frame, of the whole process tree of the server. This is the
  figure to look at, as it does not depend on how fast the clients are;
- "frames/s", "p50" and "p99" (of the latency, in microseconds, see `tests.bench.clients.PingPong`);
- in brackets: times lpechod's, the median over pairs of the same round. More than 1 is good for
  lpechod in the columns of costs, less than 1 in "frames/s"; below, the geometric mean of those of
  all workloads of a kind.

The clients encrypt, decrypt and compare, which costs them more than the servers. With four who send
much at a time, "frames/s" is how fast they are.

Servers run on the first CPU, clients on the last, both at niceness -10 if that is allowed, and
every byte of every echo is compared. What other programs do on the machine shows nevertheless:
quote ratios of one run. The kernel should use cubic, since bbr paces what it sends
(``sysctl net.ipv4.tcp_congestion_control=cubic``). Without uvloop, or with a server left out
(``--servers lpechod,asyncio``), the others are measured.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.crew import Crew
from tests.bench.meters import CLIENTS_CPU, surroundings
from tests.bench.rounds import Workload, play, show, show_head, show_together
from tests.bench.servers import FAVOURED, TLS_PEERS, installed, servers

PROCESSES = 1
"""Of clients. Several that share a CPU take turns at it, and are slower than the servers."""


def workload(name: str, connections: int, body_bytes: int) -> Workload:
    """Return what clients of one process do."""
    return Workload(name, connections, body_bytes, processes=PROCESSES)


PING_PONG = (
    workload("64 B, 1 connection", 1, 64),
    workload("64 B, 50 connections", 50, 64),
    workload("4 KiB, 50 connections", 50, 4096),
)
BULK = (
    workload("256 KiB, 1 connection", 1, 256 << 10),
    workload("256 KiB, 4 connections", 4, 256 << 10),
    workload("1 MiB, 1 connection", 1, 1 << 20),
    workload("1 MiB, 4 connections", 4, 1 << 20),
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--servers", default="lpechod,asyncio,uvloop", help=", ".join(TLS_PEERS))
    arguments = parser.parse_args()
    names = installed(arguments.servers.split(","))
    with servers(names, tls=True) as up, Crew(PROCESSES, CLIENTS_CPU, FAVOURED) as crew:
        print(surroundings(), end="\n\n")
        show_head("workload, over TLS")
        for title, workloads in (("ping-pong together", PING_PONG), ("bulk together", BULK)):
            measured = []
            for each in workloads:
                measured.append(play(crew, up, each, arguments.rounds, arguments.seconds))
                show(each, measured[-1])
            show_together(title, measured)


if __name__ == "__main__":
    main()
