"""What echoing leaves alone, however long it goes on: memory, the timer wheel, the clock, the log.

Nothing here is timed. What grows by a little with each frame, turn or connection shows after some
thousands of them; what is done for each frame shows when fifty share a turn.
"""

import gc
import sys
from collections import deque
from collections.abc import Callable, Sequence

import pytest

from lpechod.engine.poller import available
from tests.net.conftest import Serve
from tests.net.harness import Client, EchoServer, frame

TICK = 0.1

CROWD = 50
PING = frame(bytes(64))

FRAMES = 10_000
CONNECTIONS = 1_000

MOST = 20
"""Objects, or entries of containers, that may be more afterwards, whatever was done. There are
about five: the numbers that are compared, and counters that were so small before that Python had
them anyway."""

CLOCK_READINGS = 3
"""In a turn: how long to wait, what time it is, how long it took."""


@pytest.fixture(name="poller_name", params=list(available()))
def _poller_name(request: pytest.FixtureRequest) -> str:
    """Only what is real: the stand-in for kqueue(2) remembers what it was asked for."""
    return str(request.param)


def exchange(clients: Sequence[Client], together: int = 1) -> None:
    """Have all clients send so many frames before any of them receives."""
    data = PING * together
    for client in clients:
        client.send(data)
    for client in clients:
        assert client.receive_exactly(len(data)) == data


def memory(server: EchoServer) -> tuple[int, int]:
    """Return how many objects there are, and how many entries all containers have.

    A container that is given what is there already grows without a new object. The garbage
    collector does not know a dictionary of nothing but numbers; but then each is an object.
    """
    server.poller.timeouts.clear()  # A test's own record of each turn.
    gc.collect()
    containers = (each for each in gc.get_objects() if type(each) in {list, dict, set, deque})
    return sys.getallocatedblocks(), sum(map(len, containers))


def assert_no_growth(server: EchoServer, work: Callable[[], None]) -> None:
    """See that no more memory is in use when work has been done.

    What leaks does so each time. What a first time fills (buffers, the interpreter's free lists),
    or what a thread of the test runner receives meanwhile, is there once.
    """
    growths = []
    for _ in range(3):
        objects, entries = memory(server)
        work()
        objects_then, entries_then = memory(server)
        growths.append((objects_then - objects, entries_then - entries))
        if max(growths[-1]) <= MOST:
            return
    raise AssertionError(f"objects and entries, each time: {growths}")


@pytest.mark.parametrize(("connections", "together"), [(1, 1), (CROWD, 1), (1, 16)])
def test_memory_of_frames(serve: Serve, connections: int, together: int) -> None:
    """Thousands of frames leave no object behind, and no container that has grown."""
    server = serve()
    clients = [server.connect() for _ in range(connections)]
    for _ in range(17):
        exchange(clients, 16)  # The counters of each connection are now past the small integers.

    def work() -> None:
        for _ in range(FRAMES // connections // together):
            exchange(clients, together)

    assert_no_growth(server, work)


def test_memory_of_connections(serve: Serve) -> None:
    """A thousand connections that came and went leave as little, though each had a frame."""
    server = serve()
    server.log.muted.add("connection_closed")
    server.connect()  # As long as one has not ended, `finish` asks for no numbers of the others.

    def work() -> None:
        for _ in range(CONNECTIONS):
            client = server.connect()
            client.exchange(PING)
            client.close()
            server.clients.remove(client)
        server.settle()

    assert_no_growth(server, work)


def turn_with(server: EchoServer, clients: Sequence[Client]) -> int:
    """Turn once with a frame of each client ready, and return how often the clock was read."""
    for _ in range(100):
        for client in clients:
            client.send_some(PING)
        before = server.clock.readings
        events = server.turn()
        readings = server.clock.readings - before
        for client in clients:
            assert client.receive_exactly(len(PING)) == PING
        if events == len(clients):  # On a busy machine the kernel may be late with some.
            return readings
    raise AssertionError(f"{len(clients)} clients are never ready at once")


def test_the_clock_is_read_for_a_turn(serve: Serve) -> None:
    """However many connections are ready, a turn reads the clock as often as for one."""
    server = serve()
    clients = [server.connect() for _ in range(CROWD)]

    assert turn_with(server, clients[:1]) == CLOCK_READINGS
    assert turn_with(server, clients) == CLOCK_READINGS


def filed_timers(server: EchoServer) -> list[tuple[int, int, int]]:
    """Return what lies in the wheel, in its order: slot, tick and identity of each timer."""
    return [
        (slot, timer.tick, id(timer))
        for slot, timers in enumerate(server.loop._wheel._slots)
        for timer in timers
    ]


def test_the_wheel_and_the_log_are_left_alone(serve: Serve) -> None:
    """Frames put deadlines off, but move no timer, and nothing is logged of them."""
    server = serve()
    clients = [server.connect() for _ in range(CROWD)]
    server.pass_time(TICK)  # Newcomers are filed with the next tick.
    timers, lines = filed_timers(server), list(server.log.lines)
    assert len(timers) == CROWD
    server.jump(1.0)  # Whatever is filed from now on has another tick.
    turn_with(server, clients)

    assert filed_timers(server) == timers
    assert server.log.lines == lines
    connections = server.service.connections
    assert {each.protocol.active_at for each in connections} == {server.clock.now}
