"""Addresses that overlap, as while a reload goes from one to the other."""

import socket
from collections.abc import Iterator

import pytest

from lpechod.net.address import TcpAddress
from lpechod.net.listener import Listener, ListenError, ListenerSettings, open_listeners
from tests.system.daemon import EchoClient


@pytest.fixture(name="narrow")
def _narrow() -> Iterator[Listener]:
    ((listener,),) = open_listeners([ListenerSettings(TcpAddress("127.0.0.1", 0))])
    yield listener
    listener.close()


def port_of(listener: Listener) -> int:
    """Return the port of a listener."""
    port: int = listener.socket.getsockname()[1]
    return port


def widen(port: int, host: str | None, *shared_ports: int) -> Listener:
    """Listen on a port of every interface."""
    settings = [ListenerSettings(TcpAddress(host, port))]
    ((listener,),) = open_listeners(settings, shared_ports)
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


@pytest.fixture(name="wide")
def _wide(narrow: Listener) -> Iterator[Listener]:
    """Listen on every interface, beside the narrow one."""
    narrow.share_port(True)
    wide = widen(port_of(narrow), None, port_of(narrow))
    yield wide
    wide.close()


def test_who_withdraws_keeps_those_who_wait(narrow: Listener, wide: Listener) -> None:
    """A socket that is withdrawn gets no new client, and loses none that is in its queue."""
    address = f"127.0.0.1:{port_of(narrow)}"
    with EchoClient(address):
        narrow.withdraw()
        with EchoClient(address):
            for listener in (narrow, wide):
                accepted, _ = listener.socket.accept()
                accepted.close()


def test_none_listens_before_all_are_bound(monkeypatch: pytest.MonkeyPatch, wide: Listener) -> None:
    """While a name is looked up, the clients of a wider address come to whoever listens there."""
    port = port_of(wide)
    narrow = TcpAddress("127.0.0.2", port)
    served: list[str] = []
    real = socket.getaddrinfo

    def getaddrinfo(host: str, *arguments: object, **options: int) -> object:
        if host == "slow":
            with EchoClient(f"127.0.0.2:{port}"):
                accepted, _ = wide.socket.accept()
                accepted.close()
                served.append(host)
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return real(host, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    wide.share_port(True)
    settings = [ListenerSettings(each) for each in (narrow, TcpAddress("slow", 9))]
    with pytest.raises(ListenError, match="is the host name right"):
        open_listeners(settings, [port])
    assert served == ["slow"]
