"""Sets of networks, asked at each accept which of them holds the client: who may connect at all.

The longest prefix decides, as in a routing table, so the order in an operator's file means nothing.
Networks are hashed by prefix length, and a lookup is one look into a dictionary for each length
that occurs, at most 33 for IPv4 and 129 for IPv6, however many networks there are. A binary trie
was rejected: it takes a step for each bit, and in Python a step costs as much as such a look.

An address is one number, that of the IPv6 address; IPv4 has its place at ``::ffff:0:0/96`` (RFC
4291, 2.5.5.2). So an IPv4 client is the same on an IPv4 and on a dual-stack listener, and so is an
IPv4 network in either spelling. IPv6 networks that merely contain that place, ``::/0`` for one,
hold no IPv4 address: who writes them means IPv6. The number comes from inet_pton(3), which takes
a tenth of the time of `ipaddress` (0.3 against 2 to 6 microseconds); a cache of the texts was
slower as soon as clients differ.
"""

import ipaddress
import socket
from collections.abc import Iterable, Sequence
from typing import Generic, TypeAlias, TypeVar

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

V = TypeVar("V")

_MAPPED = 0xFFFF << 32
# An IPv6 network takes 43 characters; names that were put here by mistake are longer.
_MAX_TEXT = 100
_FORMS = 'write "192.0.2.0/24", "2001:db8::/32", or an address for itself alone'


def number_of(host: str) -> int:
    """Return the number of an address: its 128 bits as IPv6, where IPv4 lies at ::ffff:0:0/96.

    Args:
        host: an IP literal of either family. The scope of ``fe80::1%eth0`` is left out: networks
            and limits are about addresses, wherever they are reached.

    Raises:
        ValueError: this is no IP literal.
    """
    try:
        if ":" in host:
            packed = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
            return int.from_bytes(packed, "big")
        return _MAPPED | int.from_bytes(socket.inet_pton(socket.AF_INET, host), "big")
    except (OSError, ValueError) as error:
        raise ValueError(f'"{host}" is not an IP address') from error


def is_ipv4(number: int) -> bool:
    """Tell whether a number that `number_of` returned is that of an IPv4 address."""
    return number >> 32 == 0xFFFF


def parse_network(text: str) -> Network:
    """Parse ``192.0.2.0/24``, ``2001:db8::/32``, or a single address, which is a network of one.

    Masks are refused: ``/0.0.0.255`` is a mask to some and its inverse to others.

    Args:
        text: the network as an operator writes it.

    Returns:
        The network; an IPv4 network in IPv6 spelling becomes one of IPv4, so that networks are
        equal exactly when their texts are.

    Raises:
        ValueError: the text is no network; the message says what to write instead.
    """
    if not text:
        raise ValueError(f"a network is empty; {_FORMS}")
    if not text.isprintable() or " " in text:
        raise ValueError("a network holds no spaces or control characters")
    if len(text) > _MAX_TEXT:
        raise ValueError(f"a network has at most {_MAX_TEXT} characters, found {len(text)}")
    literal, slash, length = text.partition("/")
    address = _parse_literal(text, literal, slash + length)
    bits = _parse_length(text, address, length) if slash else address.max_prefixlen
    family = ipaddress.IPv4Network if address.version == 4 else ipaddress.IPv6Network
    network = family((int(address), bits), strict=False)
    if network.network_address != address:
        raise ValueError(
            f'"{text}" has host bits set; write "{_canonical(network)}", or "{literal}" for that '
            "address alone"
        )
    return _canonical(network)


