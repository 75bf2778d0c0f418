"""Clients of an echo server for the processes of a `Crew`: healthy ones, which verify each echo."""

import os
import socket
import ssl
import struct
import time
from dataclasses import dataclass, field

from tests.bench.crew import Signals

Address = tuple[str, int]

Stream = socket.socket | ssl.SSLSocket
_HEADER = struct.Struct(">I")
_NUMBER = struct.Struct(">Q")


def client_context() -> ssl.SSLContext:
    """Make a context for clients that ask nothing of the server's certificate: it costs less."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def connect(address: Address, context: ssl.SSLContext | None, window_bytes: int = 0) -> Stream:
    """Connect a blocking stream without delays.

    Args:
        address: where to.
        context: for TLS, or None.
        window_bytes: what the kernel may receive ahead; 0: as much as it likes.
    """
    connected = socket.socket()
    if window_bytes:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window_bytes)
    connected.connect(address)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if context is None:
        return connected
    return context.wrap_socket(connected)


class Echoing:
    """A client that sends frames, each different, and compares what comes back.

    Args:
        stream: its connection.
        body_bytes: size of the body of each frame; at least 8.
        in_flight: how many frames are sent with one call, before their echoes are received.
    """

    __slots__ = ("_frames", "_got", "_number", "_offsets", "_view", "stream")

    def __init__(self, stream: Stream, body_bytes: int, in_flight: int = 1) -> None:
        self.stream = stream
        self._number = int.from_bytes(os.urandom(4), "big") << 32
        frame = _HEADER.pack(body_bytes) + os.urandom(body_bytes)
        self._frames = bytearray(frame * in_flight)
        self._offsets = range(_HEADER.size, len(self._frames), len(frame))
        self._got = bytearray(len(self._frames))
        self._view = memoryview(self._got)

    def send(self) -> None:
        """Send the next frames."""
        for offset in self._offsets:
            self._number += 1
            _NUMBER.pack_into(self._frames, offset, self._number)
        self.stream.sendall(self._frames)

    def receive(self) -> None:
        """Receive their echoes."""
        have, size = 0, len(self._got)
        while have < size:
            count = self.stream.recv_into(self._view[have:] if have else self._view)
            if not count:
                raise AssertionError(f"the stream ended after {have} of {size} bytes")
            have += count
        if self._got != self._frames:
            raise AssertionError("a bad echo")

    def echo(self) -> None:
        """Do both."""
        self.send()
        self.receive()


@dataclass(frozen=True, slots=True)
class Timed:
    """What a job measured: seconds from the first byte sent to the last received, by frame."""

    latencies: list[float] = field(repr=False)


@dataclass(frozen=True, slots=True)
class PingPong:
    """Clients each of which has so many frames under way, one unless it is told otherwise.

    One process serves its clients in turn, sending for all before it receives for any, on blocking
    sockets: nothing costs a client less. So a latency includes the wait for those before it, and
    is the same for all frames that are under way on one connection.
    """

    address: Address
    tls: bool
    connections: int
    body_bytes: int
    seconds: float
    in_flight: int = 1

    def run(self, signals: Signals) -> Timed:
        """Connect, echo for some seconds, and return latencies."""
        context = client_context() if self.tls else None
        streams = [connect(self.address, context) for _ in range(self.connections)]
        clients = [Echoing(stream, self.body_bytes, self.in_flight) for stream in streams]
        for client in clients * 3:
            client.echo()
        signals.ready()
        latencies: list[float] = []
        clock = time.perf_counter
        end = clock() + self.seconds
        while clock() < end:
            began = []
            for client in clients:
                began.append(clock())
                client.send()
            for client, at in zip(clients, began, strict=True):
                client.receive()
                latencies += (clock() - at,) * self.in_flight
        signals.ready()  # The end of the connections is not to be measured.
        for stream in streams:
            stream.close()
        return Timed(latencies)


@dataclass(frozen=True, slots=True)
class Churn:
    """Clients that connect, echo one frame and close, so many at a time, again and again."""

    address: Address
    tls: bool
    connections: int
    body_bytes: int
    seconds: float

    def run(self, signals: Signals) -> Timed:
        """Go on for some seconds, and return the times from connect(2) to the echo."""
        context = client_context() if self.tls else None
        signals.ready()
        latencies = []
        clock = time.perf_counter
        end = clock() + self.seconds
        while clock() < end:
            under_way = []
            for _ in range(self.connections):
                at = clock()
                client = Echoing(connect(self.address, context), self.body_bytes)
                client.send()
                under_way.append((client, at))
            for client, at in under_way:
                client.receive()
                latencies.append(clock() - at)
                client.stream.close()
        signals.ready()
        return Timed(latencies)


@dataclass(frozen=True, slots=True)
class Paced:
    """A client that sends a frame at a steady rate, on one connection through several phases.

    A frame that is due while the echo before it is outstanding is late because of the server, so
    its latency counts from when it was due.
    """

    address: Address
    tls: bool
    body_bytes: int
    frames_per_s: float
    phases: int
    offset_s: float

    def run(self, signals: Signals) -> list[Timed]:
        """Wait for each phase to begin and to end; return latencies by phase."""
        client = Echoing(
            connect(self.address, client_context() if self.tls else None), self.body_bytes
        )
        for _ in range(100):
            client.echo()
        phases = []
        for _ in range(self.phases):
            signals.ready()
            latencies: list[float] = []
            due = time.perf_counter() + self.offset_s
            while not signals.over:
                begin = time.perf_counter()
                if begin < due:
                    time.sleep(due - begin)
                    begin = time.perf_counter()
                elif latencies:
                    begin = due
                client.echo()
                latencies.append(time.perf_counter() - begin)
                due += 1 / self.frames_per_s
            signals.go_on()
            phases.append(Timed(latencies))
        client.stream.close()
        return phases


@dataclass(frozen=True, slots=True)
class Kept:
    """Connections that are kept.

    Args:
        address: the server's.
        tls: whether they speak TLS.
        connections: how many.
        burst_bytes: size of a body that each echoes, one after the other, at a further signal.
        silent: whether they never send anything, not even a handshake, instead of echoing a little.
    """

    address: Address
    tls: bool
    connections: int
    burst_bytes: int = 0
    silent: bool = False

    def run(self, signals: Signals) -> None:
        """Connect; burst when all have done so; wait, and close."""
        context = client_context() if self.tls and not self.silent else None
        streams = [connect(self.address, context) for _ in range(self.connections)]
        if not self.silent:
            clients = [Echoing(stream, 8) for stream in streams]
            for client in clients:
                client.send()
            for client in clients:
                client.receive()
        signals.ready()
        if self.burst_bytes:
            for stream in streams:
                Echoing(stream, self.burst_bytes).echo()
            signals.ready()
        signals.wait()
        for stream in streams:
            stream.close()
