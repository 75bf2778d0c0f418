"""TLS on a connection: its stream, by OpenSSL on the socket itself.

OpenSSL reads one record at a time from the socket, and nothing of the next one. So whatever has not
been decrypted waits in the kernel, where a poller sees it; what no poller sees is the rest of a
record that was larger than the buffer it was read into, and that is told by `TlsTransport.more`.
The other way, with memory BIOs in between, was measured and rejected: two reads for each record
become one, but a small record costs no less, and each connection keeps buffers of the size of the
largest burst that it ever had. OpenSSL frees its own when they are empty (SSL_MODE_RELEASE_BUFFERS,
which Python sets; SSL_CTX_set_mode(3)).

What `ssl.SSLSocket` wraps is used itself. Its ``read`` and ``write`` only check what we know; and
to make one closes the descriptor of a client that is gone already (since CPython 3.11.5), in the
middle of a turn, where another could get its number.

What it says of errors (SSL_get_error(3)) becomes three things: `BLOCKED`, which may mean either
direction (`TlsTransport.crossed`); `PeerGoneError`, as without TLS; and `StreamError`.
"""

import contextlib
import fcntl
import os
import socket
import ssl
import sys
import termios
from collections.abc import Iterator, Sequence
from typing import Protocol, cast

from lpechod.engine.poller import READABLE, WRITABLE
from lpechod.net.transport import (
    BLOCKED,
    PEER_GONE,
    PeerGoneError,
    StreamError,
    translated,
    waiting,
)
from lpechod.wire.states import CloseReason

RECORD_BYTES = 16384
"""Most plaintext of one record (RFC 8446, 5.1)."""

TCP_CORK: int = getattr(socket, "TCP_CORK", 0)
"""Linux only (tcp(7)), else 0. A large echo is a write(2) for each of its records, and with
TCP_NODELAY the kernel would send each at once, in segments of which the last is not full."""

_NOTHING = bytes(4)
"""The int that TIOCOUTQ fills in, which is SIOCOUTQ (tcp(7)): bytes that the peer has not taken."""

_HINTS = {
    "HTTP_REQUEST": "it speaks HTTP without TLS",
    "WRONG_VERSION_NUMBER": "what it sends is no TLS",
    "RECORD_LAYER_FAILURE": "what it sends is no TLS",  # The same, from OpenSSL 3.2 on.
}


_KEY_UPDATE_BYTES = (22).to_bytes(2, "big")
"""As a record has it: 5 of the message, 1 of its kind, 16 of the tag (RFC 8446, 4.6.3, 5.2)."""

_CUT_OFF = "UNEXPECTED_EOF_WHILE_READING"
"""A reason of OpenSSL 3 that is an error of its own kind only from Python 3.11.3 on."""


class Stream(Protocol):
    """What OpenSSL does once hands are shaken."""

    def read(self, size: int, buffer: memoryview, /) -> int:
        """Receive, from one record."""

    def write(self, data: memoryview, /) -> int:
        """Send all of it, in one record or several."""

    def pending(self) -> int:
        """Return how many bytes are left of a record."""


class Session(Stream, Protocol):
    """All that is called of what an `ssl.SSLSocket` wraps."""

    def do_handshake(self) -> None:
        """Go on with the handshake."""

    def shutdown(self) -> object:
        """Send a close_notify, and look for the peer's."""


