"""How workers share connections by what they see of each other in shared memory."""

import itertools
import sys
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpechod.net.acceptor import ACCEPTS_PER_TURN
from lpechod.ops.segment import Segment, Slot, SlotState
from lpechod.process.siblings import Siblings

WORKERS = 4
QUEUED = 400


@pytest.fixture(name="segment")
def _segment() -> Iterator[Segment]:
    segment = Segment.create()
    yield segment
    segment.close()


def claim(segment: Segment, state: SlotState = SlotState.READY, active: int = 0) -> Slot:
    """Take a slot for a worker."""
    slot = segment.claim()
    slot.state = state
    slot.active = active
    return slot


def test_nobody_is_waited_for_when_alone(segment: Segment) -> None:
    """A worker without siblings may accept whatever comes."""
    own = claim(segment, active=10_000)
    siblings = Siblings(segment, own)
    assert siblings.allowance() == sys.maxsize
    assert siblings.connections() == 0


@pytest.mark.parametrize(
    ("own", "others", "allowance"),
    [
        (0, [0], 8),
        (0, [3], 11),
        (8, [0], 0),
        (9, [0], -1),
        (0, [8], 17),
        (0, [7], 15),
        (100, [800], 808),
        (50, [100, 10, 70], -31),
        (10, [10, 10, 10], 9),
    ],
)
def test_the_least_loaded_one_is_the_measure(
    segment: Segment, own: int, others: list[int], allowance: int
) -> None:
    """A worker may be ahead of the least loaded one by 8, and an eighth of what that one has."""
    siblings = Siblings(segment, claim(segment, active=own))
    for active in others:
        claim(segment, active=active)
    siblings.observe()
    assert siblings.allowance() == allowance


def test_the_others_are_seen_as_they_are_now(segment: Segment) -> None:
    """Between two observations, connections that come and go count at once."""
    own, other = claim(segment), claim(segment)
    siblings = Siblings(segment, own)
    own.active = 8
    assert siblings.allowance() == 0
    other.active = 1
    assert siblings.allowance() == 1
    own.active = 7
    assert siblings.allowance() == 2
    assert siblings.connections() == 1


@pytest.mark.parametrize("state", [SlotState.DRAINING, SlotState.PAUSED])
def test_who_does_not_accept_is_not_waited_for(segment: Segment, state: SlotState) -> None:
    """One that drains or can't accept is no measure, but its connections count."""
    own, other = claim(segment, active=50), claim(segment, state, active=7)
    siblings = Siblings(segment, own)
    assert siblings.allowance() == sys.maxsize
    assert not siblings.next_waits()
    assert siblings.connections() == 7
    other.state = SlotState.READY
    other.waits = True
    assert siblings.allowance() < 0
    assert siblings.next_waits()
    other.state = state
    assert siblings.allowance() == sys.maxsize
    assert not siblings.next_waits()


def test_who_starts_is_waited_for(segment: Segment) -> None:
    """One that will accept in a moment is a measure, unless it does not get there."""
    siblings = Siblings(segment, claim(segment, active=8))
    claim(segment, SlotState.STARTING)
    siblings.observe()
    assert siblings.allowance() == 0
    for _ in range(5):
        siblings.observe()
    assert siblings.allowance() == sys.maxsize


def test_who_has_ended_counts_no_more(segment: Segment) -> None:
    """A slot that was set free is neither a measure nor a number of connections."""
    own, other = claim(segment), claim(segment, active=5)
    siblings = Siblings(segment, own)
    assert siblings.connections() == 5
    segment.release(other)
    assert siblings.allowance() == sys.maxsize
    assert siblings.connections() == 0


def test_whoever_comes_counts_at_once(segment: Segment) -> None:
    """Between two heartbeats, too, the connections of a newcomer count, whatever its slot."""
    own, other = claim(segment), claim(segment, active=5)
    siblings = Siblings(segment, own)
    segment.release(other)
    siblings.observe()
    claim(segment, active=6)
    assert siblings.connections() == 6
    assert siblings.allowance() == 6 + 8
    claim(segment, active=7)
    claim(segment, active=8)
    assert siblings.connections() == 21
    siblings.observe()
    assert siblings.connections() == 21


