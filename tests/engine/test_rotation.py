"""How a turn is divided among those who move many bytes, and whose turn the loop puts off."""

from collections.abc import Callable

import pytest

from lpechod.engine.buffers import RECEIVE_BYTES
from lpechod.engine.poller import EDGE, READABLE, WRITABLE, Ready
from lpechod.engine.rotation import (
    FEW,
    LEAST_SHARE_BYTES,
    LITTLE_READS,
    ROTATED_BYTES,
    SHARED_BYTES,
    UNDIVIDED,
    Rotation,
)
from tests.engine.conftest import Pairs
from tests.engine.stage import Actor, Stage, fd_of


@pytest.fixture(name="rotation")
def _rotation() -> Rotation[str]:
    return Rotation()


def greedy(stage: Stage, actor: Actor) -> None:
    """Have an actor be served by turns, and use up all that there is in one."""

    def spend(_now: float) -> None:
        stage.loop.rotation.spent += SHARED_BYTES

    actor.act = spend
    stage.loop.rotation.join(actor)


class TestShare:
    """What each of those that are ready may receive in a turn."""

    def test_of_few(self, rotation: Rotation[str]) -> None:
        """As long as they can't take more together than a turn has, nobody is bounded."""
        for ready in (0, 1, FEW):
            rotation.divide(ready)
            assert rotation.share == UNDIVIDED

    def test_of_many(self, rotation: Rotation[str]) -> None:
        """Many divide what a turn has, until there are few again."""
        for ready in (FEW + 1, 100, 256):
            rotation.divide(ready)
            assert 0 < rotation.share * ready <= SHARED_BYTES
        rotation.divide(FEW)
        assert rotation.share == UNDIVIDED

    def test_at_least(self, rotation: Rotation[str]) -> None:
        """However many they are, there is a share that is worth a call into the kernel."""
        rotation.divide(100_000)
        assert rotation.share == LEAST_SHARE_BYTES

    def test_room(self, rotation: Rotation[str]) -> None:
        """Who is served by turns has all the room there is, and others no more than their share."""
        small, large = memoryview(bytes(10)), memoryview(bytes(RECEIVE_BYTES))
        rotation.divide(100)
        rotation.join("by turns")

        assert len(rotation.room("other", large, begins=True)) == rotation.share
        assert len(rotation.room("other", small, begins=True)) == 10
        assert rotation.room("by turns", large, begins=True) is large

    def test_ration(self, rotation: Rotation[str]) -> None:
        """Who holds nothing has no more than a ration, if there is one, and others as ever."""
        large = memoryview(bytes(RECEIVE_BYTES))
        rotation.join("by turns")
        for crowd in (1, 100, 100_000):
            rotation.ration(UNDIVIDED)
            rotation.divide(crowd)
            share = rotation.share
            rotation.ration(1000)
            assert rotation.share == 1000
            rotation.divide(crowd)
            assert len(rotation.room("other", large, begins=True)) == 1000
            assert len(rotation.room("by turns", large, begins=True)) == 1000
            assert rotation.room("by turns", large, begins=False) is large
            assert not rotation.is_generous("by turns")
            with rotation.undivided():
                assert rotation.room("other", large, begins=True) is large
            rotation.ration(UNDIVIDED)
            rotation.divide(crowd)
            assert rotation.share == share
            assert rotation.is_generous("by turns")
            assert rotation.is_generous("other") is (crowd == 1)

    def test_undivided(self, rotation: Rotation[str]) -> None:
        """Nobody is bounded within a context that says so, and all are as before behind it."""
        rotation.divide(100)
        share = rotation.share
        with rotation.undivided():
            assert rotation.share == UNDIVIDED
        assert rotation.share == share


def little(rotation: Rotation[str], name: str, times: int) -> None:
    """Receive little, so many times."""
    for _ in range(times):
        rotation.weigh(name, LEAST_SHARE_BYTES - 1, LEAST_SHARE_BYTES - 1)


