"""Files that are in memory only, and gone with their last descriptor (memfd_create(2))."""

import os


def memory_file(name: str, content: bytes) -> int:
    """Make a file.

    Args:
        name: what ``/proc/PID/fd`` shows for it.
        content: what is in it.

    Returns:
        The descriptor, behind the last byte, and closed on execve(2) unless that is changed.

    Raises:
        OSError: there are too few descriptors, or too little memory; nothing is left open.
    """
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        with os.fdopen(fd, "wb", closefd=False) as file:
            file.write(content)
    except OSError:
        os.close(fd)
        raise
    return fd
