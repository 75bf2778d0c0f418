"""Records cut out of a stream of ciphertext, however that arrives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpechod.net.tlsrecords import PIECE_BYTES, Bios

_LARGEST = 16384 + 2048
"""What may follow a header, in any version."""


def record(size: int, kind: int = 23) -> bytes:
    """Return what has the shape of a record."""
    return bytes([kind, 3, 3]) + size.to_bytes(2, "big") + bytes(size)


RECORDS = st.lists(
    st.builds(record, st.sampled_from([0, 1, 22, 300, 8000, 16401, _LARGEST]), st.integers(20, 23)),
    max_size=8,
)


def cut(bios: Bios, ahead: bytes, arriving: bytes, most: int) -> tuple[list[bytes], bytes]:
    """Return the records of what is there and of what arrives, and what is left of that."""
    bios.load(ahead)
    found = []
    while True:
        while (one := bios.take()) is not None:
            found.append(bytes(one))
        space = bios.space(most)[: len(arriving)]
        if not arriving:
            break
        space[:], arriving = arriving[: len(space)], arriving[len(space) :]
        bios.add(len(space))
    assert not bios.has_record
    return found, bios.unload()


@given(RECORDS, st.lists(st.integers(1, 40_000)), st.integers(1, 70_000))
def test_any_segments(records: list[bytes], cuts: list[int], most: int) -> None:
    """However a stream is cut, its records come out, each whole and by itself."""
    stream = b"".join(records)
    bios, found, ahead, at = Bios(), [], b"", 0
    for size in (*cuts, len(stream)):
        some, ahead = cut(bios, ahead, stream[at : at + size], most)
        found += some
        at += size
    assert found == records
    assert not ahead


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
    bios.load(record(_LARGEST)[:-1])
    assert bios.take() is None
    assert len(bios.space(1 << 20)) >= _LARGEST
