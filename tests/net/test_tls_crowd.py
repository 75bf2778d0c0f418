"""Many at a door with TLS at a time, over real sockets."""

import ssl

import pytest

from lpechod.net.entrance import Entrance
from lpechod.net.handshakegate import STEPS_PER_TURN
from lpechod.wire.states import State
from tests.net.conftest import Serve
from tests.net.harness import SECURED, EchoServer
from tests.net.tlsclient import authority
from tests.net.tlswire import HELLO, answer, dial, hello, results, shake


@pytest.fixture(name="entrance")
def _entrance() -> Entrance:
    return SECURED


@pytest.fixture(name="poller_name")
def _poller_name() -> str:
    return "epoll"


class TestCrowd:
    """Many at the door, over real sockets."""

    @pytest.fixture(name="turns")
    def _turns(self) -> list[int]:
        return []

    def counting(self, turns: list[int], server: list[EchoServer]) -> Entrance:
        """Return an entrance that notes the turn of each ClientHello."""
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority().issue_cert("echo.test").configure_cert(made)

        def note(*_named: object) -> None:
            turns.append(server[0].loop.turns)

        made.sni_callback = note
        return Entrance(tls=made)

    def test_established_ones_are_served_meanwhile(self, serve: Serve) -> None:
        """In each turn of a flood, so many hellos are answered, and others get their echo."""
        turns: list[int] = []
        servers: list[EchoServer] = []
        server = serve(entrance=self.counting(turns, servers))
        servers.append(server)
        friend = dial(server)
        shake(friend)
        crowd = [dial(server) for _ in range(10 * STEPS_PER_TURN)]
        server.settle()
        turns.clear()
        for each in crowd:
            each.socket.send(hello(each))
        served = 0
        while len(turns) < len(crowd):
            friend.send_some(HELLO)
            frames = server.tally.frames
            server.turn()
            assert server.tally.frames == frames + 1
            served += 1
        assert max(turns.count(turn) for turn in turns) == STEPS_PER_TURN
        assert served <= len(crowd) // STEPS_PER_TURN + 2
        assert friend.receive_exactly(served * len(HELLO)) == HELLO * served
        for each in crowd:
            answer(each)
            each.socket.close()
        server.turn_until(lambda: len(server.service.connections) == 1, "gone")

    @pytest.mark.parametrize("way", ["reset", "time", "drain", "close"])
    def test_one_who_waits_goes(self, serve: Serve, way: str) -> None:
        """Who goes while it waits for a place leaves the queue, without a spin before or after."""
        server = serve(max_handshakes=1)
        first, second, third = (dial(server) for _ in range(3))
        for each in (first, second, third):
            each.socket.send(hello(each))
            server.settle()
        assert server.service.counts.tls_handshakes_delayed == 2
        server.assert_quiet()
        if way in ("reset", "close"):
            second.reset() if way == "reset" else second.socket.close()
            server.settle()
            server.assert_quiet()
            first.socket.close()
            server.turn_until(lambda: len(server.service.connections) == 1, "two gone")
            shake(third)
            third.exchange(HELLO)
            assert results(server)["completed"] == 1
            assert sum(results(server).values()) == 3
        else:
            server.pass_time(1.0)
            if way == "drain":
                server.service.drain(server.clock.now + 30)
            assert server.pass_time(9.5) < 100
            assert sum(results(server).values()) == 3
        server.assert_quiet()
        assert len(server.service._gate.under_way) == 0
        assert not server.service._gate._waiting
        assert not server.service._gate._resting
        assert not server.service._gate._granted

    def test_all_get_through(self, serve: Serve) -> None:
        """Many more than there are places get through, one after the other."""
        server = serve(max_handshakes=3)
        crowd = [dial(server) for _ in range(50)]
        for each in crowd:
            each.send_some(HELLO)
        for each in crowd:
            assert each.receive_exactly(len(HELLO)) == HELLO
        assert results(server) == {"completed": 50}
        assert server.service.counts.tls_handshakes_delayed > 0

    def test_five_hundred_silent(self, serve: Serve) -> None:
        """Silent clients cost an established one no turn, and a new one gets in past them."""
        server = serve()
        friend = dial(server)
        shake(friend)
        friend.exchange(HELLO)

        def cost() -> int:
            server.settle()
            before = server.turns
            friend.exchange(HELLO)
            server.settle()
            return server.turns - before

        alone = max(cost() for _ in range(5))
        crowd = [dial(server) for _ in range(500)]
        assert len(server.service.connections) == 501
        assert max(cost() for _ in range(5)) <= alone
        assert all(
            connection.protocol.state is State.HANDSHAKE
            for connection in server.service.connections
            if connection is not server.connection_of(friend)
        )
        late = dial(server)
        shake(late)
        late.exchange(HELLO)
        assert server.service.counts.tls_handshakes_delayed == 0
        for each in crowd:
            each.socket.close()
        server.turn_until(lambda: len(server.service.connections) == 2, "crowd gone")
        assert results(server) == {"completed": 2, "abandoned": 500}
