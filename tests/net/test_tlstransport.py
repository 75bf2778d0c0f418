"""How the TLS transport sends what is more than a record, of which a connection shows little."""

import contextlib
import socket
import ssl
import struct
from collections.abc import Iterator

import pytest

from lpechod.engine.buffers import HEADROOM_BYTES
from lpechod.net.entrance import Entrance
from lpechod.net.tls import CHUNK_BYTES, MOST_BYTES, MOST_READS, TlsTransport
from lpechod.net.tlsrecords import PIECE_BYTES, RECORD_BYTES, Bios
from lpechod.net.transport import BLOCKED
from tests.net.conftest import Serve
from tests.net.harness import KernelBuffers, assert_same, body_of, frame
from tests.net.tlsclient import client_context, server_context
from tests.net.tlswire import NARROW

BUFFERS = KernelBuffers(send=1 << 20, receive=1 << 20)
SMALL = KernelBuffers(send=1 << 16, receive=1 << 16)
TUNED = KernelBuffers()

_DATA_SEGMENTS_OUT = 156
"""Offset of tcpi_data_segs_out in struct tcp_info (linux/tcp.h)."""


@pytest.fixture(name="poller_name")
def _poller_name() -> str:
    return "epoll"


@pytest.fixture(name="entrance")
def _entrance() -> Entrance:
    return Entrance(tls=server_context())


def data_segments(end: socket.socket) -> int:
    """Return how many segments with data have been sent."""
    info = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _DATA_SEGMENTS_OUT + 4)
    (count,) = struct.unpack_from("I", info, _DATA_SEGMENTS_OUT)
    return int(count)


@pytest.mark.parametrize(("records", "corked"), [(1, False), (12, True)])
def test_records_share_segments(serve: Serve, records: int, corked: bool) -> None:
    """A large echo leaves in fewer segments than it has records, and nothing of it is kept back."""
    server = serve(buffers=BUFFERS)
    client = server.connect(buffers=BUFFERS)
    end = server.connection_of(client)._transport._socket  # type: ignore[attr-defined]
    before = data_segments(end)
    client.exchange(frame(bytes(records * RECORD_BYTES - 4)))
    assert (data_segments(end) - before < records) is corked
    assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_CORK) == 0


@contextlib.contextmanager
def established(
    ours: KernelBuffers = SMALL, theirs: KernelBuffers = SMALL
) -> Iterator[tuple[TlsTransport, ssl.SSLSocket]]:
    """Yield a transport, and its peer's socket, with such buffers in between."""
    with socket.socket() as peer, socket.create_server(("127.0.0.1", 0)) as listening:
        theirs.apply(peer)
        ours.apply(listening)
        peer.connect(listening.getsockname())
        transport = TlsTransport(listening.accept()[0], server_context(), Bios())
        with client_context().wrap_socket(
            peer, server_hostname="echo.test", do_handshake_on_connect=False
        ) as client:
            client.setblocking(False)
            for _ in range(2):
                with contextlib.suppress(ssl.SSLWantReadError):
                    client.do_handshake()
                transport.shake_hands()
            yield transport, client
        transport.close()


def test_each_record_counts() -> None:
    """Of a large echo that the kernel takes in part, the records that it has taken are counted."""
    with established() as (transport, _):
        sent = transport.send(memoryview(bytes(8 << 20)))
        assert sent >= RECORD_BYTES
        assert sent % RECORD_BYTES == 0


def test_blocked_at_the_last_record() -> None:
    """An echo that is refused from any of its records on goes on from there, if only in part."""
    blocked = 0
    for records in range(1, 64):
        data = memoryview(bytes(records * RECORD_BYTES + 16000))
        with established() as (transport, client):
            sent = transport.send(data)
            if sent < len(data):
                blocked += 1
                assert transport._sealed <= RECORD_BYTES + HEADROOM_BYTES, "which is ours to keep"
                sent += transport.send_many([data[sent:]])  # Mostly nothing: it is refused again.
                received = client.recv(RECORD_BYTES)
                while sent < len(data) or len(received) < len(data):
                    sent += transport.send_many([data[sent:]])
                    with contextlib.suppress(ssl.SSLWantReadError):
                        received += client.recv(RECORD_BYTES)
                assert received == data
    assert blocked


