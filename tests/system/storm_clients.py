"""The clients of a storm, all in one loop of a process of their own.

    python -m tests.system.storm_clients SEED TCP_PORT UNIX_PATH LONG SHORT_PER_SECOND

Requests come as lines of JSON on standard input, and each is answered by one on standard output:
``report``; ``doom``, of connections whose worker is stopped and about to be killed; and ``finish``,
which is answered when every connection has ended, and ends the process.
"""

import json
import os
import random
import select
import sys
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.system.storm_stream import WINDOW_SECONDS, End, Frames, Stream

PATIENCE_SECONDS = 10.0
"""Without any progress of a connection that waits for something."""

_LONG_PERIOD_SECONDS = 0.15
_DEPTH = 6
_TICK_SECONDS = 0.02
_KEPT_SECONDS = 4 * WINDOW_SECONDS


@dataclass
class Loss:
    """By how much the daemon's counters may differ, since killed workers could not publish.

    ``unpublished``: by how much they may be less; ``unread``: by how much more the daemon may have
    echoed than clients have received.
    """

    received: int = 0
    sent: int = 0
    frames: int = 0
    accepted: int = 0
    ended: int = 0
    unread_bytes: int = 0
    unread_frames: int = 0

    def add(self, stream: Stream, known: tuple[int, int, bool], unread: bool) -> None:
        """Add a connection that has ended, of which this much had been published for sure."""
        received, frames, existed = known
        self.received += stream.sent - received
        self.sent += stream.received - received
        self.frames += stream.frames - frames
        self.accepted += not existed
        self.ended += 1
        if unread:
            self.unread_bytes += stream.sent - stream.received
            self.unread_frames += len(stream.flight)


@dataclass
class Totals:
    """What the clients have seen; ``ends`` by kind of client and kind of end."""

    opened: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    frames: int = 0
    sent: int = 0
    received: int = 0
    allowed: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)
    loss: Loss = field(default_factory=Loss)


