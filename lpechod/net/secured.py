"""The steady path over TLS: as `lpechod.net.steady`, with OpenSSL between the two calls.

It is for reads that bring just one record, less than the largest. Whatever else is received, and
whatever it is that OpenSSL says, goes the way of all others, through `TlsConnection`.

Beside what the path without TLS demands of its connections, nothing is under way in between: no
part of a record, and no ciphertext that the kernel has refused (`TlsTransport.even`).
"""

from os import read, write
from typing import Protocol

from lpechod.engine.poller import READABLE, Ready
from lpechod.net.table import SteadyTable
from lpechod.net.tlsrecords import PIECE_BYTES, RECORD_BYTES, RECORD_HEADER_BYTES, Bios, Stream
from lpechod.wire.echo import EchoProtocol
from lpechod.wire.tally import Tally


class Secured(Protocol):
    """A connection over TLS, as the path sees it."""

    protocol: EchoProtocol
    stream: Stream

    def take_cipher(self, cipher: bytes, now: float) -> None:
        """Go on with ciphertext that is not just one record."""

    def take(self, count: int, now: float) -> None:
        """Go on with what has been decrypted into the shared buffer."""

    def hold(
        self, echo: memoryview, cipher: bytes, now: float, error: OSError | None = None
    ) -> None:
        """Keep an echo, of which so much ciphertext has not been taken."""

    def fail(self, error: OSError, now: float) -> None:
        """Act on what receiving has raised."""


class SecuredPath(SteadyTable[Secured]):
    """Serves the connections of one worker that are steady and speak TLS.

    Args:
        shared: the buffer that is decrypted into.
        max_frame_bytes: longest body allowed.
        tally: where to count.

    Attributes:
        bios: those of the worker.
    """

    __slots__ = ("bios",)

    def __init__(self, shared: memoryview, max_frame_bytes: int, tally: Tally) -> None:
        super().__init__(shared, max_frame_bytes, tally)
        self.bios = Bios()

    def serve(self, ready: Ready, now: float) -> Ready:
        """Echo what those of a turn bring who are steady, and return the events of all others.

        Args:
            ready: descriptors that are ready, with their masks.
            now: the loop's time, in seconds.
        """
        connections, run, reads, cipher, rest = self.connections, self._run, 0, b"", []
        shared = self._shared
        size, headers, expected, echo = run.size, run.headers, run.expected, run.echo
        incoming, outgoing = self.bios.incoming, self.bios.outgoing
        for fd, mask in ready:
            connection = connections.get(fd)
            if connection is None or mask != READABLE:
                rest.append((fd, mask))
                continue
            stream = connection.stream
            try:
                record = read(fd, PIECE_BYTES)  # Half a microsecond less than with readv(2).
                if len(record) != int.from_bytes(record[3:5]) + RECORD_HEADER_BYTES:
                    connection.take_cipher(record, now)
                    continue
                incoming.write(record)
                count = stream.read(RECORD_BYTES, shared)
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
                stream.write(echo)
                cipher = outgoing.read()
                if cipher := cipher[write(fd, cipher) :]:
                    connection.hold(echo, cipher, now)
            except OSError as error:
                connection.hold(echo, cipher, now, error)
        if reads:
            self._note(run, reads)
        return rest
