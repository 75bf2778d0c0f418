"""The exporter as its clients see it: answers, limits, and what a bad client can't do.

Sockets, loop and poller are real, time is not. No test waits for a time to pass: the loop is turned
when something is ready, or when nothing is and the clock is to move on.
"""

import errno
import fcntl
import json
import os
import resource
import select
import socket
import ssl
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from lpechod import __version__
from lpechod.engine.loop import Loop
from lpechod.engine.poller import FD_SETSIZE, EpollPoller, Poller, available, open_poller
from lpechod.ops.counters import Totals
from lpechod.ops.exporter import MAX_CLIENTS, MAX_REQUEST_BYTES, TIMEOUT_SECONDS, Exporter
from lpechod.ops.logs import open_log
from lpechod.ops.metrics import DaemonCollector, Standing
from lpechod.ops.pages import Pages
from tests.fake_time import FakeClock, FakeTimePoller

pytestmark = pytest.mark.skipif("epoll" not in available(), reason="needs epoll(7)")

PATIENCE_SECONDS = 20
"""How long to wait for what must come. It turns a hang into a failure, and that is all."""

TICK_SECONDS = 0.1
REQUEST = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
PATHS = ("/", "/metrics", "/-/healthy", "/-/ready")


class Many(Collector):
    """A page of 600 KiB: more than the kernel takes at once."""

    def collect(self) -> Iterable[Metric]:
        """Yield one family of 20,000 samples."""
        family = GaugeMetricFamily("many", "Many of them.", labels=["number"])
        for number in range(20_000):
            family.add_metric([str(number)], number)
        yield family


class Broken(Collector):
    """A page that can't be made."""

    def collect(self) -> Iterable[Metric]:
        """Fail, as only a defect of ours would."""
        raise RuntimeError("no metrics today")


class Nobody:
    """A source that does nothing, so that a turn does not wait."""

    def on_ready(self, _mask: int, _now: float) -> None:
        """Do nothing."""

    def on_failure(self, error: Exception, _now: float) -> None:
        """Let the test fail."""
        raise error


