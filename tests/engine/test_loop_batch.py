"""Several events in one turn of the loop, the earlier of which decide on the later."""

import socket
from collections.abc import Callable
from contextlib import ExitStack

from hypothesis import given, settings
from hypothesis import strategies as st

from lpechod.engine.poller import MAX_EVENTS, READABLE
from lpechod.engine.wheel import Timer
from tests.engine.conftest import Pairs
from tests.engine.stage import Actor, Stage, fd_of


class TestBatch:
    """Several events in one turn, the earlier of which change the fate of the later."""

    def test_unregistered_later_source_is_skipped(
        self, stage: Stage, ready: Callable[..., Actor]
    ) -> None:
        """A source that an earlier event of the batch has unregistered is not called."""
        actors: dict[str, Actor] = {}

        def oust(name: str) -> Callable[[float], None]:
            return lambda _now: stage.loop.unregister(fd_of(actors[name]))

        actors["one"] = ready("one", oust("two"))
        actors["two"] = ready("two", oust("one"))
        stage.loop.turn()

        assert len(stage.journal) == 1

    def test_number_is_not_reused_within_a_batch(
        self, stage: Stage, stack: ExitStack, unix_pair: Pairs
    ) -> None:
        """What a handler opens after closing another gets no number of the running batch."""
        actors: list[Actor] = []
        opened: list[socket.socket] = []

        def replace_others(_now: float) -> None:
            for actor in actors:
                if actor.descriptor is not None and stage.journal[-1][0] != actor.name:
                    stage.loop.unregister(fd_of(actor))
                    stage.loop.defer_close(actor)
            opened.extend(stack.enter_context(end) for end in socket.socketpair())
            for end in opened:
                stage.loop.register(end.fileno(), Actor(stage, "opened"), READABLE)

        for name in ("one", "two", "three"):
            ours, theirs = unix_pair()
            theirs.send(b"frame")
            actors.append(Actor(stage, name, replace_others, ours))
            stage.loop.register(ours.fileno(), actors[-1], READABLE)
        numbers = {fd_of(actor) for actor in actors}
        stage.loop.turn()

        assert [entry[1] for entry in stage.journal] == ["ready", "close", "close"]
        assert not numbers & {end.fileno() for end in opened}
        # It was the delay that kept them apart: now that the turn is over, they do come back.
        fresh = [stack.enter_context(end) for end in socket.socketpair()]
        assert numbers >= {end.fileno() for end in fresh}

    def test_a_batch_is_bounded(self, stage: Stage, unix_pair: Pairs) -> None:
        """A turn takes no more events than fairness allows, and those that are left come next."""

        def reader_of(ours: socket.socket) -> Callable[[float], object]:
            return lambda _now: ours.recv(1)

        for number in range(MAX_EVENTS + 1):
            ours, theirs = unix_pair()
            theirs.send(b"x")
            stage.loop.register(ours.fileno(), Actor(stage, str(number), reader_of(ours)), READABLE)
        stage.loop.turn()
        stage.loop.turn()
        assert [events for _, events in stage.turns] == [MAX_EVENTS, 1]
        assert len({name for name, *_ in stage.journal}) == MAX_EVENTS + 1

    def test_closed_at_the_end_of_its_turn(self, stage: Stage, ready: Callable[..., Actor]) -> None:
        """A deferred close happens in the same turn, once, also when another close causes it."""
        last = Actor(stage, "last")

        class Chain(Actor):
            def close(self) -> None:
                stage.loop.defer_close(last)

        first = Chain(stage, "chain")
        source = ready("source", lambda _now: stage.loop.defer_close(first))
        stage.loop.turn()
        assert stage.journal[1:] == [("last", "close")]

        stage.loop.unregister(fd_of(source))
        stage.turn_at_once()
        assert stage.journal[1:] == [("last", "close")]

    def test_a_failing_close_costs_its_own_source(
        self, stage: Stage, ready: Callable[..., Actor]
    ) -> None:
        """A close that raises reaches its own on_failure, and the others are still closed."""
        failures: list[Exception] = []

        class Faulty(Actor):
            def close(self) -> None:
                raise RuntimeError("close")

            def on_failure(self, error: Exception, _now: float) -> None:
                failures.append(error)

        faulty, sound = Faulty(stage, "faulty"), Actor(stage, "sound")

        def end_both(_now: float) -> None:
            stage.loop.defer_close(sound)
            stage.loop.defer_close(faulty)

        ready("source", end_both)
        stage.loop.turn()

        assert [str(error) for error in failures] == ["close"]
        assert stage.journal[1:] == [("sound", "close")]

    def test_a_closed_source_does_not_come_again(
        self, stage: Stage, ready: Callable[..., Actor]
    ) -> None:
        """What a source asked for in the turn that closes it is forgotten."""
        ended = Actor(stage, "ended")

        def ask_and_end(_now: float) -> None:
            stage.loop.again(ended, READABLE)
            stage.loop.defer_close(ended)

        source = ready("source", ask_and_end)
        stage.loop.turn()
        stage.loop.unregister(fd_of(source))
        stage.turn_at_once()

        assert stage.journal[1:] == [("ended", "close")]

    @given(data=st.data())
    @settings(max_examples=100, deadline=None)
    def test_any_behaviour(self, data: st.DataObject) -> None:
        """Whatever handlers do to each other, nobody gets an event that is not their own."""
        with ExitStack() as stack:
            Town(stack, data).live()


