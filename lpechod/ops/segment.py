"""Counters in memory that workers and supervisor share: one memfd, mapped before fork(2).

The supervisor shows, and keeps, what its workers have counted, however they end; and when it has
executed itself anew, maybe as another version, it adopts the segment by its descriptor. So the
header says what the integers mean, and they are read by name. The file is sparse: a slot takes
memory when it is claimed. It holds words of 64 bits, in the byte order of the machine:

    header    magic, format, bytes of the header, bytes of a slot, slots, high-water mark,
              bytes of the layout, and the layout itself: JSON of `Totals.layout`
    retired   a slot that only the supervisor writes
    slots     each: state, snapshots published, heartbeats, open connections, row of the census
              plus 1 or zero for none, whether it waits, two spare words, and two banks of integers

That, but for the layout, and the values of `SlotState` are the format. Invariants:

- every word has one writer at a time. A slot is the supervisor's until its worker runs, then the
  worker's until that has been reaped. The header is the supervisor's;
- words are aligned and stored whole: a reader sees the old value or the new one;
- a worker may be killed at any instant. `Slot.publish` writes the bank that is not shown, and then
  shows it with one store, of the number of snapshots, whose lowest bit names the bank. A reader
  that finds another number after its copy has been overtaken, and copies again;
- nobody looks at slots from the high-water mark on, which have never been used: even a read would
  take memory, because tmpfs fills a hole on any access through a mapping;
- a slot is whole pages, so that workers share no cache line and dirty none of each other's pages.

Rejected: a seqlock, because a writer that is killed within leaves readers waiting for ever, and a
torn snapshot; multiprocessing.shared_memory, which has a name to clean up and a process that tracks
it; and a file for each worker, which is a path to configure and a disk that can stall.
"""

import json
import mmap
import os
import sys
import threading
from array import array
from enum import IntEnum
from typing import ClassVar, NamedTuple

from lpechod.ops.counters import Layout, Totals

_MAGIC = int.from_bytes(b"lpechod\n", sys.byteorder)
_FORMAT = 1

# Places of words, in the header and in a slot.
_MARK, _LAYOUT = 5, 7
_STATE, _SHOWN, _BEATS, _ACTIVE, _ROW, _WAITS, _BANKS = 0, 1, 2, 3, 4, 5, 8

_WORD = 8
_MAX = 2**63 - 1
_RETIRED = -1
"""The retired slot lies in front of slot 0."""

_ORDER = threading.Lock()


class SlotState(IntEnum):
    """What a slot is used for."""

    FREE = 0
    STARTING = 1
    READY = 2
    DRAINING = 3
    PAUSED = 4
    """Ready, but accept(2) fails for now: nobody should leave connections to it."""


_ACCEPTING = frozenset((SlotState.STARTING, SlotState.READY))
"""Whoever is just starting will accept in a moment; a worker that did not wait for it would have
taken everything by then."""


class SegmentFullError(Exception):
    """Every slot is in use."""


class _Shape(NamedTuple):
    """What each bank of a segment holds."""

    layout: Layout
    integers: int
    is_current: bool


