"""`max_buffered` enforced: close who is overdue, pause those who need more, then shed the largest.

Two marks and the limit. Past the first mark, which is that of overload by number, too (90 % unless
configured), memory is short until it is back below the second one, five sixths of the first. With
one mark alone, each frame that begins would make it short again. Three steps lead from the first to
the second, and each is taken only if the one before has not been enough:

1. at once, who holds memory and is overdue by the shorter time-outs of an overload is closed in
   good order, the longest overdue first;
2. those whose frames have outgrown their buffers are paused, and those whose echoes wait if they
   hold more than the mean: their peers feel it as a slow network. Whoever has room for the rest of
   a frame may go on, since its end is what gives memory back. That is looked at ten times a second,
   and over as soon as memory is relieved;
3. if it is not within a second, the largest holders are closed at once, however well they behave.

Frames before sizes, because a peer that dribbles is at fault, and one that holds much may only be
far away. And whatever the marks, a request that would pass the limit itself is met at once, from
whoever holds more than the one that asks, or not at all.
"""

from collections.abc import Hashable
from heapq import heapify, heappop

from lpechod.engine.buffers import BufferPool
from lpechod.engine.loop import Loop
from lpechod.engine.wheel import Timer
from lpechod.net.connection import Connection
from lpechod.net.eventlog import EventLog
from lpechod.net.holders import Holders

PATIENCE_SECONDS = 1.0
"""How long a pause may take to relieve memory before connections are shed."""


class MemoryBudget(Timer):
    """Keeps a pool within its limit.

    Args:
        pool: the pool; its owners are connections.
        loop: where they live.
        log: gets one line each time that memory runs short, and one when it is relieved.
        overload_percent: the first mark, as a part of the pool's limit.

    Attributes:
        seconds: how long memory has been short, in all.
    """

    urgent = True

    __slots__ = (
        "_holders", "_log", "_loop", "_paused", "_pool", "_relieved_below", "_short_since",
        "seconds",
    )  # fmt: skip

    def __init__(self, pool: BufferPool, loop: Loop, log: EventLog, overload_percent: int) -> None:
        super().__init__()
        self._pool = pool
        self._loop = loop
        self._log = log
        self._holders = Holders(pool.held_by, loop)
        self._paused: set[Connection] = set()
        self._short_since = 0.0
        self.seconds = 0.0
        pool.alarm = pool.limit * overload_percent // 100
        self._relieved_below = pool.alarm * 5 // 6
        pool.on_alarm = self._on_alarm
        pool.make_room = self._make_room

    def on_ready(self, _mask: int, now: float) -> None:
        """Close who is overdue, and pause who needs more; called in the turn after the alarm."""
        pool = self._pool
        held = pool.held
        if self.filed or held <= pool.alarm:
            return
        self._short_since = now
        closed = self._close_overdue(now)
        if pool.held > self._relieved_below:
            self._pause(now)
        self._log.warning(
            "memory_short", held=held, limit=pool.limit, closed=closed, paused=len(self._paused)
        )
        if pool.held > self._relieved_below:
            self._loop.schedule(self, now)
        else:
            self._relieve(now, shed=0)

    def on_deadline(self, now: float) -> None:
        """Look again; when patience is at its end, shed until memory is relieved."""
        if self._pool.held > self._relieved_below and now < self._short_since + PATIENCE_SECONDS:
            self._pause(now)
            self._loop.schedule(self, now)
            return
        shed = 0
        while self._pool.held > self._relieved_below:
            self._largest().shed(now)
            shed += 1
        self._relieve(now, shed)

    def _close_overdue(self, now: float) -> int:
        # In one turn, since memory cannot wait: among 25,000 holders who is overdue is found in
        # 30 ms, and that comes once in the time in which a sixth of the first mark fills up.
        overdue = [
            (overdue_at, owner.number, owner)
            for owner in self._pool.held_by
            if isinstance(owner, Connection) and (overdue_at := owner.protocol.overdue_at()) <= now
        ]
        heapify(overdue)
        closed = 0
        while overdue and self._pool.held > self._relieved_below:
            closed += heappop(overdue)[-1].vacate(now)
        return closed

    def _pause(self, now: float) -> None:
        holders = self._pool.held_by
        mean = self._pool.held / len(holders)
        paused = [
            owner
            for owner, held in holders.items()
            if isinstance(owner, Connection)
            and owner not in self._paused
            and (owner.protocol.outgrown or (held >= mean and owner.protocol.unsent_bytes))
        ]
        for connection in paused:
            self._paused.add(connection)
            connection.pause(now)

    def _relieve(self, now: float, shed: int) -> None:
        """Let those who were paused go on."""
        for connection in self._paused:
            connection.unpause(now)
        self._paused.clear()
        self._holders.forget()
        self.seconds += now - self._short_since
        self._log.warning("memory_relieved", held=self._pool.held, shed=shed)

    def on_failure(self, error: Exception, _now: float) -> None:
        """Pass a defect on: without this budget there is no bound on memory."""
        raise error

    def _on_alarm(self) -> None:
        if not self.filed:
            self._loop.again(self, 0)

    def _make_room(self, size: int, owner: Hashable) -> None:
        pool = self._pool
        while pool.held_by and pool.held + size > pool.limit:
            largest = self._largest()
            if largest is owner or pool.held_by[largest] <= pool.held_by.get(owner, 0):
                return
            largest.shed(self._loop.now)

    def _largest(self) -> Connection:
        pool = self._pool
        largest = self._holders.largest()
        if pool.held_by[largest] * len(pool.held_by) < pool.held:
            # Who holds most holds the mean at least: others have grown since that was looked at.
            self._holders.forget()
            largest = self._holders.largest()
        assert isinstance(largest, Connection)  # noqa: S101 - nobody else owns buffers.
        return largest
