"""The frame: an unsigned 32-bit big-endian length ``L``, then ``L`` bytes.

Everything here works on bytes that lie in somebody else's buffer. An echoed frame is byte-identical
to what came in, so a frame is never cut out or copied: it is enough to know where the last whole
one ends. Nor is each header decoded: who sends many frames at a time mostly sends them of one
length, and then all their headers are compared at once, which takes a quarter of the time.
"""

from struct import Struct

HEADER_BYTES = 4
MAX_LENGTH = 0xFFFF_FFFF
SIZE_CLASSES = 33
"""Entries of a frame-size histogram: entry ``k`` counts frames of ``2**(k-1) < L <= 2**k`` bytes.

A bit length is at most 32. Frames of 0 and 1 bytes share the first two entries (``-1`` has a bit
length of 1), which is why a histogram should not be cut finer than 2 bytes.
"""

TOO_LARGE = -1
UNSCANNED = 0

_FIRST_RUN = 64
LONGEST_RUN = 1024
"""Headers compared in one go, if at least eight are there. The first look is at a few, and each
that finds them alike is followed by one at four times as many; so the look that fails, of which
there is one at most, costs little."""

_REPEATED = tuple(bytes((byte,)) * LONGEST_RUN for byte in range(256))

_HEADER = Struct(">I")
unpack_length = _HEADER.unpack_from
"""Decode the length at the front of a buffer, or at an offset in it, to a tuple of one."""
encode_header = _HEADER.pack
"""Encode a length (0 to 4294967295) as the four bytes that go in front of a body."""


def scan(
    buffer: memoryview, end: int, max_length: int, budget: int, sizes: list[int]
) -> tuple[int, int, int]:
    """Find where the whole frames at the front of a buffer end.

    Args:
        buffer: bytes of one stream, from a frame boundary on.
        end: how many of them are valid.
        max_length: the largest body allowed, in bytes.
        budget: how many frames to look at, at most.
        sizes: histogram of `SIZE_CLASSES` entries, to which each whole frame is added.

    Returns:
        ``(whole, frames, need)``: the whole frames take ``buffer[:whole]``, there are ``frames`` of
        them, and what begins at ``whole`` is a frame of ``need`` bytes with its header. ``need`` is
        `HEADER_BYTES` while that header is incomplete, `TOO_LARGE` if it announces more than
        ``max_length``, and `UNSCANNED` if the budget ended the scan.
    """
    unpack = unpack_length
    offset = frames = 0
    run = _FIRST_RUN
    while frames != budget:
        body = offset + 4
        if body > end:
            return offset, frames, HEADER_BYTES
        (length,) = unpack(buffer, offset)
        if length > max_length:
            return offset, frames, TOO_LARGE
        following = body + length
        if following > end:
            return offset, frames, length + 4
        if run and following + 7 * (length + 4) <= end:
            count = min((end - offset) // (length + 4), run, budget - frames)
            if _is_run(buffer, offset, length + 4, count):
                sizes[(length - 1).bit_length()] += count
                frames += count
                offset += count * (length + 4)
                run = min(4 * run, LONGEST_RUN)
                continue
            run = 0  # They are mixed, and to look at many from each place would take long.
        sizes[(length - 1).bit_length()] += 1
        frames += 1
        offset = following
    return offset, frames, UNSCANNED


def _is_run(buffer: memoryview, offset: int, size: int, count: int) -> bool:
    """Tell whether ``count`` frames of ``size`` bytes, with their headers, follow each other."""
    end = offset + count * size
    first, second, third, fourth = buffer[offset : offset + 4]
    # The last byte first, in which those of mixed frames mostly differ.
    return (
        buffer[offset + 3 : end : size] == _REPEATED[fourth][:count]
        and buffer[offset + 2 : end : size] == _REPEATED[third][:count]
        and buffer[offset + 1 : end : size] == _REPEATED[second][:count]
        and buffer[offset:end:size] == _REPEATED[first][:count]
    )


def count_frames(buffer: memoryview, end: int) -> int:
    """Count the whole frames in ``buffer[:end]``, whose lengths have been checked already."""
    return scan(buffer, end, MAX_LENGTH, MAX_LENGTH, [0] * SIZE_CLASSES)[1]


class Run:
    """Bytes of whole frames of one length in a buffer, and how to tell if the next are alike.

    Whoever sends a frame mostly sends the next one with the same length, and as many at a time.
    Then one comparison takes the place of all that `scan` does.

    Args:
        buffer: where the frames lie, and where the next ones will.
        length: of the body of each.
        frames: how many there are, 1 to `LONGEST_RUN`.

    Attributes:
        size: bytes of all frames.
        echo: these bytes.
        headers: what ``echo`` has to begin its frames with, to be compared with ``expected``.
        expected: what that is.
        size_class: index of these frames in a histogram of `SIZE_CLASSES`.
    """

    __slots__ = ("echo", "expected", "frames", "headers", "size", "size_class")

    def __init__(self, buffer: memoryview, length: int, frames: int) -> None:
        step = length + HEADER_BYTES
        self.size_class = (length - 1).bit_length()
        self.frames = frames
        self.size = step * frames
        self.echo = echo = buffer[: self.size]
        header = encode_header(length)
        self.headers: tuple[memoryview, ...] = (echo[:HEADER_BYTES],)
        self.expected: tuple[bytes, ...] = (header,)
        if frames > 1:
            # There are no views of every n-th word, but of every n-th byte.
            self.headers = tuple(echo[place::step] for place in range(HEADER_BYTES))
            self.expected = tuple(_REPEATED[byte][:frames] for byte in header)

    @classmethod
    def recognise(cls, buffer: memoryview, end: int, max_length: int) -> "Run | None":
        """Return the run that ``buffer[:end]`` is, if it is one and no body passes a length."""
        (length,) = unpack_length(buffer)
        frames, rest = divmod(end, length + HEADER_BYTES)
        if rest or not 0 < frames <= LONGEST_RUN or length > max_length:
            return None
        run = cls(buffer, length, frames)
        return run if run.headers == run.expected else None
