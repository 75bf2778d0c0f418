"""Newcomers: connections that the timer wheel does not know before its next tick."""

import socket
from contextlib import ExitStack

import pytest

from lpechod.engine.loop import Loop
from lpechod.engine.poller import open_poller
from lpechod.net.service import EchoService, ServiceSettings
from lpechod.net.steady import SteadyConnection
from lpechod.wire.settings import EchoSettings
from lpechod.wire.tally import Tally
from tests.fake_time import FakeClock, FakeTimePoller
from tests.net.conftest import Serve
from tests.net.harness import RecordingLog, descriptors, frame

TICK = 0.1
FILED_PER_TURN = 256
ROUNDING = 0.002
"""Time-outs of pollers are rounded up to a millisecond, that before the accept included."""


def test_short_connections_file_one_timer(serve: Serve) -> None:
    """Connections that end before the next tick have one timer, however many they are."""
    server = serve()
    for _ in range(20):
        client = server.connect()
        client.exchange(frame(b"short"))
        client.close()
        server.closed(client)
        assert server.loop.timers == 1
    server.pass_time(TICK)

    assert server.loop.timers == 0


def test_who_stays_is_filed_with_the_next_tick(serve: Serve) -> None:
    """Each connection that is still there at the next tick has a timer of its own from then on."""
    server = serve()
    for _ in range(5):
        server.connect()
    server.pass_time(TICK)
    assert server.loop.timers == 5
    assert not server.service._newcomers._connections
    server.connect()
    server.pass_time(TICK)

    assert server.loop.timers == 6


@pytest.mark.parametrize("idle_s", [0.01, 0.1, 0.15, 1.0])
def test_deadlines_are_met_in_time(serve: Serve, idle_s: float) -> None:
    """A deadline is met in the first tick that is not before it, also if that is the very next."""
    server = serve(echo=EchoSettings(idle_s=idle_s))
    client = server.connect()
    server.pass_time(idle_s + TICK)
    client.expect_eof()
    client.close()
    line = server.closed(client)

    assert line["reason"] == "idle_timeout"
    assert idle_s <= line["duration_s"] <= idle_s + TICK + ROUNDING  # type: ignore[operator]


def test_a_storm_is_filed_in_several_turns() -> None:
    """However many come within a tick, no turn files more than a few hundred of them."""
    clock = FakeClock()
    loop = Loop(FakeTimePoller(open_poller("auto"), clock), clock)
    service = EchoService(ServiceSettings(), loop, Tally(), RecordingLog())
    with ExitStack() as stack:
        stack.callback(loop.close)
        for _ in range(FILED_PER_TURN + 10):
            ours, theirs = socket.socketpair()
            stack.callback(theirs.close)
            service.welcome(ours.detach(), "", "listener")
        assert loop.timers == 1
        loop.turn()
        assert loop.timers == FILED_PER_TURN
        loop.turn()
        assert loop.timers == FILED_PER_TURN + 10
        service.cut(clock.now)
        loop.turn()
    assert not service.connections


def test_a_defect_costs_its_own_connection(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A newcomer whose deadline cannot be found out is closed, and the others are filed."""
    server = serve()
    server.errors = {"connection_failed"}
    clients = [server.connect() for _ in range(3)]
    for connection in server.service.connections:
        if connection.number == 2:
            monkeypatch.setattr(connection.protocol, "_settings", None)
    server.pass_time(TICK)

    assert server.closed(clients[1])["reason"] == "internal_error"
    assert server.loop.timers == len(server.service.connections) == 2


def test_a_defect_while_welcoming_costs_no_descriptor(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that cannot be put together is closed, and its place is free again."""
    server = serve()

    class Broken(SteadyConnection):
        def _register(self) -> None:
            raise LookupError("a defect")

    monkeypatch.setattr(server.service, "_kind", Broken)
    ours, theirs = socket.socketpair()
    before = descriptors()
    with theirs, pytest.raises(LookupError, match="a defect"):
        server.service.welcome(ours.detach(), "", "listener")

    assert len(before - descriptors()) == 2
    assert server.service.admission.active == 0
