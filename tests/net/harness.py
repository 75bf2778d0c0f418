"""An echo server and its clients over real sockets, in fake time and in the test's own thread.

Nothing runs but what a test asks for: a client's operation turns the server's loop until the kernel
has done its part, for a bounded number of turns, so a server that hangs is a failed assertion and
not a time-out. The clock stands still unless `EchoServer.pass_time` or `EchoServer.jump` moves it.

`EchoServer.finish` holds every test to what must be true of any run: no defect was logged, each
connection ended once and was logged once with the numbers its client saw, all memory was given
back, and no timer or descriptor is left.
"""

import os
import select
import socket
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from lpechod.engine.kqueue import KqueuePoller
from lpechod.engine.loop import Loop
from lpechod.engine.poller import MAX_EVENTS, Poller, Ready, available
from lpechod.net.acceptor import Acceptor
from lpechod.net.address import parse_address
from lpechod.net.admission import AdmissionLimits, format_peer
from lpechod.net.connection import Connection
from lpechod.net.entrance import OPEN_TO_ALL, Entrance
from lpechod.net.listener import Listener, ListenerSettings, open_listeners
from lpechod.net.networks import AccessList
from lpechod.net.service import EchoService, ServiceSettings
from lpechod.wire.settings import EchoSettings
from lpechod.wire.states import CloseReason, State
from lpechod.wire.tally import Tally
from tests.engine import fake_kqueue
from tests.fake_time import FakeClock, FakeTimePoller
from tests.net.plainclient import Client, assert_same
from tests.net.tlsclient import TlsClient, server_context

__all__ = ["Client", "EchoServer", "TlsClient", "assert_same"]

POLLERS: Mapping[str, Callable[[], Poller]] = {
    "kqueue": lambda: KqueuePoller(fake_kqueue),
    **available(),
}
"""Every poller of the platform, and kqueue over a stand-in where there is none."""

PROXIED = Entrance(proxies=AccessList((), ()))
"""For proxies, whoever they are."""

SECURED = Entrance(tls=server_context())
"""For clients that speak TLS."""

PROXIED_TLS = Entrance(proxies=AccessList((), ()), tls=server_context())
"""For proxies whose clients speak TLS."""

ENDS_WITHOUT_NOTICE = frozenset({"write_timeout", "missing_close_notify", "tls_error"})
"""Reasons for which a TLS stream ends without a close_notify: nothing can be sent in it."""

MOST_TURNS = 20_000
"""More than any operation of a test needs; a server that needs more than that hangs or spins."""

_MOST_WAITS = 300
_WAIT_SECONDS = 0.01
"""The kernel has timers of its own, such as 40 ms for a delayed acknowledgement. A client that can
do nothing, of a server that has nothing to do, waits for its socket; three seconds are for ever."""


def frame(body: bytes) -> bytes:
    """Return a body with its length in front."""
    return struct.pack(">I", len(body)) + body


def body_of(size: int) -> bytes:
    """Return so many bytes of which no two neighbourhoods look alike."""
    count = size // 4 + 1
    return struct.pack(f">{count}I", *((k * 2654435761) & 0xFFFFFFFF for k in range(count)))[:size]


def descriptors() -> frozenset[str]:
    """Return the descriptors of this process; the one that reads the list is always in it."""
    return frozenset(os.listdir("/dev/fd"))  # noqa: PTH208 - the numbers, not paths.


@dataclass(frozen=True, slots=True)
class KernelBuffers:
    """Sizes of the kernel's buffers for a socket, in bytes; None is the kernel's choice.

    To be set before a handshake, which fixes the scale of the window.
    """

    send: int | None = None
    receive: int | None = None

    def apply(self, end: socket.socket) -> None:
        """Set them; sockets that a listening one accepts inherit them."""
        for option, size in ((socket.SO_SNDBUF, self.send), (socket.SO_RCVBUF, self.receive)):
            if size is not None:
                end.setsockopt(socket.SOL_SOCKET, option, size)


@dataclass(frozen=True, slots=True)
class Logged:
    """A line of the log, as data."""

    level: str
    event: str
    fields: dict[str, object]


