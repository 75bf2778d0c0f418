"""Snapshots of shared counters stay whole, whoever is killed or overtaken, and when."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from itertools import combinations, count
from types import CodeType, FrameType
from typing import Any

import pytest

from lpechod.ops.counters import Totals
from lpechod.ops.segment import Segment, Slot
from tests.ops.test_segment import SIZE, fork, the_number, uniform


@pytest.fixture(name="segment")
def _segment() -> Iterator[Segment]:
    segment = Segment.create()
    yield segment
    segment.close()


@contextmanager
def at_each_instruction(code: CodeType, act: Callable[[int], None]) -> Iterator[None]:
    """Call ``act`` with 0, 1, 2... before each instruction of a function, wherever it is called."""
    steps, before = count(), sys.gettrace()

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        if frame.f_code is not code:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            act(next(steps))
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def test_killed_at_each_instruction(segment: Segment) -> None:
    """A worker that is killed before any instruction of publish leaves one whole snapshot."""
    seen = []
    for victim in count():
        slot = segment.claim()
        slot.publish(uniform(1))
        slot.publish(uniform(2))

        def kill(step: int, victim: int = victim) -> None:
            if step == victim:
                os.kill(os.getpid(), signal.SIGKILL)

        def publish(slot: Slot = slot, kill: Callable[[int], None] = kill) -> None:
            with at_each_instruction(Slot.publish.__code__, kill):
                slot.publish(uniform(3))

        _, status = os.waitpid(fork(publish), 0)
        seen.append(the_number(slot.totals()))
        slot.publish(uniform(4))
        assert the_number(slot.totals()) == 4
        segment.release(slot)
        if not os.WIFSIGNALED(status):
            assert status == 0
            break
    assert victim > 30
    assert seen == sorted(seen)
    assert set(seen) == {2, 3}


def test_overtaken_at_each_instruction(segment: Segment) -> None:
    """A reader that is overtaken by a writer, who is then in the midst of the next, reads again."""
    slot = segment.claim()
    numbers = count(1)
    code = Slot.totals.__code__
    reached: list[int] = []
    with at_each_instruction(code, reached.append):
        slot.totals()
    assert len(reached) > 30

    for first, second in combinations(reached, 2):
        number = next(numbers) * 10
        slot.publish(uniform(number))

        def write(
            step: int, first: int = first, second: int = second, number: int = number
        ) -> None:
            if step == first:
                slot.publish(uniform(number + 1))
                # Half of the next one: what a writer has done that sleeps within its memcpy.
                hidden = slot._start + 8 + ~slot._words[slot._start + 1] % 2 * SIZE
                for place in range(hidden, hidden + SIZE // 2):
                    slot._words[place] = number + 2
            elif step == second:
                slot.publish(uniform(number + 2))

        with at_each_instruction(code, write):
            read = slot.totals()
        assert number <= the_number(read) <= number + 2


def publish_on(slot: Slot, parent: int) -> None:
    """Publish 1, 2, 3... as fast as possible, while the parent lives."""
    snapshot = uniform(0)
    for number in count(1):
        for each in fields(Totals):
            value = getattr(snapshot, each.name)
            many = number if isinstance(value, int) else [number] * len(value)
            setattr(snapshot, each.name, many)
        slot.publish(snapshot)
        if os.getppid() != parent:
            return


@contextmanager
def publisher(slot: Slot) -> Iterator[None]:
    """Have a worker that publishes in the meantime, and kill it."""
    child = fork(partial(publish_on, slot, os.getpid()))
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_read_while_it_is_written(segment: Segment) -> None:
    """While a worker publishes, each snapshot that is read is whole, and none is older."""
    slot = segment.claim()
    last = changes = 0
    with publisher(slot):
        while changes < 1000:
            number = the_number(slot.totals())
            assert number >= last
            changes += number > last
            last = number


def test_killed_while_it_is_written(segment: Segment) -> None:
    """Whenever a worker is killed, its last snapshot is whole, not older than any seen before."""
    for attempt in range(60):
        slot = segment.claim()
        last = reads = the_number(slot.totals())
        assert last == 0
        with publisher(slot):
            while not last or reads < attempt % 30:
                number = the_number(slot.totals())
                assert number >= last
                last, reads = number, reads + 1
        assert the_number(slot.totals()) >= last
        segment.release(slot)
