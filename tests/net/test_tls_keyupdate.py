"""A key update that has to be answered while nothing can be sent, by OpenSSL's own client."""

import os
import select
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress

import pytest

from lpechod.net.entrance import Entrance
from lpechod.wire.settings import EchoSettings
from lpechod.wire.states import State
from tests.net.conftest import Serve
from tests.net.harness import SECURED, Client, EchoServer, KernelBuffers, assert_same, frame
from tests.net.tlswire import NARROW

BODY = b"\x01" * 5000
"""No byte of it is a command of the client's."""


@pytest.fixture(name="entrance")
def _entrance() -> Entrance:
    return SECURED


@pytest.fixture(name="poller_name", params=["epoll", "epoll-et"])
def _poller_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Relay(Client):
    """Passes bytes between ``openssl s_client`` and a server, as far as it is open.

    Attributes:
        holds: whether bytes of the server's are left where they are.
    """

    def __init__(self, server: EchoServer) -> None:
        program = shutil.which("openssl")
        assert program, "openssl is needed"
        self.far = socket.socket()
        NARROW.apply(self.far)
        self.far.connect(server.listeners[0].socket.getsockname())
        super().__init__(server, self.far)
        server.clients.append(self)
        self.holds = False
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
            self.process = subprocess.Popen(
                [program, "s_client", "-connect", f"127.0.0.1:{port}", "-tls1_3"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            self.near, _ = listening.accept()
        assert self.process.stdout is not None
        assert self.process.stdin is not None
        self.stdin, self.stdout = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.stdout, False)
        self.output = b""
        self.parts = {self.near: b"", self.far: b""}
        for end in self.parts:
            end.setblocking(False)

    def move(self) -> None:
        """Pass on what there is, either way, and read what the client prints."""
        for source, sink in ((self.near, self.far), (self.far, self.near)):
            with suppress(BlockingIOError):
                if not self.parts[sink] and not (source is self.far and self.holds):
                    self.parts[sink] = source.recv(4096)
                if self.parts[sink]:
                    self.parts[sink] = self.parts[sink][sink.send(self.parts[sink]) :]
        with suppress(BlockingIOError):
            self.output += os.read(self.stdout, 1 << 16)

    def until(self, done: Callable[[], bool], what: str) -> None:
        """Turn server and relay until something has come true."""

        def moved() -> bool:
            self.move()
            return done()

        waiting = [self.near] if self.holds else [self.near, self.far]
        self.server.turn_until(moved, what, waiting)

    def type(self, data: bytes) -> None:
        """Have the client send something, and see the server receive it, or the kernel full."""
        rest = memoryview(data)
        while rest:
            if select.select((), (self.stdin,), (), 0)[1]:
                rest = rest[os.write(self.stdin, rest[:4096]) :]
            self.server.turn()
            self.move()

    def close(self) -> None:
        """End the client."""
        self.process.kill()
        self.process.communicate()
        self.near.close()
        self.far.close()


@pytest.fixture(name="relay")
def _relay(serve: Serve) -> Iterator[Relay]:
    settings = EchoSettings(high_watermark_bytes=64 << 20)
    relay = Relay(serve(echo=settings, buffers=KernelBuffers(send=8192, receive=8192)))
    relay.until(lambda: b"Verify return code" in relay.output, "hands shaken")
    yield relay
    relay.close()


@pytest.mark.parametrize("updates", [1, 2, 3])
def test_a_key_update_while_nothing_can_be_sent(relay: Relay, updates: int) -> None:
    """Key updates that arrive with a full kernel end nothing, and turn no loop."""
    server = relay.server
    (connection,) = server.service.connections
    relay.until(lambda: connection.protocol.state is State.OPEN, "open")
    relay.holds = True
    expected = b""

    def type_frame() -> None:
        nonlocal expected
        expected += frame(BODY)
        relay.type(frame(BODY))
        size = len(expected)
        relay.until(lambda: server.tally.received_bytes == size, f"{size} received")

    while not connection.protocol.unsent_bytes:
        assert len(expected) < 1 << 20, "always room for echoes"
        type_frame()
    for _ in range(10):
        type_frame()
    for _ in range(updates):
        relay.output = b""
        relay.type(b"K\n")
        relay.until(lambda: b"KEYUPDATE" in relay.output, "key update sent")
        server.assert_quiet()
    expected += frame(BODY)  # What is behind one waits with it.
    relay.type(frame(BODY))
    server.assert_quiet()
    assert connection.protocol.unsent_bytes > 10 * len(BODY)
    relay.holds = False
    relay.output = b""
    relay.until(lambda: len(relay.output) >= len(expected), "echoes")
    assert_same(expected, relay.output)
    type_frame()
    relay.until(lambda: len(relay.output) >= len(expected), "echo")
    assert_same(expected, relay.output)
    server.assert_quiet()