class TlsTransport:
    """A connected stream socket with TLS, of which we are the server.

    Args:
        connected: the socket; made non-blocking here and owned from now on.
        context: certificate, key and all else that governs the handshake.

    Attributes:
        eager: whether to receive all there is, record by record, with one call.
        more: whether something has been received that no poller will tell of.
        crossed: what the latest calls wait for against appearances: `WRITABLE` if receiving does,
            `READABLE` if sending does. For whoever waits to clear.
        refused: how many bytes the latest call was to send in vain. The next one has to bring just
            these, and what follows them only afterwards.
        stream: what OpenSSL does, from the end of the handshake to that of the stream.
    """

    __slots__ = (
        "_context", "_corks", "_failure", "_socket", "_tls", "crossed", "eager", "fd", "more",
        "refused", "stream",
    )  # fmt: skip

    def __init__(self, connected: socket.SocketType, context: ssl.SSLContext) -> None:
        connected.setblocking(False)
        self._socket: socket.SocketType = connected
        self._tls: Session | None = None
        self.stream: Stream | None = None
        self._context = context
        self._corks = TCP_CORK != 0 and connected.family != socket.AF_UNIX
        self._failure: Exception | None = None
        self.refused = 0
        self.fd = connected.fileno()
        self.eager = False
        self.more = False
        self.crossed = 0

    @property
    def touched(self) -> bool:
        """Whether there is something to be received.

        Raises:
            EOFError: the peer has ended the stream before it sent anything.
            PeerGoneError: the connection is over.
        """
        try:
            if not self._socket.recv(1, socket.MSG_PEEK):
                raise EOFError
        except BlockingIOError:
            return False
        except OSError as error:
            raise translated(error) from error
        return True

    def shake_hands(self) -> int | None:
        """Go on with the handshake; returns as `Handshake.advance`, and raises what OpenSSL does.

        To be called from the first byte on. Nothing is allocated before: silence is the cheapest of
        floods, and shall be as cheap for us.
        """
        stream = self._tls
        if stream is None:
            wrapped = socket.socket(fileno=self.fd)  # OpenSSL's object needs one of this class.
            self._socket.detach()
            self._socket = wrapped
            wrapped.setblocking(False)  # It goes by the object's own time-out.
            wrap = self._context._wrap_socket  # type: ignore[attr-defined] # noqa: SLF001 - see above.
            stream = self._tls = cast("Session", wrap(wrapped, server_side=True))
        try:
            stream.do_handshake()
        except ssl.SSLWantReadError:
            return READABLE
        except ssl.SSLWantWriteError:
            return WRITABLE
        self.stream = stream
        return None

    def receive(self, buffer: memoryview) -> int:
        """Receive into a buffer; see `Transport.receive`.

        Raises:
            StreamError: the peer has broken the rules of TLS, or has not ended the stream by them.
        """
        stream = self.stream
        if stream is None:
            return self._discard(buffer)
        if self._failure is not None:
            raise self._failure
        if self.refused and self._may_be_key_update():
            self.crossed |= WRITABLE
            return BLOCKED
        self.more = False
        try:
            count = stream.read(len(buffer), buffer)
        except OSError as error:
            self.heed(error, WRITABLE)
            return BLOCKED
        return self.receive_on(stream, buffer, count) if count else 0

    def receive_on(self, stream: Stream, buffer: memoryview, count: int) -> int:
        """Go on with receiving, behind ``count`` bytes of a first record; return the new count.

        Mostly the kernel has no other record behind one that is not full; if it has, the poller
        will tell. While a record is refused, each has to be looked at before.
        """
        room, size, read = len(buffer), count, stream.read
        least = 1 if self.eager else RECORD_BYTES
        if self.refused:
            least = sys.maxsize
        try:
            while size >= least and count < room:
                size = read(RECORD_BYTES, buffer[count:])
                count += size
            # Of an end that came behind data, a poller may not tell.
            self.more = stream.pending() > 0 if count == room else not size
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            self.heed(error, WRITABLE)
        except OSError as error:
            self._failure = failure(error)
            self.more = True
        return count

    def heed(self, error: OSError, against: int) -> None:
        """Take note of why OpenSSL could not go on; see `Transport.heed`."""
        if isinstance(error, ssl.SSLWantReadError):
            self.crossed |= READABLE & against
        elif isinstance(error, ssl.SSLWantWriteError):
            self.crossed |= WRITABLE & against
        else:
            self._failure = failure(error)
            raise self._failure from error

    def send(self, data: memoryview) -> int:
        """Send; see `Transport.send`.

        What OpenSSL has encrypted and the kernel has refused is not counted: the next call has to
        bring the same bytes again (SSL_write(3)). It does, as what a connection has to send only
        grows at its end. No more than these go with one call then: if what follows them were
        refused, too, OpenSSL would count none of all.

        Of several records, OpenSSL counts none until the last is out: a peer that takes them slowly
        would seem to take nothing. So several go with one call only if the kernel has room for all;
        should it refuse some nevertheless, as it may for want of memory, so many go together again.
        """
        stream = self.stream
        if stream is None:
            raise PeerGoneError("the stream has ended")
        if self._failure is not None:
            raise self._failure
        sent = 0
        size = len(data)
        corked = self._corks and size > RECORD_BYTES
        if corked:
            self._cork(1)
        try:
            together = self.refused or self._fitting(size)
            while sent < size:
                part = data[sent : sent + together]
                self.refused = len(part)
                sent += stream.write(part)
                self.refused, together = 0, RECORD_BYTES
        except OSError as error:
            self.heed(error, READABLE)
        finally:
            if corked:
                self._cork(0)
        return sent

    def send_many(self, views: Sequence[memoryview]) -> int:
        """Send several buffers, small ones as one record; see `Transport.send_many`."""
        sent = 0
        for data in _joined(views):
            count = self.send(data)
            sent += count
            if count < len(data):
                break
        return sent

    def waiting(self) -> int:
        """Ask the kernel; see `Transport.waiting`. What makes records of it hardly counts."""
        return waiting(self.fd)

    def take_leave(self) -> bool:
        """Send a close_notify; see `Transport.take_leave`."""
        if self.stream is None or self._tls is None or self._failure is not None:
            return True
        try:
            self._tls.shutdown()
        except ssl.SSLWantWriteError:
            return False
        except OSError:
            # It is out, but the peer's is not there yet (SSLWantReadError), or other data is in
            # front of it; or nobody is there any more to take leave of.
            pass
        self.stream = None
        return True

    def end(self) -> None:
        """Send a FIN; what is received from now on is not decrypted any more."""
        self.stream = None
        self.more = False
        self.crossed = 0
        try:
            socket.SocketType.shutdown(self._socket, socket.SHUT_WR)
        except OSError as error:
            if error.errno not in PEER_GONE:
                raise

    def close(self) -> None:
        """Close the socket, and forget an error, whose traceback leads back to here."""
        self._failure = self._tls = self.stream = None
        self._socket.close()

    def _cork(self, on: int) -> None:
        """Have the kernel gather what is sent, or send it."""
        self._socket.setsockopt(socket.IPPROTO_TCP, TCP_CORK, on)

    def _fitting(self, size: int) -> int:
        """Return how many bytes of so many, in whole records, go with one call to OpenSSL.

        All, if nothing else is in the kernel and it has room for twice as much: it counts what it
        needs for itself, too. What is there is not counted that way, hence nothing.
        """
        if size <= RECORD_BYTES or not self._corks:
            return RECORD_BYTES
        room = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        if room < 2 * size or fcntl.ioctl(self.fd, termios.TIOCOUTQ, _NOTHING) != _NOTHING:
            return RECORD_BYTES
        return size // RECORD_BYTES * RECORD_BYTES

    def _may_be_key_update(self) -> bool:
        """Tell whether the next record has the size of one, which is all that can be seen of it.

        OpenSSL answers one when the next one comes. If it can't, as a record of another kind has
        been refused, that ends the stream ("bad length"). So they wait until there is room.
        """
        with contextlib.suppress(BlockingIOError):
            return self._socket.recv(5, socket.MSG_PEEK)[3:] == _KEY_UPDATE_BYTES
        return False

    def _discard(self, buffer: memoryview) -> int:
        """Receive what nobody will decrypt, so that it does not count."""
        try:
            return BLOCKED if os.readv(self.fd, (buffer,)) else 0
        except BlockingIOError:
            return BLOCKED
        except OSError as error:
            raise translated(error) from error


