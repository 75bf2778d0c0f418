"""Who holds most, when that is asked again and again while holders come, go and change."""

import weakref
from collections.abc import Hashable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpechod.engine.loop import Loop
from lpechod.engine.poller import PollPoller
from lpechod.net.holders import Holders
from tests.fake_time import FakeClock, FakeTimePoller


class Counted(dict[Hashable, int]):
    """What holders hold, and how often all of it was looked at."""

    looks = 0

    def items(self) -> "type[None] | object":  # type: ignore[override]
        """Count a look."""
        self.looks += 1
        return super().items()


class Kept:
    """A holder that can be seen to be gone."""


@pytest.fixture(name="held")
def _held() -> Counted:
    return Counted({"a": 1, "b": 2})


def loop_of(clock: FakeClock) -> Loop:
    """Make a loop with a clock that stands still."""
    return Loop(FakeTimePoller(PollPoller(), clock), clock)


def crowd_of(count: int) -> tuple[FakeClock, Loop, Counted, Holders]:
    """Make so many who hold the same, look at them, and have number 7 grow."""
    clock = FakeClock()
    loop = loop_of(clock)
    held = Counted(dict.fromkeys(range(count), 10))
    holders = Holders(held, loop)
    holders.largest()
    held[7] = 11
    return clock, loop, held, holders


def turn(loop: Loop, clock: FakeClock, seconds: float = 0.0) -> None:
    """Pass a turn and some time."""
    clock.advance(seconds)
    loop.again(Nothing(), 0)
    loop.turn()


class Nothing:
    """A source that does nothing."""

    def on_ready(self, _mask: int, _now: float) -> None:
        """Do nothing."""

    def on_failure(self, error: Exception, _now: float) -> None:
        """Let the test fail."""
        raise error


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=60),
    st.integers(1, 9),
)
def test_within_a_turn_it_is_the_largest(changes: list[tuple[int, int]], first: int) -> None:
    """However holders shrink and go, who is named holds as much as anybody who has not grown."""
    loop = loop_of(FakeClock())
    held: dict[Hashable, int] = dict.fromkeys(range(10), 6)
    held["never"] = first % 6
    holders = Holders(held, loop)
    for holder, amount in changes:
        assert held[holders.largest()] == max(held.values())
        if held.get(holder, 0) > amount:
            held[holder] = amount
            if not amount:
                del held[holder]
        if not held:
            break
    loop.close()


def test_many_go_at_the_price_of_one_look() -> None:
    """To take the largest of 10,000, one after the other, looks at all of them once."""
    loop = loop_of(FakeClock())
    held = Counted({number: 1000 + number % 7 for number in range(10_000)})
    holders = Holders(held, loop)
    sizes = [held.pop(holders.largest()) for _ in range(10_000)]
    assert sizes == sorted(sizes, reverse=True)
    assert held.looks == 1


def test_few_are_looked_at_in_each_turn() -> None:
    """Whoever has grown or come is found in the next turn."""
    clock, loop, _, holders = crowd_of(256)
    turn(loop, clock)
    assert holders.largest() == 7


def test_many_are_looked_at_ten_times_a_second() -> None:
    """In a crowd, who has grown is found after a tenth of a second, and not in each turn."""
    clock, loop, held, holders = crowd_of(257)
    for _ in range(9):
        turn(loop, clock, 0.01)
        assert holders.largest() != 7
    assert held.looks == 1
    turn(loop, clock, 0.02)
    assert holders.largest() == 7
    assert held.looks == 2


def test_an_order_does_not_last(held: Counted) -> None:
    """A tenth of a second later nobody is kept in memory for it, whether it is asked for or not."""
    clock = FakeClock()
    loop = loop_of(clock)
    holder = Kept()
    gone = weakref.ref(holder)
    held[holder] = 5
    holders = Holders(held, loop)
    holders.largest()
    del held[holder], holder
    assert gone() is not None
    turn(loop, clock, 0.11)
    assert gone() is None
    assert loop.timers == 0


def test_what_is_forgotten_is_found_again(held: Counted) -> None:
    """After an order is forgotten, the next is of what is there by then."""
    loop = loop_of(FakeClock())
    holders = Holders(held, loop)
    assert holders.largest() == "b"
    holders.forget()
    held["a"] = 3
    assert holders.largest() == "a"
