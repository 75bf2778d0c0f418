"""The gate of TLS handshakes: how many steps in a turn, how many under way, and in which order."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lpechod.engine.loop import Loop
from lpechod.engine.poller import MAX_EVENTS, READABLE, Ready
from lpechod.net.handshakegate import SILENCE_SECONDS, STEPS_PER_TURN, HandshakeGate
from tests.fake_time import FakeClock

LIMIT = 6


class ScriptedPoller:
    """A kernel in which that is ready which the test says, for one turn."""

    edge_triggered = False

    def __init__(self) -> None:
        self.ready: Ready = []

    def register(self, fd: int, mask: int) -> None:
        """Need nothing."""

    modify = register

    def unregister(self, fd: int) -> None:
        """Need nothing."""

    forget = unregister

    def poll(self, _timeout: float | None, _maxevents: int = MAX_EVENTS, /) -> Ready:
        """Return what is ready, once."""
        ready, self.ready = self.ready, []
        return ready

    def close(self) -> None:
        """Need nothing."""


class Shaking:
    """A handshake in the loop that asks the gate whenever it is called.

    Attributes:
        steps: the turn of each step that it has made.
        parked: whether it was told to wait, and was not called since.
        gone: whether it has ended.
    """

    def __init__(self, hall: "Hall", fd: int) -> None:
        self.hall = hall
        self.fd = fd
        self.steps: list[int] = []
        self.parked = self.gone = False

    def on_ready(self, mask: int, _now: float) -> None:
        """Make a step if the gate allows it."""
        assert not (mask and self.parked), "woken by a descriptor that nobody watches"
        if not self.gone:
            self.parked = not self.hall.gate.admits(self, self)
            if not self.parked:
                self.steps.append(self.hall.loop.turns)
                self.hall.stepped.append(self)

    def on_failure(self, error: Exception, _now: float) -> None:
        """Fail the test."""
        raise error


class Hall:
    """A loop with a gate and those who come to it.

    Args:
        limit: of the gate.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.poller = ScriptedPoller()
        self.clock = FakeClock()
        self.loop = Loop(self.poller, self.clock)
        self.delays = 0
        self.gate = HandshakeGate(self.loop, limit, self._on_delay)
        self.all: list[Shaking] = []
        self.stepped: list[Shaking] = []

    def _on_delay(self) -> None:
        self.delays += 1

    def come(self) -> Shaking:
        """Add one, whose first bytes are there in the next turn."""
        shaking = Shaking(self, len(self.all))
        self.all.append(shaking)
        self.loop.register(shaking.fd, shaking, READABLE)
        self.poller.ready.append((shaking.fd, READABLE))
        return shaking

    def go_on(self, *several: Shaking) -> None:
        """Have more bytes of those who do not wait arrive."""
        known = {fd for fd, _ in self.poller.ready}
        self.poller.ready += [
            (each.fd, READABLE)
            for each in several
            if not (each.parked or each.gone or each.fd in known)
        ]

    def leave(self, shaking: Shaking) -> None:
        """End one."""
        shaking.gone = True
        self.gate.leave(shaking)

    def turn(self) -> list[Shaking]:
        """Turn once, and return who made a step."""
        self.stepped = []
        self.loop.turn()
        return self.stepped

    def turn_until_quiet(self) -> int:
        """Turn until nobody asks for another turn, and return how many turns that took."""
        for turns in range(1000):
            if not (self.loop.asking or self.poller.ready):
                return turns
            self.turn()
        raise AssertionError("never quiet")


def test_a_flood_is_spread_over_turns() -> None:
    """Of those who come at once, so many make a step in each turn, in the order they came."""
    hall = Hall(100)
    crowd = [hall.come() for _ in range(10)]
    order = [hall.turn() for _ in range(4)]
    assert [each for turn in order for each in turn] == crowd
    # Those who wait hear of it in one turn, and step in the next.
    assert [len(turn) for turn in order] == [STEPS_PER_TURN, 0, STEPS_PER_TURN, 2]
    assert hall.turn_until_quiet() <= 1
    assert hall.delays == 0, "nobody has waited for a place"


