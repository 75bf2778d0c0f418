"""The turn of the loop: its order, what waits for the next one, and defects contained."""

from collections.abc import Callable

import pytest

from lpechod.engine.loop import TICKS_PER_SECOND, Loop
from lpechod.engine.poller import READABLE, WRITABLE, Ready, open_poller
from tests.engine.conftest import Pairs
from tests.engine.stage import Actor, Stage, fd_of
from tests.fake_time import FakeClock, FakeTimePoller


class TestTurn:
    """One turn from its wait to its closes."""

    def test_order(self, stage: Stage, ready: Callable[..., Actor]) -> None:
        """A turn serves what is ready, then what asked for more, then deadlines, then closes."""
        timer = Actor(stage, "timer")
        stage.loop.schedule(timer, stage.clock.now)
        stage.clock.advance(1.0)
        closing = Actor(stage, "closing")
        ready("source", lambda _now: stage.loop.defer_close(closing))
        stage.loop.again(Actor(stage, "again"), WRITABLE)
        stage.loop.turn()

        assert stage.journal == [
            ("source", "ready", READABLE),
            ("again", "ready", WRITABLE),
            ("timer", "deadline", 1001.0),
            ("closing", "close"),
        ]
        assert len(stage.turns) == 1

    def test_shortcut(self, stage: Stage, ready: Callable[..., Actor]) -> None:
        """Who is set as the shortcut is given what is ready first, and sources have the rest."""
        given: list[tuple[int, float]] = []

        def take_the_first(events: Ready, crowd: int, now: float) -> Ready:
            given.append((crowd, now))
            return events[1:]

        ready("first")
        ready("second")
        stage.loop.again(Actor(stage, "again"), 0)
        stage.loop.shortcut = take_the_first
        stage.loop.turn()

        assert given == [(3, 1000.0)]
        assert [entry[0] for entry in stage.journal] == ["second", "again"]

    def test_one_time_for_all(self, stage: Stage, ready: Callable[..., Actor]) -> None:
        """Time is read when the wait returns; however slow a handler is, all are told the same."""
        times: list[float] = []

        def dawdle(now: float) -> None:
            times.append(now)
            assert stage.loop.now == now
            stage.clock.advance(7.0)

        stage.loop.schedule(Actor(stage, "timer", dawdle), 0.0)
        stage.clock.advance(0.1)
        for name in ("first", "second"):
            ready(name, dawdle)
        stage.loop.again(Actor(stage, "again", dawdle), 0)
        stage.loop.turn()

        assert times == [1000.1] * 4

    def test_clock_readings(self, stage: Stage, ready: Callable[..., Actor]) -> None:
        """A turn reads the clock at its start and at its end, and before a wait for a time-out."""
        ready("source")
        stage.clock.readings = 0
        stage.loop.turn()
        assert stage.clock.readings == 3

        stage.loop.again(Actor(stage, "again"), 0)
        stage.clock.readings = 0
        stage.loop.turn()
        assert stage.clock.readings == 2

    def test_reports_itself(self, stage: Stage, ready: Callable[..., Actor]) -> None:
        """Each turn reports how long it took without its wait, and how many events it had."""
        ready("slow", lambda _now: stage.clock.advance(0.25))
        ready("fast")
        stage.loop.again(Actor(stage, "again"), 0)
        stage.loop.turn()

        assert stage.turns == [(0.25, 3)]

    def test_wait_is_no_part_of_a_turn(self, stage: Stage) -> None:
        """The time spent waiting for a deadline is not counted as work."""
        stage.loop.schedule(Actor(stage, "timer"), 1100.0)
        stage.loop.turn()

        assert stage.turns == [(0.0, 0)]
        assert stage.clock.now == 1100.0

    def test_reports_nothing_by_default(self) -> None:
        """A loop without anybody to report to turns all the same."""
        clock = FakeClock()
        loop = Loop(FakeTimePoller(open_poller("auto"), clock), clock)
        loop.again(Actor(Stage("select"), "again"), 0)
        loop.turn()
        loop.close()

    def test_masks_are_passed_on(self, stage: Stage, unix_pair: Pairs) -> None:
        """A source learns what its descriptor is ready for, and interest can be changed."""
        ours, theirs = unix_pair()
        theirs.send(b"frame")
        stage.loop.register(ours.fileno(), Actor(stage, "source"), READABLE | WRITABLE)
        stage.loop.turn()
        stage.loop.modify(ours.fileno(), WRITABLE)
        stage.loop.turn()

        assert stage.journal == [
            ("source", "ready", READABLE | WRITABLE),
            ("source", "ready", WRITABLE),
        ]

    def test_refused_registration_leaves_no_trace(self, stage: Stage, unix_pair: Pairs) -> None:
        """A descriptor that the poller refuses has no source afterwards."""
        ours, _theirs = unix_pair()
        fd = ours.fileno()
        ours.close()

        with pytest.raises(OSError, match="Bad file descriptor"):
            stage.loop.register(fd, Actor(stage, "source"), READABLE)
        assert not stage.loop._sources

    def test_closes_its_poller(self) -> None:
        """Closing the loop closes the poller, and nothing can be watched any more."""
        stage = Stage("auto")
        stage.loop.close()

        with pytest.raises(ValueError, match="closed"):
            stage.loop.turn()

    def test_counts_its_turns(self, stage: Stage) -> None:
        """Each turn counts, whether it had anything to do or not."""
        assert stage.loop.turns == 0
        for expected in (1, 2, 3):
            stage.turn_at_once()
            assert stage.loop.turns == expected

    def test_shows_what_woke_it(self, stage: Stage, ready: Callable[..., Actor]) -> None:
        """Within a turn and after it, everybody can see which descriptors woke the loop."""
        shown: list[list[tuple[int, int]]] = []
        assert stage.loop.ready == []
        source = ready("source", lambda _now: shown.append(stage.loop.ready))
        stage.loop.turn()
        woken_by = [(fd_of(source), READABLE)]
        assert shown == [woken_by]
        assert stage.loop.ready == woken_by
        stage.loop.unregister(fd_of(source))
        stage.turn_at_once()

        assert stage.loop.ready == []

    def test_knows_whether_edges_are_wanted(self) -> None:
        """The loop passes on whether its poller wants connections to register for edges."""
        assert not Stage("poll").loop.edge_triggered


