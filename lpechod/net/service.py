"""All connections of a worker: admits, keeps, drains and counts them."""

import socket
from collections.abc import Callable
from dataclasses import dataclass, field

from lpechod.engine.buffers import BufferPool
from lpechod.engine.loop import Loop
from lpechod.net.admission import Admission, AdmissionLimits, format_peer, host_of
from lpechod.net.budget import MemoryBudget
from lpechod.net.connection import Connection
from lpechod.net.counts import ConnectionCounts
from lpechod.net.edge import EdgeConnection
from lpechod.net.eventlog import EventLog
from lpechod.net.transport import PlainTransport
from lpechod.wire.settings import EchoSettings
from lpechod.wire.states import CloseReason
from lpechod.wire.tally import Tally

_DRAINS_PER_TURN = 256
"""Connections told to drain in one turn: some milliseconds, in which the others wait."""


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """What governs the connections of a worker; sizes in bytes."""

    echo: EchoSettings = field(default_factory=EchoSettings)
    admission: AdmissionLimits = field(default_factory=AdmissionLimits)
    max_buffered_bytes: int = 256 << 20


class EchoService:
    """The echo service, as a set of connections in one loop.

    Args:
        settings: limits and time-outs.
        loop: where the connections live.
        tally: where they count bytes and frames.
        log: gets a line for each connection that ends.
    """

    __slots__ = (
        "_admission",
        "_drain_until",
        "_kind",
        "_log",
        "_loop",
        "_numbers",
        "_settings",
        "_to_drain",
        "connections",
        "counts",
        "draining",
        "on_departure",
        "pool",
        "tally",
    )

    def __init__(self, settings: ServiceSettings, loop: Loop, tally: Tally, log: EventLog) -> None:
        self._settings = settings
        self._loop = loop
        self._log = log
        self._admission = Admission(settings.admission)
        self._numbers = 0
        self._kind = EdgeConnection if loop.edge_triggered else Connection
        self._to_drain: list[Connection] = []
        self._drain_until = 0.0
        self.draining = False
        self.tally = tally
        self.counts = ConnectionCounts()
        self.pool = BufferPool(settings.max_buffered_bytes)
        MemoryBudget(self.pool, loop, log)
        self.connections: set[Connection] = set()
        self.on_departure: Callable[[], None] = lambda: None
        """Called after each close, when its descriptor is free again."""

    def welcome(self, client: socket.socket, peer: object, listener: str) -> None:
        """Serve a connection, or close it because a limit is reached.

        Args:
            client: a connected socket, fresh from accept(2); owned from now on.
            peer: its address as accept(2) gave it. Never asked for again: getpeername(2) fails on a
                connection that is already reset.
            listener: name of the listener.
        """
        host = host_of(peer)
        refusal = self._admission.admit(host)
        if refusal is not None:
            self._reject(client, peer, listener, refusal)
            return
        try:
            connection = self._kind(
                PlainTransport(client),
                self._loop,
                self._settings.echo,
                self.pool,
                self.tally,
                self._numbers + 1,
                peer,
                listener,
                self,
            )
        except (OSError, ValueError) as error:
            # The poller is full: epoll_ctl(2) ENOSPC or ENOMEM, a descriptor past FD_SETSIZE.
            self._admission.leave(host)
            self._reject(client, peer, listener, "other", error=str(error))
            return
        self._numbers += 1
        self.counts.accepted += 1
        self.connections.add(connection)
        if self.draining:
            self._to_drain.append(connection)
            self._loop.again(self, 0)

    def _reject(
        self, client: socket.socket, peer: object, listener: str, reason: str, **why: str
    ) -> None:
        client.close()
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
        """Close every connection at its next frame boundary.

        Args:
            until: when to close those that have not come to one, in seconds of the loop's clock.
        """
        self.draining = True
        self._drain_until = until
        self._to_drain = list(self.connections)
        self._loop.again(self, 0)

    def cut(self, now: float) -> None:
        """Close every connection at once."""
        for connection in tuple(self.connections):
            connection.cut(now)

    def on_ready(self, _mask: int, now: float) -> None:
        """Tell the next few connections to drain."""
        for connection in self._to_drain[-_DRAINS_PER_TURN:]:
            try:
                connection.drain(self._drain_until, now)
            except Exception as error:  # noqa: BLE001 - a defect ends its own connection only.
                connection.on_failure(error, now)
        del self._to_drain[-_DRAINS_PER_TURN:]
        if self._to_drain:
            self._loop.again(self, 0)

    def on_failure(self, error: Exception, _now: float) -> None:
        """Pass a defect on: a drain that stops half-way would never end."""
        raise error

    def on_closed(self, connection: Connection) -> None:
        """Count a connection that has ended, and log its one line."""
        self.connections.discard(connection)
        self._admission.leave(host_of(connection.peer))
        protocol = connection.protocol
        reason = protocol.close_reason or CloseReason.INTERNAL_ERROR
        duration = self._loop.now - connection.opened_at
        self.counts.closed[reason] += 1
        self.counts.durations.observe(duration)
        if self._log.permits("connection_closed"):
            self._log.info(
                "connection_closed",
                connection=connection.number,
                peer=format_peer(connection.peer),
                listener=connection.listener,
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
