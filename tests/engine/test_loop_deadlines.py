"""Deadlines in the seconds of the loop's clock: late, never early, and no wake-up too many."""

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpechod.engine.loop import TICKS_PER_SECOND, TIMERS_PER_TURN, Loop
from lpechod.engine.poller import READABLE, open_poller
from tests.engine.conftest import Pairs
from tests.engine.stage import Actor, Stage

_deadlines = st.integers(0, 3 * 10**11).map(lambda nanoseconds: 1000.0 + nanoseconds / 1e9)


class TestDeadlines:
    """Timers in the seconds of the loop's clock."""

    @given(
        deadlines=st.lists(_deadlines, min_size=1, max_size=30),
        steps=st.lists(st.integers(1, 10**10).map(lambda step: step / 1e9), max_size=60),
    )
    @settings(max_examples=150, deadline=None)
    def test_late_never_early(self, deadlines: list[float], steps: list[float]) -> None:
        """Whatever the steps of the clock, a timer fires once, in the first turn that may."""
        stage = Stage()
        waiting = {Actor(stage, str(number)): when for number, when in enumerate(deadlines)}
        for timer, when in waiting.items():
            stage.loop.schedule(timer, when)
        for step in [*steps, 400.0, 1.0]:
            stage.clock.advance(step)
            stage.journal.clear()
            stage.turn_at_once()
            fired = {name for name, *_ in stage.journal}
            assert len(fired) == len(stage.journal)
            for timer in [timer for timer in waiting if timer.name in fired]:
                assert waiting.pop(timer) <= stage.clock.now
            for when in waiting.values():
                assert when > stage.clock.now - 1 / TICKS_PER_SECOND

        assert not waiting
        assert stage.loop.timers == 0
        stage.close()

    @given(deadlines=st.lists(_deadlines, min_size=1, max_size=20))
    @settings(max_examples=100, deadline=None)
    def test_sleeps_up_to_the_deadline(self, deadlines: list[float]) -> None:
        """Left to its own, the loop wakes once for each tick that has timers, and in time."""
        stage = Stage()
        for number, when in enumerate(deadlines):
            stage.loop.schedule(Actor(stage, str(number)), when)
        while stage.loop.timers:
            stage.loop.turn()

        for name, _, now in stage.journal:
            assert isinstance(now, float)
            assert 0 <= now - deadlines[int(str(name))] <= 1 / TICKS_PER_SECOND + 0.002
        ticks = {max(math.ceil(when * TICKS_PER_SECOND), 10_001) for when in deadlines}
        assert len(stage.poller.timeouts) == len(ticks)
        stage.close()

    def test_no_busy_turns(self, stage: Stage) -> None:
        """A thousand timers over five minutes cost one wake-up for each distinct tick, no more."""
        chance = random.Random(1)  # noqa: S311 - any spread will do.
        deadlines = [1000.0 + chance.uniform(0.2, 300.0) for _ in range(1000)]
        for when in deadlines:
            stage.loop.schedule(Actor(stage, "timer"), when)
        while stage.loop.timers:
            fired = len(stage.journal)
            stage.loop.turn()
            assert len(stage.journal) > fired, "woken for nothing"

        ticks = {math.ceil(when * TICKS_PER_SECOND) for when in deadlines}
        assert stage.poller.idle_polls == len(ticks)
        assert len(stage.journal) == 1000

    def test_cancelled_timers_wake_nobody(self, stage: Stage) -> None:
        """Hundreds of connections that come and go leave no trail of wake-ups behind."""
        timers = [Actor(stage, "timer") for _ in range(700)]
        for number, timer in enumerate(timers):
            stage.loop.schedule(timer, 1001.0 + number / 10)
        stage.loop.schedule(Actor(stage, "last"), 1200.0)
        for timer in timers:
            stage.loop.cancel(timer)
        while stage.loop.timers:
            stage.loop.turn()

        assert stage.poller.idle_polls <= 2
        assert stage.journal == [("last", "deadline", 1200.0)]

    def test_without_timers_it_waits_for_ever(self, stage: Stage) -> None:
        """With nothing to do and no deadline, the loop asks to wait without a time-out."""
        with pytest.raises(AssertionError, match="wait forever"):
            stage.loop.turn()

        assert stage.poller.timeouts == [None]

    def test_missed_deadline_does_not_wait(self, stage: Stage) -> None:
        """A deadline that passed while handlers ran makes the next poll return at once."""
        stage.loop.schedule(Actor(stage, "timer"), 1001.0)
        stage.clock.advance(5.0)
        stage.loop.turn()

        assert stage.poller.timeouts == [0.0]
        assert stage.journal == [("timer", "deadline", 1005.0)]

    def test_far_deadlines(self, stage: Stage) -> None:
        """A deadline too far for an int of milliseconds is slept to in pieces of a day."""
        days = 60
        stage.loop.schedule(Actor(stage, "timer"), 1000.0 + days * 86_400)
        while stage.loop.timers:
            stage.loop.turn()

        assert stage.poller.timeouts == [86_400.0] * days
        assert stage.journal == [("timer", "deadline", 1000.0 + days * 86_400)]

    @pytest.mark.parametrize("name", ["epoll", "poll", "select"])
    def test_kernel_takes_the_longest_sleep(self, name: str, unix_pair: Pairs) -> None:
        """Every poller accepts the longest time-out that the loop ever asks for."""
        stage = Stage()
        loop = Loop(open_poller(name), stage.clock)
        loop.schedule(Actor(stage, "timer"), 1e12)
        ours, theirs = unix_pair()
        theirs.send(b"frame")
        loop.register(ours.fileno(), Actor(stage, "source"), READABLE)
        loop.turn()

        assert stage.journal == [("source", "ready", READABLE)]
        loop.close()

    def test_infinity_cancels(self, stage: Stage) -> None:
        """An infinite deadline is none: it takes a filed timer out, and files nothing."""
        timer = Actor(stage, "timer")
        stage.loop.schedule(timer, math.inf)
        assert not timer.filed
        stage.loop.schedule(timer, 1001.0)
        stage.loop.schedule(timer, math.inf)

        assert not timer.filed
        assert stage.loop.timers == 0

    def test_schedule_moves_both_ways(self, stage: Stage) -> None:
        """Scheduling a filed timer moves it to the new deadline, earlier or later."""
        timer = Actor(stage, "timer")
        for when in (1010.0, 1005.0, 1020.0):
            stage.loop.schedule(timer, when)
        while stage.loop.timers:
            stage.loop.turn()

        assert stage.journal == [("timer", "deadline", 1020.0)]

    def test_hasten_only_hastens(self, stage: Stage) -> None:
        """`hasten` files an unfiled timer, moves to earlier deadlines, and ignores later ones."""
        timer = Actor(stage, "timer")
        ticks = []
        for when in (1010.0, 1020.0, math.inf, 1010.0, 1005.0, 1006.0):
            stage.loop.hasten(timer, when)
            ticks.append(timer.tick)
        assert ticks == [10_100, 10_100, 10_100, 10_100, 10_050, 10_050]

        stage.loop.turn()
        assert stage.journal == [("timer", "deadline", 1005.0)]

    def test_hasten_cannot_put_off(self, stage: Stage, ready: Callable[..., Actor]) -> None:
        """A timer that each turn hastens to a deadline long past fires at the next tick."""
        timer = Actor(stage, "timer", lambda _now: stage.loop.stop())

        def hurry(_now: float) -> None:
            stage.loop.hasten(timer, 900.0)
            stage.clock.advance(0.03)

        ready("source", hurry)
        stage.loop.run()

        assert stage.journal[-1][:2] == ("timer", "deadline")
        assert len(stage.turns) == 5  # The fifth is the first in the next tenth of a second.

    def test_hasten_to_infinity_files_nothing(self, stage: Stage) -> None:
        """`hasten` of an unfiled timer with no deadline leaves it unfiled."""
        timer = Actor(stage, "timer")
        stage.loop.hasten(timer, math.inf)

        assert not timer.filed

    def test_deadline_that_moves_with_each_byte(self, stage: Stage) -> None:
        """An idle timer pushed back a hundred times a second fires once an idle time, no more."""
        deadline = 0.0
        timer = Actor(stage, "timer", lambda _now: stage.loop.hasten(timer, deadline))
        fired_early = 0
        for _ in range(20_000):  # Two hundred seconds of traffic.
            stage.clock.advance(0.01)
            deadline = stage.clock.now + 30.0
            stage.loop.hasten(timer, deadline)
            stage.turn_at_once()
            fired_early = len(stage.journal)

        assert fired_early == 200 // 30
        while timer.filed:
            stage.loop.turn()
            if stage.clock.now >= deadline:
                break
        assert stage.clock.now - deadline <= 1 / TICKS_PER_SECOND + 0.001

    def test_cancelled_by_one_that_fires_before(self, stage: Stage) -> None:
        """Of two timers due at once, the first can still cancel the second."""
        second = Actor(stage, "second")
        stage.loop.schedule(Actor(stage, "first", lambda _now: stage.loop.cancel(second)), 1001.0)
        stage.loop.schedule(second, 1001.0)
        stage.loop.turn()

        assert [name for name, *_ in stage.journal] == ["first"]
        assert stage.loop.timers == 0

    def test_moved_by_one_that_fires_before(self, stage: Stage) -> None:
        """Of two timers due at once, the first can still put off the second."""
        second = Actor(stage, "second")
        stage.loop.schedule(
            Actor(stage, "first", lambda now: stage.loop.schedule(second, now + 5.0)), 1001.0
        )
        stage.loop.schedule(second, 1001.0)
        while stage.loop.timers:
            stage.loop.turn()

        assert [(entry[0], entry[2]) for entry in stage.journal] == [
            ("first", 1001.0),
            ("second", 1006.0),
        ]

    def test_hasten_leaves_a_due_timer_alone(self, stage: Stage) -> None:
        """A timer that is due, but waits its turn, is not put off by `hasten`."""
        second = Actor(stage, "second")
        stage.loop.schedule(
            Actor(stage, "first", lambda now: stage.loop.hasten(second, now + 5.0)), 1001.0
        )
        stage.loop.schedule(second, 1001.0)
        stage.loop.turn()

        assert [name for name, *_ in stage.journal] == ["first", "second"]

    def test_counts_timers(self, stage: Stage) -> None:
        """The number of filed timers follows filing, moving, cancelling and firing."""
        counts = []
        timers = [Actor(stage, "timer") for _ in range(3)]
        for timer in timers:
            stage.loop.schedule(timer, 1001.0)
            counts.append(stage.loop.timers)
        stage.loop.schedule(timers[0], 1002.0)
        counts.append(stage.loop.timers)
        stage.loop.cancel(timers[1])
        stage.loop.cancel(timers[1])
        counts.append(stage.loop.timers)
        stage.loop.turn()
        counts.append(stage.loop.timers)

        assert counts == [1, 2, 3, 3, 2, 1]