class TestNextTurn:
    """Work created during a turn waits for the next one."""

    def test_again_does_not_wait(self, stage: Stage) -> None:
        """After `again` the next poll does not wait, and the one after that does."""
        stage.loop.again(Actor(stage, "again"), READABLE)
        stage.loop.schedule(Actor(stage, "timer"), 1010.0)
        stage.loop.turn()
        stage.loop.turn()

        assert stage.poller.timeouts == [0.0, 10.0]
        assert stage.journal == [("again", "ready", READABLE), ("timer", "deadline", 1010.0)]

    def test_again_merges(self, stage: Stage) -> None:
        """Asking twice is asking once, with both masks."""
        source = Actor(stage, "source")
        stage.loop.again(source, READABLE)
        stage.loop.again(source, 0)
        stage.loop.again(source, WRITABLE)
        stage.loop.turn()

        assert stage.journal == [("source", "ready", READABLE | WRITABLE)]

    def test_again_can_be_seen(self, stage: Stage) -> None:
        """Until the next turn, everybody can see what kinds of sources have asked for it."""

        class Asking(Actor):
            pass

        assert stage.loop.asking == []
        stage.loop.again(Asking(stage, "again"), 0)
        stage.loop.again(Actor(stage, "first"), 0)
        stage.loop.again(Actor(stage, "second"), 0)
        assert stage.loop.asking == ["Actor", "Asking"]
        stage.loop.turn()

        assert stage.loop.asking == []

    def test_again_within_again(self, stage: Stage) -> None:
        """A source that asks again whenever it is called gets one call a turn."""
        source = Actor(stage, "source", lambda _now: stage.loop.again(source, READABLE))
        stage.loop.again(source, READABLE)
        for turns in (1, 2, 3):
            stage.loop.turn()
            assert len(stage.journal) == turns

        assert stage.poller.timeouts == [0.0] * 3

    def test_again_does_not_starve_others(self, stage: Stage, ready: Callable[..., Actor]) -> None:
        """While a source asks again and again, descriptors and deadlines are served each turn."""
        greedy = Actor(stage, "greedy", lambda _now: stage.loop.again(greedy, 0), journaled=False)
        stage.loop.again(greedy, 0)
        ready("source")
        stage.loop.schedule(Actor(stage, "timer"), 1000.0)
        stage.clock.advance(0.1)
        stage.loop.turn()

        assert stage.journal == [("source", "ready", READABLE), ("timer", "deadline", 1000.1)]

    @pytest.mark.parametrize("idle", [0.0, 0.1, 5000.0])
    @pytest.mark.parametrize("origin", ["ready", "again", "deadline"])
    def test_due_timer_filed_in_a_turn(
        self, stage: Stage, ready: Callable[..., Actor], origin: str, idle: float
    ) -> None:
        """A timer filed with a deadline that is past already fires in a later turn, not in this."""
        stage.clock.advance(idle)
        late = Actor(stage, "late")

        def file_late(now: float) -> None:
            stage.loop.schedule(late, now - 1.0)

        if origin == "ready":
            source = ready("origin", file_late)
        elif origin == "again":
            stage.loop.again(Actor(stage, "origin", file_late), 0)
        else:
            stage.loop.schedule(Actor(stage, "origin", file_late), stage.clock.now)
        stage.loop.turn()
        if origin == "ready":
            stage.loop.unregister(fd_of(source))

        assert [name for name, *_ in stage.journal] == ["origin"]
        assert late.filed
        filed_at = stage.clock.now
        stage.loop.turn()
        assert [name for name, *_ in stage.journal] == ["origin", "late"]
        assert stage.clock.now <= filed_at + 1 / TICKS_PER_SECOND + 0.001

    def test_descriptor_registered_in_a_turn(
        self, stage: Stage, ready: Callable[..., Actor]
    ) -> None:
        """A descriptor that is ready when it is registered is served in the next turn."""
        source = ready("source", lambda _now: ready("fresh"))
        stage.loop.turn()
        assert [name for name, *_ in stage.journal] == ["source"]

        stage.loop.unregister(fd_of(source))
        stage.loop.turn()
        assert [name for name, *_ in stage.journal] == ["source", "fresh"]


