"""Real descriptors for the tests of the engine, closed when a test ends."""

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from lpechod.engine.poller import READABLE
from tests.engine.stage import Actor, Stage

SocketPair = tuple[socket.socket, socket.socket]
Pairs = Callable[[], SocketPair]


@pytest.fixture(name="stack")
def _stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(name="unix_pair")
def _unix_pair(stack: ExitStack) -> Pairs:
    """Make pairs of connected, non-blocking UNIX sockets."""

    def make() -> SocketPair:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            stack.callback(end.close)
            end.setblocking(False)
        return ours, theirs

    return make


@pytest.fixture(name="tcp_pair")
def _tcp_pair(stack: ExitStack) -> Pairs:
    """Make pairs of connected, non-blocking TCP sockets."""

    def make() -> SocketPair:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            theirs = socket.create_connection(listener.getsockname())
            ours, _ = listener.accept()
        for end in (ours, theirs):
            stack.callback(end.close)
            end.setblocking(False)
        return ours, theirs

    return make


@pytest.fixture(name="reset")
def _reset() -> Callable[[socket.socket], None]:
    """Close a TCP socket with a reset instead of an end of file."""

    def reset(end: socket.socket) -> None:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end.close()

    return reset


@pytest.fixture(name="fill")
def _fill() -> Callable[[socket.socket], int]:
    """Send until the kernel refuses, and say how many bytes it took."""

    def fill(end: socket.socket) -> int:
        sent = 0
        while True:
            try:
                sent += end.send(b"x" * 65536)
            except BlockingIOError:
                return sent

    return fill


@pytest.fixture(name="stage")
def _stage() -> Iterator[Stage]:
    stage = Stage()
    yield stage
    stage.close()


@pytest.fixture(name="ready")
def _ready(stage: Stage, unix_pair: Pairs) -> Callable[..., Actor]:
    """Make sources whose descriptor is readable, registered in the order of the calls."""

    def make(name: str, act: Callable[[float], object] = lambda _now: None) -> Actor:
        ours, theirs = unix_pair()
        theirs.send(b"frame")
        actor = Actor(stage, name, act, ours)
        stage.loop.register(ours.fileno(), actor, READABLE)
        return actor

    return make
