"""HTTP for Prometheus and people, on the daemon's own loop.

prometheus_client's server was rejected: it gives every client a thread and no time limit, so a few
silent ones hold it up for ever. Here each client is a source in the loop like any other, with
limits that a scrape never meets: 8 KiB of request, 5 seconds from accept to close, 8 clients at a
time. If there are more, the one that came first goes, unless it is being answered: a few silent
ones must not make a load balancer believe that nobody is ready. One request for each connection: a
scraper comes every 15 seconds or so, and keeping its connection open would only mean another time
limit.
"""

import os
import socket
import ssl
from collections.abc import Mapping
from http import HTTPStatus

import h11

from lpechod.engine.loop import Loop
from lpechod.engine.poller import READABLE, WRITABLE
from lpechod.engine.wheel import Timer
from lpechod.net.admission import format_peer
from lpechod.net.counts import ConnectionCounts
from lpechod.net.eventlog import EventLog
from lpechod.net.handshake import Handshake, HandshakeError
from lpechod.net.handshakegate import HandshakeGate
from lpechod.net.tls import TlsTransport
from lpechod.net.tlshandshake import TlsHandshake
from lpechod.net.tlsrecords import Bios
from lpechod.net.transport import PeerGoneError, PlainTransport, Transport
from lpechod.ops.pages import Page, Pages

MAX_REQUEST_BYTES = 8192
TIMEOUT_SECONDS = 5.0
MAX_CLIENTS = 8


class Exporter:
    """Keeps the HTTP clients.

    Args:
        pages: what to answer.
        loop: where they live.
        log: gets defects of ours, and what is wrong with handshakes.
        contexts: for TLS, by name of the listener; those that are not there have none.
    """

    __slots__ = ("_bios", "_contexts", "_counts", "_gate", "_loop", "_pages", "clients", "log")

    def __init__(
        self, pages: Pages, loop: Loop, log: EventLog, contexts: Mapping[str, ssl.SSLContext]
    ) -> None:
        self._pages = pages
        self._loop = loop
        self._contexts = contexts
        self._bios = Bios()
        self._gate = HandshakeGate(loop, MAX_CLIENTS, lambda: None)
        self._counts = ConnectionCounts()  # None of the service.
        self.log = log
        self.clients: dict[_Client, None] = {}
        """As they came."""

    def welcome(self, fd: int, peer: object, listener: str) -> None:
        """Take a connection fresh from accept(2), or close it if too many are being answered."""
        if not self._has_room():
            os.close(fd)
            return
        context = self._contexts.get(listener)
        transport: Transport
        handshake: Handshake | None = None
        if context is None:
            transport = PlainTransport(fd)
        else:
            transport = tls = TlsTransport(socket.SocketType(fileno=fd), context, self._bios)
            tls.eager = True
            handshake = TlsHandshake(tls, self._gate, self._counts)
        try:
            client = _Client(transport, handshake, peer, self._pages, self._loop, self)
        except (OSError, ValueError) as error:
            # The poller is full: epoll_ctl(2) ENOSPC or ENOMEM, a descriptor past FD_SETSIZE.
            transport.close()
            self.log.warning("exporter_client_rejected", error=str(error))
        else:
            self.clients[client] = None

    def _has_room(self) -> bool:
        """Tell whether another client may come, for whom the oldest may have to go."""
        staying = [client for client in self.clients if not client.closing]
        if len(staying) < MAX_CLIENTS:
            return True
        for client in staying:
            if not client.is_being_answered:
                client.end()
                return True
        return False

    def close(self) -> None:
        """Close all clients."""
        for client in tuple(self.clients):
            client.close()

    def abandon(self) -> None:
        """Close the copies that fork(2) has made; the parent goes on with the clients."""
        for client in self.clients:
            client.abandon()


