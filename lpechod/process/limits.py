"""The descriptor limit of the process: raised as far as it goes, and what is missing said."""

import resource

RESERVED_DESCRIPTORS = 64
"""For listeners, the poller, logs, the exporter and its clients, and what the libraries open."""


def raise_descriptor_limit(connections: int) -> int:
    """Raise RLIMIT_NOFILE to what so many connections need, or as far as the hard limit goes.

    Args:
        connections: how many there may be at once.

    Returns:
        For how many connections the limit suffices now, at most ``connections``.
    """
    needed = connections + RESERVED_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return connections
    if soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(connections, max(0, soft - RESERVED_DESCRIPTORS))
