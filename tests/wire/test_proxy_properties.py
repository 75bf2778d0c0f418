"""Whatever header a proxy sends, and however the network cuts it, the same is understood.

The other side is a model: an encoder, and for lines of text a decoder, written without the code
under test, its way to parse an address, or its way to compute a checksum.
"""

import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from lpechod.wire.proxy import MAX_HEADER_BYTES, ProxyError, ProxyHeader, ProxySource

pytestmark = pytest.mark.timeout(300)  # Finding the smallest example of a failure takes a while.
PROFILE = settings(deadline=None, max_examples=200)

SIGNATURE = b"\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a"
ADDRESS_BYTES = {1: 4, 2: 16}
MAPPED = bytes(10) + b"\xff\xff"


def crc32c(data: bytes) -> int:
    """Divide polynomials bit by bit, most significant first, on bytes whose bits are reversed."""
    register = 0xFFFF_FFFF
    for byte in data:
        register ^= int(f"{byte:08b}"[::-1], 2) << 24
        for _ in range(8):
            register = register << 1 ^ (0x1_1EDC_6F41 if register >> 31 else 0)
    return int(f"{register ^ 0xFFFF_FFFF:032b}"[::-1], 2)


def source_of(packed: bytes, port: int) -> ProxySource:
    """Say what a source is to be called, by the C library for IPv4."""
    if packed.startswith(MAPPED) and len(packed) == 16:
        packed = packed[12:]
    if len(packed) == 4:
        return ProxySource(socket.inet_ntop(socket.AF_INET, packed), port)
    return ProxySource(ipaddress.IPv6Address(packed).compressed, port)


def tlv(kind: int, value: bytes) -> bytes:
    """Encode a TLV."""
    return bytes([kind]) + len(value).to_bytes(2, "big") + value


def binary(version_command: int, family: int, protocol: int, block: bytes) -> bytes:
    """Encode a header of version 2."""
    kind = bytes([version_command, family << 4 | protocol])
    return SIGNATURE + kind + len(block).to_bytes(2, "big") + block


def checked(
    version_command: int,
    family: int,
    protocol: int,
    front: bytes,
    back: bytes,
    wrong: int = 0,
) -> bytes:
    """Encode a header with a checksum between ``front`` and ``back``, some bits of it wrong."""
    blank = binary(version_command, family, protocol, front + tlv(3, bytes(4)) + back)
    crc = (crc32c(blank) ^ wrong).to_bytes(4, "big")
    return binary(version_command, family, protocol, front + tlv(3, crc) + back)


@dataclass(frozen=True)
class Sent:
    """A valid header, and what is to be understood."""

    data: bytes
    source: ProxySource | None


PORTS = st.one_of(st.integers(0, 65535), st.sampled_from([0, 1, 9, 10, 65535]))
PACKED = {
    1: st.binary(min_size=4, max_size=4),
    2: st.one_of(
        st.binary(min_size=16, max_size=16),
        st.binary(min_size=4, max_size=4).map(lambda four: MAPPED + four),
        st.lists(st.sampled_from([b"\0\0", b"\0\1", b"\xff\xff"]), min_size=8, max_size=8).map(
            b"".join
        ),
    ),
}
TLVS = st.lists(
    st.builds(tlv, st.integers(0, 255).filter(lambda kind: kind != 3), st.binary(max_size=260)),
    max_size=6,
).map(b"".join)
NO_TLVS = st.one_of(
    st.sampled_from([b"\xee", b"\xee\0"]),
    st.binary(max_size=300).map(lambda b: b"\xee\xff\xff" + b),
)
"""What cannot be read as TLVs."""


