"""The header of the PROXY protocol, by examples: of its specification, of HAProxy, and broken ones.

What HAProxy sends was recorded from version 2.6 in front of a socket, so nobody's understanding of
the specification is in it, nor our idea of a checksum.
"""

import re

import pytest

from lpechod.wire import proxy
from lpechod.wire.proxy import MAX_HEADER_BYTES, ProxyError, ProxyHeader, ProxySource
from tests.wire.driver import patterned

SIGNATURE = bytes.fromhex("0D0A0D0A000D0A515549540A")
FRAMES = patterned(0) + patterned(5) + patterned(13) + b"\r\nPROXY TCP4 " + SIGNATURE

IPV4 = bytes([192, 0, 2, 1, 198, 51, 100, 2, 0xDC, 0x04, 0x01, 0xBB])
IPV6 = bytes.fromhex("20010db800000000000000000000000120010db8000000000000000000000002dc0401bb")
MAPPED = bytes.fromhex("00000000000000000000ffffc000020100000000000000000000ffffc6336402dc0401bb")
UNIX = b"/run/client".ljust(108, b"\0") + b"/run/server".ljust(108, b"\0")
NOOP = b"\x04\x00\x02\xaa\xbb"
ZERO_CHECKSUM = b"\x03\x00\x04" + bytes(4)


def binary(version_command: int, family_protocol: int, block: bytes = b"") -> bytes:
    """Encode a header of version 2."""
    length = len(block).to_bytes(2, "big")
    return SIGNATURE + bytes([version_command, family_protocol]) + length + block


FROM_V4 = ProxySource("192.0.2.1", 56324)
FROM_V6 = ProxySource("2001:db8::1", 56324)
LONGEST_V6 = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"

TEXT = {
    "example": (
        b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n",
        ProxySource("192.168.0.1", 56324),
    ),
    "longest TCP4": (
        b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n",
        ProxySource("255.255.255.255", 65535),
    ),
    "shortest TCP4": (b"PROXY TCP4 0.0.0.0 0.0.0.0 0 0\r\n", ProxySource("0.0.0.0", 0)),
    "longest TCP6": (
        f"PROXY TCP6 {LONGEST_V6} {LONGEST_V6} 65535 65535\r\n".encode(),
        ProxySource(LONGEST_V6, 65535),
    ),
    "shortest TCP6": (b"PROXY TCP6 :: :: 0 0\r\n", ProxySource("::", 0)),
    "TCP6 in long": (
        b"PROXY TCP6 2001:0DB8:0:0:0000:0:0:0001 ::1 56324 443\r\n",
        FROM_V6,
    ),
    "TCP6 mapped": (b"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:192.0.2.2 56324 443\r\n", FROM_V4),
    "TCP6 mapped in hex": (b"PROXY TCP6 ::FFFF:c000:201 ::1 56324 443\r\n", FROM_V4),
    "UNKNOWN": (b"PROXY UNKNOWN\r\n", None),
    "UNKNOWN and a space": (b"PROXY UNKNOWN \r\n", None),
    "UNKNOWN and nonsense": (b"PROXY UNKNOWN TCP4 \x00\xff  what\tever\r\n", None),
    "longest UNKNOWN": (f"PROXY UNKNOWN {LONGEST_V6} {LONGEST_V6} 65535 65535\r\n".encode(), None),
}
BINARY = {
    "TCP over IPv4": (binary(0x21, 0x11, IPV4), FROM_V4),
    "TCP over IPv6": (binary(0x21, 0x21, IPV6), FROM_V6),
    "TCP over mapped IPv4": (binary(0x21, 0x21, MAPPED), FROM_V4),
    "IPv4 and TLVs": (binary(0x21, 0x11, IPV4 + NOOP + b"\xe0\x00\x00" + NOOP), FROM_V4),
    "longest": (binary(0x21, 0x11, (IPV4 + b"\xe0\x0f\xe1").ljust(4080, b"\x03")), FROM_V4),
    "UDP over IPv4": (binary(0x21, 0x12, IPV4), None),
    "UDP over IPv6": (binary(0x21, 0x22, IPV6), None),
    "Unix stream": (binary(0x21, 0x31, UNIX), None),
    "Unix datagram": (binary(0x21, 0x32, UNIX + NOOP), None),
    "UNSPEC": (binary(0x21, 0x00), None),
    "UNSPEC and what is not defined": (binary(0x21, 0x00, IPV4), None),
    "IPv4 over UNSPEC": (binary(0x21, 0x10, IPV4[:8]), None),
    "UNSPEC over TCP": (binary(0x21, 0x01), None),
    "LOCAL": (binary(0x20, 0x00), None),
    "LOCAL with addresses": (binary(0x20, 0x11, IPV4 + NOOP), None),
    "LOCAL with too few addresses": (binary(0x20, 0x21, IPV4), None),
    "LOCAL with a TLV cut off": (binary(0x20, 0x11, IPV4 + NOOP[:-1]), None),
    "LOCAL with a family unassigned": (binary(0x20, 0xFF, b"\xff" * 9), None),
}
RECORDED = {
    "check": ("2000000703 0004a9b87e8f", None),
    "TCP4": ("2111000c7f0000017f000001c5fc98c9", ProxySource("127.0.0.1", 50684)),
    "TCP6": (
        "21210024 00000000000000000000000000000001 00000000000000000000000000000001 affa98ca",
        ProxySource("::1", 45050),
    ),
    "checksum": (
        "21110013 7f0000017f000001b28698cb 0300048c8791d0",
        ProxySource("127.0.0.1", 45702),
    ),
    "TLS": (
        (
            "21110051 7f0000017f000001a20298cc 0300046e47b1d8 02000c6563686f2e6578616d706c65"
            "05000135 2000280100000000 210007544c5376312e33"
            "230016544c535f4145535f3235365f47434d5f534841333834"
        ),
        ProxySource("127.0.0.1", 41474),
    ),
    "mapped": (
        (
            "2121002b 00000000000000000000ffff7f000001 00000000000000000000ffff7f000001 bd4e98cd"
            "0300045514567a"
        ),
        ProxySource("127.0.0.1", 48462),
    ),
}
VALID = {
    **TEXT,
    **BINARY,
    **{
        f"HAProxy, {name}": (SIGNATURE + bytes.fromhex(rest), source)
        for name, (rest, source) in RECORDED.items()
    },
}