def test_steps_of_those_let_through_count_in_their_turn() -> None:
    """Who was let through and who has just become readable share the steps of one turn."""
    hall = Hall(100)
    first = [hall.come() for _ in range(STEPS_PER_TURN)]
    hall.turn()
    waiting = [hall.come() for _ in range(2 * STEPS_PER_TURN)]
    hall.turn()
    for _ in range(6):
        hall.go_on(*first)
        assert len(hall.turn()) <= STEPS_PER_TURN
    assert all(each.steps for each in waiting)


def test_waiting_ones_do_not_block_those_under_way() -> None:
    """However many wait for a place, who has one goes on at once."""
    hall = Hall(2)
    first = [hall.come() for _ in range(2)]
    for _ in range(20):
        hall.come()
    hall.turn()
    hall.turn_until_quiet()
    assert (len(hall.gate.under_way), hall.delays) == (2, 20)
    hall.go_on(*first)
    assert hall.turn() == first


def test_a_newcomer_begins_though_others_use_up_each_turn() -> None:
    """Those under way can't keep free places empty, however many steps they ask for."""
    hall = Hall(100)
    crowd = [hall.come() for _ in range(10 * STEPS_PER_TURN)]
    hall.turn()
    while not all(each.steps for each in crowd):
        hall.turn()
    for turn in range(20):
        hall.go_on(*crowd)
        if turn == 10:
            newcomer = hall.come()
        hall.turn()
    assert newcomer.steps


def test_places_go_to_those_who_wait_longest() -> None:
    """A place that gets free goes to the first who waits, and not to one who comes just then."""
    hall = Hall(1)
    first, second, third = (hall.come() for _ in range(3))
    hall.turn()
    hall.leave(first)
    late = hall.come()
    hall.turn_until_quiet()
    assert (len(second.steps), third.steps, late.steps) == (1, [], [])
    hall.leave(second)
    hall.turn_until_quiet()
    assert (len(third.steps), late.steps) == (1, [])


@pytest.mark.parametrize("when", ["waiting", "resting", "let through"])
def test_who_leaves_is_forgotten(when: str) -> None:
    """Who ends while it waits takes no step and no place, and the loop comes to rest."""
    hall = Hall(STEPS_PER_TURN + 1 if when == "resting" else STEPS_PER_TURN)
    crowd = [hall.come() for _ in range(STEPS_PER_TURN)]
    hall.turn()
    leaver = hall.come()
    if when == "resting":
        hall.turn()
        hall.go_on(*crowd, leaver)
        hall.turn()
    elif when == "let through":
        hall.turn()
        hall.leave(crowd.pop())
        while leaver not in hall.gate.under_way:
            hall.turn()
    else:
        hall.turn()
    steps = list(leaver.steps)
    assert leaver.parked
    hall.leave(leaver)
    hall.turn_until_quiet()
    assert leaver.steps == steps
    assert set(hall.gate.under_way) == set(crowd)
    for each in crowd:
        hall.leave(each)
    hall.turn_until_quiet()
    assert not hall.gate.under_way


def test_who_falls_silent_loses_its_place() -> None:
    """While others wait, a handshake without a step for a while keeps none of them out."""
    hall = Hall(2)
    silent, other = hall.come(), hall.come()
    hall.turn()
    late, later = hall.come(), hall.come()
    hall.turn_until_quiet()
    hall.clock.advance(SILENCE_SECONDS - 0.1)
    hall.go_on(other)
    hall.turn_until_quiet()
    assert not late.steps
    hall.clock.advance(0.2)
    hall.turn()
    hall.turn_until_quiet()
    assert (len(late.steps), later.steps) == (1, [])
    assert set(hall.gate.under_way) == {other, late}

    hall.go_on(silent)  # It is heard of again, and has to wait behind who waits already.
    hall.turn_until_quiet()
    assert silent.parked
    hall.leave(other)
    hall.leave(late)
    hall.turn_until_quiet()
    assert (len(later.steps), len(silent.steps)) == (1, 2)


