"""The header of the PROXY protocol: a proxy in front of us tells whom it speaks for.

Versions 1 (a line of text) and 2 (binary), as HAProxy's ``doc/proxy-protocol.txt`` defines them;
which of the two follows from the first byte. A header is not encrypted and proves nothing: whoever
may send one may claim any address.

Invariants. No byte behind the header is ever counted as part of it. What a peer announces commands
no memory: bytes are kept as they arrive, up to `MAX_HEADER_BYTES`. How a header is cut into pieces
changes neither the result nor the error. The signature, and whatever follows from single bytes
behind it, is judged byte by byte; addresses and TLVs once they are whole (sections 2.1 and 2.2
demand that), so a header that cannot become valid is refused while the peer still listens.
"""

import re
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address

MAX_HEADER_BYTES = 4096
"""What a header may take, which is also as much as it is useful to peek at.

A length field could announce 65551 bytes. Senders should fit theirs into 536 (section 2), addresses
take 232 at most, and the rest is names: 4096 is what nginx accepts as well.
"""

_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
_FIXED_BYTES = len(_SIGNATURE) + 4
_MAX_LINE_BYTES = 107
_OPENINGS = (
    _SIGNATURE,
    b"PROXY TCP4 ",
    b"PROXY TCP6 ",
    b"PROXY UNKNOWN ",
    b"PROXY UNKNOWN\r",
)

_PORT = r"(0|[1-9][0-9]{0,4})"
_LINE = re.compile(rf"PROXY TCP([46]) ([0-9A-Fa-f:.]+) ([0-9A-Fa-f:.]+) {_PORT} {_PORT}".encode())

_VERSION = 2
_LOCAL, _PROXY = 0, 1
_UNSPEC, _INET, _INET6, _UNIX = 0, 1, 2, 3
_STREAM, _DGRAM = 1, 2
_ADDRESSES_BYTES = {_UNSPEC: 0, _INET: 12, _INET6: 36, _UNIX: 216}
_TLV_HEADER_BYTES = 3
_TYPE_CRC32C = 0x03
_CRC32C_BYTES = 4


class ProxyError(Exception):
    """The peer has sent no valid PROXY header; the message says why, in words of ours only."""


@dataclass(frozen=True, slots=True)
class ProxySource:
    """Whom the proxy speaks for: an address in canonical text (never IPv4-mapped), and a port."""

    host: str
    port: int


class ProxyHeader:
    """A header that arrives in pieces.

    Attributes:
        complete: whether all of it has been taken.
        source: whom the proxy speaks for, once complete. None if it does not say (LOCAL, UNKNOWN,
            UNSPEC), or names a Unix or datagram socket: then the connection's own address holds.
    """

    __slots__ = ("_received", "complete", "source")

    def __init__(self) -> None:
        self._received = bytearray()
        self.complete = False
        self.source: ProxySource | None = None

    def take(self, waiting: bytes | memoryview) -> int:
        """Keep a copy of what belongs to the header of the bytes that wait behind those taken.

        All of it does, unless the header ends in it.

        Args:
            waiting: what comes next in the stream; more than `MAX_HEADER_BYTES` is not looked at.

        Returns:
            How many of these bytes belong to the header; 0 once it is complete.

        Raises:
            ProxyError: this is no header, or none that is valid. It stays so.
        """
        if self.complete:
            return 0
        received = self._received
        before = len(received)
        received += waiting[: MAX_HEADER_BYTES - before]
        _check_opening(received)
        found = _read_binary(received) if received[:1] == b"\r" else _read_line(received)
        if found is None:
            return len(received) - before
        end, self.source = found
        self.complete = True
        received.clear()
        return end - before


_Found = tuple[int, ProxySource | None]
"""Where a header ends, and whom it names."""


def _check_opening(received: bytearray) -> None:
    if any(opening.startswith(received[: len(opening)]) for opening in _OPENINGS):
        return
    if received.startswith(b"PROXY "):
        raise ProxyError("protocol is none of TCP4, TCP6 and UNKNOWN")
    raise ProxyError("no signature of the PROXY protocol")


def _source(address: IPv4Address | IPv6Address, port: int) -> ProxySource:
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return ProxySource(str(address if mapped is None else mapped), port)


# Version 1, section 2.1.


def _read_line(received: bytearray) -> _Found | None:
    # The first CR ends the line or is an error, as in the sample code (section 9). One that could
    # not be followed by an LF within the limit is not looked for.
    text, cr, _ = received[: _MAX_LINE_BYTES - 1].partition(b"\r")
    if b"\n" in text:
        raise ProxyError("line has an LF without a CR")
    if not cr:
        if len(text) == _MAX_LINE_BYTES - 1:
            raise ProxyError(f"line is longer than {_MAX_LINE_BYTES} bytes")
        return None
    end = len(text) + 2
    if len(received) < end:
        return None
    if received[end - 1] != ord("\n"):
        raise ProxyError("line has a CR without an LF")
    return end, _parse_line(text)