@dataclass
class RecordingLog:
    """A log that keeps what it is told.

    Attributes:
        muted: events whose rate limit is reached.
    """

    lines: list[Logged] = field(default_factory=list)
    muted: set[str] = field(default_factory=set)

    def _record(self, level: str, event: str, fields: dict[str, object]) -> None:
        assert event not in self.muted, f"{event} was logged though its rate limit is reached"
        self.lines.append(Logged(level, event, fields))

    def debug(self, event: str, **fields: object) -> None:
        self._record("debug", event, fields)

    def info(self, event: str, **fields: object) -> None:
        self._record("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        self._record("warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        self._record("error", event, fields)

    def permits(self, event: str) -> bool:
        return event not in self.muted

    def of(self, event: str) -> list[dict[str, object]]:
        """Return the fields of each line of an event."""
        return [line.fields for line in self.lines if line.event == event]

    def events(self) -> list[str]:
        """Return the name of each line, in order, without those of single connections."""
        return [line.event for line in self.lines if not line.event.startswith("connection_")]


def proxy_header(client: socket.socket) -> bytes:
    """Return a PROXY header by which a client speaks for itself, version 2."""
    signature = b"\r\n\r\n\0\r\nQUIT\n"
    if client.family == socket.AF_UNIX:
        return signature + struct.pack(">BBH", 0x20, 0x00, 0)
    own, peer = client.getsockname(), client.getpeername()
    family = 0x11 if client.family == socket.AF_INET else 0x21
    addresses = socket.inet_pton(client.family, own[0]) + socket.inet_pton(client.family, peer[0])
    ports = struct.pack(">HH", own[1], peer[1])
    return signature + struct.pack(">BBH", 0x21, family, len(addresses + ports)) + addresses + ports


class HeldPoller(FakeTimePoller):
    """Skips waiting up to a time that the test sets, and no further."""

    def __init__(self, poller: Poller, clock: FakeClock) -> None:
        super().__init__(poller, clock)
        self._held_clock = clock
        self.until = 0.0

    def poll(self, timeout: float | None, maxevents: int = MAX_EVENTS, /) -> Ready:
        """Return what is ready, or skip the wait as far as it is allowed."""
        left = max(0.0, self.until - self._held_clock.now)
        return super().poll(left if timeout is None else min(timeout, left), maxevents)


class EchoServer:
    """The echo service behind real listeners.

    Args:
        poller: a key of `POLLERS`.
        addresses: where to listen, as in the configuration.
        echo: settings of the protocol.
        admission: limits on connections.
        max_buffered_bytes: limit on memory.
        buffers: kernel buffers of the accepted sockets.
        allowance: how many more connections it may accept; None is any number.
        others: how many connections its siblings have.
        overload_percent: part of the limits from which on there is overload.
        entrance: what its listeners demand. If that is a PROXY header, clients send one for
            themselves, so that all else is as without.
        max_handshakes: TLS handshakes under way at a time.

    Attributes:
        errors: events of level ``error`` that the test provokes.
    """

    def __init__(
        self,
        poller: str,
        *addresses: str,
        echo: EchoSettings | None = None,
        admission: AdmissionLimits | None = None,
        max_buffered_bytes: int = 256 << 20,
        buffers: KernelBuffers = KernelBuffers(),
        allowance: Callable[[], int] | None = None,
        others: Callable[[], int] = lambda: 0,
        overload_percent: int = 90,
        entrance: Entrance = OPEN_TO_ALL,
        max_handshakes: int = 256,
    ) -> None:
        self._before = descriptors()
        self.entrance = entrance
        self.clock = FakeClock()
        self.poller = HeldPoller(POLLERS[poller](), self.clock)
        self.loop = Loop(self.poller, self.clock, self._on_turn)
        self.log = RecordingLog()
        self.errors: set[str] = set()
        self.tally = Tally()
        settings = ServiceSettings(
            echo or EchoSettings(),
            admission or AdmissionLimits(),
            max_buffered_bytes,
            max_handshakes,
            overload_percent,
        )
        opened = open_listeners(
            ListenerSettings(parse_address(address)) for address in addresses or ("127.0.0.1:0",)
        )
        self.listeners = [listener for each in opened for listener in each]
        entrances = {listener.name: entrance for listener in self.listeners}
        self.service = EchoService(settings, self.loop, self.tally, self.log, others, entrances)
        for listener in self.listeners:
            buffers.apply(listener.socket)
        self.acceptor = Acceptor(
            self.listeners,
            self.service.welcome,
            self.service.counts,
            self.loop,
            self.log,
            allowance,
        )
        self.service.on_departure = self.acceptor.resume
        self.acceptor.start()
        self.clients: list[Client] = []
        self.turns = 0
        self._events = 0

    def _on_turn(self, _seconds: float, events: int) -> None:
        self.turns += 1
        self._events = events

    # Turning.

    def turn(self) -> int:
        """Turn once without moving the clock, and return how many events it handled."""
        self.loop.turn()
        for client in self.clients:
            client.pump()
        return self._events

    def settle(self) -> None:
        """Turn until nothing is left to do."""
        for _ in range(MOST_TURNS):
            if not self.turn():
                return
        raise AssertionError(f"still busy after {MOST_TURNS} turns")

    def assert_quiet(self) -> None:
        """See that nothing wakes the loop for long.

        A spin does in each turn. An acknowledgement that was delayed, or the second half of a
        close, is news that may come late, a few times on a busy machine.
        """
        busy = sum(self.turn() > 0 for _ in range(100))
        assert busy <= 10, f"busy in {busy} of 100 turns"

    def turn_until(
        self, done: Callable[[], bool], what: str, waiting: Iterable[socket.socket] = ()
    ) -> None:
        """Turn until something has come true.

        Args:
            done: whether it has.
            what: names it when it has not.
            waiting: sockets whose readiness may make it true.
        """
        sockets = list(waiting)
        waits = 0
        for _ in range(MOST_TURNS):
            if done():
                return
            if not self.turn() and not done():
                waits += 1
                if waits > _MOST_WAITS:
                    break
                select.select(sockets, (), (), _WAIT_SECONDS)
        raise AssertionError(f"not within {self.turns} turns: {what}")

    def pass_time(self, seconds: float) -> int:
        """Let time pass as the loop would sleep through it, and return how often it woke up."""
        self.poller.until = end = self.clock.now + seconds
        turns = 0
        while self.clock.now < end:
            self.turn()
            turns += 1
            assert turns < MOST_TURNS, f"spins at {self.clock.now}, {end} is far"
        self.settle()
        return turns

    def jump(self, seconds: float) -> None:
        """Move the clock while the loop is not looking, as when the process was stopped."""
        self.clock.advance(seconds)

    # Clients.

    def connect(
        self,
        listener: Listener | None = None,
        host: str | None = None,
        buffers: KernelBuffers = KernelBuffers(),
        source: str | None = None,
    ) -> "Client":
        """Connect a client and see it accepted, or turned away.

        Args:
            listener: to which listener, if there are several.
            host: by which address of it.
            buffers: its kernel buffers.
            source: address of the client, if it is not to be the kernel's choice.
        """
        client = self.dial(listener, host, buffers, source)
        counts = self.service.counts

        def seen() -> int:
            return counts.accepted + sum(counts.rejected.values())

        before = seen()
        self.turn_until(lambda: seen() > before, "accepted or rejected")
        self.turn_until(
            lambda: (
                client.greet()
                and all(
                    each.protocol.state is not State.HANDSHAKE for each in self.service.connections
                )
            ),
            "through with what precedes the first frame",
            [client.socket],
        )
        return client

    def dial(
        self,
        listener: Listener | None = None,
        host: str | None = None,
        buffers: KernelBuffers = KernelBuffers(),
        source: str | None = None,
    ) -> "Client":
        """Connect a client, which waits in the listener's queue; see `connect`."""
        listening = (listener or self.listeners[0]).socket
        address = listening.getsockname()
        family = listening.family
        if host is not None:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            address = (host, address[1])
        end = socket.socket(family, socket.SOCK_STREAM)
        buffers.apply(end)
        if source is not None:
            end.bind((source, 0))
        end.connect(address)  # Returns when the kernel has queued it.
        if self.entrance.proxies is not None:
            end.sendall(proxy_header(end))
        client = Client(self, end) if self.entrance.tls is None else TlsClient(self, end)
        self.clients.append(client)
        return client

    def connection_of(self, client: "Client") -> Connection:
        """Return the server's end of a TCP client."""
        (connection,) = (
            each for each in self.service.connections if format_peer(each.peer) == client.name
        )
        return connection

    def closed(self, client: "Client") -> dict[str, object]:
        """Turn until a TCP client's connection has ended, and return its line of the log."""

        def lines() -> list[dict[str, object]]:
            closed = self.log.of("connection_closed")
            return [line for line in closed if line["peer"] == client.name]

        self.turn_until(lambda: bool(lines()), f"connection_closed of {client.name}")
        (line,) = lines()
        return line

    # The end.

    def finish(self) -> None:
        """End all connections, and check what must be true of any run."""
        try:
            self._end()
        finally:
            # What a failed test leaves behind must not fail the next one.
            for listener in self.listeners:
                listener.close()
            for connection in self.service.connections:
                connection._transport.close()
            self.loop.close()
        assert self._before == descriptors()
        assert self.service.pool.held == 0
        assert not self.service.pool.held_by
        assert self.service.admission.active == 0
        assert not self.service.admission._by_prefix
        self._check_log()
        self._check_numbers()

    def _end(self) -> None:
        for client in self.clients:
            client.close()
        self.settle()
        self.acceptor.drain()
        self.pass_time(2.0)  # What is paused for want of memory goes on after a second.
        self.turn_until(lambda: not self.service.connections, "every connection ended")
        assert self.loop.timers == 0

    def _check_log(self) -> None:
        failed = [line for line in self.log.lines if line.level == "error"]
        assert self.errors == {line.event for line in failed}, failed
        closed = self.log.of("connection_closed")
        counts = self.service.counts
        if "connection_closed" not in self.log.muted:
            assert len(closed) == counts.accepted
            for reason in CloseReason:
                logged = [line for line in closed if line["reason"] == reason.value]
                assert len(logged) == counts.closed[reason], reason
        assert sum(counts.closed.values()) == counts.accepted
        assert sum(counts.durations.counts) == counts.accepted

    def _check_numbers(self) -> None:
        """Compare what we say we sent with what the clients received."""
        sent = self.tally.echoed_bytes - self.tally.unsent_bytes
        received = sum(client.received for client in self.clients)
        if all(client.at_end for client in self.clients):
            assert sent == received
        assert sent >= received
        lines = {line["peer"]: line for line in self.log.of("connection_closed")}
        for client in self.clients:
            line = lines.get(client.name)
            if client.at_end and line is not None:
                assert line["sent_bytes"] == client.received
                assert not client.cut or line["reason"] in ENDS_WITHOUT_NOTICE
        assert sum(self.tally.frame_sizes) == self.tally.frames
        assert sum(self.tally.echo_delays.counts) <= self.tally.delayed_frames
        assert self.tally.delayed_frames <= self.tally.frames