def test_whether_the_next_one_waits(segment: Segment) -> None:
    """The one with the fewest connections of those who accept is asked, and no other."""
    own, many, few = claim(segment), claim(segment, active=9), claim(segment, active=3)
    siblings = Siblings(segment, own)
    many.waits = own.waits = True
    assert not siblings.next_waits()
    few.waits = True
    assert siblings.next_waits()
    many.waits = False
    assert siblings.next_waits()
    few.state = SlotState.PAUSED
    assert not siblings.next_waits()


def test_who_stands_still_is_not_waited_for(segment: Segment) -> None:
    """One without a beat in five looks is no measure until it beats again; those who beat are."""
    own, still, alive = claim(segment, active=8), claim(segment), claim(segment, active=30)
    siblings = Siblings(segment, own)
    for _ in range(3):
        own.beats += 1
        alive.beats += 1
        siblings.observe()
        assert siblings.allowance() == 0
    for _ in range(20):
        own.beats += 1
        alive.beats += 1
        siblings.observe()
    assert siblings.allowance() == 30 + 8 + 3 - 8
    assert siblings.connections() == 30

    still.beats += 1
    own.beats += 1
    siblings.observe()
    assert siblings.allowance() == 0


@pytest.mark.parametrize("looks", [1, 2, 3, 4])
def test_a_slow_beat_is_a_beat(segment: Segment, looks: int) -> None:
    """One that beats at least once in four looks of ours is alive for ever."""
    own, slow = claim(segment, active=8), claim(segment)
    siblings = Siblings(segment, own)
    slow.beats += 1
    siblings.observe()
    for _ in range(10):
        for _ in range(looks):
            siblings.observe()
            assert siblings.allowance() == 0
        slow.beats += 1
        siblings.observe()


def test_a_slot_s_next_worker_starts_afresh(segment: Segment) -> None:
    """A worker is not taken for dead because the one that had its slot before was."""
    own, dead = claim(segment, active=8), claim(segment)
    dead.beats = 1000
    siblings = Siblings(segment, own)
    for _ in range(10):
        siblings.observe()
    assert siblings.allowance() == sys.maxsize
    segment.release(dead)
    claim(segment)
    siblings.observe()
    assert siblings.allowance() == 0


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, WORKERS - 1), st.integers(1, 20)), max_size=200))
def test_a_queue_is_shared_evenly(turns: list[tuple[int, int]]) -> None:
    """Whoever is woken how often, each of four workers ends with 80 to 120 of 400 connections."""
    segment = Segment.create()
    try:
        slots = [claim(segment) for _ in range(WORKERS)]
        workers = [Siblings(segment, slot) for slot in slots]
        queued = QUEUED
        # Then all in turn, until nobody waits any more; a round without a connection is a defect.
        for number, times in itertools.chain(turns, itertools.cycle((k, 1) for k in range(4))):
            for _ in range(times):
                taken = max(0, min(workers[number].allowance(), ACCEPTS_PER_TURN, queued))
                slots[number].active += taken
                queued -= taken
            if queued == 0:
                break
            assert any(worker.allowance() > 0 for worker in workers)
        assert all(80 <= slot.active <= 120 for slot in slots)
        assert all(
            worker.connections() == QUEUED - slot.active
            for worker, slot in zip(workers, slots, strict=True)
        )
    finally:
        segment.close()


@settings(deadline=None)
@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=WORKERS))
def test_somebody_may_always_accept(held: list[int]) -> None:
    """However connections are spread, the least loaded worker may take at least eight more."""
    segment = Segment.create()
    try:
        slots = [claim(segment, active=active) for active in held]
        least = min(slots, key=lambda slot: slot.active)
        assert Siblings(segment, least).allowance() >= 8
    finally:
        segment.close()


def test_a_sibling_may_be_born_at_any_moment() -> None:
    """The supervisor claims slots while a worker looks at them, and the worker sees some."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20):
            segment = Segment.create()
            siblings = Siblings(segment, claim(segment))
            supervisor = threading.Thread(target=lambda it=segment: [claim(it) for _ in range(64)])
            supervisor.start()
            while supervisor.is_alive():
                siblings.observe()
            siblings.observe()
            assert siblings.allowance() == 8
            segment.close()
    finally:
        sys.setswitchinterval(interval)