def failure(error: OSError) -> Exception:
    """Turn an error of OpenSSL's, or of the kernel's, into what a transport raises.

    SSLError is an OSError whose number is none of errno(3).
    """
    cut_off = isinstance(error, ssl.SSLEOFError) and error.reason
    if cut_off or (isinstance(error, ssl.SSLError) and error.reason == _CUT_OFF):
        return StreamError(CloseReason.MISSING_CLOSE_NOTIFY, "the stream ends without close_notify")
    if isinstance(error, ssl.SSLSyscallError | ssl.SSLEOFError):
        # Python calls it an end of file, too, when read(2) has failed (SSL_read_ex(3) returns 0 for
        # either); but only in the other case OpenSSL has a reason.
        return PeerGoneError("the connection is over")
    if isinstance(error, ssl.SSLCertVerificationError):
        return StreamError(CloseReason.TLS_ERROR, f"certificate: {error.verify_message}")
    if isinstance(error, ssl.SSLError):
        reason = error.reason or "unknown"
        return StreamError(
            CloseReason.TLS_ERROR, _HINTS.get(reason, reason.replace("_", " ").lower())
        )
    return translated(error)


def _joined(views: Sequence[memoryview]) -> Iterator[memoryview]:
    """Join neighbours that are smaller than a record, up to one: each costs a call and 22 bytes."""
    gathered = bytearray()
    for view in views:
        rest = view
        if gathered:
            rest = view[RECORD_BYTES - len(gathered) :]
            gathered += view[: RECORD_BYTES - len(gathered)]
            if len(gathered) < RECORD_BYTES:
                continue
            yield memoryview(gathered)
            gathered = bytearray()
        whole = len(rest) // RECORD_BYTES * RECORD_BYTES
        if whole:
            yield rest[:whole]
        gathered += rest[whole:]
    if gathered:
        yield memoryview(gathered)
