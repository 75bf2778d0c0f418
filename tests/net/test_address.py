"""Addresses: what is understood, what is printed, and what a mistake is answered with."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpechod.net.address import TcpAddress, UnixAddress, parse_address


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9000", TcpAddress("127.0.0.1", 9000)),
        ("[::]:9000", TcpAddress("::", 9000)),
        ("[fe80::1%eth0]:7", TcpAddress("fe80::1%eth0", 7)),
        (":9000", TcpAddress(None, 9000)),
        ("localhost:0", TcpAddress("localhost", 0)),
        ("echo-1.example.net.:65535", TcpAddress("echo-1.example.net.", 65535)),
        ("docker_name:1", TcpAddress("docker_name", 1)),
        ("unix:/run/lpechod/echo.sock", UnixAddress("/run/lpechod/echo.sock")),
        ("unix:/" + "x" * 106, UnixAddress("/" + "x" * 106)),
    ],
)
def test_every_form_is_parsed_and_prints_as_it_was_written(
    text: str, address: TcpAddress | UnixAddress
) -> None:
    """Each documented form becomes a value that prints as the same text."""
    parsed = parse_address(text)

    assert address == parsed
    assert text == str(parsed)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("[0:0::0]:9000", "[::]:9000"),
        ("[2001:DB8::00A]:1", "[2001:db8::a]:1"),
        ("LocalHost:0080", "localhost:80"),
    ],
)
def test_spellings_of_one_address_are_equal(text: str, canonical: str) -> None:
    """An address is kept in canonical form, so that duplicates can be found by comparing."""
    assert canonical == str(parse_address(text))
    assert parse_address(canonical) == parse_address(text)


def test_the_kind_is_readable_without_isinstance() -> None:
    """The tag tells TCP from UNIX sockets."""
    assert parse_address(":1").kind == "tcp"
    assert parse_address("unix:/s").kind == "unix"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", 'an address is empty; write "host:port", "[v6]:port", ":port" or "unix:/path"'),
        ("9000", '"9000" has no colon; write ":9000" for every interface'),
        ("localhost", '"localhost" has no port; write "localhost:PORT"'),
        ("[::1]", '"[::1]" has no port; write "[::1]:PORT"'),
        ("[::1]9000", '"[::1]9000" has no port; write "[::1]:PORT"'),
        ("[::1:9000", '"[::1:9000" has an opening bracket but no closing one'),
        ("::1:9000", 'an IPv6 address needs brackets; write "[::1]:9000"'),
        ("::1", 'an IPv6 address needs brackets; write "[::1]:PORT"'),
        ("a:b:1", 'an IPv6 address needs brackets; write "[v6]:port"'),
        ("[localhost]:9000", '"localhost" in brackets is not an IPv6 address'),
        ("[]:9000", '"" in brackets is not an IPv6 address'),
        ("*:9000", '"*" is no host; write ":PORT" for every interface'),
        ("256.0.0.1:9000", '"256.0.0.1" is not an IPv4 address'),
        ("1.2.3:9000", '"1.2.3" is not an IPv4 address'),
        ("-x:9000", '"-x" is not a host name'),
        ("a..b:9000", '"a..b" is not a host name'),
        ("x" * 64 + ":1", f'"{"x" * 64}" is not a host name'),
        (
            "b\u00fccher.example:1",
            '"b\u00fccher.example" is not a host name; names in other scripts have an xn-- form',
        ),
        ("host:", 'a port is a number from 0 to 65535, found ""'),
        ("host:http", 'a port is a number from 0 to 65535, found "http"'),
        ("host:65536", "a port is a number from 0 to 65535, found 65536"),
        ("host:-1", 'a port is a number from 0 to 65535, found "-1"'),
        ("host:\u0661", 'a port is a number from 0 to 65535, found "\u0661"'),
        ("unix:echo.sock", 'a UNIX socket needs an absolute path, "unix:/path", found "echo.sock"'),
        ("unix:@echo", 'a UNIX socket needs an absolute path, "unix:/path", found "@echo"'),
        ("unix:/" + "x" * 107, "the path of a UNIX socket has at most 107 bytes, found 108"),
        ("unix:/" + "\u00e9" * 54, "the path of a UNIX socket has at most 107 bytes, found 109"),
        ("host name:1", "an address holds no spaces or control characters"),
        ("unix:/a\0b", "an address holds no spaces or control characters"),
        ("x" * 301, "an address has at most 300 characters, found 301"),
    ],
)
def test_a_mistake_is_answered_with_what_to_write(text: str, message: str) -> None:
    """What is no address is refused with a message that shows the way out."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared.
        parse_address(text)

    assert message == str(caught.value)


@given(st.ip_addresses(), st.integers(0, 65535))
def test_every_literal_survives_printing(ip: object, port: int) -> None:
    """An IP literal of either family parses back from its printed form."""
    address = TcpAddress(str(ip), port)

    assert address == parse_address(str(address))


@given(st.text(max_size=60) | st.from_regex(r"[\[\]:.a-z0-9*-]{0,30}", fullmatch=True))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    """Parsing ends in an address that parses back, or in ValueError, never in anything else."""
    try:
        address = parse_address(text)
    except ValueError:
        return

    assert address == parse_address(str(address))
