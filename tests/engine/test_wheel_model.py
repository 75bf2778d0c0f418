"""The timer wheel against a naive model."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from lpechod.engine.wheel import NEVER, Timer
from tests.engine.wheels import SLOTS, Alarm, CountingWheel


class WheelAgainstModel(RuleBasedStateMachine):
    """The wheel must do what a dictionary of ticks does that is searched from end to end.

    Attributes:
        slots: of the wheel under test.
    """

    slots: int
    timers = Bundle("timers")

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[Timer, int] = {}

    @initialize(tick=st.integers(0, 3000))
    def start(self, tick: int) -> None:
        self.wheel = CountingWheel(self.slots, tick)

    @rule(target=timers)
    def create(self) -> Alarm:
        return Alarm(f"timer{len(self.model)}")

    @rule(timer=timers, distance=st.integers(-5, 40) | st.integers(-(10**4), 10**7))
    def schedule(self, timer: Timer, distance: int) -> None:
        tick = max(0, self.wheel.tick + distance)
        self.wheel.schedule(timer, tick)
        self.model[timer] = max(tick, self.wheel.tick + 1)

    @rule(timer=timers)
    def cancel(self, timer: Timer) -> None:
        self.wheel.cancel(timer)
        self.model.pop(timer, None)

    @rule(timer=consumes(timers))
    def forget(self, timer: Alarm) -> None:
        self.cancel(timer)

    @rule(step=st.integers(0, 20) | st.integers(0, 10**7) | st.just(10**15))
    def advance(self, step: int) -> None:
        self.settle(self.wheel.tick + step)

    @rule()
    def advance_to_next(self) -> None:
        if self.wheel.next_tick() != NEVER:
            self.settle(self.wheel.next_tick())

    @rule(step=st.integers(0, 50), distance=st.integers(-3, 50), data=st.data())
    def advance_with_handlers(self, step: int, distance: int, data: st.DataObject) -> None:
        """Let the handlers of due timers cancel and file others, due ones among them."""
        due = self.wheel.advance(self.wheel.tick + step)
        pending = set(due)
        for timer in due:
            assert timer.claim() == (timer in pending)
            if timer not in pending:
                continue
            pending.discard(timer)
            assert self.model.pop(timer) <= self.wheel.tick
            for victim in data.draw(st.lists(st.sampled_from(due), max_size=2)):
                pending.discard(victim)
                if data.draw(st.booleans()):
                    self.cancel(victim)
                else:
                    self.schedule(victim, distance)
        assert not pending

    @rule(back=st.integers(1, 10**6))
    def refuse_to_go_back(self, back: int) -> None:
        with pytest.raises(ValueError, match="time goes back"):
            self.wheel.advance(self.wheel.tick - back)

    def settle(self, tick: int) -> None:
        """Advance, and compare what comes out with what the model says."""
        before = self.wheel.tick
        self.wheel.opened.clear()
        due = self.wheel.advance(tick)

        expected = {timer: due_at for timer, due_at in self.model.items() if due_at <= tick}
        assert len(due) == len(set(due))
        assert set(due) == set(expected)
        assert self.wheel.tick == tick
        assert max(Counter(self.wheel.opened).values(), default=0) <= 1
        if tick - before <= self.slots:
            assert all(expected[first] <= expected[second] for first, second in pairwise(due))
        for timer in due:
            assert timer.claim()
            del self.model[timer]

    @invariant()
    def consistent(self) -> None:
        self.wheel.check()
        assert len(self.wheel) == len(self.model)
        assert self.wheel.next_tick() <= min(self.model.values(), default=NEVER)
        assert self.wheel.next_tick() > self.wheel.tick
        for timer, tick in self.model.items():
            assert timer.filed
            assert timer.tick == tick

    def teardown(self) -> None:
        """Drain by following `next_tick` alone: that must reach every timer, none of them late."""
        while self.model:
            tick = self.wheel.next_tick()
            assert tick <= min(self.model.values())
            self.settle(tick)


@SLOTS
def test_against_model(slots: int) -> None:
    """No sequence of operations makes a timer fire early, late, twice or after its cancellation."""

    class Sized(WheelAgainstModel):
        pass

    Sized.slots = slots
    run_state_machine_as_test(
        Sized, settings=settings(max_examples=120, stateful_step_count=40, deadline=None)
    )
