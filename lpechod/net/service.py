"""All connections of a worker: admits, keeps, drains and counts them."""

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from lpechod.engine.buffers import BufferPool, kept_bytes
from lpechod.engine.loop import Loop
from lpechod.net.admission import (
    ALONE,
    Admission,
    AdmissionLimits,
    ClientCounts,
    format_peer,
    host_of,
)
from lpechod.net.budget import MemoryBudget
from lpechod.net.connection import Connection
from lpechod.net.counts import ConnectionCounts
from lpechod.net.drain import Drain
from lpechod.net.edge import EdgeConnection
from lpechod.net.entrance import OPEN_TO_ALL, Entrance
from lpechod.net.eventlog import EventLog
from lpechod.net.handshake import Handshake, HandshakeError
from lpechod.net.handshakegate import HandshakeGate
from lpechod.net.newcomers import Newcomers
from lpechod.net.overload import Overload
from lpechod.net.proxied import ProxiedTransport, ProxyHandshake
from lpechod.net.steady import SteadyConnection, SteadyPath
from lpechod.net.tls import TlsTransport
from lpechod.net.tlsconnection import TlsConnection
from lpechod.net.tlshandshake import TlsHandshake
from lpechod.net.transport import PlainTransport, StreamError, Transport
from lpechod.wire.frames import HEADER_BYTES
from lpechod.wire.settings import EchoSettings
from lpechod.wire.states import CloseReason
from lpechod.wire.tally import Tally


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """What governs the connections of a worker; sizes in bytes."""

    echo: EchoSettings = field(default_factory=EchoSettings)
    admission: AdmissionLimits = field(default_factory=AdmissionLimits)
    max_buffered_bytes: int = 256 << 20
    max_handshakes: int = 256
    """TLS handshakes under way at a time."""
    overload_percent: int = 90
    """Part of the limits on connections and on memory at which there is overload."""


