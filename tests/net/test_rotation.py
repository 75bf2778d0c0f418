"""Many who move much beside some who move little: what a turn is for each of them.

Nothing here is timed: turns and bytes are counted.
"""

from collections.abc import Sequence

import pytest

from lpechod.engine.buffers import RECEIVE_BYTES
from lpechod.engine.poller import MAX_EVENTS, available
from lpechod.engine.rotation import (
    FEW,
    FRAME_COST_BYTES,
    LEAST_SHARE_BYTES,
    ROTATED_BYTES,
    SHARED_BYTES,
)
from lpechod.net.entrance import OPEN_TO_ALL, Entrance
from lpechod.wire.echo import FRAMES_PER_TURN
from lpechod.wire.settings import EchoSettings
from tests.net.conftest import Serve
from tests.net.harness import SECURED, Client, EchoServer, frame

CROWD = 40
PING = frame(bytes(64))
PIECE = memoryview(frame(bytes(65536)) * 4)

LARGE = frame(bytes(300_000))

HIGH_WATERMARK = EchoSettings().high_watermark_bytes

ONE_READ = RECEIVE_BYTES + 1024
"""The most that one connection receives in a turn, with some headers, and what is small beside."""

PERIOD = CROWD * ONE_READ // ROTATED_BYTES + 2
"""Turns in which each of the crowd has had one."""


@pytest.fixture(name="poller_name", params=list(available()))
def _poller_name(request: pytest.FixtureRequest) -> str:
    """Only what is real: a stand-in tells nothing of the order in which a kernel reports."""
    return str(request.param)


@pytest.fixture(name="entrance", params=[OPEN_TO_ALL, SECURED], ids=["plain", "tls"])
def _entrance(request: pytest.FixtureRequest) -> Entrance:
    """Without and with TLS."""
    entrance: Entrance = request.param
    return entrance


class Bulk:
    """Clients that send large frames as fast as the kernel takes them.

    Args:
        clients: who they are.
        reading: whether they receive their echoes.
    """

    def __init__(self, clients: Sequence[Client], *, reading: bool = True) -> None:
        self.clients = clients
        self.reading = reading
        self._positions = [0] * len(clients)

    def go_on(self) -> None:
        """Fill what the kernel has room for, and empty what it holds."""
        for number, client in enumerate(self.clients):
            while sent := client.send_some(PIECE[self._positions[number] :]):
                self._positions[number] = (self._positions[number] + sent) % len(PIECE)
            while self.reading and client.receive_some():
                pass


def exchange_large(server: EchoServer, clients: Sequence[Client]) -> None:
    """Have each send a large frame on its own, so that another is foreseen."""
    for client in clients:
        assert client.send_some(LARGE) == len(LARGE)
        assert client.receive_exactly(len(LARGE)) == LARGE
    server.settle()
    for client in clients:
        assert server.connection_of(client).protocol.foreseen_bytes == len(LARGE)


def bulk(server: EchoServer, *, reading: bool = True) -> Bulk:
    """Connect a crowd."""
    clients = [server.connect() for _ in range(CROWD)]
    server.turn_until(lambda: all(client.greet() for client in clients), "handshakes")
    server.settle()
    return Bulk(clients, reading=reading)


def received(server: EchoServer, clients: Sequence[Client]) -> list[int]:
    """Return how many bytes the server has received from each."""
    return [server.connection_of(client).protocol.received_bytes for client in clients]