class _Client(Timer):
    """One HTTP client: reads a request, writes an answer, and sees it off."""

    __slots__ = (
        "_buffer",
        "_ended",
        "_exporter",
        "_handshake",
        "_http",
        "_loop",
        "_pages",
        "_peer",
        "_received",
        "_rest",
        "_transport",
        "closing",
    )

    def __init__(
        self,
        transport: Transport,
        handshake: Handshake | None,
        peer: object,
        pages: Pages,
        loop: Loop,
        exporter: Exporter,
    ) -> None:
        super().__init__()
        self._transport = transport
        self._handshake = handshake
        self._peer = peer
        self._pages = pages
        self._loop = loop
        self._exporter = exporter
        # h11 applies its limit only to a request that is not whole yet, so one that comes in large
        # segments could be twice as long. The buffer holds it, and h11 gives up when that is full.
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_REQUEST_BYTES - 1)
        self._buffer = memoryview(bytearray(MAX_REQUEST_BYTES))
        self._received = 0
        self._rest: memoryview | None = None
        self._ended = False
        self.closing = False
        loop.register(transport.fd, self, READABLE)
        loop.schedule(self, loop.now + TIMEOUT_SECONDS)

    def on_ready(self, _mask: int, _now: float) -> None:
        """Go on with the request or the answer; an error shows in the attempt."""
        try:
            if self._handshake is not None and not self._shake_hands(self._handshake):
                return
            if self._rest is not None and not self._ended:
                self._write()
            else:
                self._read()
        except (PeerGoneError, EOFError):
            self.end()

    def on_deadline(self, _now: float) -> None:
        """Close: whoever needs longer than this is no scraper."""
        self.end()

    def on_failure(self, error: Exception, _now: float) -> None:
        """Close after a defect of ours; the echo service must not suffer for it."""
        self._exporter.log.error("exporter_failed", exc_info=error)
        self.end()

    @property
    def is_being_answered(self) -> bool:
        """Whether a part of an answer is not out yet."""
        return bool(self._rest) and not self._ended

    def close(self) -> None:
        """Close the descriptor."""
        self._exporter.clients.pop(self, None)
        if self._handshake is not None:
            self._handshake.abandon(None)
        self._loop.cancel(self)
        self._loop.unregister(self._transport.fd)
        self._transport.close()

    def abandon(self) -> None:
        """Close this process's copy of the descriptor, and say nothing to the poller of both."""
        self._transport.close()

    def end(self) -> None:
        """Close at the end of the turn."""
        if not self.closing:
            self.closing = True
            self._loop.defer_close(self)

    def _shake_hands(self, handshake: Handshake) -> bool:
        """Go on with the handshake, and tell whether it is complete."""
        try:
            interest = handshake.advance(self)
        except HandshakeError as error:
            log = self._exporter.log
            if log.permits("exporter_handshake_failed"):
                peer = format_peer(self._peer)
                log.warning("exporter_handshake_failed", peer=peer, problem=str(error))
            handshake.abandon(error.reason)
            self._rest = memoryview(b"")  # The alert is out; wait until it has been read.
            self._finish()
        else:
            self._loop.modify(self._transport.fd, READABLE if interest is None else interest)
            if interest is not None:
                return False
        self._handshake = None
        return not self._ended

    def _finish(self) -> None:
        """Send our FIN, and then wait for the client's."""
        self._ended = True
        self._transport.end()
        self._loop.modify(self._transport.fd, READABLE)

    def _read(self) -> None:
        if self._rest is not None:
            # The answer is out. What still comes is dropped, because close(2) with unread data
            # makes the kernel send a reset, which destroys an answer that has not been read yet.
            if self._transport.receive(self._buffer) == 0:
                self.end()
            return
        free = self._buffer[self._received :]
        count = self._transport.receive(free)
        if count == 0:
            self.end()
        elif count > 0:
            self._received += count
            self._http.receive_data(bytes(free[:count]))
            self._respond()
        if isinstance(self._transport, TlsTransport):
            if self._transport.crossed:
                self.end()  # It asks for key updates and does not take them.
            elif self._transport.more and not self.closing:
                self._loop.again(self, READABLE)

    def _respond(self) -> None:
        """Answer if the request is whole, or can't become one."""
        try:
            event = self._http.next_event()
        except h11.RemoteProtocolError as error:
            self._refuse(HTTPStatus(error.error_status_hint))
        except ValueError:
            # h11 0.14: int() refuses a Content-Length of thousands of digits.
            self._refuse(HTTPStatus.BAD_REQUEST)
        else:
            if isinstance(event, h11.Request):
                method = event.method.decode("ascii")
                # h11 has put the names into lower case. Two headers are a request for a refusal.
                sent = b"\n".join(
                    value for name, value in event.headers if name == b"authorization"
                )
                page = self._pages.answer(method, event.target.decode("ascii"), sent)
                self._answer(page, body=method != "HEAD")

    def _refuse(self, status: HTTPStatus) -> None:
        self._answer(Page(status, f"{status.phrase}.\n".encode()), body=True)

    def _answer(self, page: Page, *, body: bool) -> None:
        head = h11.Response(
            status_code=page.status,
            reason=HTTPStatus(page.status).phrase,
            headers=[
                ("Content-Type", page.content_type),
                ("Content-Length", str(len(page.body))),
                ("Connection", "close"),
                *page.headers,
            ],
        )
        data = self._http.send(head) or b""
        self._rest = memoryview(data + page.body if body else data)
        self._write()

    def _write(self) -> None:
        """Send what is left of the answer, and behind it the end."""
        rest = self._rest
        if rest is None:
            return
        if rest:  # The end may have been begun: nothing can be sent behind it, not even nothing.
            rest = self._rest = rest[self._transport.send(rest) :]
        if not rest and self._transport.take_leave():
            self._finish()
        else:
            self._loop.modify(self._transport.fd, WRITABLE)
