"""What a server needs to speak TLS, made from the contents of files and not from the files.

Whoever checks a configuration has read them, and a program that takes over must not fail on a file
that has gone since (see `lpechod.ops.credentials`). No text of a file gets into a message.
"""

import os
import re
import ssl
from contextlib import ExitStack
from typing import Final, Literal, NoReturn

from lpechod.engine.memfile import memory_file
from lpechod.net.certificate import certificates, validity

Part = Literal["certificate", "key"]

_KEY: Final = re.compile(r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY-----")
_ENCRYPTED: Final = re.compile(
    r"-----BEGIN ENCRYPTED PRIVATE KEY-----|^Proc-Type:.*ENCRYPTED", re.MULTILINE
)
_IS_ENCRYPTED: Final = (
    "the key is encrypted, and nobody is there to type the passphrase; "
    "write it without: openssl pkey -in OLD -out NEW"
)

# The last one is what a key of another kind than the certificate's leads to.
_MISMATCHES: Final = {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH", "NO_CERTIFICATE_ASSIGNED"}

_VERSIONS: Final = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


class TlsMaterialError(Exception):
    """Certificate and key can't be used, though each of them can be read.

    Args:
        part: which of them is at fault.
        problem: what is wrong.
    """

    def __init__(self, part: Part, problem: str) -> None:
        super().__init__(problem)
        self.part = part


def check_certificates(pem: str) -> None:
    """Make sure that a file holds certificates that OpenSSL can read.

    Args:
        pem: its text.

    Raises:
        ValueError: it does not.
    """
    found = certificates(pem)
    if not found:
        raise ValueError("there is no certificate in it (-----BEGIN CERTIFICATE-----)")
    reader = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    for number, der in enumerate(found, 1):
        try:
            reader.load_verify_locations(cadata=der)
            validity(der)
        except (ssl.SSLError, ValueError) as error:
            raise ValueError(f"certificate {number} can't be read: {_reason(error)}") from None


def check_key(pem: str) -> None:
    """Make sure that a file holds a private key that needs no passphrase.

    Args:
        pem: its text.

    Raises:
        ValueError: it does not.
    """
    if not _KEY.search(pem):
        raise ValueError("there is no private key in it (-----BEGIN PRIVATE KEY-----)")
    if _ENCRYPTED.search(pem):
        raise ValueError(_IS_ENCRYPTED)


def server_context(
    certificate: str, key: str, client_ca: str | None, min_version: str
) -> ssl.SSLContext:
    """Make the context for the handshakes of a listener.

    It is made before workers are forked, and so they share the keys of its session tickets: a
    client can resume its session at any of them. All that is not set here is left to OpenSSL and to
    the policy of the system (openssl.cnf).

    Args:
        certificate: text of a PEM file that `check_certificates` has accepted.
        key: text of one that `check_key` has accepted.
        client_ca: text of one that `check_certificates` has accepted, with the authorities of which
            clients need certificates. None: they need none.
        min_version: the oldest version, ``1.2`` or ``1.3``.

    Raises:
        TlsMaterialError: OpenSSL does not take them.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = _VERSIONS[min_version]
    # Python sets both by itself; that clients can't command either is too important to rely on it.
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    # Python 3.11.0 to 3.11.2 sets it: then a stream that is cut off seems to end.
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    _load(context, certificate, key)
    if client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=b"".join(certificates(client_ca)))
    return context


def _load(context: ssl.SSLContext, certificate: str, key: str) -> None:
    """Load what the ssl module takes from files only: from such as have never been on a disk."""
    with ExitStack() as stack:
        paths = {}
        for part, text in (("certfile", certificate), ("keyfile", key)):
            fd = memory_file("lpechod-pem", text.encode("latin-1"))
            stack.callback(os.close, fd)
            paths[part] = f"/dev/fd/{fd}"
        try:
            context.load_cert_chain(**paths, password=_ask_nobody)
        except ssl.SSLError as error:
            raise _material_error(error) from None


def _material_error(error: ssl.SSLError) -> TlsMaterialError:
    name, reason = error.reason or "", _reason(error)
    if name in _MISMATCHES:
        return TlsMaterialError("key", "the key does not belong to the certificate")
    if "TOO_SMALL" in name or "TOO_WEAK" in name:
        problem = f"the security level of OpenSSL does not allow it: {reason}"
        return TlsMaterialError("certificate", problem)
    return TlsMaterialError("key", f"OpenSSL can't use the key: {reason}")


def _ask_nobody() -> NoReturn:
    """Stand in for OpenSSL's prompt on the terminal."""
    raise TlsMaterialError("key", _IS_ENCRYPTED)


def _reason(error: Exception) -> str:
    """Say what OpenSSL says, without the places in its source and ours."""
    reason = getattr(error, "reason", None)
    if reason:
        return str(reason).lower().replace("_", " ")
    return re.sub(r"^\[\w+\] | \(_ssl\.c:\d+\)$", "", str(error))
