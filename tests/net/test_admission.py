"""Admission: the limits, whom they count as one client, and how a peer is written."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpechod.net.admission import Admission, AdmissionLimits, format_peer, host_of
from lpechod.net.counts import REJECT_REASONS

HOSTS = ["192.0.2.1", "192.0.2.2", "2001:db8::1", None]


def test_limit_of_all() -> None:
    """At the limit nobody is admitted; who leaves makes room for one."""
    admission = Admission(AdmissionLimits(max_connections=2))
    assert admission.admit("192.0.2.1") is None
    assert admission.admit("192.0.2.2") is None
    assert admission.admit("192.0.2.3") == "max_connections"
    admission.leave("192.0.2.1")

    assert admission.admit("192.0.2.3") is None


def test_limit_of_all_workers() -> None:
    """The limit of all counts what other workers hold at this moment."""
    others = [1]
    admission = Admission(AdmissionLimits(max_connections=3), lambda: others[0])
    assert [admission.admit("192.0.2.1") for _ in range(3)] == [None, None, "max_connections"]
    others[0] = 0
    assert admission.admit("192.0.2.2") is None
    others[0] = 1000

    assert admission.admit("192.0.2.3") == "max_connections"
    assert admission.active == 3


def test_limit_of_one_address() -> None:
    """An address at its limit is refused, and others are not."""
    admission = Admission(AdmissionLimits(max_connections_per_ip=1))
    assert admission.admit("192.0.2.1") is None
    assert admission.admit("192.0.2.1") == "max_connections_per_ip"
    assert admission.admit("192.0.2.2") is None
    admission.leave("192.0.2.1")

    assert admission.admit("192.0.2.1") is None


def test_no_limit_of_one_address() -> None:
    """By default an address may hold them all, and is not even counted."""
    admission = Admission(AdmissionLimits(max_connections=3))
    assert [admission.admit("192.0.2.1") for _ in range(3)] == [None] * 3

    assert not admission._by_prefix


def test_addresses_of_one_host_count_as_one() -> None:
    """An IPv6 host has a /64 of addresses, and all count for the limit of one."""
    admission = Admission(AdmissionLimits(max_connections_per_ip=1))
    assert admission.admit("2001:db8::1") is None
    assert admission.admit("2001:db8::2") == "max_connections_per_ip"
    assert admission.admit("2001:db8:0:1::1") is None
    admission.leave("2001:db8::1")
    assert admission.admit("2001:db8::2") is None


def test_prefixes_are_the_operators_choice() -> None:
    """Clients are told apart by as many bits as the limits say."""
    limits = AdmissionLimits(max_connections_per_ip=1, ipv4_prefix_bits=24, ipv6_prefix_bits=128)
    admission = Admission(limits)
    assert admission.admit("192.0.2.1") is None
    assert admission.admit("192.0.2.255") == "max_connections_per_ip"
    assert admission.admit("2001:db8::1") is None
    assert admission.admit("2001:db8::2") is None


def test_limit_per_second() -> None:
    """An address may come so often at once, then at its rate, and others are not affected."""
    admission = Admission(AdmissionLimits(connection_rate=2.0, connection_burst=3))
    assert [admission.admit("192.0.2.1", 100.0) for _ in range(4)] == [
        *[None] * 3,
        "connection_rate",
    ]
    assert admission.active == 3
    assert admission.admit("192.0.2.2", 100.0) is None
    assert admission.admit("192.0.2.1", 100.4) == "connection_rate"
    assert admission.admit("192.0.2.1", 100.5) is None
    assert admission.admit("192.0.2.1", 100.5) == "connection_rate"


def test_who_is_refused_for_another_limit_has_not_come() -> None:
    """A connection that is one too many at a time does not count for the limit per second."""
    limits = AdmissionLimits(max_connections_per_ip=1, connection_rate=1.0, connection_burst=2)
    admission = Admission(limits)
    assert admission.admit("192.0.2.1", 100.0) is None
    assert admission.admit("192.0.2.1", 100.0) == "max_connections_per_ip"
    admission.leave("192.0.2.1")
    assert admission.admit("192.0.2.1", 100.0) is None


class NoRoom:
    """What other workers can be told of nobody, and know of nobody."""

    def others(self, _prefix: bytes, /) -> int:
        """Return 0."""
        return 0

    def show(self, _prefix: bytes, count: int, /) -> bool:
        """Have room for nobody."""
        return not count


def test_connections_that_others_can_not_be_told_of_are_counted() -> None:
    """Each counts once, when it comes, and not again when another one goes."""
    limits = AdmissionLimits(max_connections_per_ip=10)
    admission = Admission(limits, clients=NoRoom())
    for _ in range(3):
        assert admission.admit("192.0.2.1") is None
    for _ in range(3):
        admission.leave("192.0.2.1")

    assert admission.overflows == 3


def test_unix_clients_have_no_address() -> None:
    """Clients of a UNIX socket count for the limit of all, and for no address."""
    admission = Admission(AdmissionLimits(max_connections=3, max_connections_per_ip=1))
    assert [admission.admit(None) for _ in range(4)] == [None, None, None, "max_connections"]


@given(
    st.lists(st.tuples(st.booleans(), st.sampled_from(HOSTS))),
    st.integers(1, 5),
    st.integers(0, 3),
)
def test_any_coming_and_going(
    steps: list[tuple[bool, str | None]], most: int, most_per_ip: int
) -> None:
    """Whoever comes and goes, the limits are kept, used up, and nobody is remembered for ever."""
    admission = Admission(AdmissionLimits(most, most_per_ip))
    present: Counter[str | None] = Counter()
    for comes, host in steps:
        if comes:
            limited = host is not None and most_per_ip and present[host] == most_per_ip
            refusal = admission.admit(host)
            if present.total() == most:
                assert refusal == "max_connections"
            elif limited:
                assert refusal == "max_connections_per_ip"
            else:
                assert refusal is None
                present[host] += 1
            assert refusal is None or refusal in REJECT_REASONS
        elif present[host]:
            admission.leave(host)
            present[host] -= 1
        assert admission.active == present.total()
    for host in present.elements():
        admission.leave(host)

    assert admission.active == 0
    assert not admission._by_prefix


@pytest.mark.parametrize(
    ("peer", "host", "text"),
    [
        (("192.0.2.1", 50000), "192.0.2.1", "192.0.2.1:50000"),
        (("2001:db8::1", 50000, 0, 0), "2001:db8::1", "[2001:db8::1]:50000"),
        (("::1", 1, 0, 0), "::1", "[::1]:1"),
        (("::ffff:192.0.2.1", 50000, 0, 0), "192.0.2.1", "192.0.2.1:50000"),
        (("::ffff:1:2", 50000, 0, 0), "::ffff:1:2", "[::ffff:1:2]:50000"),
        (("fe80::1%eth0", 7, 0, 2), "fe80::1%eth0", "[fe80::1%eth0]:7"),
        ("", None, "unix"),
        (b"\0abstract", None, "unix"),
        ("/run/client.sock", None, "unix"),
    ],
)
def test_peers(peer: object, host: str | None, text: str) -> None:
    """A peer is one client by whatever listener it came, and nothing it chose gets into a log."""
    assert host_of(peer) == host
    assert format_peer(peer) == text
