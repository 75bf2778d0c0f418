"""The drain: spread over a part of its time, and nobody is forgotten."""

import pytest

from lpechod.wire.settings import EchoSettings
from lpechod.wire.states import CloseReason, State
from tests.net.conftest import Serve
from tests.net.harness import Client, EchoServer, body_of, frame

TICK = 0.1


def crowd(server: EchoServer, count: int) -> list[Client]:
    """Connect so many clients, and let them be there for a while."""
    clients = [server.dial() for _ in range(count)]
    server.turn_until(lambda: len(server.service.connections) == count, f"{count} accepted")
    server.pass_time(1.0)
    return clients


def told(server: EchoServer) -> int:
    """Return how many of the connections that are there know of the drain."""
    return sum(
        connection.protocol.state is not State.OPEN for connection in server.service.connections
    )


def untold(server: EchoServer, clients: list[Client]) -> list[Client]:
    """Return the clients whose connection does not know of the drain."""
    return [
        client for client in clients if server.connection_of(client).protocol.state is State.OPEN
    ]


class TestSpread:
    """Who is told when."""

    def test_few_at_once(self, serve: Serve) -> None:
        """Ten clients may come back together, so they are told in the next turn."""
        server = serve()
        crowd(server, 10)
        server.service.drain(server.clock.now + 30)
        server.turn()

        assert told(server) == 10

    def test_ten_at_a_time(self, serve: Serve) -> None:
        """More of them, with time enough, are told ten at once and ten with each tick."""
        server = serve()
        crowd(server, 55)
        server.service.drain(server.clock.now + 30)
        server.settle()
        seen = [told(server)]
        for _ in range(6):
            server.pass_time(TICK)
            seen.append(told(server))

        assert seen == [10, 20, 30, 40, 50, 55, 55]

    def test_over_a_third_of_the_time(self, serve: Serve) -> None:
        """A batch is as large as it must be for the last one to go out after a third."""
        server = serve()
        crowd(server, 118)
        server.service.drain(server.clock.now + 1.5)
        server.settle()
        seen = [told(server)]
        for _ in range(5):
            server.pass_time(TICK)
            seen.append(told(server))

        assert seen == [24, 48, 72, 96, 118, 118]

    def test_whenever_it_begins(self, serve: Serve) -> None:
        """A drain that begins between two ticks still tells a batch with each of them."""
        server = serve()
        server.jump(0.037)
        crowd(server, 55)
        server.service.drain(server.clock.now + 30)
        server.pass_time(5 * TICK)

        assert told(server) == 55

    def test_nothing_is_left_of_it(self, serve: Serve) -> None:
        """When the last one is told, only the connections' own timers are filed."""
        server = serve()
        crowd(server, 25)
        server.service.drain(server.clock.now + 30)
        server.pass_time(2 * TICK)

        assert told(server) == server.loop.timers == 25
        server.assert_quiet()

    def test_untold_are_served(self, serve: Serve) -> None:
        """Who is not told yet gets its echo, and stays; who is told sees the end."""
        server = serve()
        clients = crowd(server, 30)
        server.service.drain(server.clock.now + 30)
        server.settle()
        waiting = untold(server, clients)
        assert len(waiting) == 20
        for client in waiting:
            client.exchange(frame(b"as usual"))
        assert untold(server, clients) == waiting
        server.pass_time(2 * TICK)

        for client in clients:
            client.expect_eof()
            client.close()
            assert server.closed(client)["reason"] == "drained"

    def test_ended_meanwhile(self, serve: Serve) -> None:
        """Connections that end by themselves do not use up a batch."""
        server = serve()
        clients = crowd(server, 60)
        server.service.drain(server.clock.now + 30)
        server.settle()
        waiting = untold(server, clients)
        for client in waiting[:35]:
            client.close()
        server.settle()
        assert told(server) == 10
        server.pass_time(TICK)
        assert told(server) == 20
        server.pass_time(TICK)

        assert told(server) == 25
        assert server.service.counts.closed[CloseReason.PEER_CLOSED] == 35

    def test_ended_in_the_same_turn(self, serve: Serve) -> None:
        """Nor does a connection that ends in the very turn in which it would have been told."""
        server = serve()
        clients = crowd(server, 30)
        server.service.drain(server.clock.now + 30)
        server.settle()
        waiting = untold(server, clients)
        for client in waiting[:10]:
            client.reset()
        server.pass_time(TICK)

        assert server.service.counts.closed[CloseReason.RESET] == 10
        assert told(server) == 20

    def test_all_ended_meanwhile(self, serve: Serve) -> None:
        """When nobody is left to be told, that is the end of it."""
        server = serve()
        crowd(server, 40)
        server.service.drain(server.clock.now + 30)
        server.service.cut(server.clock.now)
        server.settle()
        assert not server.service.connections
        assert server.service.counts.closed[CloseReason.DRAIN_TIMEOUT] == 40
        server.pass_time(2 * TICK)

        assert server.loop.timers == 0

    def test_nobody_there(self, serve: Serve) -> None:
        """A service without connections has nothing to drain."""
        server = serve()
        server.service.drain(server.clock.now + 30)
        server.settle()

        assert server.service.draining
        assert server.loop.timers == 0


