"""The exporter over TLS, as its clients see it."""

import contextlib
import select
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from lpechod.engine.poller import available
from lpechod.net.tls import TlsTransport
from lpechod.ops.exporter import MAX_CLIENTS, TIMEOUT_SECONDS
from tests.net.tlskeys import Sealer
from tests.ops.test_exporter import (
    PATIENCE_SECONDS,
    REQUEST,
    TICK_SECONDS,
    Answer,
    Many,
    Stage,
    no_descriptor_lost,
)

pytestmark = pytest.mark.skipif("epoll" not in available(), reason="needs epoll(7)")

AUTHORITY = trustme.CA()
STRANGER = trustme.CA()


def server_context(*, mutual: bool = False) -> ssl.SSLContext:
    """Make the exporter's side."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    AUTHORITY.issue_cert("metrics.test").configure_cert(context)
    if mutual:
        context.verify_mode = ssl.CERT_REQUIRED
        AUTHORITY.configure_trust(context)
    return context


def client_context(issuer: trustme.CA | None = None) -> ssl.SSLContext:
    """Make a scraper's side, with a certificate of some authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    AUTHORITY.configure_trust(context)
    if issuer is not None:
        issuer.issue_cert("scraper.test").configure_cert(context)
    return context


@pytest.fixture(name="mutual")
def _mutual() -> bool:
    return False


@pytest.fixture(name="stage")
def _stage(tmp_path: Path, *, mutual: bool) -> Iterator[Stage]:
    with no_descriptor_lost():
        stage = Stage(tmp_path, contexts={"listener": server_context(mutual=mutual)})
        yield stage
        stage.close()
    assert not stage.exporter.clients
    assert not stage.exporter._gate.under_way
    assert stage.loop.timers == 0


@pytest.fixture(name="pair")
def _pair(stage: Stage) -> Iterator[socket.socket]:
    """Connect a client, whose socket is returned."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        client.connect(listener.getsockname())
        accepted, _ = listener.accept()
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        stage.exporter.welcome(accepted.detach(), client.getsockname(), "listener")
        client.setblocking(False)
        yield client


class Scraper:
    """A client that speaks TLS behind a socket, while the loop turns.

    Args:
        stage: the exporter's.
        end: a connected socket.
        context: its side of TLS.
    """

    def __init__(self, stage: Stage, end: socket.socket, context: ssl.SSLContext) -> None:
        self._stage = stage
        self._end = end
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname="metrics.test")

    def on_ready(self, _mask: int, _now: float) -> None:
        """Do nothing: as a source of the loop, it is there to keep a turn from waiting."""

    def on_failure(self, error: Exception, _now: float) -> None:
        """Pass a defect on."""
        raise error

    def shake_hands(self) -> None:
        """Complete the handshake, as far as this side sees it."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._exchange()
            else:
                return

    def send(self, data: bytes) -> None:
        """Send bytes, in a record."""
        self._tls.write(data)
        self._flush()

    def read_to_end(self) -> bytes:
        """Return all up to the close_notify, which has to come before the end of the connection."""
        received = bytearray()
        while True:
            try:
                data = self._tls.read(1 << 16)
            except ssl.SSLWantReadError:
                self._exchange()
                continue
            if not data:
                return bytes(received)
            received += data

    def _flush(self) -> None:
        if data := self._out.read():
            self._end.sendall(data)

    def _exchange(self) -> None:
        self._flush()
        ready = self._stage.busy(self._end, timeout=PATIENCE_SECONDS)
        assert ready, "neither side has anything to do"
        if self._stage in ready:
            # Room for sending can vanish again before the turn looks for it: what the kernel holds
            # weighs more when it is acknowledged in part. Time must not pass for that.
            self._stage.loop.again(self, 0)
            self._stage.loop.turn()
        if self._end in ready:
            data = self._end.recv(1 << 16)
            if data:
                self._in.write(data)
            else:
                self._in.write_eof()


def leave(stage: Stage, client: socket.socket) -> None:
    """Close, and see the exporter alone."""
    client.close()
    stage.run_until_alone()


def test_a_scrape(stage: Stage, pair: socket.socket) -> None:
    """A scrape over TLS gets its page, and a close_notify behind it."""
    scraper = Scraper(stage, pair, client_context())
    scraper.shake_hands()
    scraper.send(REQUEST)
    answer = Answer(scraper.read_to_end())
    assert answer.status == 200
    assert b"lpechod_build_info" in answer.body
    leave(stage, pair)
    assert not stage.logged()


def test_a_request_in_many_records(stage: Stage, pair: socket.socket) -> None:
    """A request may come byte by byte, each in a record of its own."""
    scraper = Scraper(stage, pair, client_context())
    scraper.shake_hands()
    for byte in REQUEST:
        scraper.send(bytes([byte]))
        stage.run()
    assert Answer(scraper.read_to_end()).status == 200
    leave(stage, pair)