def changed(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Return whose numbers are not the same."""
    return [k for k, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]


def test_a_crowd_divides_a_turn(serve: Serve) -> None:
    """However much waits from many, a turn receives no more than its budget the first time."""
    server = serve()
    crowd = bulk(server)
    before = server.tally.received_bytes
    crowd.go_on()
    server.loop.turn()
    assert server.tally.received_bytes - before <= SHARED_BYTES


def test_who_sends_little_is_served_in_each_turn(serve: Serve) -> None:
    """Beside a crowd that sends much, a small frame that is there is echoed in the same turn."""
    server = serve()
    crowd = bulk(server)
    small = server.connect()
    small.exchange(PING)
    connection = server.connection_of(small)
    rounds = 0
    for _ in range(3 * PERIOD):
        crowd.go_on()
        frames = connection.protocol.frames
        small.send_some(PING)
        server.turn()
        if connection._transport.fd in dict(server.loop.ready):
            rounds += 1
            assert connection.protocol.frames == frames + 1
        small.receive_some()
    assert rounds > 2 * PERIOD


def test_a_turn_of_those_who_send_much(serve: Serve) -> None:
    """Those who have shown that they send much receive little more than a budget of its own."""
    server = serve()
    crowd = bulk(server)
    crowd.go_on()
    server.turn()
    for _ in range(5 * PERIOD):
        crowd.go_on()
        before = server.tally.received_bytes
        server.turn()
        assert 0 < server.tally.received_bytes - before <= ROTATED_BYTES + ONE_READ


def test_whole_frames_that_fill_a_share(serve: Serve) -> None:
    """Who fills its share is served by turns from then on, also if that is whole frames."""
    server = serve()
    clients = [server.connect() for _ in range(MAX_EVENTS)]
    server.turn_until(lambda: all(client.greet() for client in clients), "handshakes")
    server.settle()
    small = memoryview(frame(bytes(60)) * (8 * LEAST_SHARE_BYTES // 64))
    clients[0].exchange(bytes(small[:LEAST_SHARE_BYTES]))  # What has no share to fill.
    for client in clients:
        client.send_some(small)
    for _ in range(3):
        server.turn()
    before = server.tally.received_bytes
    server.turn()
    assert 0 < server.tally.received_bytes - before <= ROTATED_BYTES + ONE_READ
    server.turn_until(lambda: not any(client.receive_some() for client in clients), "echoes")


def test_nobody_starves(serve: Serve) -> None:
    """Of those who send much, each is served again before any other was served twice."""
    server = serve()
    crowd = bulk(server)
    crowd.go_on()
    server.turn()
    waits = [0] * CROWD
    for _ in range(5 * PERIOD):
        crowd.go_on()
        before = received(server, crowd.clients)
        server.turn()
        served = changed(before, received(server, crowd.clients))
        longest = sorted(waits, reverse=True)[: len(served)]
        assert sorted((waits[k] for k in served), reverse=True) == longest
        waits = [0 if k in served else wait + 1 for k, wait in enumerate(waits)]
        assert max(waits) <= PERIOD


def test_echoes_that_all_can_be_sent_at_last(serve: Serve) -> None:
    """When all the peers of a crowd begin to read, their echoes go out in more than one turn."""
    server = serve()
    crowd = bulk(server, reading=False)
    protocols = [server.connection_of(client).protocol for client in crowd.clients]
    for number, client in enumerate(crowd.clients):
        while protocols[number].unsent_bytes < HIGH_WATERMARK:  # One at a time there is no crowd.
            client.send_some(PIECE)
            server.turn()
    server.settle()

    def sent() -> int:
        return server.tally.echoed_bytes - server.tally.unsent_bytes

    while any(protocol.unsent_bytes for protocol in protocols):
        for client in crowd.clients:
            while client.receive_some():
                pass
        before = sent()
        server.turn()
        assert sent() - before <= SHARED_BYTES + 2 * ONE_READ


def test_large_frames_of_a_crowd(serve: Serve) -> None:
    """Memory for frames that are foreseen follows the shares of a turn, not what waits."""
    server = serve()
    crowd = bulk(server)
    exchange_large(server, crowd.clients)
    before = server.tally.received_bytes
    for client in crowd.clients:
        assert client.send_some(LARGE) == len(LARGE)
    server.loop.turn()
    received = server.tally.received_bytes - before
    assert received <= SHARED_BYTES
    assert server.service.pool.held <= 4 * received
    for client in crowd.clients:
        assert client.receive_exactly(len(LARGE)) == LARGE


def test_a_turn_of_large_frames(serve: Serve) -> None:
    """What those who send much are sent counts for their turn as well as what they have sent."""
    server = serve()
    crowd = bulk(server)
    exchange_large(server, crowd.clients)
    for client in crowd.clients:
        server.loop.rotation.join(server.connection_of(client))
        assert client.send_some(LARGE) == len(LARGE)

    def moved() -> int:
        tally = server.tally
        return tally.received_bytes + tally.echoed_bytes - tally.unsent_bytes

    end = moved() + 2 * (CROWD - FEW - 4) * len(LARGE)
    while moved() < end:  # The last few need not share.
        before = moved()
        server.turn()
        assert moved() - before <= ROTATED_BYTES + 2 * len(LARGE)
        for client in crowd.clients:
            while client.receive_some():
                pass


def test_who_had_to_wait_is_not_late(serve: Serve) -> None:
    """Whoever sent the rest of a frame in time is echoed, though it was not its turn until then."""
    server = serve(echo=EchoSettings(frame_s=5.0, idle_s=5.0))
    crowd = bulk(server, reading=False)
    first, rest = LARGE[: len(LARGE) // 2], LARGE[len(LARGE) // 2 :]
    for client in crowd.clients:
        assert client.send_some(first) == len(first)
    members = server.loop.rotation.members
    server.turn_until(lambda: len(members) == CROWD, "all are served by turns")
    server.settle()
    for client in crowd.clients:
        assert client.send_some(rest) == len(rest)
    server.jump(3600.0)
    server.turn()
    for client in crowd.clients:
        assert client.receive_exactly(len(LARGE)) == LARGE


def test_a_drain_among_many(serve: Serve) -> None:
    """Frames that wait when a connection is told to drain are echoed, whatever its share is."""
    server = serve()
    client = server.connect()
    server.turn_until(client.greet, "handshake")
    server.settle()
    data = frame(bytes(20_000)) * 3
    assert client.send_some(data) == len(data)
    server.loop.rotation.divide(1000)
    assert server.loop.rotation.share < len(data) // 3
    server.connection_of(client).drain(server.loop.now + 10.0, server.loop.now)

    assert client.receive_exactly(len(data)) == data
    client.expect_eof()


MOST_FRAMES = ROTATED_BYTES // FRAME_COST_BYTES
"""In a turn of those who are served by turns; the last may pass it."""


@pytest.mark.parametrize("crowd", [20, CROWD, 200])
def test_a_turn_of_tiny_frames(serve: Serve, crowd: int) -> None:
    """However many pipeline mixed tiny frames, after the first turn there is a bound for all."""
    server = serve()
    clients = [server.connect() for _ in range(crowd)]
    server.turn_until(lambda: all(client.greet() for client in clients), "handshakes")
    server.settle()
    block = b"".join(frame(bytes(number % 2)) for number in range(3000))
    waiting = [memoryview(block) for _ in clients]
    most = []
    for _ in range(6 * crowd):
        before = server.tally.frames
        server.loop.turn()
        most.append(server.tally.frames - before)
        waiting = [
            rest[client.send_some(rest) :] for client, rest in zip(clients, waiting, strict=True)
        ]
    for client in clients:
        assert client.receive_exactly(len(block)) == block

    assert max(most[3:]) <= MOST_FRAMES + 2 * FRAMES_PER_TURN


def test_tiny_frames_that_come_edge_by_edge(serve: Serve) -> None:
    """Nor is there more in a turn of reads that leave nothing behind, but have many frames each."""
    server = serve()
    clients = [server.connect() for _ in range(200)]
    server.turn_until(lambda: all(client.greet() for client in clients), "handshakes")
    server.settle()
    block = b"".join(frame(bytes(number % 2)) for number in range(FRAMES_PER_TURN - 1))
    most = []
    for _ in range(3):
        for client in clients:
            assert client.send_some(block) == len(block)
        for _ in range(40):
            before = server.tally.frames
            server.loop.turn()
            most.append(server.tally.frames - before)
        for client in clients:
            assert client.receive_exactly(len(block)) == block

    assert max(most[40:]) <= MOST_FRAMES + FRAMES_PER_TURN


def test_a_ping_beside_tiny_frames(serve: Serve) -> None:
    """Who sends a frame at a time is served in each turn, whatever the others' backlogs."""
    server = serve()
    clients = [server.connect() for _ in range(CROWD)]
    small = server.connect()
    server.turn_until(lambda: all(client.greet() for client in [*clients, small]), "handshakes")
    server.settle()
    block = b"".join(frame(bytes(number % 2)) for number in range(3000))
    for client in clients:
        assert client.send_some(block) == len(block)
    server.loop.turn()
    for _ in range(20):
        small.send_some(PING)
        server.loop.turn()
        assert small.receive_exactly(len(PING)) == PING
