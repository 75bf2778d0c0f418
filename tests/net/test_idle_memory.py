"""What an idle connection takes of the worker's memory."""

import socket
import tracemalloc
from contextlib import ExitStack
from pathlib import Path

import lpechod
from lpechod.engine.loop import Loop
from lpechod.engine.poller import open_poller
from lpechod.net.service import EchoService, ServiceSettings
from lpechod.wire.tally import Tally
from tests.fake_time import FakeClock
from tests.net.harness import RecordingLog

CONNECTIONS = 200

MOST_BYTES = 700
"""For each: two objects with slots, a transport, their numbers, and their places in collections."""


def test_an_idle_connection_takes_little_memory() -> None:
    """A silent connection allocates 700 bytes at most, its socket aside."""
    # With a dictionary, a list or a buffer of its own it would be more.
    loop = Loop(open_poller("auto"), FakeClock())
    service = EchoService(ServiceSettings(), loop, Tally(), RecordingLog())
    with ExitStack() as stack:
        stack.callback(loop.close)
        pairs = [socket.socketpair() for _ in range(CONNECTIONS)]
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        for number, (ours, _) in enumerate(pairs):
            service.welcome(ours.detach(), ("192.0.2.1", number), "listener")
        package = tracemalloc.Filter(True, str(Path(lpechod.__file__).parent / "*"))
        taken = tracemalloc.take_snapshot().filter_traces([package]).statistics("filename")
        held = len(service.connections)
        for _, theirs in pairs:
            theirs.close()
        while service.connections:
            loop.turn()

    assert held == CONNECTIONS
    assert sum(each.size for each in taken) <= CONNECTIONS * MOST_BYTES
