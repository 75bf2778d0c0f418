"""The timer wheel by example, and its own checker against corruption."""

from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpechod.engine.wheel import NEVER, TimerWheel
from tests.engine.wheels import SLOTS, Alarm, CountingWheel


class TestSchedule:
    """Filing, moving and taking out."""

    @SLOTS
    @pytest.mark.parametrize("distance", [1, 2, 7, 8, 9, 1024, 1025, 100_000])
    def test_fires_at_its_tick(self, slots: int, distance: int) -> None:
        """A timer is not due one tick before its own, and is due at its own."""
        wheel = TimerWheel(slots, tick=5)
        alarm = Alarm()
        wheel.schedule(alarm, 5 + distance)

        assert wheel.advance(5 + distance - 1) == []
        assert wheel.next_tick() == 5 + distance
        assert wheel.advance(5 + distance) == [alarm]
        assert len(wheel) == 0
        assert wheel.next_tick() == NEVER
        wheel.check()

    @SLOTS
    @pytest.mark.parametrize("late", [0, 1, 100, 5000])
    def test_past_fires_at_the_next_tick(self, slots: int, late: int) -> None:
        """What is due already when it is filed fires at the next tick, not at once and not lost."""
        wheel = TimerWheel(slots, tick=5000)
        alarm = Alarm()
        wheel.schedule(alarm, 5000 - late)
        wheel.check()

        assert wheel.advance(5000) == []
        assert wheel.advance(5001) == [alarm]

    def test_moved_timer_fires_once(self) -> None:
        """Scheduling a filed timer moves it, to a later or to an earlier tick."""
        wheel = TimerWheel(8)
        later, earlier = Alarm("later"), Alarm("earlier")
        wheel.schedule(later, 3)
        wheel.schedule(earlier, 30)
        wheel.schedule(later, 20)
        wheel.schedule(earlier, 2)

        assert len(wheel) == 2
        assert wheel.advance(19) == [earlier]
        assert wheel.advance(100) == [later]
        assert wheel.advance(1000) == []

    def test_cancelled_timer_never_fires(self) -> None:
        """A cancelled timer is gone, and cancelling it again does nothing."""
        wheel = TimerWheel(8)
        alarm = Alarm()
        wheel.schedule(alarm, 3)
        wheel.cancel(alarm)
        wheel.cancel(alarm)

        assert not alarm.filed
        assert len(wheel) == 0
        assert wheel.advance(1000) == []
        wheel.check()

    def test_tick_that_never_comes(self) -> None:
        """A deadline beyond `NEVER` waits in the wheel without a claim to a wake-up."""
        wheel = TimerWheel(8)
        alarm = Alarm()
        wheel.schedule(alarm, NEVER * 10)
        wheel.check()

        assert wheel.next_tick() == NEVER
        assert wheel.advance(10**9) == []
        wheel.cancel(alarm)
        wheel.check()

    @SLOTS
    @given(
        start=st.integers(0, 3000),
        distances=st.tuples(*[st.integers(1, 5000) | st.integers(60, 70)] * 2),
    )
    @settings(deadline=None)
    def test_next_tick_is_exact(self, slots: int, start: int, distances: tuple[int, int]) -> None:
        """Without cancellations, the wheel names the very tick that is due next, near or far."""
        near, far = distances
        wheel = TimerWheel(slots, tick=start)
        ticks = sorted({start + 1, start + 1 + near, start + 1 + far})
        for tick in ticks:
            wheel.schedule(Alarm(), tick)
        for tick in ticks:
            assert wheel.next_tick() == tick
            wheel.advance(tick)

        assert wheel.next_tick() == NEVER

    def test_last_timer_of_a_slot_takes_its_wake_up_along(self) -> None:
        """Of many cancelled timers, each alone in its slot, at most one causes a wake-up."""
        wheel = TimerWheel(1024)
        alarms = [Alarm() for _ in range(1000)]
        for tick, alarm in enumerate(alarms, start=1):
            wheel.schedule(alarm, tick)
        for alarm in alarms:
            wheel.cancel(alarm)

        wake_ups = 0
        while wheel.next_tick() != NEVER:
            assert wheel.advance(wheel.next_tick()) == []
            wake_ups += 1
        assert wake_ups <= 1