class Stage:
    """An exporter in a loop, in fake time, with a log of its own.

    Args:
        directory: for the log.
        poller: the real poller.
        contexts: for TLS, by name of the listener, which is `listener`.
    """

    def __init__(
        self,
        directory: Path,
        poller: Poller | None = None,
        contexts: Mapping[str, ssl.SSLContext] | None = None,
    ) -> None:
        self.clock = FakeClock()
        self.poller = poller or EpollPoller()
        self.turns: list[int] = []
        """How many events each turn has handled."""
        self.loop = Loop(
            FakeTimePoller(self.poller, self.clock),
            self.clock,
            lambda _seconds, events: self.turns.append(events),
        )
        self.registry = CollectorRegistry()
        self.registry.register(
            DaemonCollector(Totals, lambda: Standing({"ready": 1}, 0, 1, True, 1_700_000_000.0))
        )
        self.serving = True
        self._log_path = directory / "log"
        self._log_descriptor = os.open(self._log_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._log = open_log(
            "debug", "json", 100, 0, clock=self.clock, descriptor=self._log_descriptor
        )
        pages = Pages(self.registry, lambda: self.serving)
        self.exporter = Exporter(pages, self.loop, self._log, contexts or {})

    def logged(self) -> list[dict[str, Any]]:
        """Return what was logged so far."""
        return [json.loads(line) for line in self._log_path.read_text().splitlines()]

    def welcome(self, accepted: socket.socket) -> None:
        """Hand a connection to the exporter, as the acceptor does, and end its turn if need be."""
        self.exporter.welcome(accepted.detach(), "peer", "listener")
        if any(client.closing for client in self.exporter.clients):
            self.loop.again(Nobody(), 0)
            self.loop.turn()

    def busy(self, *others: socket.socket, timeout: float = 0.0) -> list[object]:
        """Return who is ready: the loop, by way of its epoll descriptor, or one of the sockets."""
        assert isinstance(self.poller, EpollPoller)
        watched: list[socket.socket | select.epoll] = [self.poller._epoll, *others]
        ready, _, _ = select.select(watched, [], [], timeout)
        return [self if one is self.poller._epoll else one for one in ready]

    def turn(self) -> None:
        """Turn the loop once something is ready, however long the kernel takes for it."""
        assert self.busy(timeout=PATIENCE_SECONDS), "nothing happens"
        self.loop.turn()

    def run(self) -> None:
        """Turn while anything is ready."""
        for _ in range(1000):
            if not self.busy():
                return
            self.loop.turn()
        raise AssertionError("the loop spins")

    def settle(self) -> None:
        """Turn once something is ready, and then until nothing is."""
        self.turn()
        self.run()

    def pass_time(self) -> None:
        """Turn with nothing ready: the clock goes to the next deadline."""
        assert not self.busy()
        self.loop.turn()

    def run_until_alone(self) -> None:
        """Turn until the exporter has no client any more."""
        while self.exporter.clients:
            self.turn()

    def read_to_end(self, client: socket.socket) -> bytes:
        """Return all that comes until the end of the stream, with the loop turning."""
        received = bytearray()
        while True:
            ready = self.busy(client, timeout=PATIENCE_SECONDS)
            assert ready, "neither side has anything to do"
            if self in ready:
                self.loop.turn()
            if client in ready:
                data = client.recv(65536)
                if not data:
                    return bytes(received)
                received += data

    def close(self) -> None:
        """Close all that is open."""
        self.exporter.close()
        self.loop.close()
        self._log.close()
        os.close(self._log_descriptor)


class Answer:
    """An answer as a strict client reads it: one, whole, and nothing behind it.

    Args:
        raw: all bytes of the connection.
        method: of the request; an answer to HEAD has no body, whatever its length says.
    """

    def __init__(self, raw: bytes, method: str = "GET") -> None:
        reader = h11.Connection(h11.CLIENT)
        reader.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        reader.send(h11.EndOfMessage())
        reader.receive_data(raw)
        reader.receive_data(b"")
        head = reader.next_event()
        assert isinstance(head, h11.Response)
        self.status = head.status_code
        names = [name.decode() for name, _ in head.headers]
        assert len(names) == len(set(names))
        self.headers = {name.decode(): value.decode() for name, value in head.headers}
        self.body = b""
        while isinstance(event := reader.next_event(), h11.Data):
            self.body += event.data
        assert isinstance(event, h11.EndOfMessage)
        assert isinstance(reader.next_event(), h11.ConnectionClosed)
        assert self.headers["connection"] == "close"
        if method != "HEAD":
            assert self.headers["content-length"] == str(len(self.body))


Connect = Callable[..., socket.socket]


@contextmanager
def no_descriptor_lost() -> Iterator[None]:
    """Demand that as many descriptors are open afterwards as before."""
    before = sorted(Path("/dev/fd").iterdir())
    yield
    assert sorted(Path("/dev/fd").iterdir()) == before


@pytest.fixture(name="stage")
def _stage(tmp_path: Path) -> Iterator[Stage]:
    with no_descriptor_lost():
        stage = Stage(tmp_path)
        yield stage
        stage.close()
    assert not stage.exporter.clients
    assert stage.loop.timers == 0


@pytest.fixture(name="connect")
def _connect(stage: Stage) -> Iterator[Connect]:
    """Connect over TCP; the exporter's end is with the exporter."""
    with ExitStack() as stack, socket.create_server(("127.0.0.1", 0)) as listener:

        def connect(buffer_bytes: int | None = None) -> socket.socket:
            client = stack.enter_context(socket.socket())
            client.settimeout(PATIENCE_SECONDS)
            if buffer_bytes is not None:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
            client.connect(listener.getsockname())
            accepted, _ = listener.accept()
            if buffer_bytes is not None:
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
            stage.welcome(accepted)
            return client

        yield connect


def reset(client: socket.socket) -> None:
    """Close with a reset instead of an end of file."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def request(target: str, method: str = "GET", *headers: str, version: str = "1.1") -> bytes:
    """Write a request without a body."""
    lines = [f"{method} {target} HTTP/{version}", "Host: localhost", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1")


def ask(stage: Stage, client: socket.socket, raw: bytes, method: str = "GET") -> Answer:
    """Send a request, read the answer, and leave; nothing may have been logged."""
    client.sendall(raw)
    answer = Answer(stage.read_to_end(client), method)
    client.close()
    stage.run_until_alone()
    assert not stage.logged()
    return answer


# What is answered.


@pytest.mark.parametrize(
    ("path", "kind", "body"),
    [
        ("/", "text/html; charset=utf-8", f"<h1>lpechod {__version__}</h1>"),
        ("/", "text/html; charset=utf-8", '<a href="/metrics">'),
        ("/metrics", "text/plain; version=0.0.4; charset=utf-8", "\nlpechod_frames_total 0.0\n"),
        ("/-/healthy", "text/plain; charset=utf-8", "Healthy.\n"),
        ("/-/ready", "text/plain; charset=utf-8", "Ready.\n"),
        ("/-/ready?verbose", "text/plain; charset=utf-8", "Ready.\n"),
        ("http://localhost:10862/-/ready", "text/plain; charset=utf-8", "Ready.\n"),
    ],
)
def test_page(stage: Stage, connect: Connect, path: str, kind: str, body: str) -> None:
    """Each path has its page, with its content type."""
    answer = ask(stage, connect(), request(path))
    assert (answer.status, answer.headers["content-type"]) == (200, kind)
    assert body in answer.body.decode()


@pytest.mark.parametrize("path", [*PATHS, "/nothing"])
def test_head(stage: Stage, connect: Connect, path: str) -> None:
    """HEAD brings the head that GET would bring, length included, and no body."""
    whole = ask(stage, connect(), request(path))
    head = ask(stage, connect(), request(path, "HEAD"), "HEAD")
    assert (head.status, head.headers, head.body) == (whole.status, whole.headers, b"")


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "/nothing"),
        ("GET", "/metrics/"),
        ("GET", "/Metrics"),
        ("GET", "//metrics"),
        ("GET", "/-/../metrics"),
        ("GET", "/%6detrics"),
        ("POST", "/nothing"),
        ("OPTIONS", "*"),
        ("CONNECT", "localhost:9000"),
    ],
)
def test_not_found(stage: Stage, connect: Connect, method: str, target: str) -> None:
    """Any other path is 404, whatever the method, and the answer names the paths there are."""
    answer = ask(stage, connect(), request(target, method))
    assert answer.status == 404
    assert all(path in answer.body.decode() for path in PATHS)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "get", "BREW"])
@pytest.mark.parametrize("path", PATHS)
def test_wrong_method(stage: Stage, connect: Connect, method: str, path: str) -> None:
    """Any method but GET and HEAD is 405, and the answer says which are allowed."""
    answer = ask(stage, connect(), request(path, method))
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # A TLS handshake.
        (b"\0\0\0\x05hello", 400),  # An echo client at the wrong port.
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", 400),
        (b"GET /metrics\r\n\r\n", 400),
        (b"GET /met rics HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /m\x80trics HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET http://[ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: a\x00b\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 2\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"\r\n" + REQUEST, 400),
        (b"\n", 400),
    ],
)
def test_not_http(stage: Stage, connect: Connect, raw: bytes, status: int) -> None:
    """What is no valid request is answered by an error in HTTP, without a line in the log."""
    assert ask(stage, connect(), raw).status == status


def test_http_1_0(stage: Stage, connect: Connect) -> None:
    """An HTTP/1.0 client, which sends no Host, is answered as well, keep-alive or not."""
    for extra in (b"", b"Connection: keep-alive\r\n"):
        answer = ask(stage, connect(), b"GET /-/healthy HTTP/1.0\r\n" + extra + b"\r\n")
        assert (answer.status, answer.body) == (200, b"Healthy.\n")


def test_expect_continue(stage: Stage, connect: Connect) -> None:
    """A client that waits for 100 Continue gets the answer itself instead."""
    raw = request("/", "POST", "Expect: 100-continue", "Content-Length: 5")
    assert ask(stage, connect(), raw).status == 405


def test_not_ready(stage: Stage, connect: Connect) -> None:
    """Without readiness /-/ready is 503, while health and metrics are still answered."""
    stage.serving = False
    statuses = [ask(stage, connect(), request(path)).status for path in PATHS]
    assert dict(zip(PATHS, statuses, strict=True)) == {
        "/": 200,
        "/metrics": 200,
        "/-/healthy": 200,
        "/-/ready": 503,
    }
    stage.serving = True
    assert ask(stage, connect(), request("/-/ready")).status == 200


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ("name[]=lpechod_frames_total", {"lpechod_frames_total"}),
        ("name%5B%5D=lpechod_frames_total", {"lpechod_frames_total"}),
        (
            "name[]=lpechod_timer_entries&name[]=lpechod_loop_turn_seconds_count",
            {"lpechod_timer_entries", "lpechod_loop_turn_seconds_count"},
        ),
        ("name[]=lpechod_workers", {"lpechod_workers"}),
        ("name[]=nothing", set()),
        ("name[]=%ff%00%0a", set()),
    ],
)
def test_filter(stage: Stage, connect: Connect, query: str, names: set[str]) -> None:
    """With name[] in the query only the samples of these names are shown."""
    answer = ask(stage, connect(), request(f"/metrics?{query}"))
    families = text_string_to_metric_families(answer.body.decode())
    assert {sample.name for family in families for sample in family.samples} == names
    assert answer.status == 200


@pytest.mark.parametrize("query", ["", "?", "?name[]=", "?name=lpechod_frames_total", "?x=%zz&&=;"])
def test_no_filter(stage: Stage, connect: Connect, query: str) -> None:
    """Any other query, or an empty one, shows everything."""
    everything = ask(stage, connect(), request("/metrics")).body
    assert ask(stage, connect(), request(f"/metrics{query}")).body == everything


@pytest.mark.parametrize(
    "header",
    [
        "Accept: application/openmetrics-text; version=1.0.0,text/plain;q=0.5",
        "Accept: " + "*/*;q=0.1," * 500,
        "Accept: \x80\xff",
        "Accept-Encoding: gzip;q=1e999, <script>",
        "User-Agent: ${jndi:ldap://example.org/x}",
        "X-Empty:",
        "Cookie: " + "a" * 7000,
        "Content-Length: 99999999999999999999",
        "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings",
        "If-None-Match: *",
        "Range: bytes=0-0",
    ],
)
def test_hostile_header(stage: Stage, connect: Connect, header: str) -> None:
    """No header of a valid request changes what is answered."""
    plain = ask(stage, connect(), request("/metrics"))
    answer = ask(stage, connect(), request("/metrics", "GET", header))
    assert (answer.status, answer.headers, answer.body) == (200, plain.headers, plain.body)


@pytest.mark.parametrize(
    "target",
    [
        "/<script>alert(1)</script>",
        "/metrics;x=1/../..//",
        "/%00",
        "/%0d%0aSet-Cookie:%20a=b",
        "/" + "a/" * 3000,
        "javascript:alert(1)",
        "http://localhost:99999999/nothing",
        "//[::1/metrics",
        "/?" + "&".join(f"name[]=a{n}" for n in range(500)),
    ],
)
def test_hostile_target(stage: Stage, connect: Connect, target: str) -> None:
    """Whatever the target, the answer is a page of ours, and repeats nothing of it."""
    answer = ask(stage, connect(), request(target))
    assert answer.status in {200, 400, 404}
    assert not {b"script", b"Set-Cookie", b"alert"} & set(answer.body.split())
    assert target.encode() not in answer.body


@pytest.mark.parametrize("host", ["<script>", "a:b:c", "[", "example.org:99999", "é"])
def test_hostile_host(stage: Stage, connect: Connect, host: str) -> None:
    """The Host header, of whatever form, neither matters nor shows."""
    raw = f"GET / HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1")
    answer = ask(stage, connect(), raw)
    assert answer.status == 200
    assert host.encode("latin-1") not in answer.body or host == "["


# How the request comes.


def test_byte_by_byte(stage: Stage, connect: Connect) -> None:
    """A request that comes one byte at a time is answered like a whole one."""
    client = connect()
    for position in range(len(REQUEST) - 1):
        client.sendall(REQUEST[position : position + 1])
        stage.turn()
    assert not stage.busy(client)
    answer = ask(stage, client, REQUEST[-1:])
    assert answer.status == 200
    assert answer.body == ask(stage, connect(), REQUEST).body


@pytest.mark.parametrize(
    "trailer",
    [
        REQUEST,
        b"hello",
        b"\0" * 100_000,
        request("/-/healthy", "BREW") * 1000,
    ],
)
def test_what_follows_the_request(stage: Stage, connect: Connect, trailer: bytes) -> None:
    """What a client sends behind its request is dropped, and does not cost it the answer."""
    answer = ask(stage, connect(), REQUEST + trailer)
    assert answer.status == 200


def test_chunked_body_with_a_trailer(stage: Stage, connect: Connect) -> None:
    """A body is never waited for: the head alone decides the answer."""
    raw = request("/metrics", "POST", "Transfer-Encoding: chunked", "Trailer: Expires")
    body = b"5\r\nhello\r\n0\r\nExpires: never\r\n\r\n"
    assert ask(stage, connect(), raw).status == 405
    assert ask(stage, connect(), raw + body).status == 405


@pytest.mark.parametrize("size", [MAX_REQUEST_BYTES, MAX_REQUEST_BYTES + 1, 3 * MAX_REQUEST_BYTES])
@pytest.mark.parametrize("pieces", [1, 2, 7, 100])
def test_request_size(stage: Stage, connect: Connect, size: int, pieces: int) -> None:
    """A request of 8 KiB is answered and a longer one is 431, in however many pieces it comes."""
    fill = size - len(request("/-/healthy", "GET", "X: "))
    raw = request("/-/healthy", "GET", "X: " + "x" * fill)
    assert len(raw) == size
    client = connect()
    step = -(-size // pieces)
    for start in range(0, size - step, step):
        client.sendall(raw[start : start + step])
        stage.run()
    answer = ask(stage, client, raw[(pieces - 1) * step :])
    assert answer.status == (200 if size <= MAX_REQUEST_BYTES else 431)


@pytest.mark.parametrize(
    "raw", [b"A" * 20_000, b"GET /" + b"a" * 20_000, REQUEST[:-2] + b"X" * 9000]
)
def test_endless_request(stage: Stage, connect: Connect, raw: bytes) -> None:
    """A request that never ends is 431 as soon as 8 KiB of it have come."""
    assert ask(stage, connect(), raw).status == 431


@pytest.mark.parametrize("path", PATHS)
def test_half_closed_client(stage: Stage, connect: Connect, path: str) -> None:
    """A client that ends its side behind the request (nc -N) gets the whole answer."""
    client = connect()
    client.sendall(request(path))
    client.shutdown(socket.SHUT_WR)
    answer = Answer(stage.read_to_end(client))
    assert answer.status == 200
    stage.run_until_alone()
    assert not stage.logged()


@pytest.mark.parametrize("size", range(0, len(REQUEST), 5))
def test_half_closed_inside_the_request(stage: Stage, connect: Connect, size: int) -> None:
    """A client that ends its side before the request is whole is closed without an answer."""
    client = connect()
    client.sendall(REQUEST[:size])
    client.shutdown(socket.SHUT_WR)
    assert stage.read_to_end(client) == b""
    stage.run_until_alone()
    assert not stage.logged()


# Clients that leave.


def _nothing(_stage: Stage, _client: socket.socket) -> None:
    """Leave right after connecting."""


def _part_of_the_request(stage: Stage, client: socket.socket) -> None:
    client.sendall(REQUEST[:20])
    stage.turn()


def _unread_part(_stage: Stage, client: socket.socket) -> None:
    client.sendall(REQUEST[:20])


def _unread_request(_stage: Stage, client: socket.socket) -> None:
    client.sendall(REQUEST)


def _waiting_answer(stage: Stage, client: socket.socket) -> None:
    client.sendall(REQUEST)
    stage.settle()


def _answer_half_read(stage: Stage, client: socket.socket) -> None:
    client.sendall(REQUEST)
    stage.settle()
    assert client.recv(1000)


def _answer_read(stage: Stage, client: socket.socket) -> None:
    client.sendall(request("/-/healthy"))
    stage.read_to_end(client)


def _half_closed(stage: Stage, client: socket.socket) -> None:
    client.sendall(REQUEST)
    client.shutdown(socket.SHUT_WR)
    stage.settle()


LEAVING = (
    _nothing,
    _part_of_the_request,
    _unread_part,
    _unread_request,
    _waiting_answer,
    _answer_half_read,
    _answer_read,
    _half_closed,
)


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("until", LEAVING)
def test_a_client_that_leaves(
    stage: Stage,
    connect: Connect,
    until: Callable[[Stage, socket.socket], None],
    big: bool,
    leave: Callable[[socket.socket], None],
) -> None:
    """A client may close or reset at any point: it is forgotten in two turns, without a word."""
    if big:
        stage.registry.register(Many())
    client = connect(4096)
    until(stage, client)
    stage.turns.clear()
    leave(client)
    stage.run_until_alone()
    assert stage.turns in ([1], [1, 1])
    assert not stage.busy()
    assert stage.loop.timers == 0
    assert not stage.logged()


def test_a_half_closed_client_that_does_not_read(stage: Stage, connect: Connect) -> None:
    """An end of file that waits behind an unsent answer does not keep the loop turning."""
    stage.registry.register(Many())
    client = connect(4096)
    _half_closed(stage, client)
    stage.turns.clear()
    stage.pass_time()
    assert stage.turns == [0]
    assert not stage.exporter.clients


# Limits.


def test_a_silent_client(stage: Stage, connect: Connect) -> None:
    """A client that sends nothing is closed after 5 seconds."""
    start = stage.clock.now
    client = connect()
    stage.pass_time()
    assert stage.clock.now - start == pytest.approx(TIMEOUT_SECONDS, abs=TICK_SECONDS)
    assert not stage.exporter.clients
    assert client.recv(1) == b""
    assert stage.turns == [0]


def test_a_dribbling_client(stage: Stage, connect: Connect) -> None:
    """The 5 seconds are for all of it: sending a byte now and then does not prolong them."""
    start = stage.clock.now
    client = connect()
    for position in range(4):
        client.sendall(REQUEST[position : position + 1])
        stage.turn()
        stage.clock.advance(1)
    stage.pass_time()
    assert stage.clock.now - start == pytest.approx(TIMEOUT_SECONDS, abs=TICK_SECONDS)
    assert not stage.exporter.clients


@pytest.mark.parametrize("leave", [socket.socket.close, reset])
def test_a_client_that_leaves_at_its_deadline(
    stage: Stage, connect: Connect, leave: Callable[[socket.socket], None]
) -> None:
    """A client that leaves in the turn in which its time is over is closed once."""
    client = connect()
    leave(client)
    stage.clock.advance(TIMEOUT_SECONDS + TICK_SECONDS)
    stage.turn()
    assert not stage.exporter.clients
    assert stage.turns == [1]


def test_a_client_that_does_not_leave(stage: Stage, connect: Connect) -> None:
    """A client that keeps its side open after the answer is closed after 5 seconds."""
    client = connect()
    client.sendall(REQUEST)
    assert Answer(stage.read_to_end(client)).status == 200
    stage.pass_time()
    assert not stage.exporter.clients


def test_a_slow_reader(stage: Stage, connect: Connect) -> None:
    """A client that reads a large answer in small sips gets all of it."""
    stage.registry.register(Many())
    client = connect(4096)
    client.sendall(REQUEST)
    stage.settle()
    assert not stage.busy(), "the whole answer went out at once"
    answer = Answer(stage.read_to_end(client))
    assert answer.body.count(b"\nmany{") == 20_000
    assert len(stage.turns) > 10
    stage.turns.clear()
    client.close()
    stage.run_until_alone()


def test_a_reader_that_stops(stage: Stage, connect: Connect) -> None:
    """A client that stops reading is closed after 5 seconds, and gets no whole answer."""
    stage.registry.register(Many())
    client = connect(4096)
    client.sendall(REQUEST)
    stage.settle()
    start = stage.clock.now
    stage.pass_time()
    assert not stage.exporter.clients
    assert stage.clock.now - start == pytest.approx(TIMEOUT_SECONDS, abs=TICK_SECONDS)
    with pytest.raises(h11.RemoteProtocolError):
        Answer(stage.read_to_end(client))


def test_too_many_clients(stage: Stage, connect: Connect) -> None:
    """The ninth client takes the place of the first; when one of the eight leaves, of nobody."""
    first, *clients = [connect() for _ in range(MAX_CLIENTS)]
    clients.append(connect())
    assert first.recv(1) == b""
    assert len(stage.exporter.clients) == MAX_CLIENTS
    clients[3].close()
    stage.turn()
    clients[3] = connect()
    for client in clients:
        client.sendall(REQUEST)
        assert Answer(stage.read_to_end(client)).status == 200
    assert not stage.logged()


def test_silent_clients_do_not_shut_others_out_for_ever(stage: Stage, connect: Connect) -> None:
    """However many are silent, or have been answered and stay, the next one is answered."""
    for _ in range(2 * MAX_CLIENTS):
        connect()
        lingering = connect()
        lingering.sendall(REQUEST)
        assert Answer(stage.read_to_end(lingering)).status == 200
    assert len(stage.exporter.clients) <= MAX_CLIENTS
    stage.pass_time()
    assert not stage.exporter.clients


def test_who_is_being_answered_keeps_its_place(stage: Stage, connect: Connect) -> None:
    """While eight receive their answers, a ninth client is turned away."""
    stage.registry.register(Many())
    clients = [connect(4096) for _ in range(MAX_CLIENTS)]
    for client in clients:
        client.sendall(REQUEST)
    stage.settle()
    assert connect().recv(1) == b""
    for client in clients:
        assert Answer(stage.read_to_end(client)).status == 200


def test_a_poller_that_takes_no_more(tmp_path: Path) -> None:
    """A client that the poller can't watch is closed, with a warning, and no other is harmed."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= FD_SETSIZE + 16:
        pytest.skip(f"needs descriptors past {FD_SETSIZE}")
    with no_descriptor_lost():
        stage = Stage(tmp_path, open_poller("select"))
        ours, theirs = socket.socketpair()
        with ours:
            high = fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, FD_SETSIZE)
        stage.welcome(socket.socket(fileno=high))
        assert theirs.recv(1) == b""
        theirs.close()
        assert not stage.exporter.clients
        assert stage.loop.timers == 0
        (line,) = stage.logged()
        assert (line["event"], line["level"]) == ("exporter_client_rejected", "warning")
        stage.close()


