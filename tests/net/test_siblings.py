"""Two acceptors on one listening socket, as in two worker processes, and how they share it."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from lpechod.engine.loop import Loop
from lpechod.net.acceptor import Acceptor
from lpechod.net.counts import ConnectionCounts
from lpechod.net.listener import Listener
from tests.fake_time import FakeClock, FakeTimePoller
from tests.net.harness import POLLERS, RecordingLog

HEAD_START = 4
"""How many connections a sibling may be ahead, in these tests."""


class Sibling:
    """One of several acceptors on the same listening socket, each in a loop of its own.

    Args:
        poller: a key of `POLLERS`.
        shared: the socket; this one has a descriptor of its own for it, as after fork(2).
        allowance: how many more connections it may take.
    """

    def __init__(self, poller: str, shared: socket.socket, allowance: Callable[[], int]) -> None:
        self.held: list[int] = []
        self.peers: list[tuple[str, int]] = []
        self.counts = ConnectionCounts()
        clock = FakeClock()
        self.loop = Loop(FakeTimePoller(POLLERS[poller](), clock), clock)
        self.acceptor = Acceptor(
            [Listener(shared.dup())], self._take, self.counts, self.loop, RecordingLog(), allowance
        )
        self.acceptor.start()

    def _take(self, client: int, peer: object, _listener: str) -> None:
        self.held.append(client)
        assert isinstance(peer, tuple)
        self.peers.append(peer)

    def turn(self) -> None:
        """Turn once without waiting."""
        self.loop.again(self, 0)
        self.loop.turn()

    def on_ready(self, _mask: int, _now: float) -> None:
        pass

    def on_failure(self, error: Exception, _now: float) -> None:
        raise error

    def close(self) -> None:
        self.acceptor.drain(())
        self.loop.close()
        for client in self.held:
            os.close(client)


def dial(stack: ExitStack, shared: socket.socket) -> socket.socket:
    """Connect a client, which waits in the queue."""
    return stack.enter_context(socket.create_connection(shared.getsockname()))


@pytest.fixture(name="stack")
def _stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(name="shared")
def _shared(stack: ExitStack) -> socket.socket:
    return stack.enter_context(socket.create_server(("127.0.0.1", 0)))


@pytest.fixture(name="siblings")
def _siblings(poller_name: str, stack: ExitStack, shared: socket.socket) -> tuple[Sibling, Sibling]:
    """Make two of them, neither of which may be more than `HEAD_START` ahead of the other."""

    def make(own: int) -> Sibling:
        def allowance() -> int:
            return len(pair[1 - own].held) + HEAD_START - len(pair[own].held)

        sibling = Sibling(poller_name, shared, allowance)
        stack.callback(sibling.close)
        return sibling

    pair = make(0), make(1)
    return pair


class TestSiblings:
    """Two acceptors on one listening socket."""

    @pytest.mark.parametrize("eager", [0, 1])
    def test_end_up_even(
        self,
        siblings: tuple[Sibling, Sibling],
        shared: socket.socket,
        stack: ExitStack,
        eager: int,
    ) -> None:
        """One that is always quicker does not run away, and together they take all."""
        clients = [dial(stack, shared) for _ in range(60)]
        quick, slow = siblings[eager], siblings[1 - eager]
        for _ in range(100):
            for _ in range(5):
                quick.acceptor.rejoin()
                quick.turn()
                assert len(quick.held) <= len(slow.held) + HEAD_START
            slow.acceptor.rejoin()
            slow.turn()
            assert len(slow.held) <= len(quick.held) + HEAD_START

        taken = quick.peers + slow.peers
        assert sorted(taken) == sorted(client.getsockname() for client in clients)
        assert abs(len(quick.held) - len(slow.held)) <= HEAD_START
        assert quick.counts.accept_pauses["balance"] > 0

    def test_stalled(
        self, siblings: tuple[Sibling, Sibling], shared: socket.socket, stack: ExitStack
    ) -> None:
        """Next to one that does nothing, the other takes what it may and then sleeps."""
        for _ in range(20):
            dial(stack, shared)
        alone, stalled = siblings
        for _ in range(100):
            alone.turn()

        assert len(alone.held) == HEAD_START
        assert not alone.acceptor.accepting
        assert alone.counts.accept_pauses["balance"] == 1
        stalled.turn()
        assert len(stalled.held) == 2 * HEAD_START