def test_a_large_page_and_little_room(stage: Stage, pair: socket.socket) -> None:
    """A page that the kernel takes in many parts arrives whole, close_notify and all."""
    stage.registry.register(Many())
    scraper = Scraper(stage, pair, client_context())
    scraper.shake_hands()
    scraper.send(REQUEST)
    assert Answer(scraper.read_to_end()).body.count(b"\nmany{") == 20_000
    leave(stage, pair)


def test_no_room_for_the_end(stage: Stage, pair: socket.socket) -> None:
    """A close_notify that has to wait for room is all that is tried again."""
    refusals = [False]

    class Reluctant(TlsTransport):
        """Sends its end, but says at first that the kernel had no room for it."""

        __slots__ = ()

        def take_leave(self) -> bool:
            done = super().take_leave()
            return refusals.pop() if refusals else done

    (client,) = stage.exporter.clients
    client._transport.__class__ = Reluctant
    scraper = Scraper(stage, pair, client_context())
    scraper.shake_hands()
    scraper.send(REQUEST)
    assert Answer(scraper.read_to_end()).status == 200
    stage.run()
    assert not refusals
    assert len(stage.exporter.clients) == 1, "does not wait for the client's end"
    leave(stage, pair)


def test_key_updates_that_nobody_takes(stage: Stage, pair: socket.socket, tmp_path: Path) -> None:
    """A client that asks for key updates and does not take them is closed, before it turns us."""
    made = client_context()
    made.keylog_filename = str(tmp_path / "keys")
    scraper = Scraper(stage, pair, made)
    scraper.shake_hands()
    made.keylog_filename = None  # type: ignore[assignment] # Or the file would stay open.
    scraper.send(b"G")
    stage.run()
    sealer = Sealer(tmp_path / "keys", sent=1)
    for _ in range(1000):
        cipher = b"".join(sealer.key_update(asks=True) for _ in range(20)) + sealer.data(b"G")
        with contextlib.suppress(BlockingIOError, ConnectionError):
            pair.send(cipher)
        stage.run()
        if not stage.exporter.clients:
            break
    assert not stage.exporter.clients


def test_plain_http(stage: Stage, pair: socket.socket) -> None:
    """Who speaks HTTP without TLS is sent away, and the log says why."""
    pair.send(REQUEST)
    assert stage.read_to_end(pair) == b""
    leave(stage, pair)
    (line,) = stage.logged()
    assert line["event"] == "exporter_handshake_failed"
    assert line["problem"] == "it speaks HTTP without TLS"


def test_silence(stage: Stage, pair: socket.socket) -> None:
    """A client that sends nothing is closed after five seconds."""
    start = stage.clock.now
    stage.pass_time()
    assert TIMEOUT_SECONDS <= stage.clock.now - start <= TIMEOUT_SECONDS + 2 * TICK_SECONDS
    assert select.select([pair], [], [], PATIENCE_SECONDS)[0]
    assert pair.recv(1) == b""


def test_gone_at_once(stage: Stage, pair: socket.socket) -> None:
    """A client that closes before its first byte is forgotten without a word."""
    leave(stage, pair)
    assert not stage.logged()


def test_gone_in_the_handshake(stage: Stage, pair: socket.socket) -> None:
    """A client that goes in the middle of the handshake leaves its place to others."""
    pair.send(b"\x16\x03\x01\x02\x00\x01")
    stage.settle()
    assert len(stage.exporter._gate.under_way) == 1
    leave(stage, pair)
    assert not stage.exporter._gate.under_way


def test_places(stage: Stage, pair: socket.socket) -> None:
    """Clients in their handshake take places like all others."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        clients = [
            socket.create_connection(listener.getsockname(), timeout=PATIENCE_SECONDS)
            for _ in range(MAX_CLIENTS)
        ]
        for _ in clients:
            stage.welcome(listener.accept()[0])
        assert len(stage.exporter.clients) == MAX_CLIENTS
        assert pair.recv(1) == b""
        for client in clients:
            client.close()
    stage.run_until_alone()


@pytest.mark.parametrize("mutual", [True])
class TestMutual:
    """With `client_ca`, a scraper needs a certificate."""

    def test_known(self, stage: Stage, pair: socket.socket) -> None:
        """Who has one gets the page."""
        scraper = Scraper(stage, pair, client_context(AUTHORITY))
        scraper.shake_hands()
        scraper.send(REQUEST)
        assert Answer(scraper.read_to_end()).status == 200
        leave(stage, pair)
        assert not stage.logged()

    @pytest.mark.parametrize(
        ("issuer", "alert"), [(None, "CERTIFICATE_REQUIRED"), (STRANGER, "UNKNOWN_CA")]
    )
    def test_unknown(
        self, stage: Stage, pair: socket.socket, issuer: trustme.CA | None, alert: str
    ) -> None:
        """Who has none, or another authority's, is told so by an alert and gets no page."""
        scraper = Scraper(stage, pair, client_context(issuer))
        scraper.shake_hands()
        scraper.send(REQUEST)
        with pytest.raises(ssl.SSLError, match=alert):
            scraper.read_to_end()
        leave(stage, pair)
        (line,) = stage.logged()
        assert line["event"] == "exporter_handshake_failed"
