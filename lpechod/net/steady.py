"""The steady path: connections that hold nothing, and whose reads bring whole frames of one length.

That is what nearly all events of a busy daemon are, so they are served by one function for all of a
turn: receive into the buffer that everybody shares, look at the header, send from where it lies.
No object stands between the two calls into the kernel. Layers of calls for each frame (loop,
connection, transport, protocol) were measured at a fifth of all that a small frame costs; what is
counted for each is counted once for all of a turn where it can be.

Whatever else a read brings (mixed frames, a part of one, an end, an error) goes the way of all
other connections, through `Connection` and `EchoProtocol`. Invariants:

- a connection is in here exactly while its protocol is steady, it waits for nothing but bytes, and
  it is served in each turn, not by turns; so a read that fills its share of a turn leaves here;
- what the two paths do with the same bytes is the same, down to the last counter.

Connections over TLS have a path beside this one, `lpechod.net.secured`: what differs is each call.
"""

import os
from collections.abc import Callable
from typing import Protocol

from lpechod.engine.buffers import BufferPool
from lpechod.engine.loop import Source
from lpechod.engine.poller import READABLE, WRITABLE, Ready
from lpechod.engine.rotation import FEW, UNDIVIDED, Rotation
from lpechod.net.connection import Connection
from lpechod.net.host import Host
from lpechod.net.secured import SecuredPath
from lpechod.net.table import SteadyTable
from lpechod.net.transport import PeerGoneError
from lpechod.wire.frames import Run
from lpechod.wire.tally import Tally


class SteadyPath(SteadyTable["SteadyConnection"]):
    """Serves the connections of one worker that are steady; `serve` is a loop's `shortcut`.

    Args:
        pool: has the buffer that is received into.
        rotation: divides a turn; told how many share it.
        max_frame_bytes: longest body allowed.
        tally: where to count.
        receive: readv(2): takes a descriptor and buffers, returns a count.
        send: write(2): takes a descriptor and bytes, returns a count.

    Attributes:
        secured: serves those over TLS, in the same turn.
    """

    __slots__ = ("_into", "_receive", "_rotation", "_send", "secured")

    def __init__(
        self,
        pool: BufferPool,
        rotation: Rotation[Source],
        max_frame_bytes: int,
        tally: Tally,
        receive: Callable[[int, tuple[memoryview]], int] = os.readv,
        send: Callable[[int, memoryview], int] = os.write,
    ) -> None:
        super().__init__(pool.shared, max_frame_bytes, tally)
        self._rotation = rotation
        self._into = (pool.shared,)
        self._receive = receive
        self._send = send
        self.secured = SecuredPath(pool.shared, max_frame_bytes, tally)

    def serve(self, ready: Ready, crowd: int, now: float) -> Ready:  # noqa: C901 - calls are what it saves.
        """Echo what those of a turn bring who are steady, and return the events of all others.

        Args:
            ready: descriptors that are ready, with their masks.
            crowd: how many share the turn: these, and those who have asked for it.
            now: the loop's time, in seconds.
        """
        alone = crowd <= FEW and self._rotation.share == UNDIVIDED
        into = self._into if alone else self._divide(crowd)
        if self.secured.connections:
            ready = self.secured.serve(ready, now)
        connections, receive, send = self.connections, self._receive, self._send
        if not connections or not ready:
            return ready
        run, reads, rest = self._run, 0, []
        size, headers, expected, echo = run.size, run.headers, run.expected, run.echo
        for fd, mask in ready:
            connection = connections.get(fd)
            if connection is None or mask != READABLE:
                rest.append((fd, mask))
                continue
            try:
                count = receive(fd, into)
            except OSError as error:
                connection.fail(error, now)
                continue
            if count != size or headers != expected:
                other = self._recognise(count, len(into[0]))
                if other is None:
                    connection.take(count, now)
                    continue
                self._note(run, reads)
                self._run, run, reads = other, other, 0
                size, headers, expected, echo = run.size, run.headers, run.expected, run.echo
            reads += 1
            protocol = connection.protocol
            protocol.frames += run.frames
            protocol.echoed_bytes += count
            protocol.active_at = now
            try:
                sent = send(fd, echo)
            except OSError as error:
                connection.keep(echo, 0, now, error)
            else:
                if sent != count:
                    connection.keep(echo, sent, now)
        if reads:
            self._note(run, reads)
        return rest

    def _divide(self, crowd: int) -> tuple[memoryview]:
        """Have each receive no more than its share of the turn."""
        self._rotation.divide(crowd)
        self._into = (self._shared[: self._rotation.share],)
        if self._run.size == len(self._into[0]):
            self._run = Run(self._shared, 0, 1)
        return self._into


class SteadyHost(Host, Protocol):
    """Whoever keeps the connections, and has a steady path for them."""

    steady: SteadyPath


class SteadyConnection(Connection):
    """One client without TLS, level-triggered; on the steady path for as long as it is steady."""

    __slots__ = ()

    _host: SteadyHost

    def take(self, count: int, now: float) -> None:
        """Go on with ``count`` bytes that have been received into the shared buffer; 0: the end."""
        protocol = self.protocol
        try:
            if not count:
                # Nothing is held, so this is all that `_settle` would find to do.
                protocol.receive_last()
                self._host.steady.leave(self._transport.fd)
                self._finish()
                return
            self._take(count, now)
            if protocol.changed:
                self._settle(now)
        except Exception as error:  # noqa: BLE001 - a defect ends its own connection only.
            self.on_failure(error, now)

    def keep(self, echo: memoryview, sent: int, now: float, error: OSError | None = None) -> None:
        """Keep what the kernel has not taken of an echo, which counts as sent.

        Args:
            echo: the echo.
            sent: how many bytes of it were taken.
            now: the time.
            error: why none were.
        """
        try:
            if error is not None:
                self._lose(error, READABLE, now)
            self.protocol.unsent(echo, sent, now)
            self._settle(now)
        except Exception as defect:  # noqa: BLE001 - likewise.
            self.on_failure(defect, now)

    def fail(self, error: OSError, now: float) -> None:
        """Act on an error that receiving has met."""
        try:
            self._lose(error, WRITABLE, now)
            self._settle(now)
        except Exception as defect:  # noqa: BLE001 - likewise.
            self.on_failure(defect, now)

    def _lose(self, error: OSError, against: int, now: float) -> None:
        try:
            self._transport.heed(error, against)
        except PeerGoneError as failure:
            self._lose_peer(failure, now)

    def _settle(self, now: float) -> None:
        Connection._settle(self, now)  # noqa: SLF001 - super() would cost as much as what follows.
        self._follow()

    def _weigh(self, count: int) -> None:
        super()._weigh(count)
        self._follow()

    def _register(self) -> None:
        super()._register()
        if self._greeter is None:
            self._host.steady.join(self._transport.fd, self)

    def _follow(self) -> None:
        """Join or leave the steady path, as things stand."""
        path, fd = self._host.steady, self._transport.fd
        steady = self.protocol.steady and self not in self._rotation.members
        if steady and self._interest == READABLE and self._greeter is None:
            path.join(fd, self)
        else:
            path.leave(fd)
