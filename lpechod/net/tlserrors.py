"""What OpenSSL says is wrong with a peer, as a transport tells it."""

import ssl

from lpechod.net.transport import StreamError, translated
from lpechod.wire.states import CloseReason

_HINTS = {
    "HTTP_REQUEST": "it speaks HTTP without TLS",
    "WRONG_VERSION_NUMBER": "what it sends is no TLS",
    "RECORD_LAYER_FAILURE": "what it sends is no TLS",  # The same, from OpenSSL 3.2 on.
}


def failure(error: OSError) -> Exception:
    """Turn an error of OpenSSL's, or of the kernel's, into what a transport raises.

    SSLError is an OSError whose number is none of errno(3).
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        return StreamError(CloseReason.TLS_ERROR, f"certificate: {error.verify_message}")
    if isinstance(error, ssl.SSLWantReadError):
        # OpenSSL encrypts nothing between two parts of one; nobody needs several for 5 bytes.
        return StreamError(CloseReason.TLS_ERROR, "a key update in parts")
    if isinstance(error, ssl.SSLError):
        reason = error.reason or "unknown"
        text = _HINTS.get(reason, reason.replace("_", " ").lower())
        return StreamError(CloseReason.TLS_ERROR, text)
    return translated(error)


def endless() -> StreamError:
    """Return what records without data are, one after the other."""
    return StreamError(CloseReason.TLS_ERROR, "too many records without data")


def cut_off() -> StreamError:
    """Return what a FIN in the place of a close_notify is."""
    return StreamError(CloseReason.MISSING_CLOSE_NOTIFY, "the stream ends without close_notify")
