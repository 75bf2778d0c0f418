"""Records of TLS 1.3 made without OpenSSL, whose clients send no key updates by the thousand."""

from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

_DATA, _HANDSHAKE, _ALERT = 23, 22, 21
_KEY_UPDATE = b"\x18\0\0\1"
_CLOSE_NOTIFY = b"\1\0"
_LARGEST = 16385
"""Bytes of content, kind and padding that a record has at most (RFC 8446, 5.4)."""


class Sealer:
    """A client's side of the record protocol (RFC 8446, 5.2 and 7.2), for TLS_AES_256_GCM_SHA384.

    Args:
        log: what the client's context has logged of its secrets (``keylog_filename``).
        sent: how many records the client has sent since its handshake.
    """

    def __init__(self, log: Path, sent: int = 0) -> None:
        (line,) = (each for each in log.read_text().splitlines() if "CLIENT_TRAFFIC" in each)
        self._use(bytes.fromhex(line.split()[2]))
        self._number = sent

    def data(self, plain: bytes) -> bytes:
        """Return a record of data."""
        return self._seal(plain, _DATA)

    def key_update(self, *, asks: bool = False, padded: bool = False) -> bytes:
        """Return a key update, which may ask for another; what follows has the new key.

        Args:
            asks: whether it does.
            padded: whether its record is as large as any.
        """
        record = self._seal(_KEY_UPDATE + bytes([asks]), _HANDSHAKE, padded=padded)
        self._use(_expand(self._secret, b"traffic upd", 48))
        self._number = 0
        return record

    def close_notify(self, *, padded: bool = False) -> bytes:
        """Return the end of the stream."""
        return self._seal(_CLOSE_NOTIFY, _ALERT, padded=padded)

    def part(self) -> bytes:
        """Return a record with all but the last byte of a key update."""
        return self._seal(_KEY_UPDATE, _HANDSHAKE)

    def _use(self, secret: bytes) -> None:
        self._secret = secret
        self._key = AESGCM(_expand(secret, b"key", 32))
        self._iv = int.from_bytes(_expand(secret, b"iv", 12), "big")

    def _seal(self, plain: bytes, kind: int, *, padded: bool = False) -> bytes:
        inner = plain + bytes([kind])
        if padded:
            inner += bytes(_LARGEST - len(inner))
        header = bytes([_DATA, 3, 3]) + (len(inner) + 16).to_bytes(2, "big")
        nonce = (self._iv ^ self._number).to_bytes(12, "big")
        self._number += 1
        return header + self._key.encrypt(nonce, inner, header)


def _expand(secret: bytes, label: bytes, size: int) -> bytes:
    """HKDF-Expand-Label (RFC 8446, 7.1), of no context."""
    name = b"tls13 " + label
    info = size.to_bytes(2, "big") + bytes([len(name)]) + name + b"\0"
    return HKDFExpand(SHA384(), size, info).derive(secret)
