"""Who counts as one client: the prefix of an address by which limits count.

An IPv6 host is not an address but a /64: interface identifiers have 64 bits (RFC 4291, 2.5.1), and
a host takes as many addresses out of them as it likes (RFC 8981). A limit for each address would
not limit it. Sites have more, a /56 or a /48 (RFC 6177), so an operator may count in those.

A key is the network's address as IPv6, 16 bytes, IPv4 in its place at ``::ffff:0:0/96``: keys of
the two families never meet, and ``inet_ntop(AF_INET6, key)`` shows who it is. Not a number: Python
hashes an integer to its remainder modulo 2^61 - 1, so whoever has more than 61 bits to choose, the
owner of a /48 where each address counts for itself, can choose addresses that all have one hash and
make each look into a dictionary of 16,000 cost 0.1 ms. The hash of bytes has a secret seed (PEP
456).
"""

from lpechod.net.networks import is_ipv4, number_of

_ALL = (1 << 128) - 1


class ClientPrefixes:
    """Gives clients their keys.

    Args:
        ipv4_bits: length of the prefix by which IPv4 clients count, 1 to 32.
        ipv6_bits: likewise for IPv6, 1 to 128.

    Raises:
        ValueError: a length is out of range. 0 is, too: where it is allowed in limits it means
            "off", and here it would make one client of all.
    """

    __slots__ = ("_ipv4_mask", "_ipv6_mask")

    def __init__(self, ipv4_bits: int = 32, ipv6_bits: int = 64) -> None:
        if not 1 <= ipv4_bits <= 32:
            raise ValueError(f"an IPv4 prefix to count by has 1 to 32 bits, found {ipv4_bits}")
        if not 1 <= ipv6_bits <= 128:
            raise ValueError(f"an IPv6 prefix to count by has 1 to 128 bits, found {ipv6_bits}")
        self._ipv4_mask = _ALL << (32 - ipv4_bits) & _ALL
        self._ipv6_mask = _ALL << (128 - ipv6_bits) & _ALL

    def of(self, host: str) -> bytes:
        """Return the key of a client, equal for all who share its prefix and for nobody else.

        Args:
            host: address of the client, an IP literal; a scope is left out.

        Raises:
            ValueError: the host is no IP literal.
        """
        number = number_of(host)
        mask = self._ipv4_mask if is_ipv4(number) else self._ipv6_mask
        return (number & mask).to_bytes(16, "big")
