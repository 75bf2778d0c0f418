"""How many connections each client has at which worker, in memory that all of them share.

``limits.max_connections_per_ip`` holds for the daemon, and each worker knows its own connections
only. So each keeps a row of this census, a table that nobody else writes, and whoever is about to
admit a client looks into the rows of the others. Without such a limit there are no rows, and until
there has been one, no census.

It is a memfd of its own and not a part of the `Segment`, which is replaced when the counters change
from one version to the next: workers that drain must still be seen then. It holds words of 64 bits
in the byte order of the machine:

    header    magic, format, and a secret of two words
    rows      a page: for each row a byte, whether it is in use
    tables    of each row: 4096 buckets of 16 words, each a fingerprint of a client (40 bits) and
              the number of its connections (24 bits), or zero

The keyed hash of a client names its bucket and its fingerprint. A look is at one bucket of a row,
then, and no client can choose which. Invariants:

- each word has one writer: a table its worker, all else the supervisor. Numbers are stored, not
  added, so nothing that went wrong lasts longer than the connections of that client;
- a word is stored whole. A reader sees the one before or the new one, and if the kernel should ever
  copy half of each, then for one look;
- a row counts from the moment it is claimed, before its worker is born, until that is reaped: each
  look begins with the page of rows. So nobody is overlooked, and the dead do not count;
- of those who admit the same client in the same moment, none sees the others. The limit may be
  passed by one for each of the other workers; to prevent that would take a lock.

A full bucket has no room for one more client, whom the others do not see then, and its own worker
counts as before (`Admission.overflows`). If a worker has 20,000 clients, the others miss one of
them in one case out of 12; of 30,000 they miss about ten, and of 40,000 about 200, for as long as
there are so many. Two clients are taken for one if 52 bits of their hashes agree.

Rejected: mapping all rows, as the segment does. That would save half a microsecond for each other
worker, of the 30 or more that an accept takes, and add 2 GiB to the virtual size of each process. A
worker does map its own row: write(2) takes a lock that all who write to a file share.
"""

import contextlib
import errno
import mmap
import os
import sys
from array import array
from hashlib import blake2b
from struct import Struct
from typing import ClassVar

from lpechod.ops.segment import Segment

_MAGIC = int.from_bytes(b"lpecens\n", sys.byteorder)
_FORMAT = 1

_SECRET_AT, _SECRET_BYTES = 16, 16
_ROWS_AT = mmap.PAGESIZE

_ENTRIES = 16
_BUCKET = Struct(f"={_ENTRIES}Q")
_BUCKETS = 4096
_ROW_BYTES = _BUCKETS * _BUCKET.size
_ZEROS = bytes(mmap.PAGESIZE)

_COUNT_BITS = 24
_MOST = (1 << _COUNT_BITS) - 1