def _parse_literal(
    text: str, literal: str, rest: str
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Parse what stands in front of the slash; the rest is for the messages."""
    bare = literal.removeprefix("[").removesuffix("]").partition("%")[0]
    try:
        address = ipaddress.ip_address(bare)
    except ValueError as error:
        hint = "; names are not looked up" if bare[-1:].isalpha() and ":" not in bare else ""
        raise ValueError(f'"{text}" is not a network{hint}; {_FORMS}') from error
    if bare != literal:
        excess = "an interface" if "%" in literal else "brackets"
        raise ValueError(f'a network is written without {excess}: "{bare}{rest}"')
    return address


def _parse_length(
    text: str, address: ipaddress.IPv4Address | ipaddress.IPv6Address, length: str
) -> int:
    """Parse what stands behind the slash."""
    if length.isascii() and length.isdecimal() and int(length) <= address.max_prefixlen:
        return int(length)
    try:
        meant = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(
            f'"{text}": the prefix of an IPv{address.version} network has 0 to '
            f'{address.max_prefixlen} bits, found "{length}"'
        ) from None
    raise ValueError(f'"{text}" has a mask; write "{meant}"')


def _canonical(network: Network) -> Network:
    """Return an IPv4 network in IPv6 spelling as one of IPv4, and others as they are."""
    number = int(network.network_address)
    # Whose first address is of IPv4 has only such: a prefix shorter than 96 bits ends in zeros.
    if network.version == 6 and is_ipv4(number):
        return ipaddress.IPv4Network((number & 0xFFFFFFFF, network.prefixlen - 96))
    return network


def _key(network: Network) -> tuple[int, int]:
    """Return how far to shift the number of an address, and what is then left of those inside."""
    number = int(network.network_address)
    if network.version == 4:
        number |= _MAPPED
    shift = network.max_prefixlen - network.prefixlen
    return shift, number >> shift


class NetworkTable(Generic[V]):
    """Values by network.

    Args:
        entries: networks and their values.

    Raises:
        ValueError: a network has two values that differ.
    """

    __slots__ = ("_ipv4", "_ipv6", "_len")

    def __init__(self, entries: Iterable[tuple[Network, V]]) -> None:
        ipv4: dict[int, dict[int, V]] = {}
        ipv6: dict[int, dict[int, V]] = {}
        for network, value in entries:
            shift, number = _key(network)
            family = ipv4 if is_ipv4(number << shift) else ipv6
            known = family.setdefault(shift, {}).setdefault(number, value)
            if known != value:
                raise ValueError(f"{_canonical(network)} has two values, {known!r} and {value!r}")
        # The smallest shift first: that is the longest prefix.
        self._ipv4 = tuple(sorted(ipv4.items(), key=lambda level: level[0]))
        self._ipv6 = tuple(sorted(ipv6.items(), key=lambda level: level[0]))
        self._len = sum(len(values) for _, values in self._ipv4 + self._ipv6)

    def __len__(self) -> int:
        return self._len

    def lookup(self, host: str) -> V | None:
        """Return the value of the longest prefix that holds an address, None if none does.

        Args:
            host: an IP literal, as for `number_of`.

        Raises:
            ValueError: the host is no IP literal.
        """
        number = number_of(host)
        for shift, values in self._ipv4 if number >> 32 == 0xFFFF else self._ipv6:
            prefix = number >> shift
            if prefix in values:
                return values[prefix]
        return None


class AccessList:
    """Who may connect.

    The longest prefix among both lists decides. A client in none of the networks may connect if
    nothing is allowed explicitly: a deny list alone shuts out those in it, an allow list everybody
    else.

    Args:
        allow: networks whose clients may connect.
        deny: networks whose clients may not.

    Raises:
        ValueError: a network is in both lists.
    """

    __slots__ = ("_others", "_table")

    def __init__(self, allow: Sequence[Network], deny: Sequence[Network]) -> None:
        denied = {_key(network) for network in deny}
        both = {str(_canonical(network)): None for network in allow if _key(network) in denied}
        if both:
            raise ValueError(f"both allowed and denied: {', '.join(both)}; keep each in one list")
        self._others = not allow
        self._table = NetworkTable(
            [(network, True) for network in allow] + [(network, False) for network in deny]
        )

    def __bool__(self) -> bool:
        """Tell whether any client is treated differently from others."""
        return bool(self._table)

    def permits(self, host: str | None) -> bool:
        """Tell whether a client may connect.

        Args:
            host: address of the client as `lpechod.net.admission.host_of` gives it. None: the
                client of a UNIX socket, who has no address and may always connect; the permissions
                of the socket's file decide there (unix(7)).

        Raises:
            ValueError: the host is no IP literal.
        """
        if host is None or not self._table:
            return True
        permitted = self._table.lookup(host)
        return self._others if permitted is None else permitted