class TestManyAtOnce:
    """More timers of one tick than a turn fires."""

    @pytest.fixture(name="crowd")
    def _crowd(self, stage: Stage) -> list[Actor]:
        """File so many that three turns are needed, and one that is due a tick later."""
        crowd = [Actor(stage, str(number)) for number in range(2 * TIMERS_PER_TURN + 10)]
        for timer in crowd:
            stage.loop.schedule(timer, 1001.0)
        stage.loop.schedule(Actor(stage, "later"), 1001.1)
        return crowd

    def test_in_order_over_several_turns(self, stage: Stage, crowd: list[Actor]) -> None:
        """They fire in the order in which they were filed, a bounded number a turn, unslept."""
        fired = []
        for _ in range(3):
            before = len(stage.journal)
            stage.loop.turn()
            fired.append(len(stage.journal) - before)
        assert fired == [TIMERS_PER_TURN, TIMERS_PER_TURN, 10]
        assert [name for name, *_ in stage.journal] == [timer.name for timer in crowd]
        assert stage.poller.timeouts[1:] == [0, 0]
        assert stage.clock.now == 1001.0
        assert stage.loop.timers == 1

        stage.loop.turn()
        assert stage.journal[-1][0] == "later"
        assert stage.clock.now == pytest.approx(1001.1, abs=0.002)

    def test_descriptors_are_served_in_between(
        self, stage: Stage, crowd: list[Actor], ready: Callable[..., Actor]
    ) -> None:
        """Whoever is ready meanwhile does not wait for all of them."""
        stage.loop.turn()
        assert len(stage.journal) == TIMERS_PER_TURN
        ready("reader")
        stage.loop.turn()

        assert stage.journal[TIMERS_PER_TURN][0] == "reader"
        assert len(stage.journal) == 2 * TIMERS_PER_TURN + 1 < len(crowd)

    def test_called_off_while_they_wait(self, stage: Stage, crowd: list[Actor]) -> None:
        """Between two such turns a timer can be cancelled, moved, and moved back; it fires once."""
        stage.loop.turn()
        cancelled, moved, back = crowd[-3:]
        stage.loop.cancel(cancelled)
        stage.loop.schedule(moved, 1002.0)
        stage.loop.cancel(back)
        stage.loop.hasten(back, 1001.1)
        while stage.loop.timers:
            stage.loop.turn()
        names = [str(name) for name, *_ in stage.journal]
        times = {str(name): now for name, _, now in stage.journal}

        assert len(names) == len(set(names)) == len(crowd)
        assert cancelled.name not in names
        assert times[moved.name] == pytest.approx(1002.0, abs=0.002)
        assert times[back.name] == pytest.approx(1001.1, abs=0.002)

    def test_a_tick_that_comes_meanwhile_waits_behind(
        self, stage: Stage, crowd: list[Actor]
    ) -> None:
        """What is due later fires after all that was due before, however long that takes."""
        stage.loop.turn()
        stage.clock.advance(0.2)
        stage.loop.turn()
        stage.loop.turn()

        assert [name for name, *_ in stage.journal] == [*(timer.name for timer in crowd), "later"]

    def test_urgent_ones_go_first(self, stage: Stage, crowd: list[Actor]) -> None:
        """Who keeps watch fires in time, however many are due before."""

        class Watching(Actor):
            urgent = True

        stage.loop.schedule(Watching(stage, "first"), 1001.0)
        stage.loop.schedule(Watching(stage, "second"), 1001.1)
        stage.loop.turn()
        assert stage.journal[0][0] == "first"
        stage.clock.advance(0.2)
        stage.loop.turn()
        assert stage.journal[TIMERS_PER_TURN][0] == "second"
        assert len(stage.journal) == 2 * TIMERS_PER_TURN < len(crowd)

    def test_all_are_counted(self, stage: Stage, crowd: list[Actor]) -> None:
        """Those who are due and have not fired are still timers."""
        assert stage.loop.timers == len(crowd) + 1
        stage.loop.turn()
        assert stage.loop.timers == len(crowd) + 1 - TIMERS_PER_TURN
