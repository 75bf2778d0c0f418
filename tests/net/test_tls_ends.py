"""How a TLS stream ends: by a close_notify, or by less than that."""

import socket

import pytest

from lpechod.net.entrance import Entrance
from lpechod.wire.settings import EchoSettings
from lpechod.wire.states import State
from tests.net.conftest import Serve
from tests.net.harness import (
    SECURED,
    EchoServer,
    TlsClient,
    assert_same,
    body_of,
    frame,
)
from tests.net.tlsclient import RECORD_BYTES
from tests.net.tlswire import NARROW, has_fin, meet, seal, seal_notice, skip, stuff

BODY = body_of(1000)


@pytest.fixture(name="entrance")
def _entrance() -> Entrance:
    return SECURED


@pytest.fixture(name="poller_name")
def _poller_name() -> str:
    return "epoll"


def state_of(server: EchoServer, client: TlsClient) -> State:
    """Return where the connection of a client stands."""
    return server.connection_of(client).protocol.state


def crowded(server: EchoServer, size: int = 1 << 20) -> TlsClient:
    """Connect a client that sends so many bytes and reads none of the echoes that are in flight."""
    client = meet(server, NARROW)
    stream = memoryview(frame(body_of(size - 4)))
    while stream:
        stream = stream[client.send_some(stream[:RECORD_BYTES]) :]
        server.turn()
    server.turn_until(client.flush, "sent", [client.socket])
    server.settle()
    assert server.connection_of(client).protocol.unsent_bytes > size // 2
    return client


class TestNoticeOfThePeer:
    """A close_notify of the peer's ends its direction as a FIN does."""

    def test_answered(self, serve: Serve) -> None:
        """A close_notify without a FIN is answered with a close_notify, and a FIN behind it."""
        server = serve()
        client = meet(server)
        client.exchange(frame(BODY))
        client.take_leave()
        client.expect_eof()
        assert not client.cut
        server.turn_until(lambda: has_fin(client), "FIN", [client.socket])
        server.assert_quiet()
        client.socket.close()
        line = server.closed(client)
        assert (line["reason"], line["frames"]) == ("peer_closed", 1)

    @pytest.mark.parametrize("last", [1000, RECORD_BYTES - 4])
    def test_in_the_burst_of_its_frames(self, serve: Serve, last: int) -> None:
        """Frames in front of a close_notify that comes with them are echoed."""
        server = serve()
        client = meet(server)
        stream = frame(body_of(RECORD_BYTES - 4)) * 2 + frame(body_of(last))
        records = [seal(client, stream[at : at + RECORD_BYTES]) for at in (0, 16384, 32768)]
        client.socket.send(b"".join(records) + seal_notice(client))
        assert_same(stream, client.receive_to_end())
        assert not client.cut
        client.socket.close()
        assert server.closed(client)["reason"] == "peer_closed"

    def test_inside_a_frame(self, serve: Serve) -> None:
        """A close_notify inside a frame cuts that, and what was whole is echoed."""
        server = serve()
        client = meet(server)
        client.socket.send(seal(client, frame(BODY) + frame(BODY)[:9]) + seal_notice(client))
        assert_same(frame(BODY), client.receive_to_end())
        assert not client.cut
        client.socket.close()
        assert server.closed(client)["reason"] == "truncated_frame"

    def test_behind_echoes_in_flight(self, serve: Serve) -> None:
        """The echoes that wait for a slow reader come first, however small the buffers."""
        server = serve(buffers=NARROW)
        client = crowded(server)
        client.take_leave()
        server.settle()
        server.assert_quiet()
        assert_same(frame(body_of((1 << 20) - 4)), client.receive_to_end())
        assert not client.cut
        client.socket.close()
        assert server.closed(client)["reason"] == "peer_closed"

    def test_data_behind_it(self, serve: Serve) -> None:
        """What comes behind a close_notify is dropped, and destroys no echo on its way."""
        server = serve()
        client = meet(server)
        client.socket.send(seal(client, frame(BODY)) + seal_notice(client) + bytes(50_000))
        server.settle()
        client.socket.send(bytes(1000))
        server.settle()
        assert_same(frame(BODY), client.receive_to_end())
        assert not client.cut
        client.socket.close()
        line = server.closed(client)
        assert (line["reason"], line["received_bytes"]) == ("peer_closed", 1004)

    def test_never_followed_by_a_fin(self, serve: Serve) -> None:
        """Who leaves its socket open after a close_notify is not waited for beyond the linger."""
        server = serve()
        client = meet(server)
        client.take_leave()
        server.pass_time(2.2)
        assert server.closed(client)["reason"] == "peer_closed"
        client.expect_eof()