class EchoService:
    """The echo service, as a set of connections in one loop.

    Args:
        settings: limits and time-outs.
        loop: where the connections live.
        tally: where they count bytes and frames.
        log: gets a line for each connection that ends.
        others: returns how many connections other workers hold under the same limit.
        entrances: what listeners demand of clients, by name; nothing of those that are not there.
        clients: how many connections of each client other workers hold; by default there are none.
    """

    __slots__ = (
        "_drain",
        "_entrances",
        "_gate",
        "_kind",
        "_log",
        "_loop",
        "_newcomers",
        "_numbers",
        "_settings",
        "admission",
        "budget",
        "connections",
        "counts",
        "draining",
        "on_count",
        "on_departure",
        "overload",
        "pool",
        "steady",
        "tally",
    )

    def __init__(
        self,
        settings: ServiceSettings,
        loop: Loop,
        tally: Tally,
        log: EventLog,
        others: Callable[[], int] = lambda: 0,
        entrances: Mapping[str, Entrance] | None = None,
        clients: ClientCounts = ALONE,
    ) -> None:
        self._entrances = entrances or {}
        self._settings = settings
        self._loop = loop
        self._log = log
        self.admission = Admission(settings.admission, others, clients)
        self._numbers = 0
        self._kind = EdgeConnection if loop.edge_triggered else SteadyConnection
        self._drain = Drain(loop)
        self._newcomers = Newcomers(loop)
        self.draining = False
        self.tally = tally
        self.counts = ConnectionCounts()
        self._gate = HandshakeGate(loop, settings.max_handshakes, self._note_delay)
        largest = settings.echo.max_frame_bytes + HEADER_BYTES
        keep = kept_bytes(settings.max_buffered_bytes, largest)
        self.pool = BufferPool(settings.max_buffered_bytes, keep)
        self.steady = SteadyPath(self.pool, loop.rotation, settings.echo.max_frame_bytes, tally)
        loop.shortcut = self.steady.serve
        self.budget = MemoryBudget(self.pool, loop, log, settings.overload_percent)
        self.connections: set[Connection] = set()
        mark = -(-settings.admission.max_connections * settings.overload_percent // 100)
        self.overload = Overload(mark, self.admission, self.connections, loop, log)
        self.on_departure: Callable[[], None] = lambda: None
        """Called after each close, when its descriptor is free again."""
        self.on_count: Callable[[int], None] = lambda _connections: None
        """Called with the number of open connections after each accept and each close."""

    @property
    def progress(self) -> int:
        """A number that rises with all work: a byte, a connection, a step of a handshake."""
        tally, counts = self.tally, self.counts
        return (
            tally.received_bytes
            + tally.echoed_bytes
            - tally.unsent_bytes
            + counts.accepted
            + sum(counts.closed.values())
            + sum(counts.rejected.values())
            + counts.steps
        )

    def welcome(self, fd: int, peer: object, listener: str) -> None:
        """Serve a connection, or close it because a limit is reached.

        Args:
            fd: descriptor of a connected socket, fresh from accept(2); owned from now on.
            peer: its address as accept(2) gave it. Never asked for again: getpeername(2) fails on a
                connection that is already reset.
            listener: name of the listener.
        """
        entrance = self._entrances.get(listener, OPEN_TO_ALL)
        refusal = self._screen(entrance, peer)
        if refusal is not None:
            os.close(fd)
            self._note_rejection(peer, listener, refusal)
            return
        kind: type[Connection] = self._kind
        transport: Transport
        handshakes: tuple[Handshake, ...] = ()
        if entrance.is_plain:
            transport = PlainTransport(fd)
        else:
            transport, handshakes = self._furnish(fd, entrance)
            if entrance.tls is not None:
                kind = TlsConnection
        known = self.admission.limits_clients and entrance.proxies is None
        host = host_of(peer) if known else None
        self._numbers = number = self._numbers + 1
        connection: Connection | None = None
        try:
            connection = kind(
                transport, self._loop, self._settings.echo, self.pool, self.tally, number, peer,
                listener, self, handshakes,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            # The poller is full: epoll_ctl(2) ENOSPC or ENOMEM, a descriptor past FD_SETSIZE.
            self._note_rejection(peer, listener, "other", error=str(error))
            return
        finally:
            if connection is None:  # A defect, too, must not cost the descriptor.
                self.admission.leave(host)
                transport.close()
        connection.account = host
        self.counts.accepted += 1
        self.connections.add(connection)
        self._newcomers.add(connection)
        self.on_count(len(self.connections))
        if self.draining:
            self._drain.hurry(connection)

    def _furnish(self, fd: int, entrance: Entrance) -> tuple[Transport, tuple[Handshake, ...]]:
        """Give a connection what its listener demands, other than plain frames."""
        client = socket.SocketType(fileno=fd)
        greetings: tuple[Handshake, ...] = ()
        if entrance.proxies is not None:
            greetings = (ProxyHandshake(client, self.counts),)
        if entrance.tls is None:
            return ProxiedTransport(client), greetings
        tls = TlsTransport(client, entrance.tls, self.steady.secured.bios)
        return tls, (*greetings, TlsHandshake(tls, self._gate, self.counts))

    def _screen(self, entrance: Entrance, peer: object) -> str | None:
        """Count in whoever has connected, or say why not; of a proxy, the client is yet to come."""
        if entrance.is_open and not self.admission.limits_clients:
            return self.admission.enter()
        host = host_of(peer)
        if entrance.proxies is not None:
            return self.admission.enter() if entrance.proxies.permits(host) else "untrusted_proxy"
        if not entrance.access.permits(host):
            return "denied"
        return self.admission.admit(host, self._loop.now)

    def on_identified(self, connection: Connection) -> bool:
        """Admit the client that a proxy speaks for, or not."""
        host = host_of(connection.peer)
        entrance = self._entrances[connection.listener]
        refusal: str | None = "denied"
        if entrance.access.permits(host):
            refusal = self.admission.identify(host, self._loop.now)
        if refusal is None:
            connection.account = host
            return True
        self._note_rejection(connection.peer, connection.listener, refusal)
        return False

    def on_handshake_failed(self, connection: Connection, error: HandshakeError) -> None:
        """Log what is wrong with a PROXY header or a TLS handshake."""
        self._note_failure("handshake_failed", connection, error)

    def on_stream_failed(self, connection: Connection, error: StreamError) -> None:
        """Log what a peer has done to its TLS stream; the end of many lacks a close_notify."""
        if error.reason is not CloseReason.MISSING_CLOSE_NOTIFY:
            self._note_failure("tls_failed", connection, error)

    def _note_failure(
        self, event: str, connection: Connection, error: HandshakeError | StreamError
    ) -> None:
        if self._log.permits(event):
            self._log.warning(
                event,
                connection=connection.number,
                peer=format_peer(connection.peer),
                listener=connection.listener,
                reason=error.reason.value,
                problem=str(error),
            )

    def _note_delay(self) -> None:
        self.counts.tls_handshakes_delayed += 1

    def _note_rejection(self, peer: object, listener: str, reason: str, **why: str) -> None:
        self.counts.rejected[reason] += 1
        if self._log.permits("connection_rejected"):
            self._log.warning(
                "connection_rejected",
                peer=format_peer(peer),
                listener=listener,
                reason=reason,
                **why,
            )

    def drain(self, until: float) -> None:
        """Close every connection at its next frame boundary after it is told, which takes a while.

        Args:
            until: when to close those that have not come to one, in seconds of the loop's clock.
        """
        self.draining = True
        self._drain.begin(self.connections, until)

    def cut(self, now: float) -> None:
        """Close every connection at once."""
        for connection in tuple(self.connections):
            connection.abort(CloseReason.DRAIN_TIMEOUT, now)

    def on_closed(self, connection: Connection) -> None:
        """Count a connection that has ended, and log its one line."""
        self.connections.discard(connection)
        self._newcomers.discard(connection)
        self.admission.leave(connection.account)
        protocol = connection.protocol
        reason = protocol.close_reason or CloseReason.INTERNAL_ERROR
        duration = self._loop.now - connection.opened_at
        self.counts.closed[reason] += 1
        self.counts.durations.observe(duration)
        self.on_count(len(self.connections))
        if self._log.permits("connection_closed"):
            self._log.info(
                "connection_closed",
                connection=connection.number,
                peer=format_peer(connection.peer),
                listener=connection.listener,
                **({} if connection.proxy is None else {"proxy": format_peer(connection.proxy)}),
                reason=reason.value,
                duration_s=round(duration, 6),
                frames=protocol.frames,
                received_bytes=protocol.received_bytes,
                sent_bytes=protocol.echoed_bytes - protocol.unsent_bytes,
            )
        self.on_departure()

    def on_defect(self, connection: Connection, error: Exception) -> None:
        """Log an error that is a defect of ours."""
        self._log.error("connection_failed", connection=connection.number, exc_info=error)
