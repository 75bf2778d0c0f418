"""A network of this process's own, so that nothing else's packets or ports are in a measurement."""

import ctypes
import fcntl
import os
import socket
import struct
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_IFF_UP = 1
_IFREQ = struct.Struct("16sH14x")
_CUBIC = Path("/proc/sys/net/ipv4/tcp_congestion_control")


def enter_own_network() -> None:
    """Move this process, and all that it starts from now on, into a network namespace of its own.

    It has a loopback, and cubic congestion control: a default of bbr paces what is sent. To be
    called while there is one thread, since unshare(2) moves no other. Takes root; without, the
    machine's network is used, and that is said.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        print(f"in the machine's network: {os.strerror(ctypes.get_errno())}")
        return
    with socket.socket() as any_socket:
        found = fcntl.ioctl(any_socket, _SIOCGIFFLAGS, _IFREQ.pack(b"lo", 0))
        name, flags = _IFREQ.unpack(found)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, _IFREQ.pack(name, flags | _IFF_UP))
    _CUBIC.write_text("cubic")


def tcp_counters(*names: str) -> list[int]:
    """Return counters of TCP in this network by their names in ``/proc/net/snmp`` and ``netstat``.

    Raises:
        KeyError: the kernel has no such counter.
    """
    counters: dict[str, int] = {}
    for table in ("snmp", "netstat"):
        lines = Path(f"/proc/net/{table}").read_text().splitlines()
        for heads, values in zip(lines[::2], lines[1::2], strict=True):
            if heads.startswith(("Tcp:", "TcpExt:")):
                numbers = map(int, values.split()[1:])
                counters |= dict(zip(heads.split()[1:], numbers, strict=True))
    return [counters[name] for name in names]
