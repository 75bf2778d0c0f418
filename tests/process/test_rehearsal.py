"""A rehearsal as the supervisor sees it, in moments that a whole daemon seldom comes to."""

import os
import sys
from typing import Any

import pytest

from lpechod.engine import clock
from lpechod.engine.loop import Loop
from lpechod.engine.poller import open_poller
from lpechod.process.rehearsal import Rehearsal
from lpechod.process.sockets import Bound
from tests.net.harness import descriptors
from tests.net.scarcity import descriptors_left

SOCKETS = 8

CHILD = f"""
import socket
from lpechod.process.rehearsal import _send
channel = socket.socket(fileno=3)
socket.recv_fds(channel, 64, 1)
for _ in range({SOCKETS}):
    bound = socket.create_server(("127.0.0.1", 0))
    described = {{"address": "127.0.0.1:0", "foreign": False, "sockets": [{{"path": None}}]}}
    _send(channel, b"bound", described, [bound.fileno()])
_send(channel, b"checked", {{"config": {{}}}}, [])
"""


@pytest.mark.parametrize("room", [100, 5])
def test_what_it_has_sent_is_taken_after_its_end(
    monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """A process that ended before anybody read its messages has its sockets taken, or none."""
    monkeypatch.setattr(sys, "orig_argv", [sys.executable, "-c", CHILD])
    before = descriptors()
    loop = Loop(open_poller("auto"), clock.monotonic)
    ends: list[tuple[dict[str, Any] | None, list[Bound], list[str]]] = []
    it = Rehearsal([], loop, lambda *end: ends.append(end))
    _, status = os.waitpid(it.pid, 0)
    with descriptors_left(room):
        it.ended(os.waitstatus_to_exitcode(status))
    loop.close()

    ((checked, bound, problems),) = ends
    for each in bound:
        each.close()
    if room > SOCKETS:
        assert (checked, len(bound), problems) == ({"config": {}}, SOCKETS, [])
    else:
        assert (checked, bound) == (None, [])
        assert problems == ["too few descriptors are left for its sockets; raise LimitNOFILE="]
    assert before == descriptors()