# Defects of ours.


def test_a_page_that_raises(stage: Stage, connect: Connect) -> None:
    """A collector that raises costs the one client, with one line in the log that says where."""
    stage.registry.register(Broken())
    other, client = connect(), connect()
    other.sendall(REQUEST[:10])
    stage.turn()
    client.sendall(REQUEST)
    assert stage.read_to_end(client) == b""
    other.sendall(b"HTTP" * 5 + b"\r\n\r\n")
    assert Answer(stage.read_to_end(other)).status == 400
    (line,) = stage.logged()
    assert (line["event"], line["level"]) == ("exporter_failed", "error")
    assert "RuntimeError: no metrics today" in line["exception"]
    assert connect() is not None
    assert Answer(_get(stage, connect(), "/-/healthy")).status == 200


def _get(stage: Stage, client: socket.socket, path: str) -> bytes:
    client.sendall(request(path))
    return stage.read_to_end(client)


def test_close(stage: Stage, connect: Connect) -> None:
    """Closing the exporter closes every client, wherever it stands."""
    stage.registry.register(Many())
    clients = [connect(4096) for _ in LEAVING]
    for until, client in zip(LEAVING, clients, strict=True):
        until(stage, client)
    assert stage.exporter.clients
    stage.exporter.close()
    assert not stage.exporter.clients
    assert stage.loop.timers == 0
    for client in clients:
        try:
            while client.recv(65536):
                pass
        except ConnectionResetError as error:
            assert error.errno == errno.ECONNRESET  # noqa: PT017 - data of it was unread.


