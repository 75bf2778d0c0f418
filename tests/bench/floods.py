"""Hostile clients of an echo server for the processes of a `Crew`.

Each goes on until it is stopped, and reports how much it did.
"""

import contextlib
import selectors
import socket
import ssl
import struct
from dataclasses import dataclass

from tests.bench.clients import Address, Stream, client_context, connect
from tests.bench.crew import Signals

_RESET = struct.pack("ii", 1, 0)
_CHECK_SECONDS = 0.05
_CONNECT_SECONDS = 1.0
_PIPELINED = (struct.pack(">I", 65536) + bytes(65536)) * 4


def _reset(stream: Stream) -> None:
    """Close with a reset: there is no TIME_WAIT then, and ports don't run out."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    stream.close()


@dataclass(frozen=True, slots=True)
class Spinning:
    """No flood at all: computes. Shows what it means that floods use the healthy clients' CPU."""

    def run(self, signals: Signals) -> int:
        """Count."""
        signals.ready()
        count = 0
        while not signals.over:
            count += 1
        return count


@dataclass(frozen=True, slots=True)
class Connects:
    """Connects and closes."""

    address: Address

    def run(self, signals: Signals) -> int:
        """Return how many connections were made."""
        signals.ready()
        count = 0
        while not signals.over:
            with contextlib.suppress(OSError):
                _reset(socket.create_connection(self.address, _CONNECT_SECONDS))
                count += 1
        return count


@dataclass(frozen=True, slots=True)
class Handshakes:
    """Shakes hands and closes."""

    address: Address

    def run(self, signals: Signals) -> int:
        """Return how many handshakes were made."""
        context = client_context()
        signals.ready()
        count = 0
        while not signals.over:
            with contextlib.suppress(OSError):
                connect(self.address, context).close()
                count += 1
        return count


@dataclass(frozen=True, slots=True)
class Hellos:
    """Sends the same ClientHello each time, and closes when it is answered.

    That costs a client nearly nothing, and the server its part of a handshake: a signature.
    """

    address: Address

    def run(self, signals: Signals) -> int:
        """Return how many were answered."""
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        with contextlib.suppress(ssl.SSLWantReadError):
            client_context().wrap_bio(incoming, outgoing).do_handshake()
        hello = outgoing.read()
        signals.ready()
        count = 0
        while not signals.over:
            with contextlib.suppress(OSError):
                client = socket.create_connection(self.address, _CONNECT_SECONDS)
                client.sendall(hello)
                count += bool(client.recv(1))
                _reset(client)
        return count


@dataclass(frozen=True, slots=True)
class Silence:
    """Fills places with connections on which nothing is sent, and again when they are closed."""

    address: Address
    connections: int

    def run(self, signals: Signals) -> int:
        """Return how many connections there are at the end."""
        signals.ready()
        with selectors.DefaultSelector() as selector:
            while not signals.over:
                for _ in range(self.connections - len(selector.get_map())):
                    with contextlib.suppress(OSError):
                        client = socket.create_connection(self.address, _CONNECT_SECONDS)
                        selector.register(client, selectors.EVENT_READ)
                for key, _ in selector.select(_CHECK_SECONDS):
                    assert isinstance(key.fileobj, socket.socket)
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
            held = [key.fileobj for key in selector.get_map().values()]
        for each in held:
            assert isinstance(each, socket.socket)
            _reset(each)
        return len(held)


@dataclass(frozen=True, slots=True)
class Unread:
    """Pipelines frames and never reads an echo."""

    address: Address
    tls: bool
    connections: int
    window_bytes: int = 0
    """What the kernel may receive for each; 0: as much as it likes."""

    def run(self, signals: Signals) -> int:
        """Return how many connections there are at the end."""
        context = client_context() if self.tls else None
        signals.ready()
        with selectors.DefaultSelector() as selector:
            for _ in range(self.connections):
                stream = connect(self.address, context, self.window_bytes)
                stream.setblocking(False)
                selector.register(stream, selectors.EVENT_WRITE, [0])
            while not signals.over:
                for key, _ in selector.select(_CHECK_SECONDS):
                    assert isinstance(key.fileobj, socket.socket)
                    if not _pipeline(key.fileobj, key.data):
                        selector.unregister(key.fileobj)
                        key.fileobj.close()
            held = [key.fileobj for key in selector.get_map().values()]
        for each in held:
            assert isinstance(each, socket.socket)
            _reset(each)
        return len(held)


def _pipeline(stream: Stream, position: list[int]) -> bool:
    """Send a piece, and tell whether the connection is still there."""
    try:
        sent = stream.send(memoryview(_PIPELINED)[position[0] :])
    except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
        return True
    except OSError:
        return False
    position[0] = (position[0] + sent) % len(_PIPELINED)
    return True