class TestAdvance:
    """Moving on."""

    def test_order_within_a_rotation(self) -> None:
        """Within a rotation, timers come out by tick, and within a tick as they were filed."""
        wheel = TimerWheel(16, tick=100)
        by_tick = [109, 103, 116, 101, 103, 109, 110, 101]
        alarms = [Alarm(f"{number}") for number in range(len(by_tick))]
        for alarm, tick in zip(alarms, by_tick, strict=True):
            wheel.schedule(alarm, tick)

        due = wheel.advance(116)

        assert [alarms.index(alarm) for alarm in due if isinstance(alarm, Alarm)] == [
            number for _, number in sorted(zip(by_tick, range(len(by_tick)), strict=True))
        ]

    def test_time_going_back_changes_nothing(self) -> None:
        """Going back in time is refused, and the wheel is as it was."""
        wheel = TimerWheel(8, tick=50)
        alarm = Alarm()
        wheel.schedule(alarm, 60)

        with pytest.raises(ValueError, match="from tick 50 to 49"):
            wheel.advance(49)

        wheel.check()
        assert (wheel.tick, len(wheel), wheel.next_tick(), alarm.tick) == (50, 1, 60, 60)
        assert wheel.advance(60) == [alarm]

    def test_staying_is_not_going_back(self) -> None:
        """Advancing to the present tick is allowed, and finds nothing."""
        wheel = TimerWheel(8, tick=50)
        wheel.schedule(Alarm(), 50)

        assert wheel.advance(50) == []

    @SLOTS
    def test_refiling_into_the_same_slot_ends(self, slots: int) -> None:
        """A timer filed again while the due list is worked off waits for another tick."""
        wheel = CountingWheel(slots)
        alarm = Alarm()
        wheel.schedule(alarm, slots)
        fired = []
        for timer in wheel.advance(slots):
            assert timer.claim()
            fired.append(timer)
            wheel.schedule(timer, wheel.tick)  # Due at once, as an eager handler may ask.
            wheel.schedule(timer, wheel.tick + slots)  # The very slot that has just been opened.

        assert fired == [alarm]
        assert wheel.advance(2 * slots) == [alarm]
        wheel.check()

    @SLOTS
    def test_stall_opens_each_slot_at_most_once(self, slots: int) -> None:
        """Catching up after a stall costs at most one rotation, however many ticks were missed."""
        wheel = CountingWheel(slots)
        alarms = [Alarm() for _ in range(50)]
        for number, alarm in enumerate(alarms):
            wheel.schedule(alarm, 1 + 977 * number)

        due = wheel.advance(10**12)

        assert max(Counter(wheel.opened).values()) == 1
        assert len(wheel.opened) <= slots
        assert Counter(due) == Counter(alarms)
        wheel.check()

    def test_nothing_due_opens_no_slot(self) -> None:
        """Ticks that pass before anything is due cost nothing."""
        wheel = CountingWheel(8)
        wheel.schedule(Alarm(), 10**6)
        for tick in range(1000):
            wheel.advance(tick * 999)

        assert wheel.opened == []

    def test_steps_open_only_what_they_pass(self) -> None:
        """A step of a few ticks opens as many slots, not the whole rotation."""
        wheel = CountingWheel(1024, tick=1020)
        wheel.schedule(Alarm(), 1021)
        wheel.advance(1026)

        assert wheel.opened == [1021, 1022, 1023, 0, 1, 2]


class TestClaim:
    """Timers that are due, but called off by one that fires before them."""

    def test_claimed_once(self) -> None:
        """A due timer can be claimed once, and is not filed any more then."""
        wheel = TimerWheel(8)
        alarm = Alarm()
        wheel.schedule(alarm, 1)
        due = wheel.advance(1)

        assert (due, alarm.filed) == ([alarm], True)
        assert [alarm.claim(), alarm.filed, alarm.claim()] == [True, False, False]

    def test_cancelled_while_due(self) -> None:
        """A timer cancelled while it waits in the due list must not fire."""
        wheel = TimerWheel(8)
        alarm = Alarm()
        wheel.schedule(alarm, 1)
        wheel.advance(1)
        wheel.cancel(alarm)

        assert not alarm.claim()
        assert len(wheel) == 0
        wheel.check()

    def test_moved_while_due(self) -> None:
        """A timer moved while it waits in the due list fires at its new tick, and only there."""
        wheel = TimerWheel(8)
        alarm = Alarm()
        wheel.schedule(alarm, 1)
        wheel.advance(1)
        wheel.schedule(alarm, 9)

        assert not alarm.claim()
        wheel.check()
        assert wheel.advance(9) == [alarm]
        assert alarm.claim()

    def test_unfiled_timer_has_nothing_to_claim(self) -> None:
        """Timers that were never filed, or wait for their tick, cannot be claimed."""
        wheel = TimerWheel(8)
        alarm = Alarm()
        assert not alarm.claim()

        wheel.schedule(alarm, 3)
        assert not alarm.claim()
        assert wheel.advance(3) == [alarm]

    def test_default_failure_passes_the_error_on(self) -> None:
        """A timer that does not say how to give up hands the defect to whoever runs the loop."""
        error = RuntimeError("defect")

        with pytest.raises(RuntimeError, match="defect"):
            Alarm().on_failure(error, 1.0)


def _misplace(wheel: TimerWheel, alarm: Alarm) -> None:
    del wheel._slots[alarm.tick % 8][alarm]
    wheel._slots[(alarm.tick + 1) % 8][alarm] = None


def _outdate(_wheel: TimerWheel, alarm: Alarm) -> None:
    alarm.tick -= 16


def _postpone_slot(wheel: TimerWheel, alarm: Alarm) -> None:
    wheel._earliest[alarm.tick % 8] += 8


def _miscount(wheel: TimerWheel, _alarm: Alarm) -> None:
    wheel._len += 1


def _oversleep(wheel: TimerWheel, _alarm: Alarm) -> None:
    wheel._next += 1


def _run_ahead(wheel: TimerWheel, alarm: Alarm) -> None:
    wheel.tick = alarm.tick


def _retick(_wheel: TimerWheel, alarm: Alarm) -> None:
    alarm.tick = -1


class TestCheck:
    """The checker is what the properties below rest on, so it is made to fail."""

    @pytest.mark.parametrize(
        ("corrupt", "complaint"),
        [
            (_misplace, "in slot"),
            (_outdate, "in slot"),
            (_run_ahead, "in slot"),
            (_retick, "in slot"),
            (_postpone_slot, "is due before"),
            (_miscount, "counted as"),
            (_oversleep, "next is"),
        ],
    )
    def test_detects(self, corrupt: Callable[[TimerWheel, Alarm], None], complaint: str) -> None:
        """Each kind of corruption is found, and named."""
        wheel = TimerWheel(8)
        alarm = Alarm()
        wheel.schedule(alarm, 13)
        wheel.check()
        corrupt(wheel, alarm)

        with pytest.raises(AssertionError, match=complaint):
            wheel.check()
