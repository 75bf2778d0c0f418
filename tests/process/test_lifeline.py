"""The line between supervisor and worker, over real sockets and to a process that is killed."""

import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from lpechod.engine import clock
from lpechod.engine.loop import Loop
from lpechod.engine.poller import open_poller
from lpechod.process.lifeline import Lifeline, Message, open_lifeline

ENDED: Message = {"type": "(end)"}


class End:
    """A line's end in a loop of its own, and what has been heard there."""

    def __init__(self, end: socket.socket) -> None:
        self.loop = Loop(open_poller("auto"), clock.monotonic)
        self.heard: list[Message] = []
        self.line = Lifeline(end, self.loop, self.heard.append, lambda: self.heard.append(ENDED))

    def wait(self, count: int) -> list[Message]:
        """Turn until so many messages have been heard, and maybe more."""
        while len(self.heard) < count:
            self.loop.turn()
        return self.heard

    def close(self) -> None:
        self.line.close()
        self.loop.close()


@pytest.fixture(name="ends")
def _ends() -> Iterator[tuple[End, End]]:
    ours, theirs = open_lifeline()
    ends = End(ours), End(theirs)
    yield ends
    for end in ends:
        end.close()


def numbered(count: int) -> list[dict[str, Any]]:
    """Return so many messages."""
    return [{"type": "number", "n": n} for n in range(count)]


def test_messages_go_both_ways_in_order(ends: tuple[End, End]) -> None:
    """Each side hears what the other one says, message by message and in order."""
    for here, there in (ends, ends[::-1]):
        for message in numbered(20):
            here.line.send("number", n=message["n"])
        assert there.wait(20) == numbered(20)


@pytest.mark.parametrize("finish", [None, [], ["[::]:9000", "unix:/run/\udcff.sock", "ü"]])
def test_names_arrive_as_they_are(ends: tuple[End, End], finish: list[str] | None) -> None:
    """A message carries any name that a listener can have, and tells none from no name at all."""
    ends[0].line.send("drain", finish=finish)
    assert ends[1].wait(1) == [{"type": "drain", "finish": finish}]


def test_a_long_message_arrives_whole(ends: tuple[End, End]) -> None:
    """The names of a thousand listeners fit."""
    names = [f"unix:/run/lpechod/{number:080}.sock" for number in range(1000)]
    ends[0].line.send("drain", finish=names)
    assert ends[1].wait(1) == [{"type": "drain", "finish": names}]


def test_the_end_is_heard_once_and_last(ends: tuple[End, End]) -> None:
    """What was said before the end is heard before it, and nothing afterwards."""
    ours, theirs = ends
    theirs.line.send("ready")
    theirs.line.close()
    assert ours.wait(2) == [{"type": "ready"}, ENDED]
    ours.line.send("drain")  # To nobody.
    ours.line.close()
    assert ours.heard == [{"type": "ready"}, ENDED]


def test_an_end_with_messages_unread_is_an_end(ends: tuple[End, End]) -> None:
    """A side that goes without having read what it was told is heard to go."""
    ours, theirs = ends
    ours.line.send("drain")
    theirs.line.close()
    assert ours.wait(1) == [ENDED]


def test_nobody_blocks_on_a_side_that_does_not_read(ends: tuple[End, End]) -> None:
    """A few hundred messages wait for a side that stands still; what is beyond is dropped."""
    ours, theirs = ends
    for message in numbered(10_000):
        ours.line.send("number", n=message["n"])
    theirs.wait(1)
    assert len(theirs.heard) >= 100
    assert theirs.heard == numbered(len(theirs.heard))
    ours.line.send("last")
    assert theirs.wait(len(theirs.heard) + 1)[-1] == {"type": "last"}


def test_a_line_may_be_closed_while_it_is_heard() -> None:
    """Who closes the line because of a message hears no more, not even of its end."""
    ours, theirs = open_lifeline()
    loop = Loop(open_poller("auto"), clock.monotonic)
    heard: list[Message] = []

    def hear(message: Message) -> None:
        heard.append(message)
        line.close()
        loop.stop()

    line = Lifeline(ours, loop, hear, lambda: heard.append(ENDED))
    with theirs:
        other = End(theirs)
        other.line.send("first")
        other.line.send("second")
        loop.run()
        assert heard == [{"type": "first"}]
        assert line.fd == -1
        other.close()
    loop.close()


@pytest.mark.parametrize("unread", [0, 3])
def test_a_killed_process_is_heard_to_end(unread: int) -> None:
    """A process that is killed ends its line, though it could say nothing any more."""
    ours, theirs = open_lifeline()
    pid = os.fork()
    if pid == 0:
        ours.close()
        signal.pause()
        os._exit(1)
    theirs.close()
    end = End(ours)
    for _ in range(unread):
        end.line.send("drain")
    os.kill(pid, signal.SIGKILL)
    assert end.wait(1) == [ENDED]
    os.waitpid(pid, 0)
    end.close()


def test_a_copy_is_abandoned_without_an_end(ends: tuple[End, End]) -> None:
    """A child that closes its copies of an end disturbs neither the line nor its parent's loop."""
    ours, theirs = ends
    pid = os.fork()
    if pid == 0:
        ours.line.abandon()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    theirs.line.send("ready")
    assert ours.wait(1) == [{"type": "ready"}]
    ours.line.send("drain")
    assert theirs.wait(1) == [{"type": "drain"}]


def test_an_abandoned_end_is_closed() -> None:
    """The copy that is abandoned keeps the line open no longer."""
    ours, theirs = open_lifeline()
    copy, end = End(theirs.dup()), End(ours)
    theirs.close()
    copy.line.abandon()
    assert end.wait(1) == [ENDED]
    copy.loop.close()
    end.close()


def test_a_line_is_closed_on_execve() -> None:
    """Neither end goes to a program that is executed."""
    for end in open_lifeline():
        with end:
            assert not end.get_inheritable()
