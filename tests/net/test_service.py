"""The set of connections: numbers, limits, refusals, defects contained, and siblings."""

import errno
import gc
import os

import pytest

from lpechod.engine.poller import FD_SETSIZE
from lpechod.net.admission import AdmissionLimits
from lpechod.net.connection import Connection
from lpechod.net.transport import PlainTransport
from lpechod.process.descriptors import raise_descriptor_limit
from lpechod.wire.states import CloseReason, State
from tests.net.conftest import Serve
from tests.net.harness import Client, EchoServer, frame


class FailingTransport(PlainTransport):
    """A transport whose system calls fail as they never should; it takes over another's socket."""

    __slots__ = ("on_receive", "on_send")

    def __init__(self, sound: PlainTransport) -> None:
        super().__init__(sound.fd)
        self.on_receive = 0
        self.on_send = 0

    def receive(self, buffer: memoryview) -> int:
        if self.on_receive:
            raise OSError(self.on_receive, os.strerror(self.on_receive))
        return super().receive(buffer)

    def send(self, data: memoryview) -> int:
        if self.on_send:
            raise OSError(self.on_send, os.strerror(self.on_send))
        return super().send(data)


class Probe:
    """A source that looks whether a descriptor is open."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.seen: list[bool] = []

    def is_open(self) -> bool:
        try:
            os.fstat(self.fd)
        except OSError:
            return False
        return True

    def on_ready(self, _mask: int, _now: float) -> None:
        self.seen.append(self.is_open())

    def on_failure(self, error: Exception, _now: float) -> None:
        raise error


def failing(server: EchoServer, client: Client) -> FailingTransport:
    """Put a `FailingTransport` under the connection of a client."""
    connection = server.connection_of(client)
    assert isinstance(connection._transport, PlainTransport)
    transport = FailingTransport(connection._transport)
    connection._transport = transport
    server.service.steady.leave(transport.fd)  # It would do without a transport.
    return transport


def turned_away(client: Client) -> bool:
    """Return whether the server has closed a connection without a word."""
    try:
        client.expect_eof()
    except ConnectionResetError:
        return True
    return client.at_end


class TestNumbers:
    """Connections are numbered, for the log."""

    def test_from_one(self, serve: Serve) -> None:
        """Each connection gets the next number, in the order of accepting."""
        server = serve()
        for expected in (1, 2, 3):
            client = server.connect()
            client.shutdown()
            assert server.closed(client)["connection"] == expected

    def test_not_for_the_rejected(self, serve: Serve) -> None:
        """Who is turned away takes no number, so that they count those who were served."""
        server = serve(admission=AdmissionLimits(max_connections=1))
        first = server.connect()
        assert turned_away(server.connect())
        first.shutdown()
        server.closed(first)

        assert server.connection_of(server.connect()).number == 2


class TestLimits:
    """Limits on connections: turned away, counted and logged."""

    def test_of_all(self, serve: Serve) -> None:
        """Past the limit a client is closed at once, and those who are in stay."""
        server = serve(admission=AdmissionLimits(max_connections=2))
        inside = [server.connect(), server.connect()]
        outside = server.connect()
        assert turned_away(outside)
        assert server.log.of("connection_rejected") == [
            {
                "peer": outside.name,
                "listener": server.listeners[0].name,
                "reason": "max_connections",
            }
        ]
        assert server.log.lines[-1].level == "warning"
        assert server.service.counts.rejected["max_connections"] == 1
        assert server.service.counts.accepted == 2
        inside[0].exchange(frame(b"inside"))
        inside[0].close()
        server.settle()

        server.connect().exchange(frame(b"next"))

    def test_of_an_address(self, serve: Serve) -> None:
        """One address may not take the place of others."""
        server = serve(admission=AdmissionLimits(max_connections_per_ip=1))
        server.connect(source="127.0.0.1")
        assert turned_away(server.connect(source="127.0.0.1"))
        server.connect(source="127.0.0.2").exchange(frame(b"another"))

        assert server.service.counts.rejected["max_connections_per_ip"] == 1

    def test_of_an_address_in_both_families(self, serve: Serve) -> None:
        """An IPv4 client is the same client by a dual-stack listener."""
        server = serve("127.0.0.1:0", "[::]:0", admission=AdmissionLimits(max_connections_per_ip=1))
        server.connect(server.listeners[0])

        assert turned_away(server.connect(server.listeners[1], host="127.0.0.1"))

    def test_storm_is_not_logged_line_by_line(self, serve: Serve) -> None:
        """Past the rate limit of the log, clients are turned away silently and counted."""
        server = serve(admission=AdmissionLimits(max_connections=1))
        server.connect()
        server.log.muted.add("connection_rejected")
        for _ in range(50):
            assert turned_away(server.connect())

        assert server.service.counts.rejected["max_connections"] == 50

    def test_ends_are_not_logged_line_by_line(self, serve: Serve) -> None:
        """Likewise for the line of each connection."""
        server = serve()
        server.log.muted.add("connection_closed")
        for _ in range(50):
            server.connect().close()
        server.settle()

        assert server.service.counts.closed[CloseReason.PEER_CLOSED] == 50


class TestPollerIsFull:
    """The kernel may refuse to watch a descriptor."""

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM], ids=errno.errorcode.get)
    def test_refused(self, serve: Serve, number: int) -> None:
        """That connection is closed, counted and logged with the cause; nothing of it is left."""
        server = serve(admission=AdmissionLimits(max_connections=1, max_connections_per_ip=1))
        register = server.poller.register

        def refuse(fd: int, mask: int) -> None:  # noqa: ARG001 - named as the face has them.
            raise OSError(number, os.strerror(number))

        server.poller.register = refuse
        client = server.connect()
        assert turned_away(client)
        assert server.service.counts.accepted == 0
        assert server.service.counts.rejected["other"] == 1
        (line,) = server.log.of("connection_rejected")
        assert line["reason"] == "other"
        assert os.strerror(number) in str(line["error"])
        assert server.loop.timers == 0
        server.poller.register = register

        server.connect().exchange(frame(b"next"))

    @pytest.mark.parametrize("poller_name", ["select"], indirect=False)
    def test_descriptor_too_large_for_select(self, serve: Serve) -> None:
        """With select(2), a descriptor past its end is turned away, not a crash."""
        raise_descriptor_limit(FD_SETSIZE)  # Often it is 1024, one short of what is needed here.
        server = serve()
        client = server.dial()
        null = os.open(os.devnull, os.O_RDONLY)
        taken = [null]
        while taken[-1] < FD_SETSIZE - 1:
            taken.append(os.dup(null))
        server.settle()
        for fd in taken:
            os.close(fd)
        assert server.service.counts.rejected["other"] == 1
        assert turned_away(client)
        (line,) = server.log.of("connection_rejected")
        assert "too large for select" in str(line["error"])

        server.connect().exchange(frame(b"next"))


class TestDefects:
    """A defect of ours costs one connection."""

    def test_while_receiving(self, serve: Serve) -> None:
        """It is logged with its traceback, that connection ends, and the others do not notice."""
        server = serve()
        server.errors = {"connection_failed"}
        client, other = server.connect(), server.connect()
        failing(server, client).on_receive = errno.EIO
        client.send_some(frame(b"frame"))

        line = server.closed(client)
        assert line["reason"] == "internal_error"
        (failure,) = server.log.of("connection_failed")
        assert failure["connection"] == line["connection"]
        assert isinstance(failure["exc_info"], OSError)
        other.exchange(frame(b"other"))

    def test_while_draining(self, serve: Serve) -> None:
        """A drain goes on with the connections behind the one that failed."""
        server = serve()
        server.errors = {"connection_failed"}
        clients = [server.connect() for _ in range(3)]
        server.settle()
        for client in clients[::2]:
            client.send_some(frame(b"frame"))
        failing(server, clients[1]).on_receive = errno.EIO  # Found by the drain: it reads first.
        server.service.drain(server.clock.now + 30)
        server.settle()
        for client in clients:
            client.close()

        reasons = [server.closed(client)["reason"] for client in clients]
        assert reasons == ["drained", "internal_error", "drained"]

    def test_after_the_end(self, serve: Serve) -> None:
        """A connection that fails when its protocol has ended already is closed all the same."""
        server = serve(max_buffered_bytes=1000)
        server.errors = {"connection_failed"}
        client = server.connect()
        failing(server, client).on_send = errno.EIO
        client.send_some(frame(b"good") + frame(b"no memory for this")[:-1])

        assert server.closed(client)["reason"] == "overload"
        server.assert_quiet()


class TestDepartures:
    """Descriptors are given back when a turn ends, and whoever waits for one hears of it."""

    def test_leaves_no_garbage(self, serve: Serve) -> None:
        """A connection that has ended is freed at once, and not when cycles are looked for."""
        server = serve()
        gc.collect()
        gc.disable()
        try:
            for size in (0, 3, 300_000):
                client = server.connect()
                client.exchange(frame(bytes(size)))
                client.shutdown()
                server.closed(client)
            assert not [each for each in gc.get_objects() if isinstance(each, Connection)]
        finally:
            gc.enable()

    def test_descriptor_is_open_until_then(self, serve: Serve) -> None:
        """Inside a turn no number can come back as another connection's, while events wait."""
        server = serve()
        client = server.connect()
        server.settle()
        connection = server.connection_of(client)
        probe = Probe(connection._transport.fd)
        client.reset()
        server.loop.again(probe, 0)  # Called behind all descriptors.
        server.turn()

        assert probe.seen == [True]
        assert connection.protocol.state is State.CLOSED
        assert not probe.is_open()

    def test_descriptor_is_free_by_then(self, serve: Serve) -> None:
        """The call comes after close(2): the next accept(2) can have the number."""
        server = serve()
        client = server.connect()
        probe = Probe(server.connection_of(client)._transport.fd)
        server.service.on_departure = lambda: probe.on_ready(0, 0.0)
        client.shutdown()
        server.closed(client)

        assert probe.seen == [False]


