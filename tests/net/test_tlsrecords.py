"""Records cut out of a stream of ciphertext, however that arrives."""

import contextlib
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpechod.net.tlsrecords import FULL_RECORD_BYTES, PIECE_BYTES, Bios
from lpechod.net.transport import BLOCKED

_LARGEST = 16384 + 2048
"""What may follow a header, in any version."""

_FULL = FULL_RECORD_BYTES - 5


def record(size: int, kind: int = 23) -> bytes:
    """Return what has the shape of a record."""
    return bytes([kind, 3, 3]) + size.to_bytes(2, "big") + bytes(size)


RECORDS = st.lists(
    st.builds(
        record, st.sampled_from([0, 1, 22, 300, 8000, _FULL, _FULL, _LARGEST]), st.integers(20, 23)
    ),
    max_size=8,
)


@contextlib.contextmanager
def connected() -> Iterator[tuple[socket.socket, int]]:
    """Return where to send, and the descriptor where that is received."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        yield ours, theirs.fileno()


def fed(bios: Bios, most: int, full: int = FULL_RECORD_BYTES) -> list[bytes]:
    """Return what OpenSSL is given: for each time, one record or several full ones."""
    given = []
    while count := bios.feed(most, full):
        span = bios.incoming.read()
        given.append(span)
        assert len(span) == count * bios.size
        if count > 1:
            assert count <= most
            assert bios.size == full
            assert len({span[at : at + 5] for at in range(0, len(span), len(span) // count)}) == 1
    return given


def cut(bios: Bios, ahead: bytes, arriving: bytes, most: int) -> tuple[list[bytes], bytes]:
    """Return what is found in what is there and what arrives, and what is left of that."""
    bios.load(ahead)
    found = fed(bios, 4)
    with connected() as (sender, fd):
        sender.sendall(arriving)
        while bios.receive(fd, most) != BLOCKED:
            found += fed(bios, 4)
    assert not bios.has_record
    return found, bios.unload()


@given(RECORDS, st.lists(st.integers(1, 40_000)), st.integers(1000, 70_000))
def test_any_segments(records: list[bytes], cuts: list[int], most: int) -> None:
    """However a stream is cut, its records come out whole, and in order."""
    stream = b"".join(records)
    bios, found, ahead, at = Bios(), [], b"", 0
    for size in (*cuts, len(stream)):
        some, ahead = cut(bios, ahead, stream[at : at + size], most)
        found += some
        at += size
    assert b"".join(found) == stream
    assert not ahead
    ends = {sum(map(len, records[:number])) for number in range(len(records) + 1)}
    assert {sum(map(len, found[:number])) for number in range(len(found) + 1)} <= ends


@pytest.mark.parametrize(
    ("most", "spans"),
    [(0, [1, 1, 1, 1]), (1, [1, 1, 1, 1]), (2, [2, 2]), (3, [3, 1]), (9, [4])],
)
def test_full_records_go_together(most: int, spans: list[int]) -> None:
    """As many as are wanted of those that are full are given at once."""
    bios = Bios()
    bios.load(4 * record(_FULL))
    assert [len(span) // len(record(_FULL)) for span in fed(bios, most)] == spans
    bios.load(4 * record(_FULL))
    assert len(fed(bios, most, full=0)) == 4, "which nobody knows to be full"


@pytest.mark.parametrize(
    "others",
    [(record(22), record(22)), (record(_FULL), record(_FULL, 22)), (record(_FULL), record(16400)),
     (record(_FULL - 1),) * 2, (record(_LARGEST),) * 2],
)  # fmt: skip
def test_others_go_alone(others: tuple[bytes, ...]) -> None:
    """Records that are not full, or differ, are given one at a time."""
    bios = Bios()
    bios.load(b"".join(others))
    assert fed(bios, 9) == list(others)


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n\r\n", record(10, kind=19), record(10, kind=24), b"\x17\x02\x03\0\1x",
     record(_LARGEST + 1)[:100]],
)  # fmt: skip
def test_what_is_no_record(garbage: bytes) -> None:
    """It is taken as far as it is there, so that OpenSSL tells at once what is wrong with it."""
    bios = Bios()
    assert cut(bios, b"", record(3) + garbage, PIECE_BYTES) == ([record(3), garbage], b"")


@pytest.mark.parametrize("size", range(5))
def test_part_of_a_header(size: int) -> None:
    """Less than a header is no record yet, whatever it says."""
    assert cut(Bios(), b"", b"GET /"[:size], PIECE_BYTES) == ([], b"GET /"[:size])


def test_a_full_buffer_has_room_for_the_rest() -> None:
    """In front of any part of a record there is room for what is missing."""
    bios = Bios()
    with connected() as (sender, fd):
        bios.load(record(_LARGEST)[:-1])
        assert not bios.feed(1, 0)
        sender.sendall(bytes(_LARGEST))
        assert bios.receive(fd, 1 << 20) == _LARGEST
        assert fed(bios, 1)[0] == record(_LARGEST)


def test_asking_the_kernel() -> None:
    """It is counted, and told of when there was less than there was room for."""
    bios = Bios()
    with connected() as (sender, fd):
        bios.load(b"")
        assert (bios.reads, bios.dry) == (0, False)
        sender.sendall(bytes(150))
        assert bios.receive(fd, 100) == 100
        assert (bios.reads, bios.dry) == (1, False)
        assert bios.receive(fd, 100) == 50
        assert (bios.reads, bios.dry) == (2, True)
        bios.load(bios.unload())
        assert (bios.reads, bios.dry) == (0, False)
        sender.close()
        assert bios.receive(fd, 100) == 0
        assert len(bios.unload()) == 150