class TestArrivals:
    """Who comes in while the service drains."""

    def test_served_and_told(self, serve: Serve) -> None:
        """It is served what it has sent, then told to end."""
        server = serve()
        server.service.drain(server.clock.now + 30)
        client = server.dial()
        client.send_some(frame(b"late"))
        server.pass_time(TICK)

        assert client.receive_to_end() == frame(b"late")
        client.close()
        assert server.closed(client)["reason"] == "drained"

    def test_told_at_once(self, serve: Serve) -> None:
        """It does not wait for its batch, and takes nobody's place in one."""
        server = serve()
        crowd(server, 30)
        server.service.drain(server.clock.now + 30)
        server.settle()
        late = [server.dial() for _ in range(3)]
        for client in late:
            client.send_some(frame(b"late"))
        server.settle()
        for client in late:
            assert client.receive_to_end() == frame(b"late")
        assert told(server) == 13
        server.pass_time(TICK)

        assert told(server) == 23


class TestYoung:
    """Connections that have just been made, and have not said anything yet."""

    def test_first_frame_is_served(self, serve: Serve) -> None:
        """A client that connects just before the drain gets the echo of its first frame."""
        server = serve()
        client = server.connect()
        server.service.drain(server.clock.now + 30)
        server.pass_time(0.5)
        assert told(server) == 0
        client.send_some(frame(b"first"))
        server.pass_time(TICK)

        assert client.receive_to_end() == frame(b"first")
        client.close()
        assert server.closed(client)["reason"] == "drained"

    def test_silence_is_not_waited_for(self, serve: Serve) -> None:
        """One that says nothing for a second is told like all others, and nothing is left."""
        server = serve()
        client = server.connect()
        server.service.drain(server.clock.now + 30)
        server.pass_time(0.9)
        assert told(server) == 0
        server.pass_time(0.2)

        client.expect_eof()
        client.close()
        server.settle()
        assert server.loop.timers == 0

    def test_not_beyond_the_time(self, serve: Serve) -> None:
        """A drain without time waits for nobody's first frame."""
        server = serve()
        client = server.connect()
        server.service.drain(server.clock.now + 0.3)
        server.pass_time(0.4)

        client.expect_eof()

    def test_takes_no_place(self, serve: Serve) -> None:
        """Those who are too young leave their place in a batch to others."""
        server = serve()
        crowd(server, 10)
        for _ in range(10):
            server.connect()
        server.service.drain(server.clock.now + 30)
        server.turn()

        assert told(server) == 10


class TestTime:
    """The end of the drain is the same for all."""

    @pytest.mark.parametrize("seconds", [0.0, -1.0, 0.1])
    def test_none_left(self, serve: Serve, seconds: float) -> None:
        """With no time to spread them over all are told, 256 a turn so that others get theirs."""
        server = serve(echo=EchoSettings(frame_s=1000))
        for client in crowd(server, 300):
            client.send(frame(body_of(100))[:50])
        server.settle()
        server.service.drain(server.clock.now + seconds)
        seen = []
        for _ in range(3):
            server.turn()
            deadlines = [each.protocol.next_deadline() for each in server.service.connections]
            seen.append(sum(deadline < server.clock.now + 1 for deadline in deadlines))
        assert seen == [256, 300, 300]
        server.pass_time(3 * TICK)

        assert server.service.counts.closed[CloseReason.DRAIN_TIMEOUT] == 300

    def test_same_for_all(self, serve: Serve) -> None:
        """However many there are and whenever they were told, all end at the same time."""
        server = serve(echo=EchoSettings(frame_s=1000))
        for client in crowd(server, 300):
            client.send(frame(body_of(100))[:50])
        server.settle()
        server.service.drain(server.clock.now + 5)
        server.pass_time(4.9)
        assert len(server.service.connections) == 300
        server.pass_time(0.3)

        assert server.service.counts.closed[CloseReason.DRAIN_TIMEOUT] == 300

    def test_stopped_meanwhile(self, serve: Serve) -> None:
        """A process that was stopped until the time was over forgets nobody."""
        server = serve(echo=EchoSettings(frame_s=1000))
        for client in crowd(server, 100):
            client.send(frame(body_of(100))[:50])
        server.service.drain(server.clock.now + 30)
        server.settle()
        server.jump(31)
        server.pass_time(2 * TICK)

        assert server.service.counts.closed[CloseReason.DRAIN_TIMEOUT] == 100

    def test_shortened(self, serve: Serve) -> None:
        """A second drain that leaves less time is the one that counts."""
        server = serve(echo=EchoSettings(frame_s=1000))
        for client in crowd(server, 60):
            client.send(frame(body_of(100))[:50])
        server.service.drain(server.clock.now + 300)
        server.pass_time(2 * TICK)
        server.service.drain(server.clock.now)
        server.pass_time(2 * TICK)

        assert server.service.counts.closed[CloseReason.DRAIN_TIMEOUT] == 60
