"""A worker that shares listeners: its allowance, giving way, and the queues it leaves behind."""

import errno
import itertools
from collections.abc import Callable, Collection

import pytest

from lpechod.net.acceptor import ACCEPTS_PER_TURN, RETRY_SECONDS
from tests.net.conftest import Serve
from tests.net.harness import EchoServer, frame
from tests.net.scarcity import descriptors_left, watched

TICK = 0.1


class Allowance:
    """An allowance that a test sets, and that counts who asks.

    Attributes:
        left: the answer; None fails.
        asked: how often it was given.
    """

    def __init__(self, left: int | None) -> None:
        self.left = left
        self.asked = 0

    def __call__(self) -> int:
        self.asked += 1
        if self.left is None:
            raise LookupError("a defect")
        return self.left


def awake(server: EchoServer) -> bool:
    """Return whether a server accepts at this moment."""
    return server.acceptor.accepting


class TestAllowance:
    """A worker takes what it is allowed, and leaves the rest in the queue."""

    @pytest.mark.parametrize("allowed", [1, 3, ACCEPTS_PER_TURN - 1])
    def test_less_than_the_budget(self, serve: Serve, allowed: int) -> None:
        """A turn accepts no more than is allowed."""
        server = serve(allowance=Allowance(allowed))
        for _ in range(ACCEPTS_PER_TURN + 4):
            server.dial()
        server.turn()

        assert server.service.counts.accepted == allowed

    @pytest.mark.parametrize("allowed", [ACCEPTS_PER_TURN, 1000])
    def test_more_than_the_budget(self, serve: Serve, allowed: int) -> None:
        """However much is allowed, the budget of the turn stays what it is."""
        server = serve(allowance=Allowance(allowed))
        for _ in range(ACCEPTS_PER_TURN + 4):
            server.dial()
        server.turn()

        assert server.service.counts.accepted == ACCEPTS_PER_TURN

    def test_asked_once_for_each_listener(self, serve: Serve) -> None:
        """It is asked once when a listener is ready, and not for each connection."""
        allowance = Allowance(10)
        server = serve("127.0.0.1:0", "127.0.0.1:0", allowance=allowance)
        for listener in server.listeners:
            for _ in range(5):
                server.dial(listener)
        server.turn()
        assert server.service.counts.accepted == 10
        assert allowance.asked == 2
        server.settle()
        server.assert_quiet()

        assert allowance.asked == 2

    def test_aborted_do_not_count(self, serve: Serve) -> None:
        """A connection that was gone before it was taken uses up nothing of the allowance."""
        server = serve(allowance=Allowance(1))
        watched(server.listeners[0]).failures.extend([errno.ECONNABORTED] * 3)
        clients = [server.dial() for _ in range(2)]
        server.turn()
        assert server.service.counts.rejected["aborted"] == 3
        assert server.service.counts.accepted == 1
        assert awake(server)

        clients[0].exchange(frame(b"served"))

    def test_nothing_but_aborted(self, serve: Serve) -> None:
        """Calls that all fail end in a pause, however little is allowed."""
        server = serve(allowance=Allowance(1))
        listening = watched(server.listeners[0])
        listening.failing = errno.EPERM
        server.dial()
        server.settle()
        assert listening.calls == ACCEPTS_PER_TURN
        assert server.acceptor.suspended
        listening.failing = 0
        server.pass_time(RETRY_SECONDS + TICK)

        assert server.service.counts.accepted == 1

    def test_defect(self, serve: Serve) -> None:
        """An allowance that fails costs a pause, not the worker."""
        allowance = Allowance(None)
        server = serve(allowance=allowance)
        server.errors = {"accept_failed"}
        client = server.dial()
        server.settle()
        assert server.acceptor.suspended
        server.assert_quiet()
        server.acceptor.drain()

        client.exchange(frame(b"served in the end"))


