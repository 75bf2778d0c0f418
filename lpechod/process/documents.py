"""Documents that cross execve(2), or go to another process, as a descriptor.

A JSON text in a memfd (memfd_create(2)): of any length, unlike a variable of the environment
(128 KiB, execve(2)) or a message (200 KiB), and gone with its last descriptor, unlike a file.
"""

import json
import os
from typing import Any

from lpechod.engine.memfile import memory_file


def write_document(document: dict[str, Any]) -> int:
    """Write a document.

    Returns:
        The descriptor, closed on execve(2) unless that is changed.

    Raises:
        OSError: as for `memory_file`.
    """
    return memory_file("lpechod-document", json.dumps(document).encode())


def read_document(fd: int) -> dict[str, Any]:
    """Read a document, and close its descriptor.

    Raises:
        OSError: the descriptor is not open.
        ValueError: it holds no JSON.
    """
    with os.fdopen(fd, "rb") as file:
        file.seek(0)
        document: dict[str, Any] = json.load(file)
    return document
