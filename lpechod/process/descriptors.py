"""The descriptors of the process: the three it is born with, and how many more there may be."""

import os
import resource

RESERVED_DESCRIPTORS = 64
"""For listeners, the poller, logs, the exporter and its clients, and what the libraries open."""


def occupy_standard_streams() -> None:
    """Open /dev/null for each of the descriptors 0 to 2 that is closed.

    Otherwise the first sockets would get these numbers, and whatever an interpreter or a library
    writes to standard error would go to a client.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            # open(2) returns the lowest number that is free, which is this.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def raise_descriptor_limit(connections: int, lines: int = 0) -> int:
    """Raise RLIMIT_NOFILE to what is needed, or as far as the hard limit goes.

    Args:
        connections: how many there may be at once in a worker.
        lines: how many descriptors the supervisor needs for lines to its workers.

    Returns:
        For how many connections the limit suffices now, at most ``connections``.
    """
    needed = max(connections, lines) + RESERVED_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return connections
    if soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(connections, max(0, soft - RESERVED_DESCRIPTORS))
