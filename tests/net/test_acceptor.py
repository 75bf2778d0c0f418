"""Accepting: the budget of a turn, what happens when descriptors run out, and the drain."""

import errno
import os
import socket

import pytest

from lpechod.net.acceptor import ACCEPTS_PER_TURN, RETRY_SECONDS
from tests.net.conftest import Serve
from tests.net.harness import Client, EchoServer, frame
from tests.net.scarcity import descriptors_left, watched

TICK = 0.1

EXHAUSTED = [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM]
ABORTED = [errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.ENETDOWN, errno.ETIMEDOUT]


def served(client: Client) -> None:
    """See that a client gets its echo."""
    client.exchange(frame(b"served"))


class TestBudget:
    """A storm of connections does not hold up those who are connected."""

    def test_per_turn(self, serve: Serve) -> None:
        """A turn accepts so many from a listener; the rest follows in the next ones."""
        server = serve()
        for _ in range(2 * ACCEPTS_PER_TURN + 1):
            server.dial()
        accepted = []
        for _ in range(3):
            server.turn()
            accepted.append(server.service.counts.accepted)

        assert accepted == [ACCEPTS_PER_TURN, 2 * ACCEPTS_PER_TURN, 2 * ACCEPTS_PER_TURN + 1]

    def test_per_listener(self, serve: Serve) -> None:
        """Each listener has a budget of its own."""
        server = serve("127.0.0.1:0", "127.0.0.1:0")
        for _ in range(ACCEPTS_PER_TURN + 1):
            server.dial(server.listeners[0])
        late = server.dial(server.listeners[1])
        server.turn()

        assert server.service.counts.accepted == ACCEPTS_PER_TURN + 1
        served(late)

    def test_ends_with_the_queue(self, serve: Serve) -> None:
        """One connection takes two calls: itself, and finding that there is no other."""
        server = serve()
        listening = watched(server.listeners[0])
        server.connect()

        assert listening.calls == 2

    def test_connected_are_served_in_the_same_turn(self, serve: Serve) -> None:
        """While hundreds wait to be accepted, an echo does not."""
        server = serve()
        client = server.connect()
        for _ in range(100):
            server.dial()
        client.send_some(frame(b"now"))
        server.turn()

        assert client.receive_some() == frame(b"now")


class TestDescriptorsRunOut:
    """EMFILE, for real: the soft limit of this process is lowered."""

    @pytest.fixture(name="server")
    def _server(self, serve: Serve) -> EchoServer:
        return serve()

    def test_accepting_pauses(self, server: EchoServer) -> None:
        """It stops with one call and one line, and nobody turns in circles until it is over."""
        listening = watched(server.listeners[0])
        old = server.connect()
        for _ in range(5):
            server.dial()
        listening.calls = 0
        with descriptors_left(2):
            server.settle()
            assert server.service.counts.accepted == 3
            assert listening.calls == 3
            assert not server.acceptor.accepting
            assert server.acceptor.suspended
            server.assert_quiet()
            served(old)
            assert listening.calls == 3

        assert server.log.lines[-1].level == "warning"
        assert server.log.of("accept_paused") == [
            {"reason": "emfile", "listeners": [server.listeners[0].name]}
        ]
        assert server.service.counts.accept_pauses["emfile"] == 1

    def test_resumes_when_a_connection_closes(self, server: EchoServer) -> None:
        """A descriptor that is given back is used in the next turn, without waiting."""
        old = server.connect()
        waiting = [server.dial() for _ in range(2)]
        with descriptors_left(0):
            server.settle()
            old.shutdown()
            old.expect_eof()
            server.settle()
            assert server.service.counts.accepted == 2
            served(waiting[0])
            assert server.log.events() == ["accept_paused", "accept_resumed", "accept_paused"]

        server.pass_time(RETRY_SECONDS + TICK)
        served(waiting[1])

    def test_resumes_for_good(self, server: EchoServer) -> None:
        """Once it goes on, nothing is left of the pause."""
        old = server.connect()
        waiting = server.dial()
        with descriptors_left(0):
            server.settle()
            assert server.loop.timers == 2
        old.shutdown()
        old.expect_eof()
        server.settle()
        served(waiting)

        assert server.log.events() == ["accept_paused", "accept_resumed"]
        assert server.loop.timers == len(server.service.connections) == 1
        assert not server.acceptor.suspended

    def test_resumes_by_itself(self, server: EchoServer) -> None:
        """If nothing closes, it tries again after a second, once, and so on."""
        listening = watched(server.listeners[0])
        waiting = [server.dial() for _ in range(2)]
        with descriptors_left(0):
            server.settle()
            assert listening.calls == 1
            server.pass_time(RETRY_SECONDS - TICK)
            assert listening.calls == 1
            server.pass_time(10 * RETRY_SECONDS)
            assert 8 <= listening.calls <= 11
            assert server.service.counts.accept_pauses["emfile"] == listening.calls
        server.pass_time(RETRY_SECONDS + TICK)

        assert server.acceptor.accepting
        assert server.log.events()[-1] == "accept_resumed"
        for client in waiting:
            served(client)

    def test_all_listeners_pause_together(self, serve: Serve) -> None:
        """Descriptors are missing for all listeners, and it is said once."""
        server = serve("127.0.0.1:0", "127.0.0.1:0")
        sockets = [watched(listener) for listener in server.listeners]
        waiting = [server.dial(listener) for listener in server.listeners]
        with descriptors_left(0):
            server.settle()
            assert sum(listening.calls for listening in sockets) == 1
            server.assert_quiet()
        assert server.log.of("accept_paused") == [
            {"reason": "emfile", "listeners": [listener.name for listener in server.listeners]}
        ]
        server.pass_time(RETRY_SECONDS + TICK)

        for client in waiting:
            served(client)

    def test_drain_meanwhile(self, serve: Serve) -> None:
        """A drain tries once more for each listener, says nothing new, and closes them."""
        server = serve("127.0.0.1:0", "127.0.0.1:0")
        for listener in server.listeners:
            server.dial(listener)
        with descriptors_left(0):
            server.settle()
            server.acceptor.drain()

        assert server.log.events() == ["accept_paused"]
        assert server.service.counts.accept_pauses["emfile"] == 1
        assert server.loop.timers == 0


