"""Listeners on link-local addresses, of which each interface may have the same one (RFC 4007)."""

import shutil
import subprocess
import sys

import pytest

from tests.net.harness import descriptors

INSIDE = """
import socket
from lpechod.net.address import parse_address
from lpechod.net.listener import ListenerSettings, open_listeners, serves

addresses = [parse_address(f"[fe80::1%{interface}]:9000") for interface in ("one", "two")]
listeners = sum(open_listeners(ListenerSettings(address) for address in addresses), [])
indices = [socket.if_nametoindex(interface) for interface in ("one", "two")]
print(*(listener.name == f"[fe80::1%{index}]:9000" for listener, index in zip(listeners, indices)))
addresses.append(parse_address("[fe80::1]:9000"))
print(*(serves(listener.socket, address) for listener in listeners for address in addresses))
"""

PAIR = "ip link add one type veth peer name two"

SETUP = f"""
set -e
{PAIR}
for interface in one two; do
    ip link set "$interface" up
    ip address flush dev "$interface" scope link
    ip address add fe80::1/64 dev "$interface" nodad
done
exec "$@"
"""


def can_make_interfaces() -> bool:
    """Tell whether this process may have a network of its own, with interfaces."""
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "--net", "sh", "-c", PAIR]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_make_interfaces(), reason="needs root and iproute2, for interfaces")
def test_the_same_address_on_two_interfaces() -> None:
    """They are two listeners with two names, and neither is taken for the other."""
    before = descriptors()
    command = ["unshare", "--net", "sh", "-c", SETUP, "sh", sys.executable, "-c", INSIDE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.stderr == ""
    assert done.stdout.splitlines() == ["True True", "True False True False True True"]
    assert before == descriptors()
