"""Listeners on link-local addresses, of which each interface may have the same one (RFC 4007)."""

import os
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
listeners = open_listeners(ListenerSettings(address) for address in addresses)
print(*(listener.name for listener in listeners))
print(*(serves(listener.socket, address) for listener in listeners for address in addresses))
"""

SETUP = """
set -e
ip link add one type veth peer name two
for interface in one two; do
    ip link set "$interface" up
    ip address flush dev "$interface" scope link
    ip address add fe80::1/64 dev "$interface" nodad
done
exec "$@"
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for interfaces of its own")
@pytest.mark.skipif(shutil.which("ip") is None, reason="needs iproute2")
def test_the_same_address_on_two_interfaces() -> None:
    """They are two listeners with two names, and neither is taken for the other."""
    before = descriptors()
    command = ["unshare", "--net", "sh", "-c", SETUP, "sh", sys.executable, "-c", INSIDE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "[fe80::1%one]:9000 [fe80::1%two]:9000",
        "True False False True",
    ]
    assert before == descriptors()
