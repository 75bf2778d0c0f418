"""Records of TLS, few at a time for OpenSSL, and the two ends between which it works on them.

Ciphertext goes in at one end, and comes out at the other. OpenSSL could have the socket itself. It
would then read on for as long as there are records that carry no data: TLS 1.3 lets a peer send key
updates, 27 bytes each, as many as it likes (RFC 8446, 4.6.3), and whoever sends three megabytes of
them in a second would keep OpenSSL from ever coming back (SSL_MODE_AUTO_RETRY, which Python sets;
SSL_CTX_set_mode(3)). So it is given one record at a time, or some that are full: those would take
whoever has nothing to say as much as data takes the others. A small one costs no more that way,
since OpenSSL takes two read(2) for each; a large frame is copied twice more on its way in, and
twice on its way out.

One pair serves all connections of a thread. Invariants: between two calls for a connection, both
are empty, and OpenSSL has no record in part. Pairs of their own would keep buffers of the size of
the largest burst that each connection ever had.
"""

import ssl
import struct
from collections.abc import Iterator, Sequence
from typing import Protocol

from lpechod.engine.buffers import memory
from lpechod.net.transport import receive

RECORD_BYTES = 16384
"""Most plaintext of one record (RFC 8446, 5.1)."""

FULL_RECORD_BYTES = RECORD_BYTES + 5 + 17
"""What such a record takes in TLS 1.3 (5.2), and about what it takes in TLS 1.2."""

PIECE_BYTES = RECORD_BYTES
"""What is received at a time from who does not fill records: less than a full one. What is left of
it after a record has to be put by."""

_LARGEST_RECORD_BYTES = RECORD_BYTES + 2048 + 5
"""By the most generous of all versions (RFC 5246, 6.2.3)."""

RECORD_HEADER_BYTES = 5
_KINDS = frozenset(range(20, 24))
"""Change of cipher, alert, handshake and data (RFC 8446, 5.1)."""

unpack_record = struct.Struct(">BBxH").unpack_from
"""Of a record's header: what it is, the major version, and how many bytes follow."""


class Stream(Protocol):
    """What OpenSSL does once hands are shaken."""

    def read(self, size: int, buffer: memoryview, /) -> int:
        """Decrypt, from one record."""

    def write(self, data: memoryview, /) -> int:
        """Encrypt all of it, in one record or several."""

    def pending(self) -> int:
        """Return how many bytes are left of a record."""


class Session(Stream, Protocol):
    """All that is called of what an `ssl.SSLObject` wraps."""

    def do_handshake(self) -> None:
        """Go on with the handshake."""

    def shutdown(self) -> object:
        """Say that nothing more will be sent, and look whether the peer has."""


class Bios:
    """A pair of memory BIOs, and the records on their way to the first one.

    Attributes:
        incoming: where OpenSSL reads.
        outgoing: where it writes.
        reads: how often has been received since `load`.
        dry: whether the kernel had less, the last time, than there was room for.
        size: of each record that was given to OpenSSL the last time, in bytes.
    """

    __slots__ = ("_cipher", "_end", "_start", "dry", "incoming", "outgoing", "reads", "size")

    def __init__(self) -> None:
        self.incoming = ssl.MemoryBIO()
        self.outgoing = ssl.MemoryBIO()
        self._cipher = memory(4 * FULL_RECORD_BYTES)
        self._start = self._end = self.reads = self.size = 0
        self.dry = False

    def load(self, ahead: bytes) -> None:
        """Begin with what has been received before."""
        self._start, self._end, self.reads, self.dry = 0, len(ahead), 0, False
        self._cipher[: self._end] = ahead

    def unload(self) -> bytes:
        """Return what is left."""
        return bytes(self._cipher[self._start : self._end])

    def receive(self, fd: int, most: int) -> int:
        """Receive up to so many bytes behind what is left; see `Transport.receive`."""
        left = self._end - self._start
        if self._start:
            if left:
                self._cipher[:left] = self._cipher[self._start : self._end]
            self._start, self._end = 0, left
        space = self._cipher[left : left + most]
        count = receive(fd, space)
        self.reads += 1
        self.dry = count < len(space)
        self._end += max(count, 0)
        return count

    def feed(self, most: int, full: int) -> int:
        """Give OpenSSL the next record, if it is whole, and those behind it if all are full.

        Args:
            most: how many, at most, if more than one.
            full: the size of a full record, if that is known. Many bytes can't be many records.

        Returns:
            How many.
        """
        stop = self._following()
        if not stop:
            return 0
        cipher, start = self._cipher, self._start
        self.size = size = stop - start
        count = 1
        if size == full:
            header, last = unpack_record(cipher, start), self._end - size
            while count < most and stop <= last and unpack_record(cipher, stop) == header:
                stop += size
                count += 1
        self._start = stop
        self.incoming.write(cipher[start:stop])
        return count

    @property
    def has_record(self) -> bool:
        """Whether there is a whole one."""
        return self._following() > 0

    def _following(self) -> int:
        """Return where the record behind the next one begins; 0 if that is not whole.

        What is no record counts as one up to the last byte there is: OpenSSL will say what is
        wrong with it.
        """
        start, end = self._start, self._end
        if end - start < RECORD_HEADER_BYTES:
            return 0
        kind, major, length = unpack_record(self._cipher, start)
        stop = start + RECORD_HEADER_BYTES + int(length)
        if kind not in _KINDS or major != 3 or stop - start > _LARGEST_RECORD_BYTES:
            return end
        return stop if stop <= end else 0


def joined(views: Sequence[memoryview]) -> Iterator[memoryview]:
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