class TestFailures:
    """What accept(2) may answer; a stand-in for the listening socket says it."""

    @pytest.mark.parametrize("number", EXHAUSTED, ids=errno.errorcode.get)
    def test_exhausted(self, serve: Serve, number: int) -> None:
        """Whatever has run out, accepting pauses, and the connection stays in the queue."""
        server = serve()
        listening = watched(server.listeners[0])
        listening.failing = number
        client = server.dial()
        server.settle()
        reason = errno.errorcode[number].lower()
        assert server.service.counts.accept_pauses[reason] == 1
        assert [line["reason"] for line in server.log.of("accept_paused")] == [reason]
        assert listening.calls == 1
        listening.failing = 0
        server.pass_time(RETRY_SECONDS + TICK)

        served(client)

    @pytest.mark.parametrize("number", ABORTED, ids=errno.errorcode.get)
    def test_aborted(self, serve: Serve, number: int) -> None:
        """A connection that is gone is counted, and the one behind it served in the same turn."""
        server = serve()
        watched(server.listeners[0]).failures.extend([number] * 3)
        client = server.dial()
        server.turn()

        assert server.service.counts.rejected["aborted"] == 3
        assert server.service.counts.accepted == 1
        assert server.log.events() == []
        served(client)

    def test_nothing_but_aborted(self, serve: Serve) -> None:
        """If each call of a turn fails, it is not the connections' fault, and no use to go on."""
        server = serve()
        listening = watched(server.listeners[0])
        listening.failing = errno.EPERM
        client = server.dial()
        server.settle()
        assert listening.calls == ACCEPTS_PER_TURN
        server.assert_quiet()
        assert server.service.counts.accept_pauses["other"] == 1
        assert server.service.counts.rejected["aborted"] == ACCEPTS_PER_TURN
        listening.failing = 0
        server.pass_time(RETRY_SECONDS + TICK)

        served(client)

    def test_unknown(self, serve: Serve) -> None:
        """What nobody expects is logged with its traceback, and tried again after a second."""
        server = serve()
        server.errors = {"accept_failed"}
        listening = watched(server.listeners[0])
        old = server.connect()
        listening.failing = errno.EINVAL
        listening.calls = 0
        client = server.dial()
        server.settle()
        served(old)
        (line,) = server.log.of("accept_failed")
        assert isinstance(line["exc_info"], OSError)
        assert line["exc_info"].errno == errno.EINVAL
        assert server.service.counts.accept_pauses["other"] == 1
        assert listening.calls == 1
        server.assert_quiet()
        listening.failing = 0
        server.pass_time(RETRY_SECONDS + TICK)

        served(client)

    def test_drain_in_spite_of_it(self, serve: Serve) -> None:
        """A listener that fails while it is drained does not keep the others from it."""
        server = serve("127.0.0.1:0", "127.0.0.1:0")
        server.errors = {"accept_failed"}
        watched(server.listeners[0]).failing = errno.EINVAL
        client = server.dial(server.listeners[1])
        server.acceptor.drain()

        assert server.service.counts.accepted == 1
        assert [listener.socket.fileno() for listener in server.listeners] == [-1, -1]
        served(client)

    def test_defect_while_welcoming(self, serve: Serve) -> None:
        """A connection that our own code fails to take costs a pause, not the listener."""
        server = serve()
        server.errors = {"accept_failed"}
        welcome = server.acceptor._welcome

        def fail(client: int, _peer: object, _listener: str) -> None:
            os.close(client)
            server.acceptor._welcome = welcome
            raise LookupError("a defect")

        server.acceptor._welcome = fail
        server.dial()
        lucky = server.dial()
        server.settle()
        assert server.service.counts.accept_pauses["other"] == 1
        server.pass_time(RETRY_SECONDS + TICK)

        served(lucky)


