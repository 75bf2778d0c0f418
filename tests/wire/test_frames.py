"""The header codec and the scan for whole frames."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpechod.wire.frames import (
    HEADER_BYTES,
    LONGEST_RUN,
    MAX_LENGTH,
    SIZE_CLASSES,
    TOO_LARGE,
    UNSCANNED,
    Run,
    count_frames,
    encode_header,
    scan,
)
from tests.wire.driver import decode, frame, patterned

MAX = 1000
PLENTY = 1 << 30


def scan_bytes(
    data: bytes, max_length: int = MAX, budget: int = PLENTY, end: int | None = None
) -> tuple[int, int, int]:
    """Scan with a histogram that nobody looks at."""
    valid = len(data) if end is None else end
    return scan(memoryview(data), valid, max_length, budget, [0] * SIZE_CLASSES)


class TestHeader:
    """The four bytes in front of a body."""

    @pytest.mark.parametrize("length", [0, 1, 255, 256, 1 << 20, 0x8000_0000, MAX_LENGTH])
    def test_is_big_endian(self, length: int) -> None:
        """A header is the length as an unsigned number, most significant byte first."""
        assert encode_header(length) == length.to_bytes(4, "big")

    def test_has_four_bytes(self) -> None:
        """A header takes `HEADER_BYTES`, whatever it says."""
        assert len(encode_header(0)) == len(encode_header(MAX_LENGTH)) == HEADER_BYTES


class TestScan:
    """Where the whole frames end, and what is needed next."""

    def test_nothing(self) -> None:
        """An empty buffer holds no frame and waits for a header."""
        assert scan_bytes(b"") == (0, 0, HEADER_BYTES)

    def test_empty_frame(self) -> None:
        """A frame of length zero is whole with its header."""
        assert scan_bytes(frame(b"")) == (4, 1, HEADER_BYTES)

    def test_every_prefix_of_a_frame(self) -> None:
        """A frame is not whole before its last byte, and says its size as soon as it can."""
        data = patterned(20)
        for end in range(len(data)):
            need = HEADER_BYTES if end < HEADER_BYTES else len(data)
            assert scan_bytes(data, end=end) == (0, 0, need)
        assert scan_bytes(data) == (24, 1, HEADER_BYTES)

    def test_every_prefix_of_two_frames(self) -> None:
        """What follows whole frames is judged by itself."""
        first, second = patterned(5), patterned(9)
        data = first + second
        for end in range(len(first), len(data)):
            need = HEADER_BYTES if end < len(first) + HEADER_BYTES else len(second)
            assert scan_bytes(data, end=end) == (len(first), 1, need)

    def test_ignores_what_lies_behind_the_end(self) -> None:
        """Bytes behind the valid ones, left by somebody else, are not looked at."""
        data = frame(b"ab") + b"\xff" * 8
        for end in range(6, 10):
            assert scan_bytes(data, end=end) == (6, 1, HEADER_BYTES)

    @pytest.mark.parametrize("length", [MAX - 1, MAX])
    def test_largest_length(self, length: int) -> None:
        """A frame of the largest length allowed is a frame."""
        assert scan_bytes(frame(bytes(length))) == (length + 4, 1, HEADER_BYTES)
        assert scan_bytes(encode_header(length)) == (0, 0, length + 4)

    @pytest.mark.parametrize("length", [MAX + 1, 0x7FFF_FFFF, 0x8000_0000, MAX_LENGTH])
    def test_too_large(self, length: int) -> None:
        """One byte more is refused with the header alone, and the frames before it stand."""
        before = frame(b"ab") * 3
        assert scan_bytes(encode_header(length)) == (0, 0, TOO_LARGE)
        assert scan_bytes(before + encode_header(length)) == (len(before), 3, TOO_LARGE)
        assert scan_bytes(before + encode_header(length) + before) == (len(before), 3, TOO_LARGE)

    @pytest.mark.parametrize("length", [0x8000_0000, MAX_LENGTH])
    def test_lengths_are_unsigned(self, length: int) -> None:
        """A length with the top bit set is large, not negative, where such lengths are allowed."""
        assert scan_bytes(encode_header(length), max_length=MAX_LENGTH) == (0, 0, length + 4)

    def test_largest_length_of_zero(self) -> None:
        """With a limit of zero only empty frames pass."""
        assert scan_bytes(frame(b"") * 2 + frame(b"a"), max_length=0) == (8, 2, TOO_LARGE)

    def test_budget(self) -> None:
        """The budget ends a scan between two frames, and says that more may follow."""
        data = frame(b"a") * 3
        assert scan_bytes(data, budget=2) == (10, 2, UNSCANNED)
        assert scan_bytes(data, budget=3) == (15, 3, UNSCANNED)
        assert scan_bytes(data, budget=4) == (15, 3, HEADER_BYTES)

    def test_histogram(self) -> None:
        """Entry k counts the frames of more than 2**(k-1) and at most 2**k bytes."""
        lengths = [0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 512, 513, 1000]
        sizes = [0] * SIZE_CLASSES
        data = b"".join(frame(bytes(length)) for length in lengths)
        scan(memoryview(data), len(data), MAX, PLENTY, sizes)
        expected = [0] * SIZE_CLASSES
        expected[0] = 1  # 1 byte
        expected[1] = 2  # 0 and 2 bytes
        expected[2], expected[3], expected[4], expected[5] = 2, 2, 2, 1
        expected[9], expected[10] = 1, 2
        assert sizes == expected

    def test_histogram_takes_every_length(self) -> None:
        """The histogram has a place for the longest frame that a header can announce."""
        assert (MAX_LENGTH - 1).bit_length() == SIZE_CLASSES - 1

    def test_histogram_counts_whole_frames_only(self) -> None:
        """Neither a frame that has not arrived whole nor a refused one is counted."""
        sizes = [0] * SIZE_CLASSES
        for data in (patterned(20)[:-1], encode_header(MAX + 1), b"\0\0"):
            scan(memoryview(data), len(data), MAX, PLENTY, sizes)
        assert sum(sizes) == 0

    @given(
        lengths=st.lists(st.integers(0, MAX + 3), max_size=12),
        cut=st.integers(0, 30),
        budget=st.integers(1, 14),
    )
    def test_agrees_with_a_naive_decoder(self, lengths: list[int], cut: int, budget: int) -> None:
        """A scan finds the frames that a decoder finds which cuts them out one by one."""
        stream = b"".join(frame(bytes(length)) for length in lengths)
        stream = stream[: max(0, len(stream) - cut)]
        sizes = [0] * SIZE_CLASSES
        whole, frames, need = scan(memoryview(stream), len(stream), MAX, budget, sizes)
        expected, then = decode(stream, MAX)
        assert frames == sum(sizes) == min(budget, len(expected))
        assert whole == sum(map(len, expected[:budget]))
        if len(expected) >= budget:
            assert need == UNSCANNED
        elif then == "too large":
            assert need == TOO_LARGE
        elif then == "partial" and len(stream) - whole >= HEADER_BYTES:
            assert need == int.from_bytes(stream[whole : whole + 4], "big") + 4
        else:
            assert need == HEADER_BYTES

    @given(
        runs=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 300)), max_size=4),
        cut=st.integers(0, 10),
        budget=st.integers(1, 700),
    )
    def test_runs_agree_with_a_naive_decoder(
        self, runs: list[tuple[int, int]], cut: int, budget: int
    ) -> None:
        """Many frames of one length, and then of another, are found as if each was looked at."""
        stream = b"".join(frame(bytes(length)) * times for length, times in runs)
        stream = stream[: max(0, len(stream) - cut)]
        sizes, singly = [0] * SIZE_CLASSES, [0] * SIZE_CLASSES
        whole, frames, _ = scan(memoryview(stream), len(stream), 4, budget, sizes)
        expected = decode(stream, 4)[0][:budget]
        for each in expected:
            scan(memoryview(each), len(each), 4, PLENTY, singly)
        assert (whole, frames) == (sum(map(len, expected)), len(expected))
        assert sizes == singly

    @pytest.mark.parametrize("place", [0, 1, 2, 3])
    @pytest.mark.parametrize("at", [1, 7, 8, 63, 64, 65, 199])
    def test_one_other_in_a_run(self, place: int, at: int) -> None:
        """A header that differs in any of its bytes, anywhere in a run, is not overlooked."""
        odd = bytearray(frame(b"same"))
        odd[place] ^= 1
        data = frame(b"same") * at + bytes(odd)
        expected, _ = decode(data + frame(b"same") * 200, 4)
        assert scan_bytes(data + frame(b"same") * 200, max_length=4)[:2] == (
            sum(map(len, expected)),
            len(expected),
        )

    @given(st.binary(max_size=200), st.integers(0, 300))
    def test_any_bytes(self, data: bytes, max_length: int) -> None:
        """Any garbage is frames, a beginning of one, or too large; nothing raises."""
        whole, frames, need = scan_bytes(data, max_length=max_length)
        expected, then = decode(data, max_length)
        assert (whole, frames) == (sum(map(len, expected)), len(expected))
        assert (need == TOO_LARGE) == (then == "too large")


class TestCountFrames:
    """Counting afresh what has been scanned before."""

    def test_every_prefix(self) -> None:
        """A frame counts from its last byte on."""
        data = frame(b"") + patterned(3) + patterned(MAX)
        counts = [count_frames(memoryview(data), end) for end in range(len(data) + 1)]
        assert counts[3:5] == [0, 1]
        assert counts[10:12] == [1, 2]
        assert counts[-2:] == [2, 3]
        assert counts == sorted(counts)


class TestRun:
    """A read that brings what the one before brought."""

    @given(
        length=st.integers(0, 300),
        frames=st.integers(1, 40),
        other=st.integers(0, 300),
        place=st.integers(0, 39),
    )
    def test_is_recognised(self, length: int, frames: int, other: int, place: int) -> None:
        """Frames of one length are a run, and with one of another among them they are none."""
        buffer = memoryview(bytearray(40 * 304 + 64))
        data = frame(bytes(length)) * frames
        buffer[: len(data)] = data
        run = Run.recognise(buffer, len(data), 300)
        assert run is not None
        assert (run.size_class, run.frames, run.size) == (
            (length - 1).bit_length(),
            frames,
            len(data),
        )
        assert run.echo == data
        assert run.headers == run.expected

        if place < frames:
            buffer[place * (length + 4) : place * (length + 4) + 4] = encode_header(other)
            assert (run.headers == run.expected) == (other == length)

    def test_is_whole(self) -> None:
        """A byte more or less is no run, nor is a body past the limit, nor is nothing."""
        data = memoryview(frame(b"12") * 3 + b"\0")
        assert Run.recognise(data, 18, 2) is not None
        assert Run.recognise(data, 18, 1) is None
        assert Run.recognise(data, 17, 2) is None
        assert Run.recognise(data, 19, 2) is None
        assert Run.recognise(data, 0, 2) is None

    def test_has_an_end(self) -> None:
        """A run of so many frames is left to `scan`, which has a budget."""
        data = memoryview(bytes(4 * (LONGEST_RUN + 1)))
        assert Run.recognise(data, 4 * LONGEST_RUN, 2) is not None
        assert Run.recognise(data, 4 * (LONGEST_RUN + 1), 2) is None
