"""Key updates by the thousand: TLS 1.3 has no limit for them, so the server has."""

import ssl
from pathlib import Path

import pytest

from lpechod.net.entrance import Entrance
from lpechod.net.tls import MOST_BARREN_RECORDS
from lpechod.wire.settings import EchoSettings
from tests.net.conftest import Serve
from tests.net.harness import SECURED, EchoServer, KernelBuffers, TlsClient, assert_same, frame
from tests.net.tlsclient import RECORD_BYTES
from tests.net.tlskeys import Sealer
from tests.net.tlswire import (
    HELLO,
    NARROW,
    context,
    dial,
    read_to_alert,
    shake,
    skip,
    stuff,
    transport_of,
)

ROOMY = KernelBuffers(send=1 << 20, receive=1 << 20)


@pytest.fixture(name="entrance")
def _entrance() -> Entrance:
    return SECURED


@pytest.fixture(name="poller_name", params=["epoll", "epoll-et"])
def _poller_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def meet(
    server: EchoServer, folder: Path, buffers: KernelBuffers = ROOMY
) -> tuple[TlsClient, Sealer]:
    """Connect a client, and let a sealer go on where it has left off."""
    made = context(ssl.TLSVersion.TLSv1_3)
    made.keylog_filename = str(folder / "keys")
    client = dial(server, made)
    buffers.apply(client.socket)
    shake(client)
    client.exchange(HELLO)
    made.keylog_filename = None  # type: ignore[assignment] # Or the file would stay open.
    return client, Sealer(folder / "keys", sent=1)


def deliver(server: EchoServer, client: TlsClient, cipher: bytes) -> None:
    """Have the server receive bytes, for as long as it does."""
    view = memoryview(cipher)
    blocked = 0
    while view and blocked < 3:
        try:
            view = view[client.socket.send(view) :]
            blocked = 0
        except BlockingIOError:
            blocked += 1
        except ConnectionError:
            break
        server.turn()
    server.settle()


@pytest.mark.parametrize("asks", [False, True])
def test_a_flood(serve: Serve, tmp_path: Path, *, asks: bool) -> None:
    """Key updates without data in between end the connection; no turn decrypts them all."""
    server = serve(buffers=ROOMY)
    client, sealer = meet(server, tmp_path)
    flood = b"".join(sealer.key_update(asks=asks) for _ in range(5000))
    client.socket.send(flood)
    server.turn()
    barren = transport_of(server, client)._barren if server.service.connections else 0
    assert barren <= MOST_BARREN_RECORDS + 1
    client.socket.close()
    assert server.closed(client)["reason"] == "tls_error"
    (line,) = server.log.of("tls_failed")
    assert line["problem"] == "too many records without data"


@pytest.mark.parametrize("padded", [False, True])
def test_as_many_as_are_allowed(serve: Serve, tmp_path: Path, *, padded: bool) -> None:
    """Between two records of data there may be some, again and again, and all data is echoed."""
    server = serve()
    client, sealer = meet(server, tmp_path)
    cipher = b""
    for _ in range(20):
        for _ in range(MOST_BARREN_RECORDS):
            cipher += sealer.key_update(padded=padded)
        cipher += sealer.data(HELLO)
    deliver(server, client, cipher)
    client.sent += 20 * len(HELLO)
    assert_same(HELLO * 20, client.receive_exactly(20 * len(HELLO)))
    server.assert_quiet()


def test_some_at_a_time(serve: Serve, tmp_path: Path) -> None:
    """However many come in all, each with data behind it, they end nothing."""
    server = serve()
    client, sealer = meet(server, tmp_path)
    for _ in range(2 * MOST_BARREN_RECORDS):
        deliver(server, client, sealer.key_update())
        deliver(server, client, sealer.data(HELLO))
        client.sent += len(HELLO)
        assert client.receive_exactly(len(HELLO)) == HELLO


