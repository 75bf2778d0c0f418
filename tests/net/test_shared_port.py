"""Addresses that overlap, as while a reload goes from one to the other."""

from collections.abc import Iterator

import pytest

from lpechod.net.address import TcpAddress
from lpechod.net.listener import Listener, ListenError, ListenerSettings, open_listeners
from tests.system.daemon import EchoClient


@pytest.fixture(name="narrow")
def _narrow() -> Iterator[Listener]:
    (listener,) = open_listeners([ListenerSettings(TcpAddress("127.0.0.1", 0))])
    yield listener
    listener.close()


def port_of(listener: Listener) -> int:
    """Return the port of a listener."""
    port: int = listener.socket.getsockname()[1]
    return port


def widen(port: int, host: str | None, *shared_ports: int) -> Listener:
    """Listen on a port of every interface."""
    settings = [ListenerSettings(TcpAddress(host, port))]
    (listener,) = open_listeners(settings, shared_ports)
    return listener


@pytest.mark.parametrize("host", ["0.0.0.0", "::", None])
def test_both_sides_have_to_agree(narrow: Listener, host: str | None) -> None:
    """An overlapping address is refused unless the one who has it and the one who asks share."""
    port = port_of(narrow)
    with pytest.raises(ListenError, match="in use"):
        widen(port, host, port)
    narrow.share_port(True)
    with pytest.raises(ListenError, match="in use"):
        widen(port, host)

    widen(port, host, port).close()


def test_sharing_ends(narrow: Listener) -> None:
    """When both listen and sharing is off again, a third one that does not share is refused."""
    port = port_of(narrow)
    narrow.share_port(True)
    wide = widen(port, None, port)
    narrow.share_port(False)
    for host in ("127.0.0.1", "0.0.0.0", None):
        with pytest.raises(ListenError, match="in use"):
            widen(port, host)
    wide.close()


def test_the_wider_one_takes_over(narrow: Listener) -> None:
    """Clients come to the more specific address while it is there, and then to the wider one."""
    port = port_of(narrow)
    narrow.share_port(True)
    wide = widen(port, None, port)
    with EchoClient(f"127.0.0.1:{port}"):
        accepted, _ = narrow.socket.accept()
        accepted.close()
    narrow.close()
    with EchoClient(f"127.0.0.1:{port}"):
        accepted, _ = wide.socket.accept()
        accepted.close()
    wide.close()