def test_nobody_loses_a_place_that_nobody_wants() -> None:
    """However long a handshake is silent, its place is its own until somebody needs it."""
    hall = Hall(1)
    only = hall.come()
    hall.turn_until_quiet()
    hall.clock.advance(100)
    hall.turn()
    assert set(hall.gate.under_way) == {only}
    assert hall.loop.timers == 0
    hall.go_on(only)
    hall.turn()
    assert len(only.steps) == 2


def test_who_was_not_let_is_not_silent() -> None:
    """Whoever waits for a step of a turn keeps its place, however long that takes."""
    hall = Hall(STEPS_PER_TURN + 1)
    crowd = [hall.come() for _ in range(STEPS_PER_TURN + 1)]
    hall.turn_until_quiet()
    newcomer = hall.come()
    hall.turn()
    hall.go_on(*crowd)
    hall.turn()
    resting = [each for each in crowd if each.parked]
    assert len(resting) == 1
    hall.clock.advance(10)
    hall.go_on(*crowd)
    hall.turn_until_quiet()
    assert all(len(each.steps) >= 2 for each in crowd)
    assert set(crowd) - set(hall.gate.under_way) <= {crowd[0]}
    hall.clock.advance(10)
    hall.turn()
    hall.turn_until_quiet()
    assert newcomer.steps


def test_who_waits_costs_nothing() -> None:
    """Nobody turns the loop for those who wait for a place."""
    hall = Hall(1)
    for _ in range(100):
        hall.come()
    hall.turn()
    assert hall.turn_until_quiet() <= 1


class AnyCrowd(RuleBasedStateMachine):
    """Handshakes that come, go on and end in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.hall = Hall()
        self.left: set[Shaking] = set()

    @rule(count=st.integers(1, 12))
    def come(self, count: int) -> None:
        """Some come at once."""
        for _ in range(count):
            self.hall.come()

    @rule(data=st.data())
    @precondition(lambda self: self.hall.all)
    def go_on(self, data: st.DataObject) -> None:
        """More bytes arrive for some of those who have begun."""
        begun = [each for each in self.hall.all if each.steps]
        if begun:
            self.hall.go_on(*data.draw(st.lists(st.sampled_from(begun), unique=True)))

    @rule(data=st.data())
    @precondition(lambda self: any(not each.gone for each in self.hall.all))
    def leave(self, data: st.DataObject) -> None:
        """One ends, whether it has begun or not."""
        present = [each for each in self.hall.all if not each.gone]
        self.hall.leave(data.draw(st.sampled_from(present)))

    @rule(data=st.data())
    def call_early(self, data: st.DataObject) -> None:
        """One who waits is called by somebody else than the gate, as with a deadline."""
        parked = [each for each in self.hall.all if each.parked and not each.gone]
        if parked:
            early = data.draw(st.sampled_from(parked))
            self.hall.loop.again(early, 0)

    @rule()
    def turn(self) -> None:
        """Make a turn."""
        stepped = self.hall.turn()
        assert len(stepped) <= STEPS_PER_TURN
        assert len(set(stepped)) == len(stepped)

    @invariant()
    def places(self) -> None:
        """So many are under way, and nobody who has gone."""
        under_way = self.hall.gate.under_way
        assert len(under_way) <= LIMIT
        assert not any(each.gone for each in self.hall.all if each in under_way)

    @invariant()
    def order(self) -> None:
        """They begin in the order in which they came, but for those who left before."""
        begun = [each.steps[0] for each in self.hall.all if each.steps]
        assert begun == sorted(begun)

    def teardown(self) -> None:
        """Everybody gets through in the end, and nothing is left."""
        hall = self.hall
        while any(not each.gone for each in hall.all):
            hall.turn_until_quiet()
            begun = [each for each in hall.all if each.steps and not each.gone]
            assert begun, "nobody gets through though places are free"
            for each in begun:
                assert not each.parked, "forgotten in the middle"
                hall.leave(each)
        hall.turn_until_quiet()
        assert not hall.gate.under_way


TestAnyCrowd = AnyCrowd.TestCase
TestAnyCrowd.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