def _parse_line(text: bytearray) -> ProxySource | None:
    if text.startswith(b"PROXY UNKNOWN"):
        return None
    found = _LINE.fullmatch(text)
    if found is None:
        raise ProxyError("line is malformed")
    version, *addresses, source_port, destination_port = (part.decode() for part in found.groups())
    family: type[IPv4Address | IPv6Address] = IPv4Address if version == "4" else IPv6Address
    try:
        source, _destination = [family(each) for each in addresses]
    except AddressValueError:
        # Its text quotes the peer, so it is left out.
        raise ProxyError(f"line has an address that is none of IPv{version}") from None
    if max(int(source_port), int(destination_port)) > 0xFFFF:
        raise ProxyError("line has a port beyond 65535")
    return _source(source, int(source_port))


# Version 2, section 2.2.


def _read_binary(received: bytearray) -> _Found | None:
    fixed = received[len(_SIGNATURE) : _FIXED_BYTES]
    _check_fixed(fixed)
    end = _FIXED_BYTES + int.from_bytes(fixed[2:], "big")
    if len(received) < end:
        return None
    header = received[:end]
    command = fixed[0] & 0xF
    family, protocol = divmod(fixed[1], 16)
    first_tlv = _FIXED_BYTES + _ADDRESSES_BYTES.get(family, 0)
    try:
        checksum = _find_checksum(header, first_tlv)
    except ProxyError:
        if _has_addresses(command, family, protocol):
            raise
        # LOCAL has to be accepted whatever its block looks like, and that of UNSPEC is not defined.
        checksum = None
    if checksum is not None:
        _verify(header, checksum)
    if command == _LOCAL or protocol != _STREAM:
        return end, None
    if family == _INET:
        return end, _source(IPv4Address(bytes(header[16:20])), int.from_bytes(header[24:26], "big"))
    if family == _INET6:
        return end, _source(IPv6Address(bytes(header[16:32])), int.from_bytes(header[48:50], "big"))
    return end, None


def _has_addresses(command: int, family: int, protocol: int) -> bool:
    return command == _PROXY and _UNSPEC not in {family, protocol}


def _check_fixed(fixed: bytearray) -> None:
    """Judge as much as is there of what stands between the signature and the addresses."""
    if not fixed:
        return
    version, command = divmod(fixed[0], 16)
    if version != _VERSION:
        raise ProxyError(f"version of the binary header is {version}, not {_VERSION}")
    if command not in {_LOCAL, _PROXY}:
        raise ProxyError(f"command is {command}, neither LOCAL nor PROXY")
    if len(fixed) == 1:
        return
    family, protocol = divmod(fixed[1], 16)
    # Of LOCAL the family is ignored. Of PROXY every combination of known halves is accepted: those
    # that mean nothing to a receiver of TCP, datagrams among them, fall back to UNSPEC.
    if command == _PROXY and (family > _UNIX or protocol > _DGRAM):
        raise ProxyError(f"address family {family} or transport protocol {protocol} is unassigned")
    if len(fixed) < 4:
        return
    length = int.from_bytes(fixed[2:], "big")
    if _FIXED_BYTES + length > MAX_HEADER_BYTES:
        raise ProxyError(f"binary header is longer than {MAX_HEADER_BYTES} bytes")
    if _has_addresses(command, family, protocol) and length < _ADDRESSES_BYTES[family]:
        raise ProxyError("binary header is too short for its addresses")


def _find_checksum(header: bytearray, start: int) -> int | None:
    """Walk over the TLVs from ``start`` on; return where the value of a checksum stands, if any.

    Raises:
        ProxyError: a TLV is cut off, or the checksum is not one of four bytes. A second one is
            refused too: each costs a pass over the header, and 4096 bytes hold 580 of them.
    """
    found = None
    while start < len(header):
        value = start + _TLV_HEADER_BYTES
        end = value + int.from_bytes(header[start + 1 : value], "big")
        if end > len(header):
            raise ProxyError("a TLV reaches beyond the end of the header")
        if header[start] == _TYPE_CRC32C:
            if found is not None or end - value != _CRC32C_BYTES:
                raise ProxyError("checksum is not a single one of 4 bytes")
            found = value
        start = end
    return found


def _verify(header: bytearray, at: int) -> None:
    # Section 2.2.3 says nothing of the order of the bytes; HAProxy and AWS send it like a length.
    field = slice(at, at + _CRC32C_BYTES)
    announced = int.from_bytes(header[field], "big")
    header[field] = bytes(_CRC32C_BYTES)
    if _crc32c(header) != announced:
        raise ProxyError("checksum does not fit the header")


# CRC-32C (Castagnoli), as in RFC 4960 appendix B. The standard library only has the other CRC-32.


def _crc32c_of_byte(byte: int) -> int:
    remainder = byte
    for _ in range(8):
        remainder = remainder >> 1 ^ (0x82F6_3B78 if remainder & 1 else 0)
    return remainder


_CRC32C_TABLE = tuple(map(_crc32c_of_byte, range(256)))


def _crc32c(data: bytearray) -> int:
    crc = 0xFFFF_FFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC32C_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFF_FFFF
