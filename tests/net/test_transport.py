"""The plain transport: three answers, from real sockets, and which errors are which."""

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from lpechod.net.transport import BLOCKED, PEER_GONE, PeerGoneError, PlainTransport

Pair = tuple[PlainTransport, socket.socket]

OTHER_ERRORS = [errno.EBADF, errno.EINVAL, errno.EIO, errno.ENOMEM, errno.EFAULT]


@pytest.fixture(name="pair", params=["unix", "tcp"])
def _pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Return a transport and the socket of its peer."""
    if request.param == "unix":
        ours, theirs = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            theirs = socket.create_connection(listener.getsockname())
            ours, _ = listener.accept()
    transport = PlainTransport(ours.detach())
    yield transport, theirs
    if transport.fd >= 0:
        transport.close()
    theirs.close()


@pytest.fixture(name="buffer")
def _buffer() -> memoryview:
    return memoryview(bytearray(64))


def fill(transport: PlainTransport) -> int:
    """Send until the kernel takes nothing, and return how much it took."""
    total = 0
    while count := transport.send(memoryview(bytes(1 << 20))):
        total += count
    return total


class TestReceive:
    """What a read may answer."""

    def test_bytes(self, pair: Pair, buffer: memoryview) -> None:
        """What has arrived is put into the buffer, up to its size."""
        transport, peer = pair
        peer.send(b"x" * 60 + b"frame")

        assert transport.receive(buffer) == 64
        assert bytes(buffer[60:]) == b"fram"
        assert transport.receive(buffer) == 1
        assert bytes(buffer[:1]) == b"e"

    def test_how_much(self, pair: Pair, buffer: memoryview) -> None:
        """How many bytes wait is known, however many that are."""
        transport, peer = pair
        assert transport.waiting() == 0
        peer.send(b"x" * 1000)
        assert transport.waiting() == 1000
        transport.receive(buffer)
        assert transport.waiting() == 936
        peer.close()
        assert transport.waiting() == 936

    def test_nothing_yet(self, pair: Pair, buffer: memoryview) -> None:
        """An empty socket does not block."""
        transport, _ = pair

        assert transport.receive(buffer) == BLOCKED

    def test_end_of_file(self, pair: Pair, buffer: memoryview) -> None:
        """The end of the stream is a count of nothing, again and again."""
        transport, peer = pair
        peer.send(b"last")
        peer.shutdown(socket.SHUT_WR)

        assert [transport.receive(buffer) for _ in range(3)] == [4, 0, 0]

    def test_reset(self, pair: Pair, buffer: memoryview) -> None:
        """A reset is no error of ours."""
        transport, peer = pair
        transport.send(memoryview(b"never read"))
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()

        with pytest.raises(PeerGoneError, match="reset"):
            transport.receive(buffer)


class TestSend:
    """What a write may answer."""

    def test_bytes(self, pair: Pair) -> None:
        """What the kernel takes is counted, and arrives."""
        transport, peer = pair

        assert transport.send(memoryview(b"echo")) == 4
        assert peer.recv(64) == b"echo"

    def test_full(self, pair: Pair) -> None:
        """A kernel that takes nothing is a count of nothing, for one buffer and for several."""
        transport, _ = pair
        assert fill(transport) > 0

        assert transport.send(memoryview(b"echo")) == 0
        assert transport.send_many([memoryview(b"echo")] * 2) == 0

    def test_several_buffers(self, pair: Pair) -> None:
        """Several buffers leave in order with one call."""
        transport, peer = pair

        assert transport.send_many([memoryview(b"one"), memoryview(b""), memoryview(b"two")]) == 6
        assert peer.recv(64) == b"onetwo"

    def test_several_buffers_in_part(self, pair: Pair) -> None:
        """A short count of several buffers is a short count of their concatenation."""
        transport, peer = pair
        size = fill(transport)
        received = 0
        while received < size // 2:
            received += len(peer.recv(1 << 16))
        views = [memoryview(bytes([number]) * 100_000) for number in range(200)]
        sent = transport.send_many(views)
        assert 0 < sent < 200 * 100_000
        transport.close()
        tail = b""
        while part := peer.recv(1 << 20):
            received += len(part)
            tail = (tail + part)[-(size + sent) :]

        assert received == size + sent
        assert tail.endswith(b"".join(views)[:sent])

    def test_peer_is_gone(self, pair: Pair) -> None:
        """A peer that has gone shows when something is sent to it, as no error of ours."""
        transport, peer = pair
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
        with pytest.raises(PeerGoneError):
            transport.send(memoryview(b"echo"))

        with pytest.raises(PeerGoneError, match="Broken pipe"):
            transport.send_many([memoryview(b"echo")])


class TestEnd:
    """Ending our direction, and closing."""

    def test_behind_all_that_was_sent(self, pair: Pair) -> None:
        """The peer reads everything, then the end; the other direction goes on."""
        transport, peer = pair
        transport.send(memoryview(b"echo"))
        transport.end()
        assert peer.recv(64) == b"echo"
        assert peer.recv(64) == b""
        peer.send(b"late")

        assert transport.receive(memoryview(bytearray(64))) == 4

    def test_of_a_connection_that_is_gone(self, pair: Pair) -> None:
        """There is nothing to end, and nothing to complain of."""
        transport, peer = pair
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        peer.close()
        transport.end()
        transport.end()

    def test_of_a_closed_descriptor(self, pair: Pair) -> None:
        """A descriptor that is no socket of ours any more is a defect, and passes."""
        transport, _ = pair
        transport.close()

        with pytest.raises(ValueError, match="descriptor"):
            transport.end()

    def test_close(self, pair: Pair) -> None:
        """Closing gives the descriptor back, and the peer sees the end."""
        transport, peer = pair
        fd = transport.fd
        transport.close()
        assert peer.recv(64) == b""
        assert transport.fd == -1

        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)

    def test_never_blocks(self, pair: Pair) -> None:
        """The socket is made non-blocking, whatever it was before."""
        transport, _ = pair

        assert not os.get_blocking(transport.fd)


CALLS: dict[str, tuple[str, Callable[[PlainTransport], object]]] = {
    "receive": ("readv", lambda transport: transport.receive(memoryview(bytearray(8)))),
    "send": ("write", lambda transport: transport.send(memoryview(b"echo"))),
    "send_many": ("writev", lambda transport: transport.send_many([memoryview(b"echo")])),
}


@pytest.mark.parametrize("call", CALLS)
class TestErrors:
    """Errors are sorted by whose fault they are; the system calls fail on demand."""

    def fail(
        self, monkeypatch: pytest.MonkeyPatch, call: str, number: int, transport: PlainTransport
    ) -> None:
        """Make a call on a kernel that answers with an errno."""
        name, act = CALLS[call]

        def answer(_fd: int, _data: object) -> int:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, name, answer)
            act(transport)

    def test_of_the_network(self, monkeypatch: pytest.MonkeyPatch, call: str, pair: Pair) -> None:
        """Every way in which a connection or its network ends is the same answer."""
        for number in PEER_GONE:
            with pytest.raises(PeerGoneError, match=os.strerror(number)) as caught:
                self.fail(monkeypatch, call, number, pair[0])
            assert isinstance(caught.value.__cause__, OSError)

    @pytest.mark.parametrize("number", OTHER_ERRORS, ids=errno.errorcode.get)
    def test_of_ours(
        self, monkeypatch: pytest.MonkeyPatch, call: str, number: int, pair: Pair
    ) -> None:
        """What no peer can cause is not hidden."""
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is compared.
            self.fail(monkeypatch, call, number, pair[0])
        assert caught.value.errno == number


@pytest.mark.parametrize(
    "number",
    [
        errno.ECONNRESET,
        errno.EPIPE,
        errno.ETIMEDOUT,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EPERM,
        errno.EACCES,
        errno.ECONNREFUSED,
        errno.EPROTO,
    ],
    ids=errno.errorcode.get,
)
def test_what_ends_a_connection(number: int) -> None:
    """Resets, time-outs, and what routers and firewalls answer are no defects of ours."""
    assert number in PEER_GONE