class Slot:
    """The counters of one worker; a `Segment` hands it out, and it ends with that.

    Attributes:
        index: its number, from 0.
    """

    __slots__ = ("_active", "_shape", "_start", "_words", "index")

    def __init__(self, words: "memoryview[int]", start: int, index: int, shape: _Shape) -> None:
        self.index = index
        self._words = words
        self._start = start
        self._active = start + _ACTIVE
        self._shape = shape

    @property
    def state(self) -> SlotState:
        """What the slot is used for."""
        return SlotState(self._words[self._start + _STATE])

    @state.setter
    def state(self, state: SlotState) -> None:
        self._words[self._start + _STATE] = state

    @property
    def beats(self) -> int:
        """How often the worker has shown that its loop turns."""
        return self._words[self._start + _BEATS]

    @beats.setter
    def beats(self, beats: int) -> None:
        self._words[self._start + _BEATS] = beats

    @property
    def active(self) -> int:
        """Connections open now. Ahead of `totals`, because the other workers balance by it."""
        return self._words[self._active]

    @active.setter
    def active(self, active: int) -> None:
        self._words[self._active] = active

    def show_active(self, active: int) -> None:
        """Set `active`: a method, for whoever calls back."""
        self._words[self._active] = active

    @property
    def accepts(self) -> bool:
        """Whether the worker accepts connections, or is about to, as far as its state tells."""
        return self._words[self._start + _STATE] in _ACCEPTING

    @property
    def waits(self) -> bool:
        """Whether the worker leaves new connections to the others for now."""
        return self._words[self._start + _WAITS] != 0

    @waits.setter
    def waits(self, waits: bool) -> None:
        self._words[self._start + _WAITS] = waits

    @property
    def row(self) -> int | None:
        """Which row of the census is its worker's, if there is a census."""
        return self._words[self._start + _ROW] - 1 if self._words[self._start + _ROW] else None

    @row.setter
    def row(self, row: int | None) -> None:
        self._words[self._start + _ROW] = 0 if row is None else row + 1

    def publish(self, totals: Totals) -> None:
        """Show a snapshot in place of the one before. Only the worker may do this.

        Args:
            totals: the snapshot; it is copied. A number beyond ``2**63 - 1`` is shown as that: a
                counter that stands still is wrong, but one that wraps looks like a restart.

        Raises:
            ValueError: a list is longer or shorter than in new totals; the last snapshot stays.
        """
        layout, integers, is_current = self._shape
        values = totals.to_integers(None if is_current else layout)
        try:
            packed = array("q", values)
        except OverflowError:
            packed = array("q", [min(value, _MAX) for value in values])
        words, shown = self._words, self._start + _SHOWN
        number = words[shown] + 1
        bank = self._start + _BANKS + (number & 1) * integers
        words[bank : bank + integers] = packed
        _fence()
        words[shown] = number

    def totals(self) -> Totals:
        """Return the snapshot that was published last; zeros before the first."""
        words, shown = self._words, self._start + _SHOWN
        layout, integers, _ = self._shape
        while True:
            number = words[shown]
            _fence()
            bank = self._start + _BANKS + (number & 1) * integers
            values = words[bank : bank + integers].tolist()
            _fence()
            if words[shown] == number:
                return Totals.from_integers(layout, values)