@st.composite
def lines(draw: st.DrawFn) -> Sent:
    """Headers of version 1."""
    if draw(st.integers(0, 3)) == 0:
        ignored = draw(
            st.one_of(st.just(b""), st.binary(max_size=91).map(lambda rest: b" " + rest))
        )
        ignored = ignored.replace(b"\r", b"?").replace(b"\n", b"!")
        return Sent(b"PROXY UNKNOWN" + ignored + b"\r\n", None)
    family = draw(st.sampled_from([1, 2]))
    packed, other = draw(PACKED[family]), draw(PACKED[family])
    port, to_port = draw(PORTS), draw(PORTS)
    words = ["PROXY", "TCP4" if family == 1 else "TCP6"]
    for address in (packed, other):
        text = socket.inet_ntop(socket.AF_INET if family == 1 else socket.AF_INET6, address)
        if family == 2:
            # Not ipaddress: since Python 3.13 it writes mapped addresses too long for a header.
            exploded = address.hex(":", 2)
            text = draw(st.sampled_from([text, text.upper(), exploded, exploded.upper()]))
        words.append(text)
    line = " ".join([*words, str(port), str(to_port)])
    return Sent(f"{line}\r\n".encode(), source_of(packed, port))


@st.composite
def binaries(draw: st.DrawFn) -> Sent:
    """Headers of version 2, with any TLVs, with a checksum or without."""
    command, family, protocol = (
        draw(st.sampled_from([0, 1, 1, 1])),
        *draw(st.tuples(st.sampled_from([0, 1, 1, 2, 2, 3]), st.sampled_from([0, 1, 1, 2]))),
    )
    source = None
    if family in ADDRESS_BYTES:
        packed, other, port = draw(PACKED[family]), draw(PACKED[family]), draw(PORTS)
        addresses = packed + other + port.to_bytes(2, "big") + draw(PORTS).to_bytes(2, "big")
        if command == 1 and protocol == 1:
            source = source_of(packed, port)
    else:
        addresses = draw(st.binary(min_size=216, max_size=216)) if family == 3 else b""
    front, back = addresses + draw(TLVS), draw(TLVS)
    if draw(st.booleans()):
        return Sent(checked(0x20 | command, family, protocol, front, back), source)
    return Sent(binary(0x20 | command, family, protocol, front + back), source)


@st.composite
def undefined(draw: st.DrawFn) -> Sent:
    """Headers of version 2 whose block means nothing, but has to be skipped."""
    if draw(st.booleans()):
        return Sent(binary(0x21, 0, draw(st.integers(0, 2)), draw(NO_TLVS)), None)
    family = draw(st.sampled_from([0, 4, 15]))
    return Sent(binary(0x20, family, draw(st.integers(0, 15)), draw(NO_TLVS)), None)


HEADERS = st.one_of(lines(), binaries(), undefined())
FOLLOWING = st.one_of(
    st.binary(max_size=40), st.sampled_from([b"\r\n", b"\0\0\0\0", SIGNATURE, b"PROXY TCP4 "])
)
SEGMENTS = st.lists(st.one_of(st.integers(1, 3), st.integers(1, 200)), max_size=40)


@dataclass
class Outcome:
    """What has become of a stream: how much was taken, of whom it speaks, what was wrong."""

    taken: int = 0
    complete: bool = False
    source: ProxySource | None = None
    error: str | None = None


def deliver(stream: bytes, segments: Sequence[int]) -> Outcome:
    """Let a stream arrive in segments, then the rest at once; take each time what may be taken."""
    header = ProxyHeader()
    outcome = Outcome()
    arrived = 0
    for size in [*segments, len(stream)]:
        arrived = min(arrived + size, len(stream))
        waiting = memoryview(stream)[outcome.taken : arrived][:MAX_HEADER_BYTES]
        try:
            count = header.take(waiting)
        except ProxyError as error:
            outcome.error = str(error)
            break
        assert 0 <= count <= len(waiting)
        outcome.taken += count
        if not header.complete:
            assert count == len(waiting)
            assert header.source is None
    outcome.complete = header.complete
    outcome.source = header.source
    return outcome