class TestNoticeOfOurs:
    """Each end by us is a close_notify, behind the last echo and in front of the FIN."""

    @pytest.mark.parametrize(
        ("reason", "echo"),
        [
            ("idle_timeout", EchoSettings(idle_s=5.0)),
            ("frame_timeout", EchoSettings(frame_s=5.0)),
            ("lifetime", EchoSettings(lifetime_s=5.0)),
            ("frame_too_large", EchoSettings()),
            ("drained", EchoSettings()),
        ],
    )
    def test_before_the_fin(self, serve: Serve, reason: str, echo: EchoSettings) -> None:
        """A peer sees that nothing was cut off, whatever we end the connection for."""
        server = serve(echo=echo)
        client = meet(server)
        client.exchange(frame(BODY))
        if reason == "frame_too_large":
            client.send(frame(BODY) + b"\xff\xff\xff\xff")
        elif reason == "frame_timeout":
            client.send(frame(BODY) + frame(BODY)[:9])
        else:
            client.send(frame(BODY))
        if reason == "drained":
            server.settle()
            server.pass_time(1.0)
            server.service.drain(server.clock.now + 30)
        server.pass_time(7.0 if reason != "drained" else 0.5)
        assert_same(frame(BODY), client.receive_to_end())
        assert not client.cut
        server.turn_until(lambda: has_fin(client), "FIN", [client.socket])
        client.close()
        assert server.closed(client)["reason"] == reason

    def test_waits_for_room(self, serve: Serve) -> None:
        """With a full kernel, the close_notify comes behind the last echo, and is not lost."""
        server = serve(buffers=NARROW)
        client = crowded(server)
        server.pass_time(1.0)
        server.service.drain(server.clock.now + 30)
        server.pass_time(1.0)
        server.assert_quiet()
        assert state_of(server, client) is State.DRAINING
        assert_same(frame(body_of((1 << 20) - 4)), client.receive_to_end())
        assert not client.cut
        client.close()
        assert server.closed(client)["reason"] == "drained"

    def test_never_room(self, serve: Serve) -> None:
        """Who takes neither the echoes nor the close_notify is closed when it is late."""
        server = serve(buffers=NARROW, echo=EchoSettings(high_watermark_bytes=4 << 20))
        client = crowded(server)
        client.take_leave()
        server.settle()
        begun = server.clock.now
        assert state_of(server, client) is State.FLUSHING
        server.pass_time(29.0)
        assert state_of(server, client) is State.FLUSHING
        # Once or twice, the kernel finds room for some bytes by itself, and time begins anew.
        while state_of(server, client) is State.FLUSHING and server.clock.now < begun + 100.0:
            server.pass_time(1.0)
        server.pass_time(2.4)
        assert server.closed(client)["reason"] == "peer_closed"
        assert server.tally.unsent_bytes > 0

    @pytest.mark.parametrize("reads", [True, False])
    def test_no_room_for_itself(self, serve: Serve, *, reads: bool) -> None:
        """A close_notify that finds no room goes out when there is some, or with `write`, never."""
        server = serve(buffers=NARROW)
        client = meet(server, NARROW)
        client.exchange(frame(BODY))
        size = stuff(server, client)
        client.socket.send(seal(client, b"\xff\xff\xff\xff"))
        size += stuff(server, client)  # The kernel may have found room for a few bytes more.
        server.settle()
        assert state_of(server, client) is State.FLUSHING
        server.assert_quiet()
        server.pass_time(29.0)
        assert state_of(server, client) is State.FLUSHING
        if reads:
            skip(server, client, size)
            client.expect_eof()
            assert not client.cut
            assert state_of(server, client) is State.LINGERING
            client.close()
        else:
            server.pass_time(1.4)
            assert state_of(server, client) is State.LINGERING
            server.pass_time(2.0)
        assert server.closed(client)["reason"] == "frame_too_large"


class TestLess:
    """An end without a close_notify is told from one with it."""

    @pytest.mark.parametrize(
        ("tail", "reason"),
        [(b"", "missing_close_notify"), (frame(BODY)[:9], "truncated_frame")],
    )
    def test_fin(self, serve: Serve, tail: bytes, reason: str) -> None:
        """A FIN in the place of a close_notify is a reason of its own, and no line of a failure."""
        server = serve()
        client = meet(server)
        client.exchange(frame(BODY))
        client.send(tail)
        server.settle()
        client.socket.shutdown(socket.SHUT_WR)
        server.turn_until(lambda: has_fin(client), "FIN", [client.socket])
        server.assert_quiet()
        assert server.closed(client)["reason"] == reason
        assert not server.log.of("tls_failed")

    def test_fin_right_behind_a_frame(self, serve: Serve) -> None:
        """An echo that went out before such a FIN was read is delivered."""
        server = serve()
        client = meet(server)
        client.socket.send(seal(client, frame(BODY)))
        client.socket.shutdown(socket.SHUT_WR)
        assert_same(frame(BODY), client.receive_to_end())
        assert client.cut
        assert server.closed(client)["reason"] == "missing_close_notify"

    def test_fin_in_the_read_of_a_frame(self, serve: Serve) -> None:
        """A frame that was read together with such a FIN is echoed, too."""
        server = serve()
        client = meet(server)
        piece = frame(body_of(RECORD_BYTES - 4))
        client.socket.send(seal(client, piece))
        client.socket.shutdown(socket.SHUT_WR)
        assert_same(piece, client.receive_to_end())
        line = server.closed(client)
        assert (line["reason"], line["sent_bytes"]) == ("missing_close_notify", len(piece))

    def test_inside_a_record(self, serve: Serve) -> None:
        """A FIN inside a record is the same."""
        server = serve()
        client = meet(server)
        client.exchange(frame(BODY))
        client.socket.send(seal(client, frame(BODY))[:20])
        server.settle()
        client.socket.shutdown(socket.SHUT_WR)
        assert server.closed(client)["reason"] == "missing_close_notify"

    def test_reset(self, serve: Serve) -> None:
        """A reset is a reset."""
        server = serve()
        client = meet(server)
        client.exchange(frame(BODY))
        client.reset()
        assert server.closed(client)["reason"] == "reset"
        assert not server.log.of("tls_failed")
