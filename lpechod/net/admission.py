"""Who may connect: how many in all, and how many from one address."""

from collections.abc import Callable
from dataclasses import dataclass

_MAPPED = "::ffff:"


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """The limits; 0 connections for each address means any number.

    ``max_connections`` is for all workers together, ``max_connections_per_ip`` for each of them.
    """

    max_connections: int = 10_000
    max_connections_per_ip: int = 0


class Admission:
    """Counts connections against the limits.

    Args:
        limits: the limits.
        others: returns how many connections the other workers hold. Workers that admit in the same
            moment do not see each other's yet, so the limit of all may be passed by one for each.

    Attributes:
        active: how many are in.
    """

    __slots__ = ("_by_host", "_limits", "active", "others")

    def __init__(self, limits: AdmissionLimits, others: Callable[[], int] = lambda: 0) -> None:
        self._limits = limits
        self._by_host: dict[str, int] = {}
        self.active = 0
        self.others = others

    def admit(self, host: str | None) -> str | None:
        """Count a connection in, unless a limit is reached.

        Args:
            host: address of the client as `host_of` gives it; None has no limit of its own.

        Returns:
            None, or the limit that is reached (one of `lpechod.net.counts.REJECT_REASONS`).
        """
        if self.active + self.others() >= self._limits.max_connections:
            return "max_connections"
        per_ip = self._limits.max_connections_per_ip
        if per_ip and host is not None:
            count = self._by_host.get(host, 0)
            if count >= per_ip:
                return "max_connections_per_ip"
            self._by_host[host] = count + 1
        self.active += 1
        return None

    def leave(self, host: str | None) -> None:
        """Count out a connection that was admitted."""
        self.active -= 1
        if self._limits.max_connections_per_ip and host is not None:
            count = self._by_host[host] - 1
            if count:
                self._by_host[host] = count
            else:
                del self._by_host[host]


def host_of(peer: object) -> str | None:
    """Return the host of a peer as accept(2) names it, None for a UNIX socket's.

    An IPv4 client of a dual-stack listener shows as ``::ffff:192.0.2.1`` (RFC 4291, 2.5.5.2): it is
    the same client as on an IPv4 listener, so that prefix is taken off.
    """
    if not isinstance(peer, tuple):
        return None
    host = str(peer[0])
    return host.removeprefix(_MAPPED) if "." in host else host


def format_peer(peer: object) -> str:
    """Write a peer as logs show it: ``host:port``, ``[v6]:port`` or ``unix``."""
    host = host_of(peer)
    if host is None or not isinstance(peer, tuple):
        return "unix"
    return f"[{host}]:{peer[1]}" if ":" in host else f"{host}:{peer[1]}"
