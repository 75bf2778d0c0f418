"""Files in memory."""

import os
import resource
from pathlib import Path

import pytest

from lpechod.engine.memfile import memory_file
from tests.net.harness import descriptors
from tests.net.scarcity import descriptors_left


def test_what_is_in_it_can_be_read() -> None:
    """It holds the content, and does not cross execve(2)."""
    fd = memory_file("some-name", b"content")
    try:
        assert os.pread(fd, 100, 0) == b"content"
        assert not os.get_inheritable(fd)
        assert "some-name" in str(Path(f"/proc/self/fd/{fd}").readlink())
    finally:
        os.close(fd)


@pytest.mark.parametrize("left", [0, 1])
def test_the_last_descriptor_is_enough(left: int) -> None:
    """It takes one descriptor, and without any fails and leaves none open."""
    before = descriptors()
    with descriptors_left(left):
        if left:
            os.close(memory_file("some-name", b"content"))
        else:
            with pytest.raises(OSError, match="Too many open files"):
                memory_file("some-name", b"content")
    assert before == descriptors()


def test_a_failed_write_leaves_nothing_open() -> None:
    """Without room for the content, here by a limit on the size of files, it is closed again."""
    before = descriptors()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            memory_file("some-name", bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert before == descriptors()