def test_how_much_waits() -> None:
    """How many bytes wait is known, give or take what makes a record of them."""
    with established() as (transport, client):
        assert transport.waiting() == 0
        client.send(bytes(10_000))
        assert 10_000 <= transport.waiting() <= 10_100
        assert transport.receive(memoryview(bytearray(20_000))) == 10_000
        assert transport.waiting() == 0
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.send(b"one")
        client.send(bytes(5000))
        assert transport.receive(memoryview(bytearray(20_000))) == 3
        assert 5000 <= transport.waiting() <= 5100, "of which we have all"


@pytest.mark.parametrize("records", range(2, 13))
def test_refused_within_a_call(records: int) -> None:
    """Records for which the kernel had room, but that it refuses, go out once, in order."""
    data = memoryview(body_of(records * RECORD_BYTES + 100))
    with established(BUFFERS, NARROW) as (transport, client):
        # For its own reasons: room is what SO_SNDBUF leaves (tcp(7), TCP_NOTSENT_LOWAT).
        transport._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 1)
        while transport._fitting(len(data)) == RECORD_BYTES:
            client.send(b"x")  # With it, the client acknowledges the last of the handshake.
            assert transport.receive(memoryview(bytearray(8))) == 1
        assert transport._fitting(len(data)) == CHUNK_BYTES
        sent = transport.send(data)
        assert not sent
        received = bytearray()
        while len(received) < len(data):
            with contextlib.suppress(ssl.SSLWantReadError):
                received += client.recv(RECORD_BYTES)
            if sent < len(data):
                sent += transport.send_many([data[sent:], data[:0]])
        assert_same(bytes(data), bytes(received))


def test_records_that_follow_others_count_one_by_one() -> None:
    """What the kernel holds already may leave less room than it seems: each record counts."""
    with established(BUFFERS, NARROW) as (transport, _):
        assert transport.send(memoryview(bytes(RECORD_BYTES))) == RECORD_BYTES
        assert transport._fitting(RECORD_BYTES * 2) == RECORD_BYTES


def test_what_follows_a_refused_record_waits_for_it() -> None:
    """The peer never gets more than is counted, though what waits grows behind a refused record."""
    data = memoryview(body_of(1 << 20))
    with established(KernelBuffers(send=4096), KernelBuffers(receive=4096)) as (transport, client):
        sent = received = 0
        while count := transport.send(data[sent : sent + 1000]):
            sent += count
        while received < 100_000:
            # As much as one record holds is offered, of which the first part was refused.
            sent += transport.send(data[sent : sent + RECORD_BYTES])
            with contextlib.suppress(ssl.SSLWantReadError):
                received += len(client.recv(3000))
            assert received <= sent


def test_a_record_that_is_taken_slowly(serve: Serve) -> None:
    """Who takes a part of a record is not one who takes nothing, though it does not count yet."""
    server = serve(buffers=KernelBuffers(send=4096))
    client = server.connect(buffers=KernelBuffers(receive=4096))
    client.send(frame(body_of(60_000)))
    server.settle()
    connection = server.connection_of(client)
    transport, protocol = connection._transport, connection.protocol
    assert isinstance(transport, TlsTransport)
    begun, refused, unsent = protocol.stuck_since(), len(transport._unsent), protocol.unsent_bytes
    server.jump(5.0)

    def taken() -> bool:
        with contextlib.suppress(BlockingIOError):
            client.socket.recv(1000)
        return len(transport._unsent) != refused

    server.turn_until(taken, "a part taken", [client.socket])
    assert protocol.unsent_bytes == unsent or not refused
    assert protocol.stuck_since() >= begun + 5.0
    client.socket.close()
    server.closed(client)


