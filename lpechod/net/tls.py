"""TLS on a connection: its stream, by OpenSSL, between a socket's ciphertext and a caller's bytes.

What is received goes to OpenSSL by records (`lpechod.net.tlsrecords`). No poller sees the rest of
one that was larger than a caller's buffer, nor those behind it: `TlsTransport.more` tells.

What it encrypts goes out at once. If the kernel refuses a part, that is kept; and so are, by the
caller, the bytes that it was made of, which count as sent when all of their ciphertext is out.
Beside these there are answers of OpenSSL's own, to key updates and the like. Nothing more is
received from a peer that does not take them (`TlsTransport.crossed`).
"""

import contextlib
import fcntl
import os
import socket
import ssl
import termios
from collections.abc import Sequence
from typing import cast

from lpechod.engine.buffers import HEADROOM_BYTES
from lpechod.engine.poller import READABLE, WRITABLE
from lpechod.net.tlserrors import cut_off, endless, failure
from lpechod.net.tlsrecords import FULL_RECORD_BYTES as FULL
from lpechod.net.tlsrecords import PIECE_BYTES, RECORD_BYTES, Bios, Session, Stream, joined
from lpechod.net.transport import BLOCKED, PEER_GONE, PeerGoneError, receive, translated, waiting

MOST_BARREN_RECORDS = 32
"""So many in a row may carry no data, as with BoringSSL (kMaxKeyUpdates)."""

MOST_READS = 32
"""Looks at the kernel for one call: behind much, there may be a few bytes each time, for ever."""

MUCH_BYTES = 2 * RECORD_BYTES
"""Whoever has sent so much for a call is sending a large frame, and has sent more meanwhile."""

MOST_BYTES = 1 << 20
"""Received with one call: to decrypt that takes a quarter of a millisecond."""

CHUNK_BYTES = 6 * RECORD_BYTES
"""Plaintext whose ciphertext goes to the kernel with one call, if that has room for it."""

TCP_CORK: int = getattr(socket, "TCP_CORK", 0)
"""Linux only (tcp(7)), else 0. Where there is little room, each record is a write(2), and with
TCP_NODELAY the kernel would send each at once, in segments of which the last is not full."""

_NOTHING = bytes(4)
"""The int that TIOCOUTQ fills in, which is SIOCOUTQ (tcp(7)): bytes that the peer has not taken."""


