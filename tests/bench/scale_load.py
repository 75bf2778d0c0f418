"""Clients in great numbers for the processes of a `Crew`: a few active among many that idle."""

import contextlib
import os
import resource
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tests.bench.clients import Address, Echoing, Timed, connect
from tests.bench.crew import Signals
from tests.bench.meters import tree

IDLE_BODY_BYTES = 16
CONNECTIONS_PER_SOURCE = 10_000
"""connect(2) takes every other of the 28,232 ports first; when all of those are taken, it looks at
each of them in vain before it finds one of the rest (``__inet_hash_connect``)."""

_IP_BIND_ADDRESS_NO_PORT = 24  # Of <linux/in.h>; ip(7).


def connect_from(source: str, address: Address) -> socket.socket:
    """Connect from an address of the loopback, each of which has ports of its own.

    The port is chosen by connect(2), as without an address: bind(2) would look for one that nobody
    uses, wherever to, which takes longer with each that is taken.
    """
    connected = socket.socket()
    connected.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
    connected.bind((source, 0))
    connected.connect(address)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connected


def put_first(pid: int) -> None:
    """Have a process and its descendants run before whatever else wants their CPU, if we may.

    Niceness does not do: others still run to the end of their slices, which are milliseconds, and
    what is measured is a tenth of one. Neither clients nor servers here compute without an end.
    """
    for each in tree(pid):
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(each, os.SCHED_RR, os.sched_param(1))


def end(streams: Sequence[socket.socket]) -> None:
    """End streams in good order: half-close, and demand the end of the other side, not a reset."""
    for stream in streams:
        stream.shutdown(socket.SHUT_WR)
    for stream in streams:
        if stream.recv(1):
            raise AssertionError("more than was sent came back")
        stream.close()


@dataclass(frozen=True, slots=True)
class Idle:
    """Connections that echo one frame at their beginning and one before their end, and else idle.

    Args:
        address: the server's.
        network: the first three numbers of the addresses to connect from.
        connections: how many.
        descriptors: the limit that the process is to be under.
    """

    address: Address
    network: str
    connections: int
    descriptors: int

    def run(self, signals: Signals) -> int:
        """Connect, hold, and end; return how many frames were verified."""
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        if limits != (self.descriptors, self.descriptors):
            raise AssertionError(f"the limits on descriptors are {limits}")
        streams = []
        for number in range(self.connections):
            source = f"{self.network}.{1 + number // CONNECTIONS_PER_SOURCE}"
            streams.append(connect_from(source, self.address))
            Echoing(streams[-1], IDLE_BODY_BYTES).echo()
        signals.ready()
        signals.wait()
        for stream in streams:
            Echoing(stream, IDLE_BODY_BYTES).echo()
        end(streams)
        return 2 * len(streams)


@dataclass(frozen=True, slots=True)
class Active:
    """Connections that send frames in turn, at a steady rate for all together.

    A frame that is due while the one before it, on another connection, is under way counts from
    when it was due: a server that holds one of them up can't hide it by holding up the load.

    Args:
        address: the server's.
        source: address to connect from.
        connections: how many.
        body_bytes: size of the body of each frame.
        frames_per_s: of all together.
        phases: how often that is begun and stopped.
    """

    address: Address
    source: str
    connections: int
    body_bytes: int
    frames_per_s: float
    phases: int

    def run(self, signals: Signals) -> list[Timed]:
        """Wait for each phase to begin and to end; return latencies by phase."""
        clients = [
            Echoing(connect_from(self.source, self.address), self.body_bytes)
            for _ in range(self.connections)
        ]
        for client in clients * 3:
            client.echo()
        put_first(os.getpid())
        phases = []
        for _ in range(self.phases):
            signals.ready()
            phases.append(Timed(self._phase(signals, clients)))
            signals.go_on()
        end([client.stream for client in clients])
        return phases

    def _phase(self, signals: Signals, clients: list[Echoing]) -> list[float]:
        latencies: list[float] = []
        clock, step = time.perf_counter, 1 / self.frames_per_s
        due = clock() + step
        while True:
            for client in clients:
                if signals.over:
                    return latencies
                early = due - clock()
                if early > 0:
                    time.sleep(early)
                # What our own timer is late by is not the server's.
                begin = clock() if early > 0 else due
                client.echo()
                latencies.append(clock() - begin)
                due += step


@dataclass(frozen=True, slots=True)
class Pipelined:
    """Clients each of which has some frames under way, sent at once.

    As in `tests.bench.clients.PingPong`, one process sends for all of them before it receives for
    any, on blocking sockets; it takes no times, and sends all frames of a client with one call.
    """

    address: Address
    connections: int
    body_bytes: int
    in_flight: int
    seconds: float

    def run(self, signals: Signals) -> int:
        """Connect, echo for some seconds, and return how many frames were verified."""
        streams = [connect(self.address, None) for _ in range(self.connections)]
        sent = [self._frames() for _ in streams]
        got = bytearray(len(sent[0]))
        for stream, frames in zip(streams, sent, strict=True):
            stream.sendall(frames)
            _verify(stream, frames, got)
        signals.ready()
        count = 0
        until = time.perf_counter() + self.seconds
        while time.perf_counter() < until:
            for stream, frames in zip(streams, sent, strict=True):
                stream.sendall(frames)
            for stream, frames in zip(streams, sent, strict=True):
                _verify(stream, frames, got)
            count += len(streams) * self.in_flight
        signals.ready()  # The end of the connections is not to be measured.
        end(streams)
        return count

    def _frames(self) -> bytes:
        header = self.body_bytes.to_bytes(4, "big")
        return b"".join(header + os.urandom(self.body_bytes) for _ in range(self.in_flight))


def _verify(stream: socket.socket, sent: bytes, got: bytearray) -> None:
    if stream.recv_into(got, len(got), socket.MSG_WAITALL) != len(got) or got != sent:
        raise AssertionError("a bad echo, or the end of the stream")