@contextlib.contextmanager
def by_packets() -> Iterator[tuple[TlsTransport, ssl.SSLObject, ssl.MemoryBIO, socket.socket]]:
    """Yield a transport for which each packet takes a read, its peer, and what that has to send."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context().wrap_bio(incoming, outgoing, server_hostname="echo.test")
    transport = TlsTransport(ours, server_context(), Bios())
    with theirs:
        for _ in range(2):
            with contextlib.suppress(ssl.SSLWantReadError):
                client.do_handshake()
            theirs.send(outgoing.read())
            if transport.shake_hands() is not None:
                incoming.write(theirs.recv(1 << 16))
        yield transport, client, outgoing, theirs
    transport.close()


def test_a_few_bytes_at_a_time() -> None:
    """Whoever sends much with a call is asked for more, but not for ever; others are not."""
    buffer = memoryview(bytearray(10 * RECORD_BYTES))
    with by_packets() as (transport, client, outgoing, peer):
        for size, looks in ((RECORD_BYTES, 0), (4 * RECORD_BYTES, MOST_READS - 2), (8000, 0)):
            client.write(bytes(size))
            cipher = outgoing.read()
            peer.send(cipher[:PIECE_BYTES])  # As much as is received at a time, if it is there.
            if size >= RECORD_BYTES:
                peer.send(cipher[PIECE_BYTES:])
            client.write(bytes(100))
            for byte in outgoing.read():
                peer.send(bytes([byte]))
            assert transport.receive(buffer) == size
            assert len(transport._ahead) == looks
            while transport.receive(buffer) != 100:
                assert transport.waiting()
            assert not transport.more


def test_much_at_a_time() -> None:
    """Whoever has sent much is expected to do so again: all there is takes one call."""
    size = RECORD_BYTES * 3
    buffer = memoryview(bytearray(size))
    with established(BUFFERS, BUFFERS) as (transport, client):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for reads in (2, 1):
            assert [client.send(bytes(RECORD_BYTES)) for _ in range(3)] == [RECORD_BYTES] * 3
            assert transport.receive(buffer) == size
            assert transport._bios.reads == reads


def test_not_too_much_at_a_time() -> None:
    """However much there is, and room for it, others have their turn in between."""
    buffer = memoryview(bytearray(2 * MOST_BYTES))
    with established(TUNED, TUNED) as (transport, client):
        size = 0
        with contextlib.suppress(ssl.SSLWantWriteError):
            while size < len(buffer):
                size += client.send(bytes(RECORD_BYTES))
        assert size > MOST_BYTES
        assert transport.receive(buffer) == MOST_BYTES
        assert transport.more or transport.waiting()


def test_who_sends_much() -> None:
    """Neither nothing at all, nor what there is little room for, says that somebody sends less."""
    buffer = memoryview(bytearray(RECORD_BYTES))
    with established(BUFFERS, BUFFERS) as (transport, client):
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.send(bytes(RECORD_BYTES))
        assert transport.receive(buffer) == RECORD_BYTES
        assert transport.receive(buffer) == BLOCKED
        assert not transport.even
        client.send(bytes(100))
        assert transport.receive(buffer[:100]) == 100
        assert not transport.even
        client.send(bytes(100))
        assert transport.receive(buffer) == 100
        assert transport.even


def test_no_call_for_a_little(serve: Serve) -> None:
    """A few bytes behind what the kernel gets with one call go with it, and not by themselves."""
    server = serve(buffers=BUFFERS)
    client = server.connect(buffers=BUFFERS)
    end = server.connection_of(client)._transport._socket  # type: ignore[attr-defined]
    segments = []
    for more in (0, 1, HEADROOM_BYTES):
        before = data_segments(end)
        client.exchange(frame(bytes(CHUNK_BYTES + more - 4)))
        segments.append(data_segments(end) - before)
    assert len(set(segments)) == 1
