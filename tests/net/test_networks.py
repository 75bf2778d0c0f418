"""Sets of networks: held against a plain search, and what a mistake is answered with."""

import ipaddress
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpechod.net.networks import (
    AccessList,
    Network,
    NetworkTable,
    is_ipv4,
    number_of,
    parse_network,
)

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

MAPPED = 0xFFFF << 32

ALONE = "for that address alone"
FORMS = 'write "192.0.2.0/24", "2001:db8::/32", or an address for itself alone'

# Networks hold each other, and addresses lie in them or beside them by one bit, only if they are
# made from few numbers.
IPV4 = st.sampled_from([0, 0x0A000000, 0x0A0000FF, 0x0AFF0000, 0xC0000201, 0xFFFFFFFF])
IPV6 = st.sampled_from([0, 1, MAPPED - 1, MAPPED + (1 << 32), 0x20010DB8 << 96, (1 << 128) - 1]) | (
    IPV4.map(lambda number: MAPPED | number)
)


def _network(number: int, bits: int) -> Network:
    return ipaddress.IPv4Network((number, bits), strict=False)


def _network6(number: int, bits: int) -> Network:
    return ipaddress.IPv6Network((number, bits), strict=False)


def _flip(number: int, bit: int | None) -> int:
    return number if bit is None else number ^ (1 << bit)


NETWORKS = st.builds(_network, IPV4, st.integers(0, 32)) | st.builds(
    _network6, IPV6, st.integers(0, 128) | st.integers(90, 100)
)
ADDRESSES: st.SearchStrategy[IPAddress] = st.builds(
    _flip, IPV4, st.none() | st.integers(0, 31)
).map(ipaddress.IPv4Address) | st.builds(_flip, IPV6, st.none() | st.integers(0, 127)).map(
    ipaddress.IPv6Address
)


def plain_address(address: IPAddress) -> IPAddress:
    """Take an IPv4 address out of its IPv6 spelling."""
    return address if address.version == 4 else address.ipv4_mapped or address


def plain_network(network: Network) -> Network:
    """Take an IPv4 network out of its IPv6 spelling."""
    first = plain_address(network.network_address)
    if network.version == 6 and first.version == 4 and network.prefixlen >= 96:
        return ipaddress.IPv4Network((first, network.prefixlen - 96))
    return network


def longest(networks: Sequence[Network], address: IPAddress) -> Network | None:
    """Search all networks for the smallest one that holds an address."""
    holding = [each for each in map(plain_network, networks) if plain_address(address) in each]
    return max(holding, key=lambda network: network.prefixlen, default=None)


class TestNumberOf:
    """From texts to numbers."""

    @given(ADDRESSES)
    @settings(deadline=None)
    def test_every_spelling_has_one_number(self, address: IPAddress) -> None:
        """An address has the number of its IPv6 form however it is written."""
        plain = plain_address(address)
        expected = int(plain) | MAPPED if plain.version == 4 else int(plain)
        spellings = {str(address), address.exploded}
        if plain.version == 4:
            spellings |= {f"::ffff:{plain}", f"::FFFF:{plain}", f"::ffff:{plain}%eth0"}
        if address.version == 6:
            spellings |= {f"{address}%eth0", f"{address}%2"}

        assert {number_of(spelling) for spelling in spellings} == {expected}
        assert is_ipv4(expected) == (plain.version == 4)

    @pytest.mark.parametrize(
        "text",
        [
            *["", "localhost", "10.0.0", "10.0.0.256", "010.0.0.1", "10.0.0.1%eth0", "10.0.0.1:80"],
            *["::1::", "[::1]", "%eth0", "10.0.0.1\0", "10.0.0.1\n", "::1\0", "\udc80"],
            "\u0661.0.0.1",
        ],
    )
    def test_what_is_no_address_is_refused(self, text: str) -> None:
        """A text that is no IP literal is a ValueError that shows it."""
        with pytest.raises(ValueError, match="is not an IP address") as caught:
            number_of(text)

        assert str(caught.value) == f'"{text}" is not an IP address'