class TestGivingWay:
    """With nothing allowed, a worker does not even look at its listeners."""

    @pytest.fixture(name="allowance")
    def _allowance(self) -> Allowance:
        return Allowance(0)

    @pytest.fixture(name="server")
    def _server(self, serve: Serve, allowance: Allowance) -> EchoServer:
        """Start a server that has given way, with a client in the queue."""
        server = serve(allowance=allowance)
        server.dial()
        server.settle()
        return server

    @pytest.mark.parametrize("left", [0, -5])
    def test_sleeps(self, serve: Serve, left: int) -> None:
        """The queue does not keep it awake, and nothing is said to the operator."""
        allowance = Allowance(left)
        server = serve("127.0.0.1:0", "127.0.0.1:0", allowance=allowance)
        for listener in server.listeners:
            server.dial(listener)
        server.settle()
        assert not awake(server)
        assert not server.acceptor.suspended
        assert server.service.counts.accept_pauses["balance"] == 1
        assert allowance.asked == 1
        assert {line.level for line in server.log.lines} <= {"debug"}
        assert server.loop.timers == 0

        server.assert_quiet()

    def test_not_when_nobody_comes(self, serve: Serve, allowance: Allowance) -> None:
        """Without a connection in the queue there is nothing to leave to anybody."""
        server = serve(allowance=allowance)
        server.settle()

        assert awake(server)
        assert allowance.asked == 0

    def test_rejoins(self, server: EchoServer, allowance: Allowance) -> None:
        """It goes on when it is asked to and something is allowed again."""
        allowance.left = -1
        server.acceptor.rejoin()
        assert not awake(server)
        allowance.left = 0
        server.acceptor.rejoin()
        assert not awake(server)
        allowance.left = 1
        server.settle()
        assert server.service.counts.accepted == 0
        server.acceptor.rejoin()
        assert awake(server)
        assert server.service.counts.accept_pauses["balance"] == 1

        server.clients[0].exchange(frame(b"served"))

    def test_counts_each_time(self, server: EchoServer, allowance: Allowance) -> None:
        """Each time that it begins to give way is counted, and no time that it goes on to."""
        server.acceptor.rejoin()
        allowance.left = 1
        server.acceptor.rejoin()
        server.dial()
        server.turn()
        allowance.left = 0
        server.settle()
        server.acceptor.rejoin()

        assert server.service.counts.accepted == 1
        assert server.service.counts.accept_pauses["balance"] == 2

    def test_nothing_to_rejoin(self, serve: Serve, allowance: Allowance) -> None:
        """A worker that does not give way is not asked what it may take."""
        server = serve(allowance=allowance)
        server.acceptor.rejoin()
        server.acceptor.stop()
        server.acceptor.rejoin()

        assert allowance.asked == 0
        assert not awake(server)

    def test_rejoin_without_allowance(self, serve: Serve) -> None:
        """A worker without siblings goes on as it was."""
        server = serve()
        server.acceptor.rejoin()

        server.connect().exchange(frame(b"served"))

    def test_until_a_connection_closes(self, serve: Serve, allowance: Allowance) -> None:
        """A close of its own is no reason to go on: the heartbeat decides."""
        allowance.left = 1
        server = serve(allowance=allowance)
        client = server.connect()
        allowance.left = 0
        server.dial()
        server.settle()
        client.shutdown()
        server.closed(client)

        assert not awake(server)

    def test_suspended_for_want_of_descriptors(self, serve: Serve, allowance: Allowance) -> None:
        """A suspension that ends leads to a worker that gives way, not to one that spins."""
        allowance.left = 1
        server = serve(allowance=allowance)
        server.dial()
        with descriptors_left(0):
            server.settle()
            assert server.acceptor.suspended
            server.acceptor.rejoin()
            assert not awake(server)
        allowance.left = 0
        server.pass_time(RETRY_SECONDS + TICK)
        assert server.log.of("accept_resumed") == [{"reason": "emfile"}]
        assert not awake(server)
        server.assert_quiet()
        allowance.left = 1
        server.acceptor.rejoin()

        server.clients[0].exchange(frame(b"served"))

    @pytest.mark.parametrize("order", list(itertools.permutations(["suspend", "yield", "stop"])))
    def test_one_of_three_causes_is_enough(
        self, server: EchoServer, allowance: Allowance, order: tuple[str, ...]
    ) -> None:
        """Stopped, suspended and giving way: it goes on when the last of them is over."""
        allowance.left = 1
        server.acceptor.suspend("emfile")
        server.acceptor.stop()
        ends: dict[str, Callable[[], None]] = {
            "suspend": server.acceptor.resume,
            "yield": server.acceptor.rejoin,
            "stop": server.acceptor.start,
        }
        seen = []
        for cause in order:
            ends[cause]()
            seen.append(awake(server))
        assert seen == [False, False, True]

        server.clients[0].exchange(frame(b"served"))


class TestDrain:
    """A worker that leaves takes with it only the queues that nobody else will serve."""

    @pytest.fixture(name="server")
    def _server(self, serve: Serve) -> EchoServer:
        """Start a server with two listeners, and two clients in the queue of each."""
        server = serve("127.0.0.1:0", "127.0.0.1:0")
        for listener in server.listeners * 2:
            server.dial(listener)
        return server

    @pytest.mark.parametrize(
        ("finished", "accepted"), [((), 0), ((0,), 2), ((1,), 2), ((0, 1), 4), (None, 4)]
    )
    def test_queues(
        self, server: EchoServer, finished: tuple[int, ...] | None, accepted: int
    ) -> None:
        """The queues that are named are served, and all listeners closed in this process."""
        names = None if finished is None else {server.listeners[k].name for k in finished}
        shared = [listener.socket.dup() for listener in server.listeners]
        server.acceptor.drain(names)
        assert server.service.counts.accepted == accepted
        assert [listener.socket.fileno() for listener in server.listeners] == [-1, -1]
        assert not awake(server)
        server.settle()
        for number, listening in enumerate(shared):
            listening.setblocking(False)
            left = 0 if finished is None or number in finished else 2
            for _ in range(left):
                listening.accept()[0].close()
            with pytest.raises(BlockingIOError):
                listening.accept()
            listening.close()

    @pytest.mark.parametrize("names", [["elsewhere:1"], {}])
    def test_other_names(self, server: EchoServer, names: Collection[str]) -> None:
        """A listener that this worker does not have is nothing to it."""
        server.acceptor.drain(names)

        assert server.service.counts.accepted == 0
        assert [listener.socket.fileno() for listener in server.listeners] == [-1, -1]

    def test_while_giving_way(self, serve: Serve) -> None:
        """The end comes for all that wait, whatever is allowed, and is the end."""
        allowance = Allowance(0)
        server = serve(allowance=allowance)
        clients = [server.dial() for _ in range(20)]
        server.settle()
        server.acceptor.drain()
        assert server.service.counts.accepted == 20
        allowance.left = 1
        server.acceptor.rejoin()
        server.settle()
        assert allowance.asked == 1

        for client in clients:
            client.exchange(frame(b"served"))