class TestMembers:
    """Who is served by turns."""

    def test_who_fills_its_share(self, rotation: Rotation[str]) -> None:
        """Who has filled its share joins, and stays for as long as it receives much at a time."""
        rotation.weigh("one", LEAST_SHARE_BYTES, 0)
        assert "one" in rotation.members
        rotation.weigh("one", LEAST_SHARE_BYTES, 0)
        assert "one" in rotation.members
        for _ in range(2):
            little(rotation, "one", LITTLE_READS - 1)
            assert "one" in rotation.members
            rotation.weigh("one", LEAST_SHARE_BYTES, 0)
        little(rotation, "one", LITTLE_READS)
        assert "one" not in rotation.members

    def test_who_has_much_to_send(self, rotation: Rotation[str]) -> None:
        """Who has much to send joins, and stays for as long as that is so."""
        rotation.expect("one", LEAST_SHARE_BYTES - 1)
        assert "one" not in rotation.members
        rotation.expect("one", LEAST_SHARE_BYTES)
        little(rotation, "one", LITTLE_READS - 1)
        rotation.weigh("one", 1, LEAST_SHARE_BYTES)
        little(rotation, "one", LITTLE_READS - 1)
        assert "one" in rotation.members
        little(rotation, "one", 1)
        assert "one" not in rotation.members

    def test_leaving(self, rotation: Rotation[str]) -> None:
        """Whoever leaves is forgotten, and need not have been there."""
        rotation.join("one")
        little(rotation, "one", 1)
        for _ in range(2):
            rotation.leave("one")
        assert not rotation.members
        assert not rotation._little


def line_up(rotation: Rotation[str], *names: str) -> None:
    """Have some be ready, who are served by turns."""
    for name in names:
        rotation.join(name)
        rotation.line_up(name, READABLE)


def served(rotation: Rotation[str], cost: int) -> list[str]:
    """Serve a turn, in which each moves so many bytes."""
    names = []
    for name, _ in rotation.turns():
        names.append(name)
        rotation.weigh(name, cost, 0)
    return names


