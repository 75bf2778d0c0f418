"""When certificates are valid, read from their encoding.

The standard library tells the dates of a certificate only if it is a peer's and has been verified;
here they are our own, and may have expired. The ``cryptography`` package would cost every process
10 MB and each start 100 ms for these two fields. So a dozen lines walk over what stands before them
(RFC 5280, 4.1); nothing is verified, and all else is OpenSSL's affair.
"""

import binascii
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

_SEQUENCE: Final = 0x30
_VERSION: Final = 0xA0
_UTC_TIME: Final = 0x17
_GENERALIZED_TIME: Final = 0x18

# The labels under which OpenSSL takes certificates, see PEM_read_bio_X509_AUX(3).
_BEGIN: Final = re.compile(r"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----")
_BLOCK: Final = re.compile(
    r"-----BEGIN ((?:X509 |TRUSTED )?CERTIFICATE)-----([^-]*)-----END \1-----"
)


@dataclass(frozen=True, slots=True)
class Validity:
    """From when to when a certificate is valid, both inclusive, in Unix time."""

    not_before: float
    not_after: float


def certificates(pem: str) -> list[bytes]:
    """Return the certificates of a PEM file, in order, in DER.

    Args:
        pem: The text; what stands around certificates is passed over.

    Raises:
        ValueError: One of them is cut off or garbled.

    """
    blocks = [body for _, body in _BLOCK.findall(pem)]
    if len(blocks) != len(_BEGIN.findall(pem)):
        raise ValueError("a certificate is cut off or garbled")
    found = []
    for number, body in enumerate(blocks, 1):
        try:
            der = binascii.a2b_base64("".join(body.split()), strict_mode=True)
        except ValueError as error:
            raise ValueError(f"certificate {number} is not base64: {error}") from None
        # A TRUSTED CERTIFICATE has more behind it, which is of no use to a server.
        tag, _, end = _element(der, 0)
        if tag != _SEQUENCE:
            raise ValueError(f"certificate {number} is none")
        found.append(der[:end])
    return found


def validity(der: bytes) -> Validity:
    """Read the dates of a certificate.

    Args:
        der: The certificate.

    Raises:
        ValueError: It is none, or cut off.

    """
    _, at, _ = _expect(der, 0, _SEQUENCE)  # Certificate
    _, at, _ = _expect(der, at, _SEQUENCE)  # TBSCertificate
    tag, _, end = _element(der, at)
    if tag == _VERSION:
        _, _, end = _element(der, end)  # The serial number, which is first if there is no version.
    _, _, end = _expect(der, end, _SEQUENCE)  # The algorithm of the signature.
    _, _, end = _expect(der, end, _SEQUENCE)  # The issuer.
    _, at, _ = _expect(der, end, _SEQUENCE)
    not_before, at = _time(der, at)
    not_after, _ = _time(der, at)
    return Validity(not_before, not_after)


def _element(der: bytes, at: int) -> tuple[int, int, int]:
    """Return the tag of the element at an index, and where its content begins and ends.

    Raises:
        ValueError: There is none, or it goes beyond the end.

    """
    if at + 2 > len(der):
        raise ValueError("the encoding is cut off")
    tag, length, start = der[at], der[at + 1], at + 2
    if length & 0x80:
        # Of the long form, the low bits say how many bytes of length follow (X.690, 8.1.3.5).
        more = length & 0x7F
        start += more
        length = int.from_bytes(der[at + 2 : start])
    if start + length > len(der):
        raise ValueError("the encoding is cut off")
    return tag, start, start + length


def _expect(der: bytes, at: int, tag: int) -> tuple[int, int, int]:
    found = _element(der, at)
    if found[0] != tag:
        raise ValueError(f"tag 0x{found[0]:02x} stands where 0x{tag:02x} is expected")
    return found


def _time(der: bytes, at: int) -> tuple[float, int]:
    """Return the Unix time of a Time (RFC 5280, 4.1.2.5), and where it ends."""
    tag, start, end = _element(der, at)
    text = der[start:end].decode("ascii", "replace")
    if tag == _UTC_TIME and re.fullmatch(r"[0-9]{12}Z", text):
        # Two digits of the year: 50 to 99 are of the last century.
        text = ("19" if text >= "5" else "20") + text
    elif not (tag == _GENERALIZED_TIME and re.fullmatch(r"[0-9]{14}Z", text)):
        raise ValueError("a date is written as no certificate may have it")
    month, day, hour, minute, second = (int(text[at : at + 2]) for at in range(4, 14, 2))
    moment = datetime(int(text[:4]), month, day, hour, minute, second, tzinfo=UTC)
    return moment.timestamp(), end