each_valid = pytest.mark.parametrize(("data", "source"), VALID.values(), ids=VALID.keys())


class TestValid:
    """Headers that are accepted, with frames behind them."""

    @each_valid
    def test_at_once(self, data: bytes, source: ProxySource | None) -> None:
        """A header is read, and nothing is taken of the frames behind it."""
        header = ProxyHeader()
        assert header.take(data + FRAMES) == len(data)
        assert header.complete
        assert header.source == source

    @each_valid
    def test_without_anything_behind(self, data: bytes, source: ProxySource | None) -> None:
        """A header is complete with its last byte, and takes nothing that comes afterwards."""
        header = ProxyHeader()
        assert header.take(data) == len(data)
        assert header.complete
        assert header.take(FRAMES) == 0
        assert header.source == source

    @each_valid
    def test_in_two_pieces(self, data: bytes, source: ProxySource | None) -> None:
        """A piece that ends before the header is taken whole, and is no error."""
        for cut in range(len(data)):
            header = ProxyHeader()
            assert (header.take(data[:cut]), header.complete, header.source) == (cut, False, None)
            rest = data[cut:] + FRAMES
            assert (header.take(rest), header.complete) == (len(data) - cut, True)
            assert header.source == source

    @each_valid
    def test_byte_by_byte(self, data: bytes, source: ProxySource | None) -> None:
        """A header that comes byte by byte is complete with its last byte, not before."""
        header = ProxyHeader()
        for at in range(len(data)):
            assert not header.complete
            assert header.take(data[at : at + 1]) == 1
        assert header.complete
        assert header.source == source

    def test_nothing(self) -> None:
        """Where nothing waits, nothing is taken."""
        header = ProxyHeader()
        assert header.take(b"") == 0
        assert not header.complete

    def test_keeps_a_copy(self) -> None:
        """What has been taken may be overwritten."""
        data, source = TEXT["example"]
        buffer = bytearray(data)
        header = ProxyHeader()
        assert header.take(memoryview(buffer)[:30]) == 30
        buffer[:30] = bytes(30)
        assert header.take(memoryview(buffer)[30:]) == len(data) - 30
        assert header.source == source