class TestParseNetwork:
    """What an operator writes."""

    @pytest.mark.parametrize(
        ("text", "canonical"),
        [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("192.0.2.1", "192.0.2.1/32"),
            ("192.0.2.1/32", "192.0.2.1/32"),
            ("::/0", "::/0"),
            ("::1", "::1/128"),
            ("::/1", "::/1"),
            ("2001:DB8:0::/32", "2001:db8::/32"),
            ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
            ("::ffff:192.0.2.1", "192.0.2.1/32"),
            ("::fffe:0:0/95", "::fffe:0:0/95"),
        ],
    )
    def test_every_form_is_parsed_into_the_canonical_one(self, text: str, canonical: str) -> None:
        """Each documented form becomes a network that prints in the one way to write it."""
        assert str(parse_network(text)) == canonical

    @given(NETWORKS)
    @settings(deadline=None)
    def test_every_network_survives_printing(self, network: Network) -> None:
        """A network of either family parses back from its text, IPv4 as IPv4."""
        assert parse_network(str(network)) == plain_network(network)

    @given(st.text(max_size=60) | st.from_regex(r"[\[\]%:./a-f0-9]{0,30}", fullmatch=True))
    @settings(deadline=None)
    def test_any_text_is_a_network_or_refused(self, text: str) -> None:
        """Parsing ends in a network that parses back, or in ValueError, never in anything else."""
        try:
            network = parse_network(text)
        except ValueError:
            return

        assert parse_network(str(network)) == network

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "10.0.0.1/8",
                f'"10.0.0.1/8" has host bits set; write "10.0.0.0/8", or "10.0.0.1" {ALONE}',
            ),
            ("::1/0", f'"::1/0" has host bits set; write "::/0", or "::1" {ALONE}'),
            (
                "::ffff:0:1/96",
                f'"::ffff:0:1/96" has host bits set; write "0.0.0.0/0", or "::ffff:0:1" {ALONE}',
            ),
            ("", f"a network is empty; {FORMS}"),
            ("localhost", f'"localhost" is not a network; names are not looked up; {FORMS}'),
            ("10/8", f'"10/8" is not a network; {FORMS}'),
            ("10.0.0.0:80", f'"10.0.0.0:80" is not a network; {FORMS}'),
            ("::1:fffff", f'"::1:fffff" is not a network; {FORMS}'),
            ("10.0.0.0/255.0.0.0", '"10.0.0.0/255.0.0.0" has a mask; write "10.0.0.0/8"'),
            ("10.0.0.0/0.0.0.255", '"10.0.0.0/0.0.0.255" has a mask; write "10.0.0.0/24"'),
            (
                "10.0.0.0/33",
                '"10.0.0.0/33": the prefix of an IPv4 network has 0 to 32 bits, found "33"',
            ),
            ("::/129", '"::/129": the prefix of an IPv6 network has 0 to 128 bits, found "129"'),
            ("::/", '"::/": the prefix of an IPv6 network has 0 to 128 bits, found ""'),
            (
                "::/\u0663",
                '"::/\u0663": the prefix of an IPv6 network has 0 to 128 bits, found "\u0663"',
            ),
            ("[2001:db8::]/32", 'a network is written without brackets: "2001:db8::/32"'),
            ("fe80::%eth0/64", 'a network is written without an interface: "fe80::/64"'),
            ("10.0.0.0 /8", "a network holds no spaces or control characters"),
            ("10.0.0.0/8\n", "a network holds no spaces or control characters"),
            ("x" * 101, "a network has at most 100 characters, found 101"),
        ],
    )
    def test_a_mistake_is_answered_with_what_to_write(self, text: str, message: str) -> None:
        """What is no network is refused with a message that shows the way out."""
        with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared.
            parse_network(text)

        assert str(caught.value) == message