class TestTurns:
    """Whose turn it is."""

    def test_the_longest_wait(self, rotation: Rotation[str]) -> None:
        """Whoever was ready first is served first, and in any case; then it is the last in line."""
        line_up(rotation, "c", "a", "b")
        for turn in range(6):
            line_up(rotation, "b", "a", "c")  # They still are.
            assert served(rotation, SHARED_BYTES) == ["cab"[turn % 3]]

    def test_as_long_as_there_is_room(self, rotation: Rotation[str]) -> None:
        """One after the other is served until they have moved what a turn has for them."""
        names = [f"{number:02}" for number in range(10)]
        for _ in range(5):
            line_up(rotation, *names)
            assert served(rotation, SHARED_BYTES // 4) == names[:4]
            names = names[4:] + names[:4]

    @pytest.mark.parametrize(("ready", "expected"), [(FEW, 8), (FEW + 1, 1)])
    def test_few_and_many(self, rotation: Rotation[str], ready: int, expected: int) -> None:
        """Few may move together what any few may; of many, no more than does not hold up others."""
        line_up(rotation, *(f"{number:02}" for number in range(ready)))
        assert len(served(rotation, ROTATED_BYTES)) == expected

    def test_who_was_not_ready(self, rotation: Rotation[str]) -> None:
        """Whoever becomes ready later is served later."""
        line_up(rotation, "b", "c")
        assert served(rotation, SHARED_BYTES) == ["b"]
        line_up(rotation, "a", "c", "b")
        assert [served(rotation, SHARED_BYTES) for _ in range(4)] == [["c"], ["a"], ["b"], []]

    def test_masks_add_up(self, rotation: Rotation[str]) -> None:
        """Whoever waits is served once, for all that it has been ready for."""
        line_up(rotation, "one")
        rotation.line_up("one", WRITABLE)
        assert list(rotation.turns()) == [("one", READABLE | WRITABLE)]

    def test_who_has_ended(self, rotation: Rotation[str]) -> None:
        """Whoever has ended is not waited for, and is not kept."""
        line_up(rotation, "a", "b")
        rotation.forget("a")
        assert served(rotation, SHARED_BYTES) == ["b"]
        rotation.forget("b")
        assert not rotation.members


class TestLoop:
    """What the loop does with those whose turn it is not."""

    def test_ready(self, stage: Stage, ready: Callable[..., Actor]) -> None:
        """Of those who are ready, one after the other is called, and all others in each turn."""
        for name in ("first", "second", "third"):
            greedy(stage, ready(name))
        ready("light")
        for name in ("first", "second", "third", "first"):
            stage.journal.clear()
            stage.loop.turn()
            assert [entry[0] for entry in stage.journal] == ["light", name]
            assert stage.turns[-1][1] == 2

    def test_asking_again(self, stage: Stage) -> None:
        """Whoever has asked for a turn gets one that comes after it, and the loop doesn't sleep."""
        for name in ("first", "second"):
            actor = Actor(stage, name)
            greedy(stage, actor)
            stage.loop.again(actor, WRITABLE)
        for _ in range(2):
            stage.loop.turn()

        assert stage.journal == [("first", "ready", WRITABLE), ("second", "ready", WRITABLE)]
        assert stage.poller.timeouts == [0.0, 0.0]

    def test_asking_and_ready(self, stage: Stage, ready: Callable[..., Actor]) -> None:
        """Whoever is ready and has asked for the turn, too, is called once, for both."""
        for name in ("first", "second"):
            actor = ready(name)
            greedy(stage, actor)
            stage.loop.again(actor, WRITABLE)
        for _ in range(2):
            stage.loop.turn()

        both = READABLE | WRITABLE
        assert stage.journal == [("first", "ready", both), ("second", "ready", both)]
        assert stage.turns[0][1] == 1, "who is called once, or has to wait, counts as such"

    def test_edges(self, unix_pair: Pairs) -> None:
        """An edge that comes when it is not a source's turn is kept until it is."""
        stage = Stage("epoll-et")
        for name in ("first", "second", "third"):
            ours, theirs = unix_pair()
            theirs.send(b"frame")
            actor = Actor(stage, name, descriptor=ours)
            stage.loop.register(fd_of(actor), actor, READABLE | EDGE)
            greedy(stage, actor)
        for _ in range(3):
            stage.loop.turn()
        stage.turn_at_once()
        stage.close()

        names = ("first", "second", "third")
        assert stage.journal == [(name, "ready", READABLE) for name in names]

    def test_closing(self, stage: Stage) -> None:
        """Whoever closes is not waited for any more."""
        actor = Actor(stage, "actor")
        stage.loop.rotation.join(actor)
        stage.loop.rotation.line_up(actor, READABLE)
        stage.loop.defer_close(actor)
        assert not stage.loop.rotation.members
        assert not stage.loop.rotation.line

    def test_nobody_sleeps_while_somebody_waits(self, stage: Stage) -> None:
        """A turn in which nothing is new serves the next in line, without waiting for anything."""
        actors = [Actor(stage, name) for name in ("first", "second")]
        for actor in actors:
            greedy(stage, actor)
            stage.loop.rotation.line_up(actor, READABLE)
        stage.loop.turn()
        stage.loop.turn()

        assert stage.journal == [("first", "ready", READABLE), ("second", "ready", READABLE)]
        assert stage.poller.timeouts == [0.0, 0.0]
        assert [events for _, events in stage.turns] == [1, 1]

    def test_the_crowd_is_all_who_wait(self, stage: Stage) -> None:
        """A turn is divided among those who are in line, too."""
        crowds = []

        def shortcut(ready: Ready, crowd: int, _now: float) -> Ready:
            crowds.append(crowd)
            return ready

        stage.loop.shortcut = shortcut
        for number in range(5):
            actor = Actor(stage, str(number))
            greedy(stage, actor)
            stage.loop.again(actor, READABLE)
        for _ in range(3):
            stage.loop.turn()

        assert crowds == [5, 4, 3]