class Town:
    """Sources that open, close, delay and break each other as hypothesis tells them to.

    Args:
        stack: closes what is left over.
        data: makes the decisions.
    """

    def __init__(self, stack: ExitStack, data: st.DataObject) -> None:
        self.stack = stack
        self.data = data
        self.stage = Stage(data.draw(st.sampled_from(["epoll", "poll", "select"])))
        stack.callback(self.stage.close)
        self.turn = 0
        self.born = 0
        self.citizens: list[Citizen] = []

    def live(self) -> None:
        """Found the town, and run it for a few turns."""
        for _ in range(4):
            self.populate()
        for self.turn in range(1, 8):
            self.stage.turn_at_once()
            self.stage.loop._wheel.check()
            for citizen in self.citizens:
                if not citizen.closing:
                    assert self.turn in {citizen.served, citizen.born}
            self.stage.clock.advance(0.1)

    def populate(self) -> None:
        """Add a citizen, readable from the start."""
        if self.born < 40:
            self.born += 1
            self.citizens.append(Citizen(self, f"citizen{self.born}"))

    def decide(self, citizen: "Citizen") -> None:
        """Let a citizen do something to itself, to another, or to the town."""
        loop = self.stage.loop
        for _ in range(self.data.draw(st.integers(0, 2))):
            other = self.data.draw(st.sampled_from(self.citizens))
            match self.data.draw(st.sampled_from(["open", "close", "timer", "cancel", "raise"])):
                case "open":
                    self.populate()
                case "close":
                    other.leave()
                case "timer" if not other.closing:
                    loop.schedule(other, self.stage.clock.now + self.data.draw(st.floats(-1, 1)))
                    other.scheduled_in = self.turn
                case "cancel":
                    loop.cancel(other)
                    other.scheduled_in = None
                case "raise":
                    raise ZeroDivisionError(citizen.name)


class Citizen(Timer):
    """One of them, with a descriptor that always has something to read.

    Args:
        town: where it lives.
        name: in reports.
    """

    def __init__(self, town: Town, name: str) -> None:
        super().__init__()
        self.town = town
        self.name = name
        self.ours, self.theirs = socket.socketpair()
        for end in (self.ours, self.theirs):
            town.stack.callback(end.close)
            end.setblocking(False)
        self.theirs.send(b"x")
        self.born = town.turn
        self.served = town.turn
        self.closing = False
        self.scheduled_in: int | None = None
        town.stage.loop.register(self.ours.fileno(), self, READABLE)

    def __repr__(self) -> str:
        return self.name

    def on_ready(self, mask: int, now: float) -> None:
        assert mask == READABLE
        assert not self.closing
        assert self.born < self.town.turn, "served in the turn of its birth"
        assert self.served < self.town.turn, "served twice in a turn"
        assert now == self.town.stage.loop.now
        assert self.ours.recv(8) == b"x", "somebody else's event"
        self.theirs.send(b"x")
        self.served = self.town.turn
        self.town.decide(self)

    def on_deadline(self, now: float) -> None:
        assert now == self.town.stage.loop.now
        assert not self.closing
        assert self.scheduled_in is not None, "fired after it was cancelled"
        assert self.scheduled_in < self.town.turn, "fired in the turn that filed it"
        self.scheduled_in = None
        self.town.decide(self)

    def on_failure(self, error: Exception, now: float) -> None:
        if not isinstance(error, ZeroDivisionError):
            raise error
        assert str(error) == self.name, "somebody else's defect"
        assert now == self.town.stage.loop.now
        self.leave()

    def leave(self) -> None:
        if not self.closing:
            self.closing = True
            self.town.citizens.remove(self)
            if not self.town.citizens:
                self.town.populate()
            self.town.stage.loop.cancel(self)
            self.town.stage.loop.unregister(self.ours.fileno())
            self.town.stage.loop.defer_close(self)

    def close(self) -> None:
        assert self.closing
        self.ours.close()
        self.theirs.close()
