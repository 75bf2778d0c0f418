"""Records that are none, on a connection that was in order before."""

import pytest

from lpechod.net.entrance import Entrance
from tests.net.conftest import Serve
from tests.net.harness import SECURED, assert_same, body_of, frame
from tests.net.tlsclient import RECORD_BYTES
from tests.net.tlswire import has_fin, meet, read_to_alert, seal


@pytest.fixture(name="entrance")
def _entrance() -> Entrance:
    return SECURED


@pytest.fixture(name="poller_name")
def _poller_name() -> str:
    return "epoll"


BODY = body_of(1000)


def flip(record: bytes) -> bytes:
    """Return a record with one bit of its ciphertext changed."""
    return record[:20] + bytes([record[20] ^ 1]) + record[21:]


class TestBroken:
    """A record that is none ends the connection with an alert."""

    @pytest.mark.parametrize("how", ["flipped bit", "garbage", "plaintext", "too long"])
    @pytest.mark.parametrize("size", [1000, 3 * RECORD_BYTES])
    def test_broken(self, serve: Serve, how: str, size: int) -> None:
        """Echoes that went out before it arrive, then an alert, and the log has one line."""
        server = serve()
        client = meet(server)
        stream = frame(body_of(size - 4))
        secret = b"s3cr3t bytes"
        for at in range(0, size, RECORD_BYTES):
            client.socket.send(seal(client, stream[at : at + RECORD_BYTES]))
        client.socket.send(
            {
                "flipped bit": flip(seal(client, secret)),
                "garbage": secret * 10,
                "plaintext": frame(secret * 10),
                "too long": b"\x17\x03\x03\xff\xff" + secret,
            }[how]
        )
        # Of a read that ends in such a record, nothing can be sent behind the alert.
        assert_same(stream if size < RECORD_BYTES else b"", read_to_alert(client))
        server.settle()
        server.assert_quiet()
        client.socket.close()
        assert server.closed(client)["reason"] == "tls_error"
        (line,) = server.log.of("tls_failed")
        assert line["reason"] == "tls_error"
        assert "s3cr3t" not in repr(line)
        assert secret.hex() not in repr(line)

    @pytest.mark.parametrize("how", ["flipped bit", "garbage"])
    def test_behind_a_part_of_a_frame(self, serve: Serve, how: str) -> None:
        """It is noticed at once also if it comes with a record after which there is no echo."""
        server = serve()
        client = meet(server)
        part = frame(body_of(3 * RECORD_BYTES))[:RECORD_BYTES]
        broken = flip(seal(client, part)) if how == "flipped bit" else b"s3cr3t " * 10
        client.socket.send(seal(client, part) + broken)
        server.settle()
        assert server.log.of("tls_failed")
        client.socket.close()
        assert server.closed(client)["reason"] == "tls_error"

    @pytest.mark.parametrize(
        "record", [b"\x17\x03\x03\xff\xff", b"\x17\x09\x09\0\x50", b"\0\0\0\0\0"]
    )
    def test_others_notice_nothing(self, serve: Serve, record: bytes) -> None:
        """What one has sent that OpenSSL did not even look at is not left for another."""
        server = serve()
        one, other = meet(server), meet(server)
        one.socket.send(record + bytes(100))
        server.settle()
        other.exchange(frame(BODY))
        newcomer = meet(server)
        newcomer.exchange(frame(BODY))
        one.socket.close()
        assert server.closed(one)["reason"] == "tls_error"

    def test_no_reset(self, serve: Serve) -> None:
        """The peer sees a FIN behind the alert, though it goes on to send."""
        server = serve()
        client = meet(server)
        client.socket.send(bytes(50_000))
        server.settle()
        client.socket.send(bytes(50_000))
        server.turn_until(lambda: has_fin(client), "FIN", [client.socket])
        server.pass_time(2.2)
        assert server.closed(client)["reason"] == "tls_error"

    def test_muted(self, serve: Serve) -> None:
        """A flood of them does not flood the log."""
        server = serve()
        server.log.muted.add("tls_failed")
        client = meet(server)
        client.socket.send(bytes(1000))
        server.settle()
        client.socket.close()
        assert server.closed(client)["reason"] == "tls_error"
