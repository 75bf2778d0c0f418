"""The frame: an unsigned 32-bit big-endian length ``L``, then ``L`` bytes.

Everything here works on bytes that lie in somebody else's buffer. An echoed frame is byte-identical
to what came in, so a frame is never cut out or copied: it is enough to know where the last whole
one ends.
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
        sizes[(length - 1).bit_length()] += 1
        frames += 1
        offset = following
    return offset, frames, UNSCANNED


def count_frames(buffer: memoryview, end: int) -> int:
    """Count the whole frames in ``buffer[:end]``, whose lengths have been checked already."""
    return scan(buffer, end, MAX_LENGTH, -1, [0] * SIZE_CLASSES)[1]