class Segment:
    """All slots, mapped into this process and those that it forks. See `create` and `adopt`.

    Attributes:
        fd: the descriptor, -1 after `close`. exec(3) closes it unless it is made inheritable.
        is_current: whether this version's `Totals` has the layout of the segment. Another segment
            can be used as well, but keeps only what it has a place for.
    """

    SLOTS: ClassVar = 4096
    """Four times the most workers there may be: older generations of them may still drain."""

    __slots__ = ("_mapping", "_shape", "_slots", "_start", "_step", "_words", "fd", "is_current")

    def __init__(self, fd: int) -> None:
        header_bytes, slot_bytes, self._slots, layout = _read_header(fd)
        # Python's mapping keeps a copy of the descriptor (trackfd=False came with 3.13).
        self._mapping = mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED)
        # The slots share this view: one for each would have to be released before the mapping.
        self._words = memoryview(self._mapping).cast("q")
        self._step = slot_bytes // _WORD
        self._start = header_bytes // _WORD + self._step
        self.fd = fd
        self.is_current = layout == Totals.layout()
        self._shape = _Shape(layout, sum(count for _, count in layout), self.is_current)

    @classmethod
    def create(cls) -> "Segment":
        """Make a segment in which everything is zero and every slot is free.

        Raises:
            OSError: there is no descriptor or no memory left.
        """
        layout = Totals.layout()
        encoded = json.dumps(layout).encode()
        header_bytes = _whole_pages(_LAYOUT * _WORD + len(encoded))
        slot_bytes = _whole_pages((_BANKS + 2 * sum(count for _, count in layout)) * _WORD)
        words = [_MAGIC, _FORMAT, header_bytes, slot_bytes, cls.SLOTS, 0, len(encoded)]
        fd = os.memfd_create("lpechod-counters", os.MFD_CLOEXEC)
        try:
            os.truncate(fd, header_bytes + (1 + cls.SLOTS) * slot_bytes)
            os.posix_fallocate(fd, 0, header_bytes + slot_bytes)
            os.pwrite(fd, array("q", words).tobytes() + encoded, 0)
            return cls(fd)
        except OSError:
            os.close(fd)
            raise

    @classmethod
    def adopt(cls, fd: int) -> "Segment":
        """Map a segment that exists.

        Args:
            fd: its descriptor; the segment owns it, unless an error is raised.

        Raises:
            ValueError: this is no segment, or one of another format.
        """
        return cls(fd)

    def claim(self) -> Slot:
        """Take the free slot of the lowest index. Only the supervisor may do this.

        Returns:
            The slot, all zeros whoever has used it before, in state STARTING.

        Raises:
            SegmentFullError: no slot is free.
            OSError: there is no memory for it.
        """
        states = self._column(_STATE, self._words[_MARK])
        index = states.index(SlotState.FREE) if SlotState.FREE in states else len(states)
        if index == self._slots:
            raise SegmentFullError(f"all {self._slots} slots are in use")
        slot, start, size = self._slot(index), self._start + index * self._step, self._step
        # Without memory for a page this is an error, and the first access to it would be SIGBUS.
        os.posix_fallocate(self.fd, start * _WORD, size * _WORD)
        self._words[start : start + size] = array("q", bytes(size * _WORD))
        slot.state = SlotState.STARTING
        self._words[_MARK] = max(index + 1, len(states))
        return slot

    def release(self, slot: Slot) -> None:
        """Set a slot free, whose worker has been reaped. Only the supervisor may do this."""
        slot.state = SlotState.FREE
        slot.active = 0  # For the siblings, who add up what all slots hold.

    def slot(self, index: int) -> Slot:
        """Return a slot, whatever its state.

        Raises:
            IndexError: there is none of this index.
        """
        if not 0 <= index < self._slots:
            raise IndexError(f"there is no slot {index} among {self._slots}")
        return self._slot(index)

    @property
    def used(self) -> int:
        """How many slots, from the first on, have ever been used."""
        return self._words[_MARK]

    def signs(self) -> tuple[list[int], list[int]]:
        """Return state and heartbeats of each slot up to the highest that was ever used."""
        mark = self._words[_MARK]  # Read once: the supervisor may raise it at any moment.
        return self._column(_STATE, mark), self._column(_BEATS, mark)

    @property
    def retired(self) -> Totals:
        """What ended workers have counted. Only the supervisor may set it."""
        return self._slot(_RETIRED).totals()

    @retired.setter
    def retired(self, totals: Totals) -> None:
        self._slot(_RETIRED).publish(totals)

    def close(self) -> None:
        """Unmap the segment and close the descriptor; its slots raise ValueError from then on."""
        if self.fd >= 0:
            self._words.release()
            self._mapping.close()
            os.close(self.fd)
            self.fd = -1

    def _slot(self, index: int) -> Slot:
        return Slot(self._words, self._start + index * self._step, index, self._shape)

    def _column(self, word: int, slots: int) -> list[int]:
        """Read one word of each of so many slots."""
        first = self._start + word
        return self._words[first : first + slots * self._step : self._step].tolist()


def _fence() -> None:
    """Keep apart, for other processes, what this one does before and after.

    x86-64 does not reorder stores, nor loads; ARM does both. The interpreter has no barrier, but a
    lock that is released and then taken is one: hence two rounds.
    """
    with _ORDER:
        pass
    with _ORDER:
        pass


def _whole_pages(count: int) -> int:
    return -(-count // mmap.PAGESIZE) * mmap.PAGESIZE


def _read_header(fd: int) -> tuple[int, int, int, Layout]:
    """Return the bytes of the header and of a slot, the number of slots, and the layout."""
    try:
        words = array("q", os.pread(fd, _LAYOUT * _WORD, 0))
        size = os.fstat(fd).st_size
    except (OSError, ValueError) as error:
        raise ValueError(f"descriptor {fd} is not a segment: {error}") from error
    if words[:2].tolist() != [_MAGIC, _FORMAT]:
        raise ValueError(f"descriptor {fd} is not a segment of format {_FORMAT}")
    header_bytes, slot_bytes, slots, _, length = words[2:]
    # A mapping may end beyond its file, but an access there is SIGBUS.
    if size != header_bytes + (1 + slots) * slot_bytes:
        raise ValueError(f"descriptor {fd} is a segment of {size} bytes, which is a wrong length")
    pairs = json.loads(os.pread(fd, length, _LAYOUT * _WORD))
    return header_bytes, slot_bytes, slots, [(name, count) for name, count in pairs]
