"""Contexts for servers: what they demand of clients, and what OpenSSL does not take."""

import os
import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from lpechod.net.tlscontext import (
    TlsMaterialError,
    check_certificates,
    check_key,
    server_context,
)
from tests.certificates import Issued, authority, issue
from tests.net.harness import descriptors


@pytest.fixture(name="issued")
def _issued(tmp_path: Path) -> Issued:
    return issue(tmp_path)


def context_of(issued: Issued, *, client_ca: bool = False, version: str = "1.2") -> ssl.SSLContext:
    """Make a context of files."""
    return server_context(
        issued.certificate.read_text(),
        issued.key.read_text(),
        issued.ca.read_text() if client_ca else None,
        version,
    )


def shake_hands(
    server: ssl.SSLContext,
    prepare: Callable[[ssl.SSLContext], object] = lambda _client: None,
    session: ssl.SSLSession | None = None,
) -> ssl.SSLObject:
    """Do a handshake in memory, and return the client's end; both sides may raise SSLError."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority().configure_trust(client)
    prepare(client)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.wrap_bio(to_client, to_server, server_hostname="localhost", session=session),
        server.wrap_bio(to_server, to_client, server_side=True),
    )
    done: set[ssl.SSLObject] = set()
    while len(done) < 2:
        for end in ends:
            try:
                end.do_handshake()
                done.add(end)
            except ssl.SSLWantReadError:
                pass
    ends[1].write(b"x")
    assert ends[0].read(1) == b"x"  # By then it has the session tickets of TLS 1.3, too.
    return ends[0]


def test_a_handshake(issued: Issued) -> None:
    """A client that trusts the authority is served, without a certificate of its own."""
    before = descriptors()
    end = shake_hands(context_of(issued))
    assert end.version() == "TLSv1.3"
    assert end.compression() is None
    assert descriptors() == before


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_the_oldest_version(issued: Issued, version: str) -> None:
    """A client that speaks TLS 1.2 at most is served only if that is old enough."""

    def is_old(client: ssl.SSLContext) -> None:
        client.maximum_version = ssl.TLSVersion.TLSv1_2

    context = context_of(issued, version=version)
    if version == "1.2":
        assert shake_hands(context, is_old).version() == "TLSv1.2"
    else:
        with pytest.raises(ssl.SSLError, match="UNSUPPORTED_PROTOCOL"):
            shake_hands(context, is_old)


def test_what_clients_may_not_do(issued: Issued) -> None:
    """Nobody can have the handshake done again and again, or have secrets compressed."""
    context = context_of(issued)
    assert context.options & ssl.OP_NO_RENEGOTIATION
    assert context.options & ssl.OP_NO_COMPRESSION
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_clients_need_certificates(issued: Issued, tmp_path: Path) -> None:
    """With client_ca, a client needs a certificate, and one of that authority."""
    context = context_of(issued, client_ca=True)
    own = issue(tmp_path, "client")
    shake_hands(context, lambda client: client.load_cert_chain(own.certificate, own.key))
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        shake_hands(context)
    stranger = trustme.CA().issue_cert("localhost")
    with pytest.raises(ssl.SSLError, match="CERTIFICATE_VERIFY_FAILED"):
        shake_hands(context, stranger.configure_cert)


def test_several_authorities(issued: Issued, tmp_path: Path) -> None:
    """Of several authorities in a file, each one's certificates are taken."""
    other = trustme.CA()
    own = issue(tmp_path, "client")
    context = server_context(
        issued.certificate.read_text(),
        issued.key.read_text(),
        f"Some words.\n{other.cert_pem.bytes().decode()}\n{issued.ca.read_text()}",
        "1.2",
    )
    shake_hands(context, other.issue_cert("localhost").configure_cert)
    shake_hands(context, lambda client: client.load_cert_chain(own.certificate, own.key))