class TlsTransport:
    """A connected stream socket with TLS, of which we are the server.

    Args:
        connected: the socket; made non-blocking here and owned from now on.
        context: certificate, key and all else that governs the handshake.
        bios: those of its thread.

    Attributes:
        eager: whether to receive all there is, record by record, with one call.
        more: whether something has been received that no poller will tell of.
        crossed: `WRITABLE` if receiving waits for that, against appearances; for whoever waits to
            clear.
        moved: whether the kernel has taken something; for whoever wants to know to clear.
        stream: what OpenSSL does, from the end of the handshake to that of the stream.
        wasted: how many records have come without data in the latest call.
    """

    __slots__ = (
        "_ahead", "_at_end", "_barren", "_bios", "_context", "_corks", "_cut", "_failure",
        "_full", "_owes_answer", "_sealed", "_socket", "_tls", "_unsent", "crossed", "eager",
        "fd", "more", "moved", "stream", "wasted",
    )  # fmt: skip

    def __init__(self, connected: socket.SocketType, context: ssl.SSLContext, bios: Bios) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._tls: Session | None = None
        self.stream: Stream | None = None
        self._context = context
        self._bios = bios
        self._corks = TCP_CORK != 0 and connected.family != socket.AF_UNIX
        self._failure: Exception | None = None
        self._at_end = False
        """Whether the peer's close_notify has been read."""
        self._cut = False
        """Whether its FIN has, which may come without."""
        self._ahead = b""
        """Ciphertext that has been received and not been given to OpenSSL."""
        self._full = 0
        """The size of a full record, of the latest that had one; 0 if the next had room for one."""
        self._barren = 0
        """How many records have come since the latest plaintext."""
        self._unsent = b""
        """Ciphertext that the kernel has refused."""
        self._sealed = 0
        """How many bytes that is of what is to be sent; the next call brings them again."""
        self._owes_answer = False
        self.fd = connected.fileno()
        self.eager = False
        self.more = False
        self.crossed = 0
        self.wasted = 0
        self.moved = False

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

    @property
    def even(self) -> bool:
        """Whether nothing is under way: what comes next is the front of a record, and not many."""
        return not (self._full or self.more or self._ahead or self._barren or self._unsent)

    def shake_hands(self) -> int | None:
        """Go on with the handshake by one piece; returns as `Handshake.advance`.

        To be called from the first byte on. Nothing is allocated before: silence is the cheapest of
        floods, and shall be as cheap for us.

        Raises:
            PeerGoneError: the connection is over; `StreamError` if the peer has broken the rules.
        """
        tls, bios = self._tls, self._bios
        if tls is None:
            wrapped = self._context.wrap_bio(bios.incoming, bios.outgoing, server_side=True)
            # Its methods only check what we know, so what it wraps is called itself.
            tls = self._tls = cast("Session", wrapped._sslobj)  # type: ignore[attr-defined] # noqa: SLF001
        if self._unsent and not self._put():
            return WRITABLE
        bios.load(b"")
        if not bios.receive(self.fd, PIECE_BYTES):
            raise cut_off()
        bios.incoming.write(bios.unload())
        try:
            tls.do_handshake()
        except ssl.SSLWantReadError:
            return READABLE if self._put() else WRITABLE
        except OSError as error:
            raise self._fail(error) from error
        self._ahead = bios.incoming.read()
        self.more = bool(self._ahead)
        self.stream = tls
        self._answer()
        return None

    def receive(self, buffer: memoryview) -> int:
        """Receive into a buffer; see `Transport.receive`.

        No further than a record that is not full: what is behind it may be broken, and then OpenSSL
        would not encrypt any more what this one has brought. (Padded to that size, it is full.)

        Raises:
            StreamError: the peer has broken the rules of TLS, or has not ended the stream by them.
        """
        stream = self.stream
        if stream is None:
            return receive(self.fd, buffer) and BLOCKED  # Nobody decrypts it: it does not count.
        if self._failure is not None:
            raise self._failure
        if self._at_end:
            return 0
        if self._owes_answer and not self._put():
            self.crossed = WRITABLE
            return BLOCKED
        count, size = self._decrypt(stream, buffer)
        if self._cut and size < 0 == count:
            raise cut_off()
        return count or size

    def _decrypt(self, stream: Stream, buffer: memoryview) -> tuple[int, int]:
        """Return how many bytes have been received, and how many of them from the last record.

        That is 0 at the end, and `BLOCKED` if there is no whole one.
        """
        bios, room = self._bios, min(len(buffer), MOST_BYTES)
        size, least = RECORD_BYTES, 1 if self.eager else RECORD_BYTES
        count = stream.read(room, buffer) if stream.pending() else 0
        self.wasted = 0
        bios.load(self._ahead)
        try:
            while size >= least and count < room and self.wasted <= MOST_BARREN_RECORDS:
                records, before = self._feed(room - count, much=count >= MUCH_BYTES), count
                if not records:
                    size = BLOCKED
                    break
                try:
                    while records:
                        size = stream.read(RECORD_BYTES, buffer[count:])
                        count += size
                        records -= 1
                    self._barren = 0
                    if size == RECORD_BYTES:
                        self._full = bios.size
                except ssl.SSLWantReadError:
                    self._note_barren(records, beside_data=count > before)
            self._answer()
        except (OSError, PeerGoneError) as error:
            problem = self._fail(error)
            if not count:
                raise problem from error
        if not size:
            bios.incoming.read()  # Nobody looks at what is behind it.
        self._at_end = not size
        if 0 < count < RECORD_BYTES <= room:
            self._full = 0
        failed = self._failure is not None
        self.more = failed or bios.has_record or not size or stream.pending() > 0
        self._ahead = bios.unload()
        return count, size

    def _feed(self, room: int, *, much: bool) -> int:
        """Give OpenSSL the next record, received if need be; see `Bios.feed`.

        The kernel has nothing behind a read that was not filled; if it has, the poller will tell.
        But of ``much``, more has come while the last was decrypted, and a turn costs more than a
        look.
        """
        bios, most = self._bios, room // RECORD_BYTES
        while not (records := bios.feed(most, self._full)):
            if bios.dry and not (much and bios.reads < MOST_READS):
                break
            # Whoever fills a piece has more; but what there is no room for has to be put by.
            size = (most + 1) * FULL if self._full or bios.reads else PIECE_BYTES
            count = bios.receive(self.fd, size)
            if count <= 0:
                self._cut = not count
                break
        return records

    def _note_barren(self, records: int = 1, *, beside_data: bool = False) -> None:
        """Count records without data, of which TLS 1.3 has no limit (RFC 8446, 4.6.3).

        Whether such as were decrypted together with data came behind it, OpenSSL does not tell.
        """
        self._barren = 0 if beside_data else self._barren + records
        self.wasted += records
        if self._barren > MOST_BARREN_RECORDS:
            raise endless()

    def _answer(self) -> None:
        """Send what OpenSSL has written of itself, if anything."""
        if self._bios.outgoing.pending and not self._put():
            self._owes_answer = True
            self.crossed = WRITABLE

    def put_by(self, cipher: bytes) -> None:
        """Keep ciphertext that somebody else has received, for `receive` to begin with."""
        self._ahead = cipher

    def heed(self, error: OSError, _against: int) -> None:
        """Take note of why a call on the stream or the socket has failed; see `Transport.heed`."""
        if isinstance(error, BlockingIOError):
            return
        if not isinstance(error, ssl.SSLWantReadError):
            raise self._fail(error) from error
        self._note_barren()
        self._answer()

    def send(self, data: memoryview) -> int:
        """Send; see `Transport.send`.

        What is encrypted and has been refused by the kernel is not counted, and no more is sent
        before it is out: the next call has to bring the same bytes again, in front of others. It
        does, as what a connection has to send only grows at its end.
        """
        stream = self.stream
        if stream is None:
            raise PeerGoneError("the stream has ended")
        if self._failure is not None:
            raise self._failure
        if self._unsent and not self._put():
            return 0
        size = len(data)
        sent = min(self._sealed, size)
        self._sealed -= sent
        chunk = self._fitting(size - sent)
        corked = self._corks and chunk == RECORD_BYTES < size - sent - HEADROOM_BYTES
        if corked:
            self._cork(1)
        try:
            while sent < size:
                part = data[sent : sent + chunk]
                if size - sent <= chunk + HEADROOM_BYTES:
                    part = data[sent:]  # What would be left is not worth a call.
                stream.write(part)
                if not self._put():
                    self._sealed = len(part)
                    break
                sent += len(part)
        except OSError as error:
            raise self._fail(error) from error
        finally:
            if corked:
                self._cork(0)
        return sent

    def hold(self, cipher: bytes, size: int) -> None:
        """Keep ciphertext of so many bytes that the kernel has refused."""
        self._unsent = cipher
        self._sealed = size

    def send_many(self, views: Sequence[memoryview]) -> int:
        """Send several buffers, small ones as one record; see `Transport.send_many`."""
        sent = 0
        for data in joined(views):
            count = self.send(data)
            sent += count
            if count < len(data):
                break
        return sent

    def waiting(self) -> int:
        """Return what is there; see `Transport.waiting`. What makes records of it hardly counts."""
        return len(self._ahead) + waiting(self.fd)

    def take_leave(self) -> bool:
        """Send a close_notify; see `Transport.take_leave`."""
        if self.stream is None or self._tls is None or self._failure is not None:
            return True
        with contextlib.suppress(OSError):  # The peer's is not there yet, or data is in front.
            self._tls.shutdown()
        with contextlib.suppress(PeerGoneError):  # Nobody is there any more to take leave of.
            if not self._put():
                return False
        self.stream = None
        return True

    def end(self) -> None:
        """Send a FIN; what is received from now on is not decrypted any more."""
        self.stream = None
        self.more = False
        self.crossed = 0
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno not in PEER_GONE:
                raise

    def close(self) -> None:
        """Close the socket, and forget an error, whose traceback leads back to here."""
        self._failure = self._tls = self.stream = None
        self._socket.close()

    def _put(self) -> bool:
        """Send what OpenSSL has written, behind what was refused; tell whether all of it is out."""
        cipher = self._bios.outgoing.read()
        if self._unsent:
            cipher = self._unsent + cipher
        try:
            while cipher:  # Until it is refused, or the kernel would have room that nobody uses.
                cipher = cipher[os.write(self.fd, cipher) :]
                self.moved = True
        except BlockingIOError:
            self._unsent = cipher
            return False
        except OSError as error:
            raise translated(error) from error
        self._unsent = b""
        self._owes_answer = False
        return True

    def _fail(self, error: Exception) -> Exception:
        """Send the alert that OpenSSL has for an error, and return what to raise from now on."""
        self._bios.incoming.read()
        self._failure = failure(error) if isinstance(error, OSError) else error
        self.more = True
        with contextlib.suppress(PeerGoneError):
            self._put()
        return self._failure

    def _cork(self, on: int) -> None:
        """Have the kernel gather what is sent, or send it."""
        self._socket.setsockopt(socket.IPPROTO_TCP, TCP_CORK, on)

    def _fitting(self, size: int) -> int:
        """Return how many bytes of so many go to the kernel with one call.

        Several records, if nothing else is in there and it has room for twice as much: it counts
        what it needs for itself, too. What is there is not counted that way, hence nothing.
        """
        if size <= RECORD_BYTES + HEADROOM_BYTES or not self._corks:
            return RECORD_BYTES
        room = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        if room < 2 * size or fcntl.ioctl(self.fd, termios.TIOCOUTQ, _NOTHING) != _NOTHING:
            return RECORD_BYTES
        return CHUNK_BYTES
