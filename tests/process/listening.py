"""Listening sockets, for the tests of who has them."""

import socket
import struct

from lpechod.net.address import parse_address
from lpechod.process.sockets import ECHO, METRICS, Sockets, Wanted
from lpechod.process.systemd import Inherited

_TCP_INFO_BACKLOG = 28
"""Offset of ``tcpi_sacked``, which is the backlog of a listening socket (tcp_diag of Linux)."""


def want(*addresses: str, purpose: str = ECHO, backlog: int = 16) -> list[Wanted]:
    """Want addresses."""
    return [Wanted(parse_address(address), backlog, purpose) for address in addresses]


def listening(address: str) -> socket.socket:
    """Listen as somebody else would."""
    if address.startswith("unix:"):
        made = socket.socket(socket.AF_UNIX)
        made.bind(address.removeprefix("unix:"))
        made.listen()
        return made
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, int(port)), family=family)


def name_of(made: socket.socket) -> str:
    """Return the address of a socket as a configuration has it."""
    bound = made.getsockname()
    if isinstance(bound, str):
        return f"unix:{bound}"
    return f"[{bound[0]}]:{bound[1]}" if ":" in bound[0] else f"{bound[0]}:{bound[1]}"


def passed(made: socket.socket, name: str = "unit") -> Inherited:
    """Give a socket away."""
    return Inherited(name, made.detach())


def backlog_of(made: socket.socket) -> int:
    """Return how many connections may wait in a queue."""
    info = made.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    backlog: int = struct.unpack_from("I", info, _TCP_INFO_BACKLOG)[0]
    return backlog


def close(sockets: Sockets) -> None:
    """Close all."""
    sockets.close(ECHO)
    sockets.close(METRICS)