def test_no_call_reads_all_of_a_flood(serve: Serve, tmp_path: Path) -> None:
    """A little data in between does not let a flood be read with one call, at a deadline either."""
    server = serve(buffers=ROOMY)
    client, sealer = meet(server, tmp_path)
    cipher = b""
    for _ in range(100):
        cipher += b"".join(sealer.key_update() for _ in range(MOST_BARREN_RECORDS))
        cipher += sealer.data(b"\0")
    assert client.socket.send(cipher) == len(cipher)
    transport = transport_of(server, client)
    transport.eager = True
    while transport.receive(memoryview(bytearray(1000))) > 0:
        assert transport.wasted <= 2 * MOST_BARREN_RECORDS
    assert transport.waiting() == 0
    client.socket.close()
    server.settle()


FULL = frame(bytes(RECORD_BYTES - 4))


@pytest.mark.parametrize("ahead", range(4))
def test_each_in_front_of_data(serve: Serve, tmp_path: Path, ahead: int) -> None:
    """Those in front of data are not charged to what comes behind it."""
    server = serve(buffers=ROOMY)
    client, sealer = meet(server, tmp_path)
    cipher = b"".join(sealer.data(FULL) for _ in range(ahead))
    for _ in range(4):
        for _ in range(MOST_BARREN_RECORDS):
            cipher += sealer.key_update(padded=True)
        cipher += sealer.data(FULL)
    deliver(server, client, cipher)
    client.sent += (ahead + 4) * len(FULL)
    assert_same((ahead + 4) * FULL, client.receive_exactly((ahead + 4) * len(FULL)))


def test_together(serve: Serve, tmp_path: Path) -> None:
    """Of full records that are decrypted together, nobody can tell which had no data."""
    server = serve(buffers=ROOMY)
    client, sealer = meet(server, tmp_path)
    deliver(server, client, sealer.data(FULL))
    cipher = sealer.key_update(padded=True) + sealer.data(FULL)
    client.socket.send(cipher + sealer.key_update(padded=True))
    server.settle()
    assert transport_of(server, client)._barren == 0
    client.sent += 2 * len(FULL)
    assert_same(2 * FULL, client.receive_exactly(2 * len(FULL)))


def test_an_echo_goes_before_what_is_broken(serve: Serve, tmp_path: Path) -> None:
    """What comes in one record that is not full, if only just, is echoed, whatever follows."""
    server = serve(buffers=ROOMY)
    client, sealer = meet(server, tmp_path)
    deliver(server, client, sealer.data(FULL))
    small = frame(bytes(RECORD_BYTES - 5))
    cipher = sealer.data(small)
    broken = bytearray(sealer.data(small))
    broken[-1] ^= 1
    client.socket.send(cipher + broken)
    client.sent += len(FULL + small)
    assert_same(FULL + small, read_to_alert(client))
    client.socket.close()
    assert server.closed(client)["reason"] == "tls_error"


def test_among_full_records(serve: Serve, tmp_path: Path) -> None:
    """Those that are as large as the data around them take nothing away from it."""
    server = serve()
    client, sealer = meet(server, tmp_path)
    cipher = b""
    for updates in (0, 1, 0, 2, 1, 3, 0):
        cipher += sealer.data(FULL)
        for _ in range(updates):
            cipher += sealer.key_update(padded=True)
    deliver(server, client, cipher)
    client.sent += 7 * len(FULL)
    assert_same(7 * FULL, client.receive_exactly(7 * len(FULL)))


@pytest.mark.parametrize("records", range(4))
def test_behind_the_end(serve: Serve, tmp_path: Path, records: int) -> None:
    """What follows a close_notify of the size of data is dropped, and reaches nobody else."""
    server = serve()
    client, sealer = meet(server, tmp_path)
    cipher = [sealer.data(FULL) for _ in range(records)]
    cipher += [sealer.close_notify(padded=True), sealer.data(FULL), sealer.data(FULL)]
    deliver(server, client, b"".join(cipher))
    server.connect().exchange(HELLO)
    client.sent += records * len(FULL)
    assert_same(records * FULL, client.receive_to_end())
    client.socket.close()
    assert server.closed(client)["reason"] == "peer_closed"


