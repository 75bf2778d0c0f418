"""Keys of clients: equal for those who share a prefix, and for nobody else."""

import ipaddress
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpechod.net.prefixes import ClientPrefixes

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

MAPPED = 0xFFFF << 32


def _near(address: IPAddress, bit: int | None) -> IPAddress:
    """Flip one bit of an address."""
    if bit is None:
        return address
    return type(address)(int(address) ^ (1 << bit % address.max_prefixlen))


ADDRESSES = st.builds(
    _near,
    st.ip_addresses()
    | st.sampled_from(
        [ipaddress.IPv6Address(number) for number in (0, MAPPED, MAPPED | 0x0A000001)]
        + [ipaddress.IPv6Address(0xFFFF << 80), ipaddress.IPv6Address(0xFFFF0A000001 << 64)]
    ),
    st.none() | st.integers(0, 127),
)
PAIRS = st.tuples(ADDRESSES, ADDRESSES) | ADDRESSES.flatmap(
    lambda address: st.tuples(
        st.just(address), st.builds(_near, st.just(address), st.integers(0, 127))
    )
)


def shared(address: IPAddress, ipv4_bits: int, ipv6_bits: int) -> object:
    """Return the network by which an address counts."""
    plain = address if address.version == 4 else address.ipv4_mapped or address
    bits = ipv4_bits if plain.version == 4 else ipv6_bits
    return ipaddress.ip_network(f"{plain}/{bits}", strict=False)


@given(PAIRS, st.integers(1, 32), st.integers(1, 128))
@settings(deadline=None)
def test_keys_are_equal_exactly_for_a_shared_prefix(
    pair: tuple[IPAddress, IPAddress], ipv4_bits: int, ipv6_bits: int
) -> None:
    """Two clients have one key if and only if they are of one family and share its prefix."""
    prefixes = ClientPrefixes(ipv4_bits, ipv6_bits)
    first, second = pair
    same = shared(first, ipv4_bits, ipv6_bits) == shared(second, ipv4_bits, ipv6_bits)

    assert (prefixes.of(str(first)) == prefixes.of(str(second))) == same


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("192.0.2.1", "::ffff:192.0.2.1"),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.1"),
        ("2001:db8:1:3:3:4:5:6", "2001:db8:1:3::"),
        ("2001:db8:1:2::%eth0", "2001:db8:1:2::"),
        ("fe80::1%eth0", "fe80::"),
        ("fe80::2%eth1", "fe80::"),
    ],
)
def test_the_default_is_an_ipv4_address_or_an_ipv6_network_of_a_host(host: str, shown: str) -> None:
    """By default a client is an IPv4 address or a /64, and its key can be shown as an address."""
    key = ClientPrefixes().of(host)

    assert len(key) == 16
    assert socket.inet_ntop(socket.AF_INET6, key) == shown


@pytest.mark.parametrize(("bits", "shown"), [(24, "::ffff:192.0.2.0"), (1, "::ffff:128.0.0.0")])
def test_ipv4_clients_can_be_counted_by_network(bits: int, shown: str) -> None:
    """A shorter IPv4 prefix makes one client of a network, in either spelling."""
    prefixes = ClientPrefixes(ipv4_bits=bits)

    for host in ("192.0.2.1", "192.0.2.255", "::ffff:192.0.2.7"):
        assert socket.inet_ntop(socket.AF_INET6, prefixes.of(host)) == shown


@pytest.mark.parametrize(
    ("ipv4_bits", "ipv6_bits", "message"),
    [
        (0, 64, "an IPv4 prefix to count by has 1 to 32 bits, found 0"),
        (33, 64, "an IPv4 prefix to count by has 1 to 32 bits, found 33"),
        (32, 0, "an IPv6 prefix to count by has 1 to 128 bits, found 0"),
        (32, 129, "an IPv6 prefix to count by has 1 to 128 bits, found 129"),
    ],
)
def test_a_length_out_of_range_is_refused(ipv4_bits: int, ipv6_bits: int, message: str) -> None:
    """A prefix that is no prefix of the family, or that all clients share, is an error."""
    with pytest.raises(ValueError, match=f"^{message}$"):
        ClientPrefixes(ipv4_bits, ipv6_bits)


def test_what_is_no_address_has_no_key() -> None:
    """A host that is no IP literal is an error and not a client."""
    with pytest.raises(ValueError, match=r'^"localhost" is not an IP address$'):
        ClientPrefixes().of("localhost")
