"""What a benchmark reads off processes, and where it has them run."""

import contextlib
import importlib.metadata
import os
import platform
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.system.daemon import children

SERVERS_CPU, CLIENTS_CPU = min(os.sched_getaffinity(0)), max(os.sched_getaffinity(0))
"""Apart if there is more than one: what clients compute then takes nothing from a server."""


def surroundings() -> str:
    """Return in one line what the figures depend on beside the servers."""
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    congestion = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    parts = [f"Python {platform.python_version()}"]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        parts.append(f"uvloop {importlib.metadata.version('uvloop')}")
    parts.append(f"Linux {platform.release()}, {congestion}")
    parts.append(f"{os.cpu_count()} CPUs, {found[1] if found else platform.machine()}")
    return "; ".join(parts)


def tree(pid: int) -> Iterator[int]:
    """Yield a process and all that descend from it."""
    yield pid
    with contextlib.suppress(FileNotFoundError):
        for child in children(pid):
            yield from tree(child)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process and its descendants have used, with all their threads."""
    used = 0
    for each in tree(pid):
        for task in Path(f"/proc/{each}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                used += int((task / "schedstat").read_text().split()[0])
    return used / 1e9


def private_bytes(pid: int) -> int:
    """Return the memory that only this process has, as far as it is not a file's."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Private_Dirty:\s+(\d+)", rollup, re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def pin(pid: int, cpu: int, nice: int = 0) -> None:
    """Keep a process and its descendants on a CPU.

    Args:
        pid: the process.
        cpu: where.
        nice: niceness; less than that of this process only if the system allows it.
    """
    for each in tree(pid):
        for task in Path(f"/proc/{each}/task").iterdir():
            os.sched_setaffinity(int(task.name), {cpu})
            with contextlib.suppress(PermissionError):
                os.setpriority(os.PRIO_PROCESS, int(task.name), nice)


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the value that so large a share of others, in order, does not exceed."""
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)]


def median_ratio(ones: Sequence[float], others: Sequence[float]) -> float:
    """Return how many times the others the ones are, where each pair is from the same moment."""
    return statistics.median(one / other for one, other in zip(ones, others, strict=True))
