"""What tests do with a `TlsClient` on the wire: flights, records and ends, each by itself."""

import select
import socket
import ssl

import pytest
import trustme

from lpechod.net.tls import TlsTransport
from tests.net.harness import EchoServer, KernelBuffers, TlsClient, frame
from tests.net.tlsclient import RECORD_BYTES, authority

HELLO = frame(b"hello")
NARROW = KernelBuffers(send=8192, receive=8192)
ROOMY = KernelBuffers()


def meet(server: EchoServer, buffers: KernelBuffers = ROOMY) -> TlsClient:
    """Connect a client."""
    client = server.connect(buffers=buffers)
    assert isinstance(client, TlsClient)
    return client


def transport_of(server: EchoServer, client: TlsClient) -> TlsTransport:
    """Return the server's end of a client."""
    transport = server.connection_of(client)._transport
    assert isinstance(transport, TlsTransport)
    return transport


def seal(client: TlsClient, data: bytes) -> bytes:
    """Encrypt as one record, and do not send it."""
    assert len(data) <= RECORD_BYTES
    assert client.flush()
    client.tls.write(data)
    client.sent += len(data)
    return client._outgoing.read()


def seal_notice(client: TlsClient) -> bytes:
    """Encrypt a close_notify, and do not send it."""
    assert client.flush()
    client._plain += client._decrypt(1 << 24) or b""
    with pytest.raises(OSError, match=r"."):
        client.tls.unwrap()
    return client._outgoing.read()


def has_fin(client: TlsClient) -> bool:
    """Tell whether the server's FIN is there, behind whatever has not been received."""
    try:
        while data := client.socket.recv(1 << 16):
            client._incoming.write(data)
    except BlockingIOError:
        return False
    return True


def read_to_alert(client: TlsClient) -> bytes:
    """Receive until the server's alert, and return what came before."""
    echo = bytearray()

    def alerted() -> bool:
        try:
            echo.extend(client.receive_some() or b"")
        except ssl.SSLError as error:
            return "ALERT" in (error.reason or "")
        return False

    client.server.turn_until(alerted, "alert", [client.socket])
    return bytes(echo)


def context(
    version: ssl.TLSVersion | None = None, certificate: trustme.CA | None = None
) -> ssl.SSLContext:
    """Make a context for a client, of one version, and with a certificate of some authority."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority().configure_trust(made)
    if version is not None:
        made.minimum_version = made.maximum_version = version
    if certificate is not None:
        certificate.issue_cert("client.test").configure_cert(made)
    return made


def dial(server: EchoServer, made: ssl.SSLContext | None = None) -> TlsClient:
    """Connect a client that has not said anything yet."""
    client = TlsClient(server, server.dial().socket, made)
    server.clients[-1] = client
    count = server.service.counts.accepted
    server.turn_until(lambda: server.service.counts.accepted == max(count, len(server.clients)), "")
    return client


def shake(client: TlsClient) -> None:
    """Shake hands as far as it goes."""
    client.server.turn_until(client.greet, "greeted", [client.socket])
    client.server.settle()


def hello(client: TlsClient) -> bytes:
    """Return the client's first flight, and do not send it."""
    with pytest.raises(ssl.SSLWantReadError):
        client.tls.do_handshake()
    return client._outgoing.read()


def answer(client: TlsClient) -> bytes:
    """Return the client's second flight, once the server's is there, and do not send it."""

    def done() -> bool:
        client._take()
        try:
            client.tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    client.server.turn_until(done, "server's flight", [client.socket])
    client._greeted = True
    return client._outgoing.read()


def results(server: EchoServer) -> dict[str, int]:
    """Return the results that are not 0, of handshakes that are over."""
    return {name: count for name, count in server.service.counts.tls_handshakes.items() if count}


def stuff(server: EchoServer, client: TlsClient) -> int:
    """Fill the kernel from the server's side with bytes that are no TLS, and return how many."""
    transport = transport_of(server, client)
    size = blocked = 0
    while blocked < 3:
        try:
            size += socket.socket.send(transport._socket, bytes(4096))
            blocked = 0
        except BlockingIOError:
            # What is on its way to the client, at a pace, may still make room.
            select.select((), (transport.fd,), (), 0.1)
            blocked += 1
    return size


def skip(server: EchoServer, client: TlsClient, size: int) -> None:
    """Receive so many bytes of what `stuff` has sent."""

    def done() -> bool:
        nonlocal size
        try:
            while size:
                size -= len(client.socket.recv(size))
        except BlockingIOError:
            return False
        return True

    server.turn_until(done, "stuffing", [client.socket])
