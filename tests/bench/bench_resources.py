"""What clients cost the daemon: memory for idle ones, CPU for hostile ones.

    python tests/bench/bench_resources.py [--seconds 5] [--idle 10000]

Starts the daemon of this checkout, plays one kind of client after the other, and prints for each
what its processes used meanwhile: CPU as a share of one core (from /proc/PID/schedstat) and, where
it matters, private memory. A healthy client echoes all along in every run.
"""

import argparse
import contextlib
import re
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.system.daemon import Daemon, EchoClient, frame

MIB = 1 << 20


def cpu_seconds(it: Daemon) -> float:
    """Return the CPU time that supervisor and workers have used; each has one thread."""
    pids = (it.pid, *it.workers())
    return sum(int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) for pid in pids) / 1e9


def user_memory(it: Daemon) -> int:
    """Return the private memory of the worker in bytes."""
    (worker,) = it.workers()
    found = re.search(
        r"^Private_Dirty:\s+(\d+)", Path(f"/proc/{worker}/smaps_rollup").read_text(), re.MULTILINE
    )
    assert found
    return int(found[1]) * 1024


@contextlib.contextmanager
def daemon(config: str = "", prefix: tuple[str, ...] = ()) -> Iterator[Daemon]:
    """Run a daemon that expects nothing of its clients."""
    with tempfile.TemporaryDirectory() as folder, Daemon(Path(folder), config, prefix=prefix) as it:
        it.wait_for("ready")
        yield it


def cpu_share(it: Daemon, healthy: EchoClient, seconds: float) -> float:
    """Return the CPU share at rest, with one echo every 100 ms to see that others are served."""
    healthy.echo(b"hello")
    begin, before = time.monotonic(), cpu_seconds(it)
    while time.monotonic() - begin < seconds:
        time.sleep(0.1)
        healthy.echo(b"hello")
    return (cpu_seconds(it) - before) / (time.monotonic() - begin)


def never_reads(it: Daemon) -> EchoClient:
    """Pipeline until nothing more goes in, and never read."""
    client = it.connect()
    client.socket.setblocking(False)
    flood = frame(bytes(65536)) * 16
    while it.metric("lpechod_backpressure_pauses_total") == 0:
        with contextlib.suppress(BlockingIOError):
            client.socket.send(flood)
    return client


def half_closes(it: Daemon) -> EchoClient:
    """End the own side while echoes are pending that nobody reads."""
    client = never_reads(it)
    client.socket.shutdown(socket.SHUT_WR)
    return client


def resets(it: Daemon) -> EchoClient:
    """Reset while echoes are pending."""
    client = never_reads(it)
    client.reset()
    it.wait_for("connection_closed", reason="reset")
    return client


def hostile(name: str, client: Callable[[Daemon], EchoClient], seconds: float) -> None:
    """Print the CPU share beside one hostile client."""
    with daemon() as it, client(it), it.connect() as healthy:
        print(f"{name:42} {cpu_share(it, healthy, seconds):8.2%} of a CPU", flush=True)


def exhausted(seconds: float) -> None:
    """Print the CPU share while descriptors lack and clients wait to be accepted."""
    with daemon(prefix=("prlimit", "--nofile=64:64")) as it:
        first = it.connect()
        first.echo(b"hello")
        waiting = [it.connect() for _ in range(100)]
        it.wait_for("accept_paused")
        share = cpu_share(it, first, seconds)
        print(f"{'accept at EMFILE, 100 clients waiting':42} {share:8.2%} of a CPU", flush=True)
        for client in (first, *waiting):
            client.reset()


def announcers() -> None:
    """Print what 200 announcements of 1 MiB add to the resident set."""
    with daemon() as it:
        with it.connect() as client:
            client.echo(bytes(100))
        it.get()
        before = it.resident_kib()
        clients = [it.connect() for _ in range(200)]
        for client in clients:
            client.send(MIB.to_bytes(4, "big"))
        it.wait_until("lpechod_received_bytes_total", 104 + 800)
        grown = it.resident_kib() - before
        print(f"{'200 clients announce 1 MiB, send nothing':42} {grown:8} KiB more resident")
        for client in clients:
            client.reset()


IDLERS = """
import resource, socket, sys
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
held = []
for number in range(count):
    client = socket.create_connection((host, port), source_address=(f"127.0.0.{2 + number % 8}", 0))
    client.sendall(b"\\0\\0\\0\\5hello")
    client.recv(9)
    held.append(client)
print("connected", flush=True)
sys.stdin.read()
"""


def idle(count: int, seconds: float) -> None:
    """Print memory for each idle connection, and the CPU share at rest."""
    config = f"[limits]\nmax_connections = {count + 100}\n"
    with daemon(config) as it:
        with it.connect() as client:
            client.echo(b"hello")
        it.get()
        before = user_memory(it)
        host, _, port = it.address.rpartition(":")
        idlers = subprocess.Popen(
            [sys.executable, "-c", IDLERS, host, port, str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert idlers.stdin is not None
        assert idlers.stdout is not None
        idlers.stdout.readline()
        each = (user_memory(it) - before) / count
        begin, used = time.monotonic(), cpu_seconds(it)
        time.sleep(seconds)
        share = (cpu_seconds(it) - used) / (time.monotonic() - begin)
        print(f"{f'{count} idle connections':42} {each:8.0f} bytes each, {share:.2%} of a CPU")
        idlers.stdin.close()
        idlers.wait()


def main() -> None:
    """Run every part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--idle", type=int, default=10_000)
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    hostile("a client that pipelines and never reads", never_reads, arguments.seconds)
    hostile("a half-closed client with echoes pending", half_closes, arguments.seconds)
    hostile("a client that has reset", resets, arguments.seconds)
    exhausted(arguments.seconds)
    announcers()
    idle(arguments.idle, arguments.seconds)


if __name__ == "__main__":
    main()