class TestNoRoomInThePoller:
    """epoll_ctl(2) refuses a listener, as with ENOSPC and ENOMEM."""

    def test_all_are_tried_again(self, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
        """If one can't be watched, none is, and all are a second later: the worker is not deaf."""
        server = serve("127.0.0.1:0", "127.0.0.1:0")
        first, second = server.listeners
        register = server.poller.register

        def refuse(fd: int, mask: int) -> None:
            if fd == second.socket.fileno():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            register(fd, mask)

        server.acceptor.stop()
        with monkeypatch.context() as patch:
            patch.setattr(server.poller, "register", refuse)
            server.acceptor.start()
            waiting = [server.dial(first), server.dial(second)]
            server.pass_time(2.5 * RETRY_SECONDS)
            assert server.service.counts.accepted == 0
            assert server.service.counts.accept_pauses["other"] == 3
        server.pass_time(RETRY_SECONDS + TICK)

        assert server.acceptor.accepting
        for client in waiting:
            served(client)


class TestStopAndStart:
    """Accepting can be left to other workers for a while."""

    def test_stopped(self, serve: Serve) -> None:
        """While it is stopped, connections stay in the queue and wake nobody."""
        server = serve()
        server.acceptor.stop()
        client = server.dial()
        server.assert_quiet()
        assert not server.acceptor.accepting
        server.acceptor.start()

        served(client)

    def test_twice(self, serve: Serve) -> None:
        """Starting what is started and stopping what is stopped changes nothing."""
        server = serve()
        server.acceptor.start()
        server.acceptor.stop()
        server.acceptor.stop()
        server.acceptor.start()

        served(server.connect())

    def test_resume_without_a_pause(self, serve: Serve) -> None:
        """A connection that closes does not start what was stopped for another cause."""
        server = serve()
        client = server.connect()
        server.acceptor.stop()
        client.shutdown()
        client.expect_eof()
        server.settle()

        assert not server.acceptor.accepting
        assert server.log.events() == []


class TestDrain:
    """Closing a listening socket resets what waits in its queue, so that is served before."""

    def test_queue_is_served(self, serve: Serve) -> None:
        """All that wait are accepted at once, beyond the budget of a turn, from each listener."""
        server = serve("127.0.0.1:0", "[::1]:0")
        clients = [server.dial(listener) for listener in server.listeners for _ in range(50)]
        server.acceptor.drain()
        assert server.service.counts.accepted == 100

        for client in clients:
            served(client)

    def test_nobody_listens(self, serve: Serve) -> None:
        """After it the listeners are closed, and a new connection is refused."""
        server = serve()
        address = server.listeners[0].socket.getsockname()
        server.acceptor.drain()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)

        assert not server.acceptor.accepting
        server.assert_quiet()

    def test_twice(self, serve: Serve) -> None:
        """A second drain finds nothing to do."""
        server = serve()
        server.acceptor.drain()
        server.acceptor.drain()

        assert server.log.events() == []
