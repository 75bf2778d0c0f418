"""The descriptors that a process starts with and may have, each tried in a child of its own."""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from lpechod.process.descriptors import RESERVED_DESCRIPTORS
from tests.system.daemon import Daemon, configuration


def run(code: str, *prefix: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    done = subprocess.run(
        [*prefix, sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


RAISE = """
import resource
from lpechod.process.descriptors import raise_descriptor_limit
print(raise_descriptor_limit(CONNECTIONS, LINES), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("connections", "lines", "limit", "expected"),
    [
        (500, 2, "256:1024", (500, 500 + RESERVED_DESCRIPTORS, 1024)),
        (2000, 2, "256:1024", (1024 - RESERVED_DESCRIPTORS, 1024, 1024)),
        (100, 2, "1000:1024", (100, 1000, 1024)),
        (10, 2, "32:32", (0, 32, 32)),
        (10, 400, "256:1024", (10, 400 + RESERVED_DESCRIPTORS, 1024)),
    ],
    ids=["raised as needed", "as far as it goes", "left alone", "never negative", "for workers"],
)
def test_the_limit_is_raised(
    connections: int, lines: int, limit: str, expected: tuple[int, ...]
) -> None:
    """The soft limit becomes what is needed, within the hard limit, and the rest is reported."""
    code = RAISE.replace("CONNECTIONS", str(connections)).replace("LINES", str(lines))
    printed = run(code, "prlimit", f"--nofile={limit}")

    assert printed == " ".join(map(str, expected))


def test_the_limit_of_connections_is_the_one_that_holds(tmp_path: Path) -> None:
    """The limit shown is what the workers' descriptors suffice for together, or what is set."""
    each = 100
    config = "[server]\nworkers = 2\n[limits]\nmax_connections = {}"
    prefix = ("prlimit", f"--nofile={each + RESERVED_DESCRIPTORS}")
    with Daemon(tmp_path, config.format(1000), prefix=prefix) as daemon, ExitStack() as clients:
        assert daemon.metric("lpechod_connections_limit") == 2 * each
        for _ in range(2 * each):
            clients.enter_context(daemon.connect()).echo(b"hello")
        assert daemon.settled("lpechod_accept_pauses_total", reason="emfile") == 0
        daemon.reload(configuration(more=config.format(2 * each - 1)))
        assert daemon.metric("lpechod_connections_limit") == 2 * each - 1


OCCUPY = """
import os
for descriptor in CLOSED:
    os.close(descriptor)
before = len(os.listdir("/proc/self/fd"))
from lpechod.process.descriptors import occupy_standard_streams
occupy_standard_streams()
after = len(os.listdir("/proc/self/fd"))
names = [os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in (0, 1, 2)]
os.write(RESULT, f"{after - before} {names.count('/dev/null')}".encode())
"""


@pytest.mark.parametrize("closed", [(0,), (2,), (0, 1, 2), ()])
def test_closed_standard_streams_are_occupied(closed: tuple[int, ...], tmp_path: Path) -> None:
    """Descriptors 0 to 2 that are closed become /dev/null, and nothing else stays open."""
    reader, writer = os.pipe()
    code = OCCUPY.replace("CLOSED", repr(closed)).replace("RESULT", str(writer))
    with (tmp_path / "stream").open("w+") as stream, os.fdopen(reader) as result:
        try:
            subprocess.run(
                [sys.executable, "-c", code],
                stdin=stream,
                stdout=stream,
                stderr=stream,
                pass_fds=(writer,),
                check=True,
            )
        finally:
            os.close(writer)

        assert result.read() == f"{len(closed)} {len(closed)}"


@pytest.mark.parametrize("limit", ["--fsize=1000000", "--nofile=10"])
def test_a_start_without_means_is_one_line(tmp_path: Path, limit: str) -> None:
    """Whoever has no room for memory or descriptors is told so in a line of the log."""
    prefix = ("prlimit", limit)
    with Daemon(tmp_path, status=1, prefix=prefix, errors=("start_failed",)) as daemon:
        daemon.wait_for("start_failed")
        assert daemon.wait() == 1
