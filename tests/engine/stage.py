"""A loop in fake time, and actors that only write down what the loop does with them."""

import socket
from collections.abc import Callable

from lpechod.engine.loop import Loop
from lpechod.engine.poller import open_poller
from lpechod.engine.wheel import Timer
from tests.fake_time import FakeClock, FakeTimePoller

Journal = list[tuple[object, ...]]


class Stage:
    """A loop in fake time, and the journal of what happened in it.

    Args:
        name: of the poller underneath.
        start: first reading of the clock, in seconds.
    """

    def __init__(self, name: str = "auto", start: float = 1000.0) -> None:
        self.clock = FakeClock(start)
        self.poller = FakeTimePoller(open_poller(name), self.clock)
        self.turns: list[tuple[float, int]] = []
        self.loop = Loop(
            self.poller, self.clock, lambda seconds, events: self.turns.append((seconds, events))
        )
        self.journal: Journal = []

    def turn_at_once(self) -> None:
        """Turn without waiting: something else is to be done as well."""
        self.loop.again(Actor(self, "idler", journaled=False), 0)
        self.loop.turn()

    def close(self) -> None:
        self.loop.close()


class Actor(Timer):
    """A source, a timer and something to close, all of which only write into the journal.

    Args:
        stage: where it acts.
        name: in the journal.
        act: called with the time by `on_ready` and `on_deadline`, after they are journaled.
        descriptor: closed by `close`.
        journaled: whether it writes at all.
    """

    def __init__(
        self,
        stage: Stage,
        name: str,
        act: Callable[[float], object] = lambda _now: None,
        descriptor: socket.socket | None = None,
        *,
        journaled: bool = True,
    ) -> None:
        super().__init__()
        self.stage = stage
        self.name = name
        self.act = act
        self.descriptor = descriptor
        self.journaled = journaled

    def on_ready(self, mask: int, now: float) -> None:
        self.note("ready", mask)
        self.act(now)

    def on_deadline(self, now: float) -> None:
        self.note("deadline", now)
        self.act(now)

    def on_failure(self, error: Exception, now: float) -> None:  # noqa: ARG002 - of the interface.
        self.note("failure", str(error))

    def close(self) -> None:
        self.note("close")
        if self.descriptor is not None:
            self.descriptor.close()

    def note(self, *what: object) -> None:
        if self.journaled:
            self.stage.journal.append((self.name, *what))


def fd_of(actor: Actor) -> int:
    """Return the number of an actor's descriptor."""
    assert actor.descriptor is not None
    return actor.descriptor.fileno()