class TestDefects:
    """What a source raises costs that source, and nobody else."""

    def test_contained(self, stage: Stage, ready: Callable[..., Actor]) -> None:
        """Each defect reaches the one that has it, and everybody else is served."""

        def fail(_now: float) -> None:
            raise RuntimeError(stage.journal[-1][0])

        for number in (1, 2, 3):
            act = fail if number == 2 else lambda _now: None
            ready(f"source{number}", act)
            stage.loop.again(Actor(stage, f"again{number}", act), 0)
            stage.loop.schedule(Actor(stage, f"timer{number}", act), stage.clock.now)
        stage.clock.advance(0.1)
        stage.loop.defer_close(Actor(stage, "closing"))
        stage.loop.turn()

        assert [(name, what) for name, what, *_ in stage.journal] == [
            ("source1", "ready"),
            ("source2", "ready"),
            ("source2", "failure"),
            ("source3", "ready"),
            ("again1", "ready"),
            ("again2", "ready"),
            ("again2", "failure"),
            ("again3", "ready"),
            ("timer1", "deadline"),
            ("timer2", "deadline"),
            ("timer2", "failure"),
            ("timer3", "deadline"),
            ("closing", "close"),
        ]
        failures = [(name, *rest) for name, what, *rest in stage.journal if what == "failure"]
        assert all(name == told for name, told in failures)
        assert len(stage.turns) == 1

    def test_signals_are_no_defects(self, stage: Stage, ready: Callable[..., Actor]) -> None:
        """KeyboardInterrupt and SystemExit are nobody's defect, and end the loop."""

        def leave(_now: float) -> None:
            raise SystemExit(3)

        ready("source", leave)

        with pytest.raises(SystemExit):
            stage.loop.run()
        assert stage.journal == [("source", "ready", READABLE)]

    def test_failure_of_failure_ends_the_loop(self, stage: Stage) -> None:
        """A source that can't even give up passes the error on to the caller."""

        def fail(_now: float) -> None:
            raise RuntimeError("defect")

        class Helpless(Actor):
            def on_failure(self, error: Exception, now: float) -> None:  # noqa: ARG002
                raise error

        stage.loop.again(Helpless(stage, "helpless", fail), 0)

        with pytest.raises(RuntimeError, match="defect"):
            stage.loop.turn()


class TestRun:
    """Running and stopping."""

    def test_stop_ends_after_the_present_turn(
        self, stage: Stage, ready: Callable[..., Actor]
    ) -> None:
        """A handler that stops the loop does not take the turn from those after it."""
        ready("first", lambda _now: stage.loop.stop())
        ready("second")
        stage.loop.defer_close(Actor(stage, "closing"))
        stage.loop.run()

        assert [name for name, *_ in stage.journal] == ["first", "second", "closing"]

    def test_runs_until_stopped(self, stage: Stage) -> None:
        """The loop turns for as long as nobody stops it."""
        timer = Actor(stage, "timer")

        def tick(now: float) -> None:
            if len(stage.journal) == 5:
                stage.loop.stop()
            stage.loop.schedule(timer, now + 1.0)

        timer.act = tick
        stage.loop.schedule(timer, 1001.0)
        stage.loop.run()

        assert [entry[2] for entry in stage.journal] == [1001.0, 1002.0, 1003.0, 1004.0, 1005.0]

    def test_stopped_before_it_runs(self, stage: Stage) -> None:
        """A loop that was stopped already does not turn, and does not wait."""
        stage.loop.stop()
        stage.loop.run()

        assert stage.turns == []
