"""What TLS connections cost in memory: private memory of the server for each of them.

    python tests/bench/bench_tls_memory.py [--connections 2000] [--servers lpechod,asyncio,uvloop]

For each server, started anew for each part, it prints bytes for each connection, from
/proc/PID/smaps_rollup (Private_Dirty) against the server without connections, which a few have
warmed up before. The kernel's memory for sockets is not in it. The parts:

- silent: connections that never send a byte, so that there is not even a handshake;
- idle: each has shaken hands and echoed 8 bytes;
- burst: each of those has also echoed 256 KiB, one after the other in each of two processes, and
  idles again. Beside them, what a worker keeps for reuse is in it (16 MiB in lpechod);
- closed: all are gone again. What is left is the server's, not any connection's: in MiB.
"""

import argparse
import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.clients import Kept, PingPong
from tests.bench.crew import Crew
from tests.bench.meters import CLIENTS_CPU, cpu_seconds, private_bytes, tree
from tests.bench.servers import TLS_PEERS, Server, installed, servers

PROCESSES = 2
BURST_BYTES = 256 << 10
SETTLED_SECONDS = 0.5


def memory(server: Server) -> int:
    """Return the private memory of what serves, once it is done with what it has been doing."""
    used = -1.0
    while (now := cpu_seconds(server.pid)) - used > SETTLED_SECONDS * 0.02:
        used = now
        time.sleep(SETTLED_SECONDS)
    *_, serving = tree(server.pid)  # The worker, or a peer's only process.
    return private_bytes(serving)


@contextlib.contextmanager
def warm(name: str, connections: int) -> Iterator[tuple[Server, Crew]]:
    """Run a server, and warm it up with what is measured later, in small."""
    more = f"[limits]\nmax_connections = {connections + 100}\n[timeouts]\nhandshake = '1h'\n"
    with servers([name], more, tls=True) as up, Crew(PROCESSES, CLIENTS_CPU) as crew:
        server = up[name]
        crew.prepare([PingPong(server.address, True, 10, BURST_BYTES, 0.2)] * PROCESSES)
        crew.begin()
        crew.await_ready()
        crew.begin()
        crew.collect()
        yield server, crew


def silent(name: str, connections: int) -> float:
    """Return bytes for each silent connection."""
    with warm(name, connections) as (server, crew):
        before = memory(server)
        job = Kept(server.address, True, connections // PROCESSES, silent=True)
        crew.prepare([job] * PROCESSES)
        each = (memory(server) - before) / connections
        crew.begin()
        crew.stop()
    return each


def idle(name: str, connections: int) -> tuple[float, float, float]:
    """Return bytes for each idle connection, before and after a burst, and all that is left."""
    with warm(name, connections) as (server, crew):
        before = memory(server)
        job = Kept(server.address, True, connections // PROCESSES, BURST_BYTES)
        crew.prepare([job] * PROCESSES)
        idling = (memory(server) - before) / connections
        crew.begin()
        crew.await_ready()
        after = (memory(server) - before) / connections
        crew.begin()
        crew.stop()
        return idling, after, float(memory(server) - before)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--servers", default="lpechod,asyncio,uvloop", help=", ".join(TLS_PEERS))
    arguments = parser.parse_args()
    names = installed(arguments.servers.split(","))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    count = arguments.connections
    print(f"private bytes for each of {count} TLS connections")
    print(f"{'server':<18}{'silent':>10}{'idle':>10}{'burst':>10}{'closed':>12}")
    for name in names:
        quiet = silent(name, count)
        idling, after, left = idle(name, count)
        left_mib = f"{left / (1 << 20):.1f} MiB"
        print(f"{name:<18}{quiet:>10.0f}{idling:>10.0f}{after:>10.0f}{left_mib:>12}", flush=True)


if __name__ == "__main__":
    main()