class Census:
    """All rows, as the supervisor keeps them. See `create` and `adopt`.

    Attributes:
        fd: the descriptor. exec(3) closes it unless it is made inheritable.
        wanted: whether workers that start now are to have a row.
    """

    ROWS: ClassVar = Segment.SLOTS
    """As many as there may be workers, those of older generations included."""

    __slots__ = ("fd", "wanted")

    def __init__(self, fd: int, wanted: bool) -> None:
        self.fd = fd
        self.wanted = wanted

    @classmethod
    def create(cls) -> "Census":
        """Make a census of which no row is in use.

        Raises:
            OSError: there is no descriptor or no memory left.
        """
        fd = os.memfd_create("lpechod-census", os.MFD_CLOEXEC)
        try:
            os.truncate(fd, _tables_at() + cls.ROWS * _ROW_BYTES)
            os.posix_fallocate(fd, 0, _tables_at())
            os.pwrite(fd, array("q", [_MAGIC, _FORMAT]).tobytes() + os.urandom(_SECRET_BYTES), 0)
        except OSError:
            os.close(fd)
            raise
        return cls(fd, wanted=True)

    @classmethod
    def adopt(cls, fd: int, wanted: bool = True) -> "Census":
        """Go on with a census that exists.

        Args:
            fd: its descriptor; the census owns it, unless an error is raised.
            wanted: whether workers that start now are to have a row.

        Raises:
            ValueError: this is no census, or one of another format.
        """
        expected = array("q", [_MAGIC, _FORMAT]).tobytes()
        try:
            found = os.pread(fd, len(expected), 0)
        except OSError as error:
            raise ValueError(f"descriptor {fd} is not a census: {error}") from error
        if found != expected or os.fstat(fd).st_size != _tables_at() + cls.ROWS * _ROW_BYTES:
            raise ValueError(f"descriptor {fd} is not a census of format {_FORMAT}")
        return cls(fd, wanted)

    def claim(self) -> int:
        """Take the free row of the lowest index, empty whoever has used it before.

        Raises:
            OSError: every row is in use, or there is no memory for it.
        """
        row = os.pread(self.fd, self.ROWS, _ROWS_AT).find(0)
        if row < 0:
            raise OSError(errno.ENOSPC, f"all {self.ROWS} rows of the census are in use")
        # Without memory this is an error, and the worker's first access would be SIGBUS.
        os.posix_fallocate(self.fd, _table_at(row), _ROW_BYTES)
        # A page again and again: a row of zeros of its own would leave a hole in the supervisor's
        # heap, half a megabyte for as long as that lives.
        os.pwritev(self.fd, [_ZEROS] * (_ROW_BYTES // len(_ZEROS)), _table_at(row))
        os.pwrite(self.fd, b"\1", _ROWS_AT + row)
        return row

    def release(self, row: int) -> None:
        """Set a row free, whose worker has been reaped or was never born."""
        os.pwrite(self.fd, b"\0", _ROWS_AT + row)
        # Its memory goes back where that is possible, which is not so in every sandbox.
        with (
            contextlib.suppress(OSError),
            mmap.mmap(self.fd, _ROW_BYTES, offset=_table_at(row)) as table,
        ):
            table.madvise(mmap.MADV_REMOVE)

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.fd)


class CensusRow:
    """A worker's row, and its view of the others.

    Args:
        census: all rows.
        row: the index of its own, as `Census.claim` gave it.
    """

    __slots__ = (
        "_fd",
        "_hashed",
        "_mapping",
        "_others",
        "_own",
        "_place",
        "_rows",
        "_secret",
        "_words",
    )

    def __init__(self, census: Census, row: int) -> None:
        self._fd = census.fd
        self._own = row
        self._secret = os.pread(census.fd, _SECRET_BYTES, _SECRET_AT)
        self._mapping = mmap.mmap(census.fd, _ROW_BYTES, offset=_table_at(row))
        self._words = memoryview(self._mapping).cast("Q")
        self._rows = b""
        self._others: list[int] = []
        self._hashed = b""
        self._place = self._place_of(b"")

    def others(self, prefix: bytes) -> int:
        """Return how many connections of a client the other workers hold at this moment.

        Args:
            prefix: who it is, as `lpechod.net.prefixes.ClientPrefixes` tells clients apart.
        """
        rows = os.pread(self._fd, Census.ROWS, _ROWS_AT)
        if rows != self._rows:
            used = [row for row, in_use in enumerate(rows) if in_use and row != self._own]
            self._others = [_table_at(row) for row in used]
            self._rows = rows
        if not self._others:
            return 0
        bucket, fingerprint = self._find(prefix)
        found = 0
        for table in self._others:
            for word in _BUCKET.unpack(os.pread(self._fd, _BUCKET.size, table + bucket)):
                if word >> _COUNT_BITS == fingerprint:
                    found += word & _MOST
                    break
        return found

    def show(self, prefix: bytes, count: int) -> bool:
        """Let the others see how many connections of a client this worker holds.

        Args:
            prefix: who it is.
            count: the number, which replaces the one before.

        Returns:
            Whether they see it: there may be no room for one more client.
        """
        bucket, fingerprint = self._find(prefix)
        start = bucket // 8
        words = self._words[start : start + _ENTRIES].tolist()
        fingerprints = [word >> _COUNT_BITS for word in words]
        if fingerprint in fingerprints:
            place = fingerprints.index(fingerprint)
        elif count == 0:
            return True  # It has never been shown, for want of room.
        elif 0 in words:
            place = words.index(0)
        else:
            return False
        word = fingerprint << _COUNT_BITS | min(count, _MOST)
        self._words[start + place] = word if count else 0
        return True

    def close(self) -> None:
        """Unmap the row; the census stays open."""
        self._words.release()
        self._mapping.close()

    def _find(self, prefix: bytes) -> tuple[int, int]:
        """Return where the bucket of a client begins in each table, in bytes, and who it is."""
        # A client that is admitted is asked for, and then shown.
        if prefix != self._hashed:
            self._place = self._place_of(prefix)
            self._hashed = prefix
        return self._place

    def _place_of(self, prefix: bytes) -> tuple[int, int]:
        digest = blake2b(prefix, key=self._secret, digest_size=8).digest()
        number = int.from_bytes(digest, "little")
        # No fingerprint is 0: those words are free.
        return (number & _BUCKETS - 1) * _BUCKET.size, number >> _COUNT_BITS or 1


def _tables_at() -> int:
    return _ROWS_AT + -(-Census.ROWS // mmap.PAGESIZE) * mmap.PAGESIZE


def _table_at(row: int) -> int:
    return _tables_at() + row * _ROW_BYTES
