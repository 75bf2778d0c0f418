"""Servers that benchmarks load: lpechod of this checkout, and the peers it is compared with."""

import contextlib
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.clients import Address
from tests.bench.meters import SERVERS_CPU, pin
from tests.certificates import Issued, issue
from tests.system.daemon import Daemon

FAVOURED = -10
"""Niceness of servers and clients, against whatever else runs on the machine."""

OURS = "lpechod"
BARE = "bare"
TLS_PEERS: Mapping[str, Sequence[str]] = {
    "asyncio": ("peer.py", "asyncio", "protocol"),
    "asyncio-buffered": ("peer.py", "asyncio", "buffered"),
    "uvloop": ("peer.py", "uvloop", "protocol"),
    "uvloop-buffered": ("peer.py", "uvloop", "buffered"),
}
"""Script and arguments of each."""
PEERS: Mapping[str, Sequence[str]] = {BARE: ("bare.py",), **TLS_PEERS}


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is up."""

    pid: int
    address: Address
    tls: bool = False


def installed(names: Sequence[str]) -> list[str]:
    """Leave out servers on uvloop if it is not there, and say so."""
    if importlib.util.find_spec("uvloop") is None and any("uvloop" in name for name in names):
        print("uvloop is not installed: going on without it", file=sys.stderr)
        return [name for name in names if "uvloop" not in name]
    return list(names)


@contextlib.contextmanager
def lpechod(folder: Path, more: str = "", issued: Issued | None = None) -> Iterator[Server]:
    """Run the daemon of this checkout, on the CPU of servers.

    Args:
        folder: for its configuration.
        more: TOML to go before the listener.
        issued: for TLS.
    """
    config = f'{more}\n[[listen]]\naddress = "127.0.0.1:0"\n'
    if issued:
        config += f"tls = {issued.table()}\n"
    with Daemon(folder, config) as it:
        pin(it.pid, SERVERS_CPU, FAVOURED)
        host, _, port = it.address.rpartition(":")
        yield Server(it.pid, (host, int(port)), issued is not None)


@contextlib.contextmanager
def peer(script: str, *arguments: str, issued: Issued | None = None) -> Iterator[Server]:
    """Run a script of this folder that prints its port, on the CPU of servers."""
    path = Path(__file__).with_name(script)
    files = (str(issued.certificate), str(issued.key)) if issued else ()
    process = subprocess.Popen(
        [sys.executable, str(path), *arguments, *files], stdout=subprocess.PIPE
    )
    with process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            pin(process.pid, SERVERS_CPU, FAVOURED)
            yield Server(process.pid, ("127.0.0.1", port), issued is not None)
        finally:
            process.kill()


@contextlib.contextmanager
def servers(
    names: Sequence[str], more: str = "", *, tls: bool = False
) -> Iterator[dict[str, Server]]:
    """Run servers.

    Args:
        names: which.
        more: TOML for the configuration of lpechod.
        tls: whether they speak TLS, all with one certificate.
    """
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        issued = issue(folder) if tls else None
        up = {}
        for each in names:
            up[each] = stack.enter_context(
                lpechod(folder, more, issued) if each == OURS else peer(*PEERS[each], issued=issued)
            )
        yield up