# What ends in a byte that makes it invalid, and was not certain to be before.
BROKEN_TEXT = [
    (b"G", "no signature"),
    (b"\0", "no signature"),
    (b"p", "no signature"),
    (b"PROXy", "no signature"),
    (b"PROXY\t", "no signature"),
    (b"PROXY  ", "protocol"),
    (b"PROXY TCP5", "protocol"),
    (b"PROXY TCP4\t", "protocol"),
    (b"PROXY TCP4\r", "protocol"),
    (b"PROXY UD", "protocol"),
    (b"PROXY UNKNOWNS", "protocol"),
    (b"PROXY UNKNOWN\n", "protocol"),
    (b"PROXY UNKNOWN \n", "LF without a CR"),
    (b"PROXY UNKNOWN\rx", "CR without an LF"),
    (b"PROXY UNKNOWN x\r\r", "CR without an LF"),
    (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\n", "LF without a CR"),
    (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\r", "CR without an LF"),
    (b"PROXY UNKNOWN ".ljust(106, b"."), "longer than 107"),
    (b"PROXY TCP6 ".ljust(106, b":"), "longer than 107"),
]
BROKEN_LINES = [
    ("PROXY TCP4 ", "malformed"),
    ("PROXY TCP4 192.0.2.1", "malformed"),
    ("PROXY TCP4 192.0.2.1 192.0.2.2 1", "malformed"),
    ("PROXY TCP4 192.0.2.1 192.0.2.2 1 ", "malformed"),
    ("PROXY TCP4 192.0.2.1 192.0.2.2 1 2 ", "malformed"),
    ("PROXY TCP4 192.0.2.1 192.0.2.2 1 2 3", "malformed"),
    ("PROXY TCP4  192.0.2.1 192.0.2.2 1 2", "malformed"),
    ("PROXY TCP4 192.0.2.1  192.0.2.2 1 2", "malformed"),
    ("PROXY TCP4 192.0.2.1\t192.0.2.2 1 2", "malformed"),
    ("PROXY TCP4 192.0.2.1 192.0.2.2 01 2", "malformed"),
    ("PROXY TCP4 192.0.2.1 192.0.2.2 1 00", "malformed"),
    ("PROXY TCP4 192.0.2.1 192.0.2.2 +1 2", "malformed"),
    ("PROXY TCP4 192.0.2.1 192.0.2.2 1 -2", "malformed"),
    ("PROXY TCP4 192.0.2.1 192.0.2.2 1 1_0", "malformed"),
    ("PROXY TCP4 192.0.2.1 192.0.2.2 1 100000", "malformed"),
    ("PROXY TCP4 192.0.2.1 192.0.2.2 65536 2", "beyond 65535"),
    ("PROXY TCP4 192.0.2.1 192.0.2.2 1 65536", "beyond 65535"),
    ("PROXY TCP4 192.0.2.1 192.0.2.2 ¹ 2", "malformed"),
    ("PROXY TCP4 192.0.2.01 192.0.2.2 1 2", "none of IPv4"),
    ("PROXY TCP4 192.0.2.1 192.0.2.02 1 2", "none of IPv4"),
    ("PROXY TCP4 192.0.2.256 192.0.2.2 1 2", "none of IPv4"),
    ("PROXY TCP4 192.0.2 192.0.2.2 1 2", "none of IPv4"),
    ("PROXY TCP4 192.0.2.1. 192.0.2.2 1 2", "none of IPv4"),
    ("PROXY TCP4 192.0.2.1/32 192.0.2.2 1 2", "malformed"),
    ("PROXY TCP4 ::1 ::1 1 2", "none of IPv4"),
    ("PROXY TCP4 192.0.2.1 ::1 1 2", "none of IPv4"),
    ("PROXY TCP6 192.0.2.1 192.0.2.2 1 2", "none of IPv6"),
    ("PROXY TCP6 ::1 192.0.2.2 1 2", "none of IPv6"),
    ("PROXY TCP6 ::1%eth0 ::1 1 2", "malformed"),
    ("PROXY TCP6 [::1] ::1 1 2", "malformed"),
    ("PROXY TCP6 1::2::3 ::1 1 2", "none of IPv6"),
    ("PROXY TCP6 1:2:3:4:5:6:7 ::1 1 2", "none of IPv6"),
    ("PROXY TCP6 1:2:3:4:5:6:7:8:9 ::1 1 2", "none of IPv6"),
    ("PROXY TCP6 00001::1 ::1 1 2", "none of IPv6"),
    ("PROXY TCP6 g::1 ::1 1 2", "malformed"),
]
BROKEN_BINARY = [
    (b"\r\r", "no signature"),
    (SIGNATURE[:-1] + b"\r", "no signature"),
    (SIGNATURE + b"\x11", "version of the binary header is 1"),
    (SIGNATURE + b"\x31", "version of the binary header is 3"),
    (SIGNATURE + b"\x22", "command is 2"),
    (SIGNATURE + b"\x2f", "command is 15"),
    (SIGNATURE + b"\x21\x41", "unassigned"),
    (SIGNATURE + b"\x21\xf0", "unassigned"),
    (SIGNATURE + b"\x21\x13", "unassigned"),
    (SIGNATURE + b"\x21\x0f", "unassigned"),
    (SIGNATURE + b"\x21\x11\x00\x0b", "too short"),
    (SIGNATURE + b"\x21\x12\x00\x00", "too short"),
    (SIGNATURE + b"\x21\x21\x00\x23", "too short"),
    (SIGNATURE + b"\x21\x22\x00\x0c", "too short"),
    (SIGNATURE + b"\x21\x31\x00\xd7", "too short"),
    (SIGNATURE + b"\x21\x11\x0f\xf1", "longer than 4096"),
    (SIGNATURE + b"\x21\x11\xff\xff", "longer than 4096"),
    (SIGNATURE + b"\x20\x00\x0f\xf1", "longer than 4096"),
    (binary(0x21, 0x11, IPV4 + b"\x04"), "beyond the end"),
    (binary(0x21, 0x11, IPV4 + b"\x04\x00"), "beyond the end"),
    (binary(0x21, 0x11, IPV4 + NOOP[:-1]), "beyond the end"),
    (binary(0x21, 0x11, IPV4 + NOOP + b"\x04\xff\xff"), "beyond the end"),
    (binary(0x21, 0x12, IPV4 + NOOP[:-1]), "beyond the end"),
    (binary(0x21, 0x31, UNIX + NOOP[:-1]), "beyond the end"),
    (binary(0x21, 0x11, IPV4 + b"\x03\x00\x03" + bytes(3)), "not a single one of 4"),
    (binary(0x21, 0x11, IPV4 + b"\x03\x00\x05" + bytes(5)), "not a single one of 4"),
    (binary(0x21, 0x11, IPV4 + ZERO_CHECKSUM * 2), "not a single one of 4"),
    (binary(0x21, 0x11, IPV4 + ZERO_CHECKSUM), "does not fit"),
    (binary(0x21, 0x12, IPV4 + NOOP + ZERO_CHECKSUM), "does not fit"),
    (binary(0x21, 0x00, ZERO_CHECKSUM), "does not fit"),
    (binary(0x20, 0x00, NOOP + ZERO_CHECKSUM), "does not fit"),
    (binary(0x20, 0x11, IPV4 + ZERO_CHECKSUM + NOOP), "does not fit"),
    (binary(0x20, 0xFF, NOOP + ZERO_CHECKSUM), "does not fit"),
]
BROKEN = [
    *BROKEN_TEXT,
    *((f"{line}\r\n".encode(), message) for line, message in BROKEN_LINES),
    *BROKEN_BINARY,
]

each_broken = pytest.mark.parametrize(("data", "message"), BROKEN)


class TestBroken:
    """Headers that are refused, and when."""

    @each_broken
    def test_at_once(self, data: bytes, message: str) -> None:
        """What is no valid header is refused, for the reason that holds."""
        with pytest.raises(ProxyError, match=re.escape(message)):
            ProxyHeader().take(data + FRAMES)

    @each_broken
    def test_as_early_as_certain(self, data: bytes, message: str) -> None:
        """Byte by byte, it is refused with the first byte that cannot be, whatever follows."""
        header = ProxyHeader()
        for at in range(len(data) - 1):
            assert header.take(data[at : at + 1]) == 1
            assert not header.complete
        with pytest.raises(ProxyError, match=re.escape(message)):
            header.take(data[-1:])

    @each_broken
    def test_stays_so(self, data: bytes, message: str) -> None:
        """Who goes on after an error gets the same one again."""
        header = ProxyHeader()
        for more in (data, b"", FRAMES):
            with pytest.raises(ProxyError, match=re.escape(message)):
                header.take(more)
        assert not header.complete
        assert header.source is None

    @pytest.mark.parametrize("word", ["dead:beef", "4711.1", "\x1b[31m"])
    def test_does_not_quote_the_peer(self, word: str) -> None:
        """A message has nothing in it of what the peer sent, nor is another error shown with it."""
        for family in ("TCP4", "TCP6"):
            with pytest.raises(ProxyError) as caught:
                ProxyHeader().take(f"PROXY {family} {word} {word} 1 2\r\n".encode())
            assert word not in str(caught.value)
            assert caught.value.__cause__ is None
            assert caught.value.__context__ is None or caught.value.__suppress_context__


class TestBounds:
    """A peer commands no memory."""

    def test_announced_bytes_are_not_kept(self) -> None:
        """What waits behind the longest header is not even copied."""
        data, _ = BINARY["longest"]
        assert len(data) == MAX_HEADER_BYTES
        header = ProxyHeader()
        assert header.take(data[:-1]) == MAX_HEADER_BYTES - 1
        assert len(header._received) == MAX_HEADER_BYTES - 1
        assert header.take(data[-1:] + bytes(1 << 20)) == 1
        assert not header._received

    def test_a_refused_flood_is_not_kept(self) -> None:
        """Who floods after an error fills no more than a header."""
        header = ProxyHeader()
        for _ in range(10):
            with pytest.raises(ProxyError):
                header.take(b"x" * MAX_HEADER_BYTES)
        assert len(header._received) <= MAX_HEADER_BYTES


@pytest.mark.parametrize(
    ("data", "crc"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(reversed(range(32))), 0x113FDB5C),
    ],
)
def test_crc32c(data: bytes, crc: int) -> None:
    """The checksum has the values that the RFC 3720 of iSCSI lists in appendix B.4."""
    assert proxy._crc32c(bytearray(data)) == crc