class TestNetworkTable:
    """Values by network."""

    @given(st.lists(NETWORKS, max_size=30), ADDRESSES)
    @settings(deadline=None)
    def test_the_longest_prefix_decides(self, networks: list[Network], address: IPAddress) -> None:
        """A lookup finds what a search of all networks for the smallest one finds, or nothing."""
        table = NetworkTable([(network, plain_network(network)) for network in networks])

        assert table.lookup(str(address)) == longest(networks, address)
        assert len(table) == len(set(map(plain_network, networks)))

    @pytest.mark.parametrize("value", [None, False, 0])
    def test_any_value_covers_those_of_larger_networks(self, value: object) -> None:
        """A value counts even if it is one that Python takes for false."""
        table = NetworkTable[object](
            [(parse_network("10.0.0.0/8"), "larger"), (parse_network("10.1.0.0/16"), value)]
        )

        assert table.lookup("10.1.2.3") is value
        assert table.lookup("10.2.2.3") == "larger"

    def test_ipv6_networks_hold_no_ipv4_address(self) -> None:
        """The network of all IPv6 addresses leaves IPv4 clients alone in either spelling."""
        table = NetworkTable([(parse_network("::/0"), "IPv6"), (parse_network("::/64"), "64")])

        assert table.lookup("192.0.2.1") is None
        assert table.lookup("::ffff:192.0.2.1") is None
        assert table.lookup("::fffe:192.0.2.1") == "64"
        assert table.lookup("2001:db8::1") == "IPv6"

    def test_the_scope_of_a_client_is_left_out(self) -> None:
        """A link-local client is found by its address on whatever interface it is."""
        table = NetworkTable([(parse_network("fe80::/10"), "local")])

        assert table.lookup("fe80::1%eth0") == table.lookup("fe80::1%2") == "local"

    def test_a_network_has_one_value(self) -> None:
        """The same network with two values is an error that names it, with one value it is none."""
        network, again = parse_network("10.0.0.0/8"), _network6(MAPPED | 0x0A000000, 104)

        assert NetworkTable([(network, 1), (again, 1)]).lookup("10.0.0.1") == 1
        with pytest.raises(ValueError, match=r"^10\.0\.0\.0/8 has two values, 1 and 2$"):
            NetworkTable([(network, 1), (again, 2)])

    def test_a_text_that_is_no_address_is_no_miss(self) -> None:
        """A lookup of something that is no address fails, for None would mean an answer."""
        with pytest.raises(ValueError, match=r'^"localhost" is not an IP address$'):
            NetworkTable[int]([]).lookup("localhost")


class TestAccessList:
    """Who may connect."""

    @given(st.lists(NETWORKS, max_size=12), st.lists(NETWORKS, max_size=12), ADDRESSES)
    @settings(deadline=None)
    def test_the_longest_prefix_of_both_lists_decides(
        self, allow: list[Network], deny: list[Network], address: IPAddress
    ) -> None:
        """The smallest network in either list that holds the client decides, not the order."""
        allowed = set(map(plain_network, allow))
        deny = [network for network in deny if plain_network(network) not in allowed]
        access = AccessList(allow, deny)
        decisive = longest(allow + deny, address)
        expected = not allow if decisive is None else decisive in allowed

        assert access.permits(str(address)) is expected
        assert AccessList(allow[::-1], deny[::-1]).permits(str(address)) is expected

    @pytest.mark.parametrize(
        ("allow", "deny", "permitted"),
        [
            ([], [], {"10.0.0.1", "10.1.0.1", "192.0.2.1", "2001:db8::1"}),
            (["10.0.0.0/8"], [], {"10.0.0.1", "10.1.0.1"}),
            ([], ["10.0.0.0/8"], {"192.0.2.1", "2001:db8::1"}),
            (["10.0.0.0/8"], ["10.1.0.0/16"], {"10.0.0.1"}),
            (["10.1.0.0/16"], ["10.0.0.0/8"], {"10.1.0.1"}),
            (["0.0.0.0/0"], ["10.0.0.0/8"], {"192.0.2.1"}),
            (["::/0"], [], {"2001:db8::1"}),
            ([], ["0.0.0.0/0", "::/0"], set()),
        ],
    )
    def test_examples(self, allow: list[str], deny: list[str], permitted: set[str]) -> None:
        """Who is in no network may connect only if nothing is allowed explicitly."""
        access = AccessList([*map(parse_network, allow)], [*map(parse_network, deny)])
        clients = ["10.0.0.1", "10.1.0.1", "192.0.2.1", "2001:db8::1"]

        assert {client for client in clients if access.permits(client)} == permitted

    def test_clients_of_a_unix_socket_are_not_asked_for_an_address(self) -> None:
        """Who has no address may connect even where nobody else may."""
        networks = [parse_network("0.0.0.0/0"), parse_network("::/0")]

        assert AccessList([], networks).permits(None)
        assert AccessList([parse_network("192.0.2.1")], networks).permits(None)

    def test_a_network_in_both_lists_is_named(self) -> None:
        """A network that is both allowed and denied, in whatever spelling, is an error."""
        allow = [parse_network(text) for text in ("::1", "10.0.0.0/8", "::/0", "::1")]
        deny = [_network6(MAPPED | 0x0A000000, 104), parse_network("::1"), parse_network("::/1")]

        with pytest.raises(
            ValueError,
            match=r"^both allowed and denied: ::1/128, 10\.0\.0\.0/8; keep each in one list$",
        ):
            AccessList(allow, deny)
