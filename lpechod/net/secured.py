"""The steady path over TLS: as `lpechod.net.steady`, with OpenSSL's calls in the place of read(2).

A read brings what one record has, so it is served here if it is less than the largest record: then
nothing is left inside OpenSSL, and of the next record the poller will tell. A larger one, and
whatever else it is that OpenSSL says, goes the way of all others, through `TlsConnection`.

Beside what the path without TLS demands of its connections, neither direction waits for the other,
and nothing is left that no poller tells of.
"""

from typing import Protocol

from lpechod.engine.poller import READABLE, Ready
from lpechod.net.table import SteadyTable
from lpechod.net.tls import RECORD_BYTES, Stream
from lpechod.wire.echo import EchoProtocol


class Secured(Protocol):
    """A connection over TLS, as the path sees it."""

    protocol: EchoProtocol
    stream: Stream

    def take(self, count: int, now: float) -> None:
        """Go on with what has been received into the shared buffer."""

    def keep(self, echo: memoryview, sent: int, now: float, error: OSError | None = None) -> None:
        """Keep what has not been taken of an echo."""

    def fail(self, error: OSError, now: float) -> None:
        """Act on what receiving has raised."""


class SecuredPath(SteadyTable[Secured]):
    """Serves the connections of one worker that are steady and speak TLS."""

    __slots__ = ()

    def serve(self, ready: Ready, into: memoryview, now: float) -> Ready:
        """Echo what those of a turn bring who are steady, and return the events of all others.

        Args:
            ready: descriptors that are ready, with their masks.
            into: the front of the shared buffer, as much as each may receive; a record at least.
            now: the loop's time, in seconds.
        """
        connections, run, reads = self.connections, self._run, 0
        size, headers, expected, echo = run.size, run.headers, run.expected, run.echo
        rest: Ready = []
        for fd, mask in ready:
            connection = connections.get(fd)
            if connection is None or mask != READABLE:
                rest.append((fd, mask))
                continue
            stream = connection.stream
            try:
                count = stream.read(RECORD_BYTES, into)
            except OSError as error:
                connection.fail(error, now)
                continue
            if count != size or headers != expected:
                other = self._recognise(count, RECORD_BYTES)
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
                stream.write(echo)  # All of it, or an error: see `TlsTransport.send`.
            except OSError as error:
                connection.keep(echo, 0, now, error)
        if reads:
            self._note(run, reads)
        return rest