# Every poller, and every input.


@pytest.mark.parametrize("name", available())
def test_every_poller(tmp_path: Path, name: str) -> None:
    """With each poller a client is answered, waited for and forgotten in as many turns."""
    with no_descriptor_lost():
        stage = Stage(tmp_path, open_poller(name))
        client, accepted = socket.socketpair()
        stage.welcome(accepted)
        client.sendall(REQUEST)
        stage.loop.turn()
        assert Answer(_drained(client)).status == 200
        client.close()
        stage.loop.turn()
        assert not stage.exporter.clients
        assert stage.turns == [1, 1]
        assert not stage.logged()
        stage.close()


def _drained(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(65536), b""))


NEAR_HTTP = st.lists(
    st.one_of(
        st.sampled_from(
            [
                *(REQUEST[at : at + 6] for at in range(0, len(REQUEST), 6)),
                REQUEST,
                b"GET ",
                b"HEAD ",
                b"/metrics?name[]=",
                b" HTTP/1.1\r\n",
                b" HTTP/1.0\r\n",
                b"Host: a\r\n",
                b"Content-Length: 3\r\n",
                b"Transfer-Encoding: chunked\r\n",
                b"Connection: keep-alive\r\n",
                b"Expect: 100-continue\r\n",
                b"\r\n",
                b"\n",
                b":",
                b"http://[",
                b"x" * 4096,
            ]
        ),
        st.binary(max_size=12),
    ),
    max_size=12,
)
"""Requests as far as they are right, and other bytes between their parts."""


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.one_of(st.lists(st.binary(max_size=64), max_size=6), NEAR_HTTP),
    joined=st.booleans(),
    end=st.sampled_from(["wait", "half-close", "close"]),
)
def test_any_bytes(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], joined: bool, end: str
) -> None:
    """Whatever bytes come, the client gets an answer or is closed, and no error is logged."""
    with no_descriptor_lost():
        # UNIX sockets: what one end has sent, the other end has, so a turn never comes too early.
        stage = Stage(tmp_path_factory.getbasetemp())
        client, accepted = socket.socketpair()
        stage.welcome(accepted)
        for piece in [b"".join(pieces)] if joined else pieces:
            client.sendall(piece)
            stage.run()
        if end == "half-close":
            client.shutdown(socket.SHUT_WR)
        elif end == "close":
            client.close()
        stage.run()
        if stage.exporter.clients:
            assert end == "wait"
            stage.pass_time()
        assert not stage.exporter.clients
        if end != "close":
            raw = _drained(client)
            client.close()
            if raw:
                bare = raw.endswith(b"\r\n\r\n")
                assert not bare or b"".join(pieces).startswith(b"HEAD ")
                assert Answer(raw, "HEAD" if bare else "GET").status in {
                    200,
                    400,
                    404,
                    405,
                    431,
                    501,
                }
        assert not stage.logged()
        assert len(stage.turns) <= len(pieces) + 4
        stage.close()
