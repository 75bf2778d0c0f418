"""Near `max_connections`: who goes, who stays, and what it costs the others."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpechod.net.admission import AdmissionLimits
from lpechod.net.entrance import OPEN_TO_ALL
from lpechod.net.overload import CALM_SECONDS, CLOSES_PER_TURN, LOOK_AGAIN_SECONDS, LOOKS_PER_TURN
from lpechod.wire.settings import EchoSettings
from lpechod.wire.states import CloseReason
from tests.net.conftest import Serve
from tests.net.harness import PROXIED, Client, EchoServer, frame

ECHO = EchoSettings(overload_idle_s=10.0, overload_frame_s=4.0, min_rate_bytes_per_s=1024)
LIMITS = AdmissionLimits(max_connections=20)
MARK = 18
PING = frame(b"ping")


class Siblings:
    """The other workers."""

    connections = 0

    def __call__(self) -> int:
        return self.connections


def beat(server: EchoServer, seconds: float = 0.1) -> None:
    """Let time pass, with a heartbeat each tenth of a second as in a worker."""
    for _ in range(round(seconds * 10)):
        server.pass_time(0.1)
        server.service.overload.check(server.clock.now)
        server.settle()


def connect(server: EchoServer, count: int) -> list[Client]:
    """Connect clients, each a second after the one before."""
    clients = []
    for _ in range(count):
        clients.append(server.connect())
        beat(server, 1.0)
    return clients


def shed(server: EchoServer) -> int:
    """Return how many were told to go, whether they have gone yet or not."""
    return (
        sum(
            each.protocol.close_reason is CloseReason.OVERLOAD
            for each in server.service.connections
        )
        + server.service.counts.closed[CloseReason.OVERLOAD]
    )


def see_off(server: EchoServer, clients: list[Client]) -> None:
    """See clients closed in good order, and close them."""
    for client in clients:
        client.expect_eof()
        client.close()
        assert server.closed(client)["reason"] == "overload"


@pytest.fixture(name="server")
def _server(serve: Serve) -> EchoServer:
    return serve(echo=ECHO, admission=LIMITS)


class TestWhoGoes:
    """The longest overdue first, and only as many as it takes."""

    def test_the_longest_idle_first(self, server: EchoServer) -> None:
        """Of many idle ones those go that have been so for longest, down to below the mark."""
        clients = connect(server, MARK - 1)
        clients[0].exchange(PING)
        beat(server, 20.0)
        assert shed(server) == 0
        clients += [server.connect() for _ in range(2)]
        beat(server)

        see_off(server, clients[1:3])
        beat(server, 5.0)
        assert shed(server) == 2
        for client in [clients[0], *clients[3:]]:
            client.exchange(PING)

    def test_the_active_stay(self, server: EchoServer) -> None:
        """With all places taken, nobody goes who keeps to the shorter time, however long."""
        clients = [server.connect() for _ in range(LIMITS.max_connections)]
        for _ in range(6):
            beat(server, 9.0)
            for client in clients:
                client.exchange(PING)

        assert shed(server) == 0
        assert len(server.log.of("overload_began")) == 1

    def test_only_the_overdue(self, server: EchoServer) -> None:
        """If fewer are overdue than should go, the others stay all the same."""
        clients = [server.connect() for _ in range(LIMITS.max_connections)]
        beat(server, 9.0)
        for client in clients[1:]:
            client.exchange(PING)
        beat(server, 2.0)

        see_off(server, clients[:1])
        beat(server, 5.0)
        assert shed(server) == 1

    def test_those_who_become_overdue_later(self, server: EchoServer) -> None:
        """Who was in time at the first look is found by a later one."""
        clients = [server.connect() for _ in range(MARK)]
        beat(server, 9.0)
        assert shed(server) == 0
        for client in clients[1:]:
            client.exchange(PING)
        beat(server, 1.0 + LOOK_AGAIN_SECONDS)

        see_off(server, clients[:1])

    def test_leaving_ones_count(self, server: EchoServer) -> None:
        """Who has been told to go and does not is not replaced by another."""
        clients = connect(server, MARK)
        beat(server, 10.0)
        assert shed(server) == 1
        beat(server, 1.0)
        assert shed(server) == 1

        beat(server, 2.0)
        assert server.closed(clients[0])["reason"] == "overload"
        assert shed(server) == 1

    def test_places_are_free_again(self, server: EchoServer) -> None:
        """While silent clients hold the places, newcomers come in and are served."""
        for _ in range(LIMITS.max_connections):
            server.connect()
        server.connect().expect_eof()
        assert server.service.counts.rejected["max_connections"] == 1
        beat(server, 10.1)
        beat(server, 3.0)

        newcomer = server.connect()
        newcomer.exchange(PING)
        assert server.service.counts.rejected["max_connections"] == 1

    def test_silent_before_the_first_frame(self, serve: Serve) -> None:
        """Who never sends its PROXY header goes as if it were idle since it has connected."""
        echo = EchoSettings(overload_idle_s=3.0, handshake_s=100.0)
        server = serve(echo=echo, admission=LIMITS, entrance=PROXIED)
        served = [server.connect() for _ in range(5)]
        server.entrance = OPEN_TO_ALL
        silent = [server.dial() for _ in range(MARK - 5)]
        server.settle()
        server.entrance = PROXIED
        beat(server, 2.9)
        for client in served:
            client.exchange(PING)
        assert shed(server) == 0
        beat(server, 1.1)
        assert shed(server) == 1

        for client in silent:
            client.close()
        for client in served:
            client.exchange(PING)

    def test_inside_a_frame(self, server: EchoServer) -> None:
        """Who dribbles goes by the time for a frame, and before those who have been idle."""
        idle = [server.connect() for _ in range(MARK - 1)]
        beat(server, 3.0)
        dribbler = server.connect()
        dribbler.send(frame(bytes(2048))[:100])
        beat(server, 5.9)
        dribbler.send(b"\0")
        assert shed(server) == 0
        beat(server, 0.3)
        beat(server, LOOK_AGAIN_SECONDS)

        see_off(server, [dribbler])
        assert shed(server) == 1
        for client in idle:
            client.exchange(PING)

    def test_bytes_in_the_kernel_are_in_time(self, server: EchoServer) -> None:
        """Whose frames wait for us, since we were stopped, is not closed for our being late."""
        clients = [server.connect() for _ in range(MARK)]
        server.jump(60.0)
        for client in clients:
            assert client.send_some(PING) == len(PING)
        server.loop.now = server.clock.now
        server.service.overload.check(server.clock.now)
        for connection in server.service.connections:
            connection.vacate(server.clock.now)
        server.settle()

        assert shed(server) == 0
        for client in clients:
            assert client.receive_exactly(len(PING)) == PING

    def test_active_since_the_look(self, serve: Serve) -> None:
        """Who does something between the look and its turn to go stays."""
        limits = AdmissionLimits(max_connections=100)
        server = serve(echo=ECHO, admission=limits, overload_percent=50)
        clients = [server.connect() for _ in range(70)]
        server.pass_time(11.0)
        server.service.overload.check(server.clock.now)
        server.turn()
        assert shed(server) == 0
        for client in clients:
            assert client.send_some(PING) == len(PING)
        server.settle()
        for client in clients:
            assert client.receive_exactly(len(PING)) == PING
        beat(server)

        assert shed(server) == 0


class TestShare:
    """All workers share the limit, and each makes room in proportion to what it holds."""

    @pytest.mark.parametrize(
        ("own", "others", "share"), [(10, 7, 0), (10, 8, 1), (10, 10, 2), (4, 16, 1), (1, 19, 1)]
    )
    def test_in_proportion(self, serve: Serve, own: int, others: int, share: int) -> None:
        """Of those too many, each worker closes its part, rounded up."""
        siblings = Siblings()
        server = serve(echo=ECHO, admission=LIMITS, others=siblings)
        for _ in range(own):
            server.connect()
        siblings.connections = others
        beat(server, 11.0)

        assert shed(server) == share

    def test_without_connections(self, serve: Serve) -> None:
        """A worker that holds none is in overload with the others, and has nothing to do."""
        siblings = Siblings()
        siblings.connections = MARK
        server = serve(echo=ECHO, admission=LIMITS, others=siblings)
        beat(server, 1.0)

        server.assert_quiet()
        assert len(server.log.of("overload_began")) == 1


class TestEdges:
    """The beginning and the end are lines of the log; the time between is counted."""

    def test_once_each(self, server: EchoServer) -> None:
        """One warning when the mark is reached, one line when it is over, with what was done."""
        clients = [server.connect() for _ in range(MARK - 1)]
        beat(server)
        assert server.log.events() == []
        clients.append(server.connect())
        beat(server, 10.0 + LOOK_AGAIN_SECONDS)
        assert server.log.of("overload_began") == [{"connections": MARK, "own": MARK, "mark": MARK}]
        see_off(server, clients[:1])
        before = server.service.overload.seconds
        beat(server, CALM_SECONDS - 0.2)
        assert server.log.events() == ["overload_began"]
        beat(server, 0.5)
        assert server.log.events() == ["overload_began", "overload_ended"]
        (ended,) = server.log.of("overload_ended")
        assert ended["closed"] == 1
        assert server.service.overload.seconds == pytest.approx(before + CALM_SECONDS, abs=0.3)
        assert ended["duration_s"] == pytest.approx(server.service.overload.seconds, abs=0.2)

        beat(server, 20.0)
        assert server.service.overload.seconds == pytest.approx(before + CALM_SECONDS, abs=0.3)

    def test_around_the_mark(self, server: EchoServer) -> None:
        """A number that moves around the mark is one overload."""
        clients = [server.connect() for _ in range(MARK - 1)]
        for _ in range(10):
            last = server.connect()
            beat(server, 0.5)
            last.close()
            beat(server, CALM_SECONDS - 1.0)
            for client in clients:
                client.exchange(PING)

        assert server.log.events() == ["overload_began"]

    def test_again(self, server: EchoServer) -> None:
        """The next overload is handled like the first, and counts for itself."""
        clients = connect(server, MARK - 1)
        for _ in range(2):
            clients.append(server.connect())
            beat(server, 10.0)
            see_off(server, [clients.pop(0)])
            beat(server, CALM_SECONDS + 0.2)

        assert server.log.events() == ["overload_began", "overload_ended"] * 2
        assert [line["closed"] for line in server.log.of("overload_ended")] == [1, 1]


class TestCost:
    """Work is bounded for each turn, so that the others keep their latency."""

    def test_closes_for_each_turn(self, serve: Serve) -> None:
        """However many have to go, a few go in each turn, and other clients are served between."""
        limits = AdmissionLimits(max_connections=100)
        server = serve(echo=ECHO, admission=limits, overload_percent=50)
        idle = [server.connect() for _ in range(80)]
        server.pass_time(11.0)
        active = server.connect()
        active.exchange(PING)
        server.service.overload.check(server.clock.now)
        steps = []
        for _ in range(20):
            before = shed(server)
            server.turn()
            steps.append(shed(server) - before)

        assert max(steps) == CLOSES_PER_TURN
        assert shed(server) == 81 - 50 + 1
        active.exchange(PING)
        see_off(server, idle[:32])

    def test_looks_for_each_turn(self, serve: Serve) -> None:
        """Many connections are looked at in several turns, and the order holds over all of them."""
        count = LOOKS_PER_TURN + 50
        server = serve(echo=ECHO, admission=AdmissionLimits(max_connections=count))
        clients = [server.connect() for _ in range(5)]
        server.pass_time(1.0)
        clients += [server.connect() for _ in range(count - 5)]
        server.pass_time(11.0)
        for client in clients[10:]:
            client.exchange(PING)
        server.service.overload.check(server.clock.now)
        server.turn()
        assert shed(server) == 0
        server.settle()

        assert shed(server) == 10
        see_off(server, clients[:10])

    def test_no_spin(self, server: EchoServer) -> None:
        """An overload in which nobody is overdue wakes the loop for its looks only."""
        for _ in range(LIMITS.max_connections):
            server.connect()
        beat(server, 1.0)

        server.assert_quiet()
        server.service.overload.check(server.clock.now)
        assert server.turn() == 0


def overdue_for(silence: int, *, inside: bool) -> float:
    """Return for how many seconds somebody is overdue who sent the last thing so long ago."""
    return silence - (ECHO.overload_frame_s + 4 / 1024 if inside else ECHO.overload_idle_s)


@settings(max_examples=60, deadline=None)
@given(
    clients=st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=20),
    others=st.integers(0, 40),
)
def test_model(clients: list[tuple[int, bool]], others: int) -> None:
    """Whatever clients did last, those go who are overdue for longest, as many as should."""
    siblings = Siblings()
    server = EchoServer("epoll", echo=ECHO, admission=LIMITS, others=siblings)
    try:
        ends = [server.connect() for _ in clients]
        for moment in range(30, 0, -1):
            for end, (silence, inside) in zip(ends, clients, strict=True):
                if silence == moment:
                    end.send(PING[:5] if inside else PING)
            server.pass_time(1.0)
        siblings.connections = others
        server.service.overload.check(server.clock.now)
        server.settle()

        total = len(clients) + others
        share = max(0, -(-(total - MARK + 1) * len(clients) // total))
        overdue = [overdue_for(silence, inside=inside) for silence, inside in clients]
        late = sorted((each for each in overdue if each >= 0), reverse=True)
        gone = [
            each
            for each, end in zip(overdue, ends, strict=True)
            if server.connection_of(end).protocol.close_reason is CloseReason.OVERLOAD
        ]
        assert sorted(gone, reverse=True) == late[:share]
    finally:
        server.finish()