class Clients:
    """Long-lived ones that pipeline and short-lived ones that come at a steady rate.

    Args:
        seed: decides on contents and sizes.
        port: of the TCP listener on 127.0.0.1.
        path: of the UNIX listener.
        longs: how many stay.
        rate: how many come each second.
    """

    def __init__(self, seed: int, port: int, path: str, longs: int, rate: float) -> None:
        self._dice = random.Random(seed)  # noqa: S311 - to be repeatable is its purpose.
        self._frames = Frames(self._dice)
        self._addresses: tuple[tuple[str, int], str] = (("127.0.0.1", port), path)
        self._longs = longs
        self._pause = 1 / rate
        self._poller = select.epoll()
        self._streams: dict[int, Stream] = {}
        self._recent: deque[tuple[float, Stream]] = deque()
        self._next_short = 0.0
        self._shorts = 0
        self._requests = b""
        self._finishing = False
        self.totals = Totals()

    def run(self) -> None:
        """Go on until told to finish, or until whoever tells has gone."""
        self._poller.register(sys.stdin.fileno(), select.EPOLLIN)
        now = time.monotonic()
        self._next_short = now
        for number in range(self._longs):
            self._open(self._addresses[number % 5 == 0], True, [], now)
        while not self._finishing or self._streams:
            events = self._poller.poll(_TICK_SECONDS)
            now = time.monotonic()
            for fd, mask in events:
                if fd == sys.stdin.fileno():
                    self._read_requests(now)
                elif fd in self._streams:
                    self._handle(self._streams[fd], mask, now)
            self._pace(now)
        self._answer()

    # Connections.

    def _open(
        self, address: str | tuple[str, int], is_long: bool, frames: Iterable[bytes], now: float
    ) -> None:
        stream = Stream(address, is_long, frames, now)
        stream.due_at = now + self._dice.random() * _LONG_PERIOD_SECONDS
        self._streams[stream.socket.fileno()] = stream
        self._poller.register(stream.socket.fileno(), select.EPOLLOUT)
        self._handle(stream, select.EPOLLOUT, now)

    def _handle(self, stream: Stream, mask: int, now: float) -> None:
        end = None
        if mask & ~select.EPOLLOUT and stream.opened_at is not None:
            end = stream.receive(now)
        was_open = stream.opened_at is not None
        if end is None and stream.wants_write and (was_open or mask):
            end = stream.send(now)
        is_open = stream.opened_at is not None
        if is_open and not was_open:
            self.totals.opened[_kind(stream)] += 1
        may_finish = is_open and (self._finishing or not stream.is_long)
        if end is None and may_finish and not stream.flight and not stream.half_closed:
            stream.finish(now)
        if end is None:
            read = 0 if stream.opened_at is None else select.EPOLLIN
            write = select.EPOLLOUT if stream.wants_write else 0
            self._poller.modify(stream.socket.fileno(), read | write)
        else:
            self._ended(stream, end, now)

    def _ended(self, stream: Stream, end: End, now: float) -> None:
        fd = stream.socket.fileno()
        self._poller.unregister(fd)
        del self._streams[fd]
        stream.socket.close()
        totals = self.totals
        totals.frames += stream.frames
        totals.sent += stream.sent
        totals.received += stream.received
        totals.ends[f"{_kind(stream)} {end.value}"] += 1
        if stream.doomed is not None:
            totals.loss.add(stream, stream.doomed, unread=True)
        elif stream.opened_at is not None:
            self._recent.append((now, stream))
        if stream.doomed is not None and end in (End.RESET, End.CUT):
            totals.allowed[end.value] += 1
        elif end not in (End.DONE, End.DRAINED):
            totals.wrong[end.value] += 1
            totals.details.append(
                f"{_kind(stream)} client {stream.identity} {end.value} at {now:.3f}: open for "
                f"{now - (stream.opened_at or now):.3f} s, {stream.frames} frames echoed, "
                f"{len(stream.flight)} in flight, half-closed: {stream.half_closed}"
            )
        address = self._addresses[stream.family == "unix"]
        wants_more = stream.flight or (stream.is_long and not self._finishing)
        if wants_more and end not in (End.REFUSED, End.MISMATCH, End.TIMEOUT):
            # What was not echoed is ours to send again.
            self._open(address, stream.is_long, stream.flight, now)

    # Time.

    def _pace(self, now: float) -> None:
        while now >= self._next_short and not self._finishing:
            self._next_short += self._pause
            self._shorts += 1
            frames = [self._frames.make(small=True) for _ in range(self._dice.randint(1, 3))]
            self._open(self._addresses[self._shorts % 4 == 0], False, frames, now)
        for stream in tuple(self._streams.values()):
            waits = stream.flight or stream.half_closed or stream.opened_at is None
            if waits and now - stream.progress_at > PATIENCE_SECONDS:
                self._ended(stream, End.TIMEOUT, now)
            elif stream.is_long and now >= stream.due_at and not self._finishing:
                stream.due_at = now + self._dice.uniform(0.5, 1.5) * _LONG_PERIOD_SECONDS
                for _ in range(self._dice.randint(1, _DEPTH - min(len(stream.flight), _DEPTH - 1))):
                    stream.add(self._frames.make(), now)
                self._handle(stream, 0, now)
        while self._recent and self._recent[0][0] < now - _KEPT_SECONDS:
            self._recent.popleft()

    # Requests.

    def _read_requests(self, now: float) -> None:
        data = os.read(sys.stdin.fileno(), 1 << 16)
        if not data:
            raise SystemExit(1)
        *lines, self._requests = (self._requests + data).split(b"\n")
        for line in lines:
            request = json.loads(line)
            if request["do"] == "finish":
                self._finishing = True
                for stream in tuple(self._streams.values()):
                    self._handle(stream, 0, now)
                continue
            if request["do"] == "doom":
                self._doom(request)
            self._answer()

    def _doom(self, request: dict[str, Any]) -> None:
        """Note whose worker will be killed, and what of theirs it may not have published.

        The owner of a connection that has ended is not known any more, so of all of those that
        ended lately it counts what they did lately.
        """
        since = request["stopped_at"] - WINDOW_SECONDS
        for stream in self._streams.values():
            if stream.identity in request[stream.family]:
                stream.doomed = stream.published(since)
        for ended_at, stream in self._recent:
            if ended_at >= since:
                self.totals.loss.add(stream, stream.published(since), unread=False)

    def _answer(self) -> None:
        totals = self.totals
        print(json.dumps({**vars(totals), "loss": vars(totals.loss)}), flush=True)


def _kind(stream: Stream) -> str:
    return f"{'long' if stream.is_long else 'short'} {stream.family}"


if __name__ == "__main__":
    seed, port, path, longs, rate = sys.argv[1:]
    Clients(int(seed), int(port), path, int(longs), float(rate)).run()
