"""The dates of certificates, against what the cryptography package reads from the same ones."""

import base64
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lpechod.net.certificate import certificates, validity
from tests.certificates import authority, issue

KEY = ec.generate_private_key(ec.SECP256R1())
NAME = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])


def made(not_before: datetime, not_after: datetime, serial: int = 5) -> x509.Certificate:
    """Make a certificate that signs itself."""
    return (
        x509.CertificateBuilder()
        .subject_name(NAME)
        .issuer_name(NAME)
        .public_key(KEY.public_key())
        .serial_number(serial)
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .sign(KEY, hashes.SHA256())
    )


def dates(certificate: x509.Certificate) -> tuple[float, float]:
    """Return the dates as the cryptography package reads them."""
    both = (certificate.not_valid_before_utc, certificate.not_valid_after_utc)
    return both[0].timestamp(), both[1].timestamp()


def read(certificate: x509.Certificate) -> tuple[float, float]:
    """Return the dates as we read them."""
    found = validity(certificate.public_bytes(Encoding.DER))
    return found.not_before, found.not_after


SOUND = made(datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 4, 1, tzinfo=UTC))
DER = SOUND.public_bytes(Encoding.DER)
PEM = SOUND.public_bytes(Encoding.PEM).decode()

FIRST = datetime(1950, 1, 1, tzinfo=UTC)
"""The earliest date that a certificate can have."""

MOMENTS = st.integers(0, 8049 * 365 * 86400).map(lambda after: FIRST + timedelta(seconds=after))


@settings(deadline=None)
@given(MOMENTS, MOMENTS, st.integers(1, 2**158))
def test_dates_are_those_of_another_reader(one: datetime, two: datetime, serial: int) -> None:
    """Dates of any century are read right, whatever the length of what stands before them."""
    certificate = made(min(one, two), max(one, two), serial)
    assert read(certificate) == dates(certificate)


@pytest.mark.parametrize("year", [1950, 1999, 2000, 2049, 2050, 9999])
def test_the_turns_of_the_centuries(year: int) -> None:
    """Two digits of a year mean 1950 to 2049, and from 2050 on there are four."""
    certificate = made(FIRST, datetime(year, 12, 31, 23, 59, 59, tzinfo=UTC))
    assert read(certificate) == dates(certificate)


def test_a_certificate_without_a_version() -> None:
    """Certificates of the first version begin with their serial number."""
    inner = DER.index(b"\xa0\x03\x02\x01\x02")
    without = bytearray(DER[:inner] + DER[inner + 5 :])
    for at in (2, 6):  # Both lengths around it take two bytes.
        length = int.from_bytes(without[at : at + 2]) - 5
        without[at : at + 2] = length.to_bytes(2)
    found = validity(bytes(without))
    assert (found.not_before, found.not_after) == dates(SOUND)


def test_a_chain_is_read_in_order(tmp_path: Path) -> None:
    """Of a file with several certificates and other text, each certificate is found."""
    files = issue(tmp_path)
    own, issuer = files.certificate.read_text(), files.ca.read_text()
    found = certificates(f"Bag Attributes\nsubject=é - ---\n{own}\n{issuer}{files.key.read_text()}")
    assert found[-1] == x509.load_pem_x509_certificate(authority().cert_pem.bytes()).public_bytes(
        Encoding.DER
    )
    assert len(found) == own.count("BEGIN CERT") + 1
    assert certificates(files.key.read_text()) == certificates("") == []


@pytest.mark.parametrize("label", ["X509 CERTIFICATE", "TRUSTED CERTIFICATE"])
def test_the_other_labels_of_openssl(label: str) -> None:
    """What OpenSSL takes for a certificate is one for us, and what it trusts it for is left out."""
    assert certificates(PEM.replace("CERTIFICATE", label)) == [DER]
    body = x509.load_pem_x509_certificate(PEM.encode()).public_bytes(Encoding.DER) + b"\x30\x00"
    assert certificates(pem_of(body).replace("CERTIFICATE", label)) == [DER]


def pem_of(der: bytes) -> str:
    """Put anything into the form of a PEM file."""
    text = base64.encodebytes(der).decode()
    return f"-----BEGIN CERTIFICATE-----\n{text}-----END CERTIFICATE-----\n"


@pytest.mark.parametrize(
    ("pem", "problem"),
    [
        (PEM[:200], "a certificate is cut off or garbled"),
        (PEM + PEM[:200], "a certificate is cut off or garbled"),
        (PEM.replace("END CERT", "END KEY"), "a certificate is cut off or garbled"),
        (PEM + PEM.replace("M", "!", 1), "certificate 2 is not base64"),
        (PEM + pem_of(b"\x02\x01\x05"), "certificate 2 is none"),
        (pem_of(DER[:-1]), "the encoding is cut off"),
    ],
    # Not the text, in which each process that collects tests has another key.
    ids=["cut off", "next one cut off", "no end", "no base64", "no certificate", "short"],
)
def test_a_file_that_is_damaged(pem: str, problem: str) -> None:
    """A certificate that is cut off is not passed over, as if it had not been there."""
    with pytest.raises(ValueError, match=problem):
        certificates(pem)


@given(st.binary(max_size=40) | st.integers(0, len(DER) - 1).map(lambda end: DER[:end]))
def test_garbage_is_an_error(der: bytes) -> None:
    """Of what is no certificate, or only the beginning of one, no dates are read."""
    with pytest.raises(ValueError, match=r"cut off|stands where|a date is written"):
        validity(der)


@given(st.integers(0, 200), st.integers(0, 255))
def test_a_changed_byte(at: int, byte: int) -> None:
    """A byte that is wrong leads to other dates or to a ValueError, and to nothing else."""
    changed = DER[:at] + bytes([byte]) + DER[at + 1 :]
    with suppress(ValueError):
        assert validity(changed).not_after is not None


@given(st.text() | st.text("-BEGINCRTFA \n=Ab/", max_size=200))
def test_any_text(text: str) -> None:
    """Any text has certificates or a ValueError."""
    assume("BEGIN CERTIFICATE" not in text)
    with suppress(ValueError):
        assert certificates(text + PEM)[-1] == DER


@pytest.mark.parametrize(
    "text", [b"2601010000Z", b"260101000000+", b"269901000000Z", b"2601 1000000Z"]
)
def test_dates_that_no_certificate_may_have(text: bytes) -> None:
    """Dates without seconds, with an offset, or of the 99th month are errors (RFC 5280)."""
    start = DER.index(b"\x17\x0d")
    field = b"\x17" + bytes([len(text)]) + text
    changed = bytearray(DER[:start] + field + DER[start + 15 :] + bytes(2))
    changed[2:4] = (int.from_bytes(changed[2:4]) - 2).to_bytes(2)
    with pytest.raises(ValueError, match=r"a date is|month must be"):
        validity(bytes(changed))


def test_a_day_is_a_day() -> None:
    """Dates are in UTC, whatever the zone of the machine."""
    start = datetime(2026, 3, 29, tzinfo=UTC)
    found = read(made(start, start + timedelta(days=1)))
    assert found[1] - found[0] == 86400