class TestValid:
    """Any header, with anything behind it, in any pieces."""

    @given(sent=HEADERS, following=FOLLOWING, segments=SEGMENTS)
    @example(Sent(b"PROXY UNKNOWN\r\n", None), b"\r\n", [14, 1])
    @example(Sent(binary(0x20, 0, 0, b""), None), SIGNATURE, [15, 1, 1])
    @example(Sent(binary(0x21, 0, 1, b"\xee"), None), b"", [])
    @PROFILE
    def test_is_understood(self, sent: Sent, following: bytes, segments: list[int]) -> None:
        """A valid header is taken to its last byte and no further, and means what it says."""
        assert deliver(sent.data + following, segments) == Outcome(
            len(sent.data), complete=True, source=sent.source
        )

    @given(sent=HEADERS, cut=st.integers(0, MAX_HEADER_BYTES), segments=SEGMENTS)
    @PROFILE
    def test_truncated(self, sent: Sent, cut: int, segments: list[int]) -> None:
        """A valid header of which the end is absent is incomplete, never an error."""
        cut %= len(sent.data)
        assert deliver(sent.data[:cut], segments) == Outcome(cut)


class TestChecksum:
    """What a checksum is there to find."""

    @given(
        command=st.sampled_from([0x20, 0x21]),
        addresses=st.binary(min_size=12, max_size=12),
        front=TLVS,
        back=TLVS,
        wrong=st.integers(1, 0xFFFF_FFFF),
        segments=SEGMENTS,
    )
    @PROFILE
    def test_wrong(
        self,
        command: int,
        addresses: bytes,
        front: bytes,
        back: bytes,
        wrong: int,
        segments: list[int],
    ) -> None:
        """A header with any other checksum than its own is refused, of LOCAL as well."""
        data = checked(command, 1, 1, addresses + front, back, wrong)
        assert deliver(data, segments).error == "checksum does not fit the header"

    @given(addresses=st.binary(min_size=36, max_size=36), back=TLVS, bit=st.integers(0, 40 * 8 - 1))
    @PROFILE
    def test_flipped_bit(self, addresses: bytes, back: bytes, bit: int) -> None:
        """No bit of the addresses or the checksum can change unnoticed."""
        at = 16 + bit // 8
        data = bytearray(checked(0x21, 2, 1, addresses, back))
        data[at if at < 52 else at + 3] ^= 1 << bit % 8
        assert deliver(bytes(data), []).error == "checksum does not fit the header"


def model_of_line(line: str) -> ProxySource | None:
    """Decode a line with TCP4 or TCP6 by the C library; None if it is not valid."""
    words = line.split(" ")
    if len(words) != 6 or not line.isascii():
        return None
    family = socket.AF_INET if words[1] == "TCP4" else socket.AF_INET6
    try:
        packed, _ = (socket.inet_pton(family, word) for word in words[2:4])
    except (OSError, ValueError):
        return None
    for port in words[4:]:
        if not port.isdigit() or str(int(port)) != port or int(port) > 65535:
            return None
    return source_of(packed, int(words[4]))


ADDRESS_LIKE = st.one_of(
    st.sampled_from(["1.2.3.4", "::1", "::", "::ffff:1.2.3.4", "1:2:3:4:5:6:7:8", "1::8", "1.2.3"]),
    st.lists(
        st.sampled_from(["0", "00", "1", "255", "256", "f", "F00", "12345", ""]), max_size=9
    ).map(":".join),
    st.lists(st.sampled_from(["0", "00", "1", "01", "255", "256", "+1", ""]), max_size=5).map(
        ".".join
    ),
    st.text("0123456789abcdefABCDEFgx:.%/[]", max_size=20),
)
PORT_LIKE = st.one_of(
    st.integers(0, 70000).map(str),
    st.sampled_from(["", "00", "01", "+1", "-1", "1_0", "²", "0x1", "65536", "1\t", "1\0"]),
)


