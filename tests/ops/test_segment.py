"""Shared counters: slots, other processes, other versions.

The format is written out here again: whoever has to change it in both places changes its number.
"""

import json
import mmap
import os
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import combinations, count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lpechod.ops.counters import Totals
from lpechod.ops.segment import Segment, SegmentFullError, Slot, SlotState
from tests.segments import occupied

LAYOUT = Totals.layout()
SIZE = sum(length for _, length in LAYOUT)
MAGIC = int.from_bytes(b"lpechod\n", sys.byteorder)
BIG = st.integers(0, 2**63 - 1)
Layout = list[tuple[str, int]]


def uniform(number: int) -> Totals:
    """Make totals in which each number is the same."""
    return Totals.from_integers(LAYOUT, [number] * SIZE)


def rising(number: int) -> Totals:
    """Make totals in which each number is another."""
    return Totals.from_integers(LAYOUT, range(number, number + SIZE))


def the_number(totals: Totals) -> int:
    """Return the number of which uniform totals consist, which they must."""
    numbers = set(totals.to_integers())
    assert len(numbers) == 1, f"a torn snapshot: {sorted(numbers)}"
    return numbers.pop()


def file_of(layout: Layout, number: int = 3, **change: int) -> int:
    """Write a segment as another version would, and return its descriptor."""
    encoded = json.dumps(layout).encode()
    size = sum(length for _, length in layout)
    head = -(-(56 + len(encoded)) // mmap.PAGESIZE) * mmap.PAGESIZE
    step = -(-(8 + 2 * size) * 8 // mmap.PAGESIZE) * mmap.PAGESIZE
    words = {"magic": MAGIC, "format": 1, "head": head, "step": step, "slots": number, "mark": 0}
    words |= {"length": len(encoded)} | change
    fd = os.memfd_create("other")
    os.truncate(fd, head + (number + 1) * step)
    os.pwrite(fd, array("q", words.values()).tobytes() + encoded, 0)
    return fd


@pytest.fixture(name="segment")
def _segment() -> Iterator[Segment]:
    segment = Segment.create()
    yield segment
    segment.close()


def fork(run: Callable[[], object]) -> int:
    """Run something in a child and return its process id."""
    child = os.fork()
    if not child:
        with suppress(BaseException):
            run()
            os._exit(0)
        os._exit(1)
    return child


# Slots.


class Slots(RuleBasedStateMachine):
    """A segment against plain lists."""

    def __init__(self) -> None:
        super().__init__()
        self.segment = Segment.create()
        self.used: dict[int, list[Any]] = {}  # By index: state, beats, active, waits, totals.
        self.retired = Totals()

    def teardown(self) -> None:
        """Give the memory back."""
        self.segment.close()

    def any_slot(self, data: st.DataObject) -> tuple[Slot, list[Any]]:
        """Draw a slot in use and what it should hold."""
        index = data.draw(st.sampled_from(sorted(self.used)))
        return self.segment.slot(index), self.used[index]

    @rule()
    def claim(self) -> None:
        """The free slot of the lowest index is taken, and nothing of its former user is left."""
        slot = self.segment.claim()
        assert slot.index == next(index for index in count() if index not in self.used)
        self.used[slot.index] = [SlotState.STARTING, 0, 0, False, Totals()]

    @precondition(lambda self: self.used)
    @rule(
        data=st.data(),
        state=st.sampled_from(list(SlotState)[1:]),
        beats=BIG,
        active=BIG,
        waits=st.booleans(),
    )
    def store(
        self, data: st.DataObject, state: SlotState, beats: int, active: int, waits: bool
    ) -> None:
        """State, beats, open connections and whether it waits are stored."""
        slot, held = self.any_slot(data)
        held[:4] = [state, beats, active, waits]
        slot.state, slot.beats, slot.active, slot.waits = state, beats, active, waits

    @precondition(lambda self: self.used)
    @rule(data=st.data(), number=st.integers(0, 2**63 - 1 - SIZE), times=st.integers(1, 3))
    def publish(self, data: st.DataObject, number: int, times: int) -> None:
        """The snapshot published last is shown."""
        slot, held = self.any_slot(data)
        for each in reversed(range(times)):
            slot.publish(rising(max(0, number - each)))
        held[4] = rising(number)

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def retire(self, data: st.DataObject) -> None:
        """A worker ends: its totals are kept and its slot is free."""
        slot, held = self.any_slot(data)
        kept = [min(n, 2**63 - 1) for n in Totals.sum([self.retired, held[4]]).to_integers()]
        self.segment.retired = Totals.sum([self.segment.retired, slot.totals()])
        self.segment.release(slot)
        self.retired = Totals.from_integers(LAYOUT, kept)
        del self.used[slot.index]
        assert (slot.state, slot.active) == (SlotState.FREE, 0)

    @rule()
    def adopt(self) -> None:
        """Somebody else goes on with the segment."""
        adopted = Segment.adopt(os.dup(self.segment.fd))
        self.segment.close()
        self.segment = adopted
        assert adopted.is_current

    @invariant()
    def all_is_as_it_should_be(self) -> None:
        """Every slot in use is found, in order, with what it holds."""
        found = [
            (slot.index, [slot.state, slot.beats, slot.active, slot.waits, slot.totals()])
            for slot in occupied(self.segment)
        ]
        assert found == sorted(self.used.items())
        assert self.segment.retired == self.retired


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_full(segment: Segment) -> None:
    """Each of 4096 slots can be claimed, no more, and one that is released is the next to go."""
    assert [segment.claim().index for _ in range(Segment.SLOTS)] == list(range(4096))
    with pytest.raises(SegmentFullError, match="4096"):
        segment.claim()
    segment.slot(4095).publish(uniform(3))
    segment.release(segment.slot(77))
    assert segment.claim().index == 77
    assert the_number(segment.slot(4095).totals()) == 3
    assert the_number(segment.retired) == 0


@pytest.mark.parametrize("index", [-1, 4096])
def test_no_slot_beyond_the_ends(segment: Segment, index: int) -> None:
    """An index that would lead to the retired slot or past the end is refused."""
    with pytest.raises(IndexError, match=str(index)):
        segment.slot(index)


def test_only_slots_in_use_take_memory(segment: Segment) -> None:
    """Neither creating nor listing touches slots that were never claimed."""
    for _ in range(3):
        segment.claim()
    assert len(occupied(segment)) == 3
    Segment.adopt(os.dup(segment.fd)).close()
    assert os.fstat(segment.fd).st_blocks * 512 == 5 * mmap.PAGESIZE


def test_slots_share_no_page(segment: Segment) -> None:
    """What a worker writes changes only pages that belong to its slot."""

    def pages() -> list[bytes]:
        whole = os.pread(segment.fd, 16 * mmap.PAGESIZE, 0)
        return [whole[at : at + mmap.PAGESIZE] for at in range(0, len(whole), mmap.PAGESIZE)]

    slots = [segment.claim() for _ in range(3)]
    changed: list[set[int]] = []
    for slot in slots:
        before = pages()
        slot.state, slot.beats, slot.active = SlotState.READY, 2, 3
        slot.publish(uniform(4))
        slot.publish(uniform(5))
        changed.append({at for at, page in enumerate(pages()) if page != before[at]})
    assert all(changed)
    assert not any(one & other for one, other in combinations([{0, 1}, *changed], 2))


# Totals.


@given(number=st.integers(2**63, 2**70))
def test_numbers_that_do_not_fit(number: int) -> None:
    """A number too large for a word is shown as the largest, and the others are left alone."""
    segment = Segment.create()
    segment.retired = Totals(frames=number, turns=[7] * len(Totals().turns))
    assert segment.retired == Totals(frames=2**63 - 1, turns=[7] * len(Totals().turns))
    segment.close()


def test_totals_of_another_shape_are_refused(segment: Segment) -> None:
    """Totals that would shift the fields behind are not published, and the last ones stay."""
    slot = segment.claim()
    slot.publish(uniform(1))
    with pytest.raises(ValueError, match="different structures"):
        slot.publish(Totals(turns=[1]))
    assert the_number(slot.totals()) == 1


# Other versions.


@st.composite
def other_layouts(draw: st.DrawFn) -> Layout:
    """Draw a layout in which fields were added, removed, moved, lengthened or shortened."""
    kept = draw(st.permutations(LAYOUT))[draw(st.integers(0, len(LAYOUT))) :]
    resized = st.sampled_from([0, 0, 1, 9, -2])
    changed = [(name, max(0, length + draw(resized))) for name, length in kept]
    # Some are names of what is no field.
    names = st.sampled_from(["new", "other", "layout", "sum", "__class__"])
    added = draw(st.dictionaries(names, st.integers(0, 700), max_size=3))
    return draw(st.permutations([*changed, *added.items()]))


def by_name(source: Layout, target: Layout, values: list[int]) -> list[int]:
    """Look each integer of one layout up in the other; zero if it is not there."""
    places = [(name, place) for name, length in source for place in range(length)]
    known = dict(zip(places, values, strict=True))
    return [known.get((name, place), 0) for name, length in target for place in range(length)]


@settings(deadline=None)
@given(layout=other_layouts(), data=st.data())
def test_segment_of_another_version(layout: Layout, data: st.DataObject) -> None:
    """What another version has counted, and what is counted into its segment, is kept by name."""
    size = sum(length for _, length in layout)
    values = [data.draw(BIG), *range(1, size)][:size]
    fd = file_of(layout)
    segment = Segment.adopt(fd)
    assert segment.is_current == (layout == LAYOUT)
    assert [segment.claim().totals() for _ in range(2)] == [Totals()] * 2

    _, _, head, step, _, mark, _ = array("q", os.pread(fd, 56, 0))
    assert mark == 2
    words = [SlotState.DRAINING, 1, 5, 6, 0, 0, 0, 0, *[77] * size, *values]
    os.pwrite(fd, array("q", words).tobytes(), head + 2 * step)
    slot = occupied(segment)[1]
    assert (slot.state, slot.beats, slot.active) == (SlotState.DRAINING, 5, 6)
    assert slot.totals().to_integers() == by_name(layout, LAYOUT, values)

    ours = rising(1000).to_integers()
    segment.retired = rising(1000)
    segment.slot(2).publish(rising(2000))
    stored = array("q", os.pread(fd, size * 8, head + (8 + size) * 8)).tolist()
    assert stored == by_name(LAYOUT, layout, ours)
    assert segment.retired.to_integers() == by_name(layout, LAYOUT, stored)
    assert slot.totals().to_integers() == by_name(layout, LAYOUT, values)
    segment.close()


def test_this_version_writes_the_same_format(segment: Segment) -> None:
    """A segment of this version is, byte for byte, what these tests take for one."""
    fd = file_of(LAYOUT, Segment.SLOTS)
    assert os.fstat(fd).st_size == os.fstat(segment.fd).st_size
    assert os.pread(fd, 1 << 20, 0) == os.pread(segment.fd, 1 << 20, 0)
    assert segment.is_current
    os.close(fd)


def memfd(content: bytes) -> int:
    """Write a file that is no segment."""
    fd = os.memfd_create("none")
    os.write(fd, content)
    return fd


def cut_off() -> int:
    """Write a segment whose last page is missing."""
    fd = file_of(LAYOUT)
    os.truncate(fd, os.fstat(fd).st_size - mmap.PAGESIZE)
    return fd


@pytest.mark.parametrize(
    "make",
    [
        lambda: memfd(b""),
        lambda: memfd(b"lpechod"),
        lambda: memfd(bytes(1 << 20)),
        lambda: memfd(array("q", [MAGIC, 1, 4096]).tobytes()),
        lambda: file_of(LAYOUT, magic=MAGIC + 1),
        lambda: file_of(LAYOUT, format=0),
        lambda: file_of(LAYOUT, format=2),
        lambda: file_of(LAYOUT, slots=4),
        lambda: file_of(LAYOUT, length=20),
        cut_off,
        lambda: os.eventfd(0),
    ],
)
def test_what_is_no_segment(make: Callable[[], int]) -> None:
    """Anything but a segment of this format is refused and stays open."""
    fd = make()
    with pytest.raises(ValueError, match=r"segment|unpack|Unterminated"):
        Segment.adopt(fd)
    os.close(fd)
    with pytest.raises(ValueError, match="Bad file descriptor"):
        Segment.adopt(fd)


# Processes.


def test_a_forked_worker_and_its_supervisor(segment: Segment) -> None:
    """After fork, each sees what the other writes, in both directions."""
    slot, other = segment.claim(), segment.claim()
    reader, writer = os.pipe()

    def work() -> None:
        os.read(reader, 1)
        slot.state, slot.beats, slot.active = SlotState.DRAINING, other.beats, other.active
        slot.publish(other.totals())

    child = fork(work)
    other.beats, other.active = 5, 6
    other.publish(rising(7))
    os.write(writer, b"!")
    assert os.waitpid(child, 0)[1] == 0
    assert (slot.state, slot.beats, slot.active) == (SlotState.DRAINING, 5, 6)
    assert slot.totals() == rising(7)
    os.close(reader)
    os.close(writer)


def test_a_new_program_adopts_it(segment: Segment) -> None:
    """A fresh interpreter that is given the descriptor reads, and writes, the same counters."""
    slot = segment.claim()
    slot.state, slot.beats, slot.active = SlotState.READY, 5, 6
    slot.publish(rising(7))
    segment.retired = rising(8)
    program = """if True:
        import sys
        from lpechod.ops.segment import Segment
        segment = Segment.adopt(int(sys.argv[1]))
        [state], _ = segment.signs()
        slot = segment.slot(0)
        print(segment.is_current, slot.index, slot.state.name, slot.beats, slot.active)
        print(slot.totals().to_integers() + segment.retired.to_integers())
        segment.claim().active = 9
    """
    assert not os.get_inheritable(segment.fd)
    ran = subprocess.run(
        [sys.executable, "-c", program, str(segment.fd)],
        pass_fds=[segment.fd],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    numbers = rising(7).to_integers() + rising(8).to_integers()
    assert ran.stdout == f"True 0 READY 5 6\n{numbers}\n"
    assert [(each.index, each.active) for each in occupied(segment)] == [(0, 6), (1, 9)]


def test_close() -> None:
    """Closing gives back descriptors and mapping, once, and ends the slots, but for other users."""

    def held() -> tuple[list[Path], int]:
        maps = Path("/proc/self/maps").read_text()
        return sorted(Path("/proc/self/fd").iterdir()), maps.count("lpechod-counters")

    before = held()
    segment = Segment.create()
    other = Segment.adopt(os.dup(segment.fd))
    slot = segment.claim()
    segment.close()
    segment.close()
    with pytest.raises(ValueError, match="released"):
        slot.active = 1
    assert [each.index for each in occupied(other)] == [0]
    other.close()
    assert held() == before