class TestSiblings:
    """What a service shares with those of other workers: its number, and the limit."""

    def test_number_is_told(self, serve: Serve) -> None:
        """Each accept and each close tells how many connections are open now."""
        server = serve()
        told: list[int] = []
        server.service.on_count = told.append
        clients = [server.connect() for _ in range(3)]
        for client in clients[:2]:
            client.shutdown()
            server.closed(client)

        assert told == [1, 2, 3, 2, 1]

    def test_number_is_told_before_accepting_goes_on(self, serve: Serve) -> None:
        """Whoever hears of a departure finds the number told already."""
        server = serve()
        client = server.connect()
        order: list[object] = []
        server.service.on_count = order.append
        server.service.on_departure = lambda: order.append("departure")
        client.shutdown()
        server.closed(client)

        assert order == [0, "departure"]

    def test_number_does_not_change_by_a_refusal(self, serve: Serve) -> None:
        """Who is turned away is no change of the number."""
        server = serve(admission=AdmissionLimits(max_connections=1))
        told: list[int] = []
        server.service.on_count = told.append
        server.connect()
        assert turned_away(server.connect())

        assert told == [1]

    def test_limit_is_for_all_workers(self, serve: Serve) -> None:
        """What the others hold leaves less room here, from one moment to the next."""
        held = [3]
        server = serve(admission=AdmissionLimits(max_connections=4), others=lambda: held[0])
        server.connect().exchange(frame(b"the fourth"))
        assert turned_away(server.connect())
        assert server.service.counts.rejected["max_connections"] == 1
        held[0] = 2

        server.connect().exchange(frame(b"the next"))

    def test_others_can_be_named_later(self, serve: Serve) -> None:
        """A service can be told of the others after it was made."""
        server = serve(admission=AdmissionLimits(max_connections=1))
        assert server.service.admission.others() == 0
        server.service.admission.others = lambda: 1

        assert turned_away(server.connect())
        assert server.service.admission.others() == 1