class TestLines:
    """Lines that are nearly valid."""

    @given(
        family=st.sampled_from(["TCP4", "TCP6"]),
        addresses=st.lists(ADDRESS_LIKE, min_size=1, max_size=3),
        ports=st.lists(PORT_LIKE, min_size=1, max_size=3),
    )
    @example("TCP6", ["::1%1", "::1"], ["1", "2"])
    @example("TCP6", ["1:2:3:4:5:6:7::", "::2:3:4:5:6:7:8"], ["1", "2"])
    @example("TCP6", ["::1.2.3.4", "1:2:3:4:5:6:1.2.3.4"], ["1", "2"])
    @example("TCP6", ["::ffff:1.2.3.04", "::"], ["1", "2"])
    @example("TCP4", ["1.2.3.4", "1.2.3.4"], ["²", "2"])
    @settings(PROFILE, max_examples=600)
    def test_are_judged_like_by_the_model(
        self, family: str, addresses: list[str], ports: list[str]
    ) -> None:
        """A line is accepted if the C library would, with the source that it would find."""
        line = " ".join(["PROXY", family, *addresses, *ports])
        data = f"{line}\r\n".encode()
        assume(len(data) <= 107)
        expected = model_of_line(line)
        outcome = deliver(data, [])
        assert (outcome.error is None, outcome.source) == (expected is not None, expected)


@st.composite
def mutants(draw: st.DrawFn) -> bytes:
    """Valid headers in which some bytes are changed, removed, repeated or inserted."""
    data = bytearray(draw(HEADERS).data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, min(len(data) - 1, 120))))
        end = at + draw(st.integers(0, 3))
        kind = draw(st.sampled_from(["change", "remove", "repeat"]))
        if kind == "change":
            data[at:end] = draw(st.binary(max_size=4))
        elif kind == "remove":
            del data[at:end]
        else:
            data[at:at] = data[at:end]
    return bytes(data)


STREAMS = st.one_of(
    mutants(),
    st.binary(max_size=300),
    st.builds(bytes.__add__, st.sampled_from([SIGNATURE, b"PROXY TCP4 "]), st.binary(max_size=300)),
    st.builds(bytes.__add__, st.just(SIGNATURE + b"\x21\x11\x00"), st.binary(max_size=300)),
    st.builds(
        bytes.__add__, st.just(b"PROXY UNKNOWN "), st.text("\r\n x", max_size=120).map(str.encode)
    ),
)


class TestAnything:
    """Whatever comes."""

    @given(stream=STREAMS, segments=SEGMENTS)
    @example(b"PROXY UNKNOWN " + b"x" * 92 + b"\r\n", [106])
    @example(b"PROXY UNKNOWN " + b"x" * 92 + b"\n", [106])
    @example(SIGNATURE + b"\x21\x11\x0f\xf0" + bytes(13), [16])
    @settings(PROFILE, max_examples=600)
    def test_segmentation_changes_nothing(self, stream: bytes, segments: list[int]) -> None:
        """At once, in segments or byte by byte: the result is the same, down to the words."""
        at_once = deliver(stream, [])
        in_segments = deliver(stream, segments)
        by_bytes = deliver(stream, [1] * len(stream))
        if at_once.error is not None:
            # What has been taken before an error depends on when it was seen.
            in_segments.taken = by_bytes.taken = at_once.taken
        assert in_segments == at_once
        assert by_bytes == at_once

    @given(stream=STREAMS)
    @PROFILE
    def test_a_header_ends_in_one_place(self, stream: bytes) -> None:
        """What was taken is the same header on its own, and incomplete without its last byte."""
        outcome = deliver(stream, [])
        if outcome.complete:
            assert deliver(stream[: outcome.taken], []) == outcome
            assert deliver(stream[: outcome.taken - 1], []) == Outcome(outcome.taken - 1)
