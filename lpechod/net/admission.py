"""How many may connect: in all, and from one address at a time and per second."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from lpechod.net.prefixes import ClientPrefixes
from lpechod.net.ratelimit import RateLimit

_MAPPED = "::ffff:"


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """The limits; 0 connections for each address, or per second, means any number.

    ``connection_rate`` is per second, and for each worker; the limits on how many there are at a
    time are for all workers together. An address is a prefix of so many bits.
    """

    max_connections: int = 10_000
    max_connections_per_ip: int = 0
    ipv4_prefix_bits: int = 32
    ipv6_prefix_bits: int = 64
    connection_rate: float = 0.0
    connection_burst: int = 50


class ClientCounts(Protocol):
    """What workers tell each other of the connections of each client.

    A client is a key of `ClientPrefixes`.
    """

    def others(self, prefix: bytes, /) -> int:
        """Return how many connections of a client the other workers hold."""

    def show(self, prefix: bytes, count: int, /) -> bool:
        """Tell the others how many connections of a client this worker holds now.

        Returns:
            Whether there is room to tell them.
        """


class _Alone:
    """The counts of a worker that has no others."""

    __slots__ = ()

    def others(self, _prefix: bytes, /) -> int:
        """Return 0."""
        return 0

    def show(self, _prefix: bytes, _count: int, /) -> bool:
        """Tell nobody."""
        return True


ALONE: Final = _Alone()


class Admission:
    """Counts connections against the limits.

    Workers that admit in the same moment do not see each other's connection yet, so a limit for all
    of them may be passed by one for each.

    Args:
        limits: the limits.
        others: returns how many connections the other workers hold.
        clients: how many of these each client has; used only if there is a limit on that.

    Attributes:
        active: how many are in.
        limits_clients: whether there is any limit on those of one address.
        overflows: how many connections other workers do not count for that of an address.
    """

    __slots__ = (
        "_by_prefix",
        "_clients",
        "_limits",
        "_prefixes",
        "_rate",
        "active",
        "limits_clients",
        "others",
        "overflows",
    )

    def __init__(
        self,
        limits: AdmissionLimits,
        others: Callable[[], int] = lambda: 0,
        clients: ClientCounts = ALONE,
    ) -> None:
        self._limits = limits
        self._clients = clients
        self._prefixes = ClientPrefixes(limits.ipv4_prefix_bits, limits.ipv6_prefix_bits)
        self._by_prefix: dict[bytes, int] = {}
        self.limits_clients = bool(limits.max_connections_per_ip or limits.connection_rate)
        self._rate: RateLimit | None = None
        if limits.connection_rate:
            self._rate = RateLimit(limits.connection_rate, limits.connection_burst)
        self.active = 0
        self.overflows = 0
        self.others = others

    @property
    def rate_evictions(self) -> int:
        """How many addresses `RateLimit` has forgotten too early."""
        return 0 if self._rate is None else self._rate.evictions

    def admit(self, host: str | None, now: float = 0.0) -> str | None:
        """Count a connection in, unless a limit is reached.

        Args:
            host: address of the client as `host_of` gives it; None has no limit of its own.
            now: the time in seconds, for the limit per second.

        Returns:
            None, or the limit that is reached (one of `lpechod.net.counts.REJECT_REASONS`).
        """
        if self.active + self.others() >= self._limits.max_connections:
            return "max_connections"
        if self.limits_clients and (refusal := self.identify(host, now)) is not None:
            return refusal
        self.active += 1
        return None

    def enter(self) -> str | None:
        """Count a connection in whose client is not known yet; see `admit`."""
        if self.active + self.others() >= self._limits.max_connections:
            return "max_connections"
        self.active += 1
        return None

    def identify(self, host: str | None, now: float = 0.0) -> str | None:
        """Count a client that is in by now among those of its address; see `admit`."""
        per_ip = self._limits.max_connections_per_ip
        if host is None or not self.limits_clients:
            return None
        prefix = self._prefixes.of(host)
        count = self._by_prefix.get(prefix, 0)
        if per_ip and (count >= per_ip or count + self._clients.others(prefix) >= per_ip):
            return "max_connections_per_ip"
        if self._rate is not None and not self._rate.admits(prefix, now):
            return "connection_rate"
        if per_ip:
            self._by_prefix[prefix] = count + 1
            self.overflows += not self._clients.show(prefix, count + 1)
        return None

    def leave(self, host: str | None) -> None:
        """Count out a connection.

        Args:
            host: with which it was admitted or identified; None if it has not been.
        """
        self.active -= 1
        if self._limits.max_connections_per_ip and host is not None:
            prefix = self._prefixes.of(host)
            count = self._by_prefix[prefix] - 1
            if count:
                self._by_prefix[prefix] = count
            else:
                del self._by_prefix[prefix]
            self._clients.show(prefix, count)


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