def test_a_session_is_resumed_in_another_process(issued: Issued) -> None:
    """Contexts that fork(2) has copied share keys, so that any worker can resume a session."""
    context = context_of(issued, client_ca=False)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority().configure_trust(client)

    def connect(server: ssl.SSLContext, session: ssl.SSLSession | None) -> ssl.SSLObject:
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        near = client.wrap_bio(to_client, to_server, server_hostname="localhost", session=session)
        far = server.wrap_bio(to_server, to_client, server_side=True)
        for end in (near, far, near, far):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
        far.write(b"x")
        assert near.read(1) == b"x"
        return near

    session = connect(context, None).session
    pid = os.fork()
    if pid == 0:
        os._exit(0 if connect(context, session).session_reused else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not connect(context_of(issued), session).session_reused


def test_certificate_and_key_in_one_file(issued: Issued) -> None:
    """A file that has both is the certificate and the key."""
    both = issued.key.read_text() + issued.certificate.read_text()
    check_certificates(both)
    check_key(both)
    shake_hands(server_context(both, both, None, "1.2"))


# What can't be used.


def refused(certificate: str, key: str) -> tuple[str, str]:
    """Return which part OpenSSL does not take, and why."""
    before = descriptors()
    with pytest.raises(TlsMaterialError) as caught:
        server_context(certificate, key, None, "1.2")
    assert descriptors() == before
    return caught.value.part, str(caught.value)


@pytest.mark.parametrize("kind", trustme.KeyType)
def test_a_key_of_another_certificate(issued: Issued, kind: trustme.KeyType) -> None:
    """A key that is not the certificate's is said to be that, be it of the same kind or not."""
    other = authority().issue_cert("localhost", key_type=kind).private_key_pem.bytes().decode()
    check_key(other)
    part, problem = refused(issued.certificate.read_text(), other)
    assert (part, problem) == ("key", "the key does not belong to the certificate")


@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_an_encrypted_key(issued: Issued, form: PrivateFormat) -> None:
    """Nobody is asked for a passphrase: an encrypted key is refused, and the way out is named."""
    key = serialization.load_pem_private_key(issued.key.read_bytes(), None)
    pem = key.private_bytes(Encoding.PEM, form, BestAvailableEncryption(b"x")).decode()
    with pytest.raises(ValueError, match=r"the key is encrypted.*openssl pkey -in OLD -out NEW"):
        check_key(pem)
    part, problem = refused(issued.certificate.read_text(), pem)
    assert part == "key"
    assert problem.startswith("the key is encrypted")


def test_a_key_that_is_too_small() -> None:
    """What the security level of OpenSSL forbids is refused, and not served for nobody to take."""
    key = rsa.generate_private_key(65537, 1024)  # noqa: S505 - that is what it is about.
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime(2026, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2027, 1, 1, tzinfo=UTC))
        .sign(key, hashes.SHA256())
    )
    pem = (
        certificate.public_bytes(Encoding.PEM)
        + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    ).decode()
    check_certificates(pem)
    check_key(pem)
    part, problem = refused(pem, pem)
    assert part == "certificate"
    assert problem == "the security level of OpenSSL does not allow it: ee key too small"


def test_a_key_that_is_garbled(issued: Issued) -> None:
    """A key that OpenSSL can't read is refused, and nothing of it is in the message."""
    key = issued.key.read_text()
    body = key.splitlines()[1]
    part, problem = refused(issued.certificate.read_text(), key.replace(body, body[::-1]))
    assert (part, problem.partition(":")[0]) == ("key", "OpenSSL can't use the key")
    assert "_ssl.c" not in problem
    assert body[::-1] not in problem


@pytest.mark.parametrize(
    "text",
    [
        "",
        "é\0",
        "-----BEGIN CERTIFICATE-----\nMAMCAQE=\n-----END CERTIFICATE-----",
        "-----BEGIN CERTIFICATE-----\nMAMCAQE=\n-----END CERT",
        "-----BEGIN PRIVATE KEY-----\nMAMCAQE=\n-----END PRIVATE KEY-----",
    ],
)
def test_what_is_no_certificate(text: str) -> None:
    """A file without a certificate, or with one that can't be read, is refused."""
    with pytest.raises(ValueError, match="certificate"):
        check_certificates(text)


@pytest.mark.parametrize("text", ["", "é\0", "-----BEGIN PUBLIC KEY-----"])
def test_what_is_no_key(text: str, issued: Issued) -> None:
    """A file without a private key is refused, that of the certificate as well."""
    for each in (text, issued.certificate.read_text()):
        with pytest.raises(ValueError, match="there is no private key in it"):
            check_key(each)