@pytest.mark.parametrize("records", range(4))
def test_broken_among_full_records(serve: Serve, tmp_path: Path, records: int) -> None:
    """One that does not decrypt ends its own connection, and nobody else sees what is behind it."""
    server = serve()
    client, sealer = meet(server, tmp_path)
    whole = [sealer.data(FULL) for _ in range(records)]
    broken = bytearray(sealer.data(FULL))
    broken[-1] ^= 1
    deliver(server, client, b"".join([*whole, broken, *whole]))
    server.connect().exchange(HELLO)
    client.socket.close()
    assert server.closed(client)["reason"] == "tls_error"


def test_in_parts(serve: Serve, tmp_path: Path) -> None:
    """A key update in two records, between which OpenSSL can send nothing, is an error by name."""
    server = serve(buffers=ROOMY)
    client, sealer = meet(server, tmp_path)
    deliver(server, client, sealer.data(frame(bytes(RECORD_BYTES - 4))) + sealer.part())
    client.socket.close()
    assert server.closed(client)["reason"] == "tls_error"
    (line,) = server.log.of("tls_failed")
    assert line["problem"] == "a key update in parts"


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_one_more(serve: Serve, tmp_path: Path, *, padded: bool, apart: bool) -> None:
    """One more than that is too many, whether they come together or each by itself."""
    server = serve()
    client, sealer = meet(server, tmp_path)
    records = [sealer.key_update(padded=padded) for _ in range(MOST_BARREN_RECORDS + 1)]
    for cipher in records[:-1] if apart else [b"".join(records[:-1])]:
        deliver(server, client, cipher)
    assert server.service.connections
    assert not server.log.of("tls_failed")
    deliver(server, client, records[-1])
    client.socket.close()
    assert server.closed(client)["reason"] == "tls_error"


def test_answers_that_nobody_takes(serve: Serve, tmp_path: Path) -> None:
    """Who asks for key updates and does not read is not read from any more, and turns no loop."""
    echo = EchoSettings(high_watermark_bytes=64 << 20, low_watermark_bytes=1 << 20)
    server = serve(echo=echo, buffers=KernelBuffers(send=8192, receive=1 << 20))
    client, sealer = meet(server, tmp_path, NARROW)
    body = frame(bytes(8000))
    for _ in range(200):
        deliver(server, client, sealer.data(body))
    assert server.connection_of(client).protocol.unsent_bytes
    before = server.tally.received_bytes
    cipher = b"".join(sealer.key_update(asks=True) + sealer.data(b"\0\0\0\0") for _ in range(5000))
    deliver(server, client, cipher)
    assert server.tally.received_bytes - before < 4 * 1000
    assert len(transport_of(server, client)._unsent) < 1 << 16
    server.assert_quiet()
    received = server.tally.received_bytes
    server.connection_of(client)._catch_up(server.clock.now)
    assert server.tally.received_bytes == received, "at a deadline, too"
    server.assert_quiet()


def test_an_answer_goes_before_what_follows(serve: Serve, tmp_path: Path) -> None:
    """A key update that finds the kernel full is answered when there is room, before all echoes."""
    server = serve(buffers=NARROW)
    client, sealer = meet(server, tmp_path, NARROW)
    size, transport = 0, transport_of(server, client)
    while not transport.crossed:
        size += stuff(server, client)
        # The kernel may find room for a few bytes more.
        deliver(server, client, sealer.key_update(asks=True))
    deliver(server, client, sealer.data(HELLO))
    assert server.tally.frames == 1, "receives, though it has to answer first"
    server.assert_quiet()
    skip(server, client, size)
    client.sent += len(HELLO)
    assert client.receive_exactly(len(HELLO)) == HELLO
    assert transport.fd in server.service.steady.secured.connections
