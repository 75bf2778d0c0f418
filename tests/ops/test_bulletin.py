"""When a worker shows its counters: at once if anything has happened, once a second at rest."""

import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from lpechod.engine.loop import Loop
from lpechod.engine.poller import open_poller
from lpechod.engine.wheel import Timer
from lpechod.net.service import EchoService, ServiceSettings
from lpechod.ops.bulletin import BEATS_AT_REST, Bulletin
from lpechod.ops.counters import Totals, TurnWatch, gather
from lpechod.ops.segment import Segment
from lpechod.wire.states import CloseReason
from lpechod.wire.tally import Tally
from tests.fake_time import FakeClock, FakeTimePoller
from tests.net.harness import RecordingLog, frame


class Stage(Timer):
    """A worker's loop and service whose heartbeat is a bulletin's only, in fake time.

    Attributes:
        gathered: how often the totals were asked for.
    """

    def __init__(self, segment: Segment) -> None:
        super().__init__()
        clock, tally = FakeClock(), Tally()
        self.watch = TurnWatch(tally)
        self.loop = Loop(FakeTimePoller(open_poller("auto"), clock), clock, self.watch.note)
        self.service = EchoService(ServiceSettings(), self.loop, tally, RecordingLog())
        self.slot = segment.claim()
        self.bulletin = Bulletin(self.slot, self.loop, self.service, self._totals)
        self.gathered = 0
        self.on_deadline(clock.now)

    def on_deadline(self, now: float) -> None:
        self.bulletin.beat()
        self.loop.schedule(self, now)

    def _totals(self) -> Totals:
        self.gathered += 1
        return gather(self.service, self.loop, self.watch)

    def turn(self, count: int = 1) -> None:
        """Turn so often; without clients each turn is a heartbeat."""
        for _ in range(count):
            self.loop.turn()


@pytest.fixture(name="stage")
def _stage() -> Iterator[Stage]:
    with ExitStack() as stack:
        segment = Segment.create()
        stack.callback(segment.close)
        stage = Stage(segment)
        stack.callback(stage.loop.close)
        yield stage
        stage.service.cut(stage.loop.now)
        stage.turn(3)


def test_at_rest(stage: Stage) -> None:
    """While nothing happens but heartbeats, the numbers are shown with every fifth of them."""
    assert stage.gathered == 1
    stage.turn(BEATS_AT_REST - 1)
    assert stage.gathered == 1
    stage.turn()
    assert stage.gathered == 2
    stage.turn(10 * BEATS_AT_REST)

    assert stage.gathered == 12


def test_what_is_new_is_shown_with_the_next_heartbeat(stage: Stage) -> None:
    """A frame is in the numbers after one heartbeat, and so is the end of its connection."""
    stage.turn(3)
    client, accepted = socket.socketpair()
    with client:
        stage.service.welcome(accepted.detach(), "", "listener")
        client.sendall(frame(b"echo"))
        stage.turn(2)
        assert client.recv(100) == frame(b"echo")
        shown = stage.slot.totals()
        assert (shown.connections_accepted, shown.connections_active) == (1, 1)
        assert shown.frames == 1
    stage.turn(3)

    assert sum(stage.slot.totals().connections_closed) == 1


def test_what_heartbeats_alone_bring_is_new(stage: Stage) -> None:
    """A connection that ends by a deadline, in the turn of a heartbeat, is shown with the next."""
    client, accepted = socket.socketpair()
    with client:
        stage.service.welcome(accepted.detach(), "", "listener")
        stage.turn(2)
        gathered = stage.gathered
        (connection,) = stage.service.connections
        connection.abort(CloseReason.OVERLOAD, stage.loop.now)
        stage.turn()
        stage.turn()

        assert stage.gathered == gathered + 1
        assert sum(stage.slot.totals().connections_closed) == 1


def test_show(stage: Stage) -> None:
    """Whoever wants the numbers to be seen now has them shown, and a second begins anew."""
    stage.turn(3)
    stage.bulletin.show()
    assert stage.gathered == 2
    assert sum(stage.slot.totals().turns) == 3
    stage.turn(BEATS_AT_REST - 1)

    assert stage.gathered == 2
