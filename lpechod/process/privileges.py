"""The privileges of the daemon: it needs none, gains none, and lets its workers have none.

Who starts it as root, as people do in containers, gets a warning and a daemon. What a service
manager does better (users, namespaces, system calls) is left to it; see the unit.

By system calls through libc: Python has neither prctl(2) nor capset(2). Where they are missing,
outside of Linux, nothing is done.
"""

import ctypes
import os
import re
import sys
from pathlib import Path

from lpechod.net.eventlog import EventLog

_PR_SET_NO_NEW_PRIVS = 38
_CAPABILITY_VERSION_3 = 0x2008_0522  # capget(2)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    """Two of these hold the sets, as each field has 32 bits."""

    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def forgo_new_privileges(log: EventLog) -> None:
    """See to it that no program executed from now on has more privileges than this one.

    Args:
        log: gets a warning if this is root.
    """
    if os.geteuid() == 0:
        log.warning("running_as_root", hint="no root is needed; set User= or start it as a user")
    if sys.platform == "linux":
        _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def drop_capabilities(log: EventLog) -> None:
    """Give up every capability of this process: what root may do, but for owning files.

    With `forgo_new_privileges` before it, nothing brings one back (capabilities(7)).

    Args:
        log: gets a warning if that is not possible.
    """
    if sys.platform != "linux" or not _has_capabilities():
        return
    try:
        _call("capset", ctypes.byref(_Header(_CAPABILITY_VERSION_3, 0)), (_Sets * 2)())
    except OSError as error:
        # A filter of system calls, such as our unit's, may refuse even to give them up.
        log.warning("capabilities_kept", problem=str(error))


def _has_capabilities() -> bool:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # A root directory without /proc.
        return True
    return any(
        int(bits, 16) for bits in re.findall(r"^Cap(?:Prm|Eff|Inh):\t(\w+)", status, re.MULTILINE)
    )


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
