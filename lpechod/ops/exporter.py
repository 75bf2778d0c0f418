"""HTTP for Prometheus and people, on the daemon's own loop.

prometheus_client's server was rejected: it gives every client a thread and no time limit, so a few
silent ones hold it up for ever. Here each client is a source in the loop like any other, with
limits that a scrape never meets: 8 KiB of request, 5 seconds from accept to close, 8 clients at a
time. One request for each connection: a scraper comes every 15 seconds or so, and keeping its
connection open would only mean another time limit.
"""

import socket
from http import HTTPStatus

import h11

from lpechod.engine.loop import Loop
from lpechod.engine.poller import READABLE, WRITABLE
from lpechod.engine.wheel import Timer
from lpechod.net.eventlog import EventLog
from lpechod.net.transport import PeerGoneError, PlainTransport
from lpechod.ops.pages import Page, Pages

MAX_REQUEST_BYTES = 8192
TIMEOUT_SECONDS = 5.0
MAX_CLIENTS = 8


class Exporter:
    """Keeps the HTTP clients.

    Args:
        pages: what to answer.
        loop: where they live.
        log: gets defects of ours.
    """

    __slots__ = ("_loop", "_pages", "clients", "log")

    def __init__(self, pages: Pages, loop: Loop, log: EventLog) -> None:
        self._pages = pages
        self._loop = loop
        self.log = log
        self.clients: set[_Client] = set()

    def welcome(self, client: socket.socket, _peer: object, _listener: str) -> None:
        """Take a connection fresh from accept(2), or close it if there are too many."""
        if len(self.clients) >= MAX_CLIENTS:
            client.close()
            return
        try:
            self.clients.add(_Client(PlainTransport(client), self._pages, self._loop, self))
        except (OSError, ValueError) as error:
            # The poller is full: epoll_ctl(2) ENOSPC or ENOMEM, a descriptor past FD_SETSIZE.
            client.close()
            self.log.warning("exporter_client_rejected", error=str(error))

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
        "_closing",
        "_exporter",
        "_http",
        "_loop",
        "_pages",
        "_received",
        "_rest",
        "_transport",
    )

    def __init__(
        self, transport: PlainTransport, pages: Pages, loop: Loop, exporter: Exporter
    ) -> None:
        super().__init__()
        self._transport = transport
        self._pages = pages
        self._loop = loop
        self._exporter = exporter
        # h11 applies its limit only to a request that is not whole yet, so one that comes in large
        # segments could be twice as long. The buffer holds it, and h11 gives up when that is full.
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_REQUEST_BYTES - 1)
        self._buffer = memoryview(bytearray(MAX_REQUEST_BYTES))
        self._received = 0
        self._rest: memoryview | None = None
        self._closing = False
        loop.register(transport.fd, self, READABLE)
        loop.schedule(self, loop.now + TIMEOUT_SECONDS)

    def on_ready(self, _mask: int, _now: float) -> None:
        """Go on with the request or the answer; an error shows in the attempt."""
        try:
            if self._rest:
                self._write()
            else:
                self._read()
        except PeerGoneError:
            self._end()

    def on_deadline(self, _now: float) -> None:
        """Close: whoever needs longer than this is no scraper."""
        self._end()

    def on_failure(self, error: Exception, _now: float) -> None:
        """Close after a defect of ours; the echo service must not suffer for it."""
        self._exporter.log.error("exporter_failed", exc_info=error)
        self._end()

    def close(self) -> None:
        """Close the descriptor."""
        self._exporter.clients.discard(self)
        self._loop.cancel(self)
        self._loop.unregister(self._transport.fd)
        self._transport.close()

    def abandon(self) -> None:
        """Close this process's copy of the descriptor, and say nothing to the poller of both."""
        self._transport.close()

    def _end(self) -> None:
        if not self._closing:
            self._closing = True
            self._loop.defer_close(self)

    def _read(self) -> None:
        if self._rest is not None:
            # The answer is out. What still comes is dropped, because close(2) with unread data
            # makes the kernel send a reset, which destroys an answer that has not been read yet.
            if self._transport.receive(self._buffer) == 0:
                self._end()
            return
        free = self._buffer[self._received :]
        count = self._transport.receive(free)
        if count == 0:
            self._end()
        elif count > 0:
            self._received += count
            self._http.receive_data(bytes(free[:count]))
            self._respond()

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
        """Send what is left of the answer; behind it our FIN, and then wait for the client's."""
        rest = self._rest
        if rest is None:
            return
        rest = self._rest = rest[self._transport.send(rest) :]
        if not rest:
            self._transport.end()
        self._loop.modify(self._transport.fd, WRITABLE if rest else READABLE)
