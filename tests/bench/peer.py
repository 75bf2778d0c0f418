"""An echo server on asyncio or uvloop, for comparison; prints its port.

    python tests/bench/peer.py LOOP KIND [CERTIFICATE KEY]

With a certificate it speaks TLS. LOOP is ``asyncio`` or ``uvloop``. KIND is ``protocol`` or
``buffered``: `asyncio.Protocol` gets new bytes objects, `asyncio.BufferedProtocol` has its own
buffer filled. Both do what a careful user would: whole frames are written with one call, and a
frame in part is gathered without copying it again for each piece. Neither has limits, time-outs,
metrics or back-pressure.
"""

import asyncio
import importlib
import ssl
import sys
from collections.abc import Callable
from typing import Any, cast

MAX_FRAME = 1 << 20
HEADER = 4


class Frames:
    """Finds the end of the last whole frame."""

    transport: asyncio.Transport

    def scan(self, data: Any, size: int) -> tuple[int, int]:
        """Return where the last whole frame ends, and where the first that is not whole will."""
        end = 0
        while size - end >= HEADER:
            length = int.from_bytes(data[end : end + HEADER], "big")
            if length > MAX_FRAME:
                self.transport.abort()
                return end, end + HEADER
            if end + HEADER + length > size:
                return end, end + HEADER + length
            end += HEADER + length
        return end, end + HEADER


class Echo(asyncio.Protocol, Frames):
    """Gets bytes objects."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class.
        self.held = bytearray()
        self.need = 0

    def data_received(self, data: bytes) -> None:
        if not self.held:
            size = len(data)
            end, self.need = self.scan(data, size)
            if end == size:
                self.transport.write(data)
                return
            if end:
                self.transport.write(memoryview(data)[:end])
            self.held += memoryview(data)[end:]
            self.need -= end
            return
        held = self.held
        held += data
        if len(held) < self.need:
            return
        end, need = self.scan(held, len(held))
        self.need = need - end
        if end == len(held):
            self.transport.write(held)
            self.held = bytearray()
        elif end:
            self.transport.write(memoryview(held)[:end])
            self.held = held[end:]


class BufferedEcho(asyncio.BufferedProtocol, Frames):
    """Has a buffer of its own filled, which grows to the size of the largest frame."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is none by its class.
        self.buffer = memoryview(bytearray(65536))
        self.have = 0
        self.need = HEADER

    def get_buffer(self, _hint: int) -> memoryview:
        if self.need > len(self.buffer):
            larger = memoryview(bytearray(self.need))
            larger[: self.have] = self.buffer[: self.have]
            self.buffer = larger
        return self.buffer[self.have :]

    def buffer_updated(self, count: int) -> None:
        self.have += count
        if self.have < self.need:
            return
        buffer, have = self.buffer, self.have
        end, need = self.scan(buffer, have)
        self.need = need - end
        if end:
            # A copy, since nobody says when the transport has sent it.
            self.transport.write(bytes(buffer[:end]))
            buffer[: have - end] = buffer[end:have]
            self.have = have - end


async def serve(kind: str, *certificate_and_key: str) -> None:
    """Serve for ever."""
    context = None
    if certificate_and_key:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate_and_key)
    factory: Callable[[], asyncio.BaseProtocol] = Echo if kind == "protocol" else BufferedEcho
    server = await asyncio.get_running_loop().create_server(
        factory, "127.0.0.1", 0, ssl=context, backlog=4096
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> None:
    """Run on the loop that was asked for."""
    loop, *rest = sys.argv[1:]
    factory = None if loop == "asyncio" else importlib.import_module(loop).new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve(*rest))


if __name__ == "__main__":
    main()
