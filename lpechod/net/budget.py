"""`max_buffered` enforced: pause those who hold most, then shed them.

Three marks. Past seven eighths of the limit, connections that hold more than the mean are paused:
their peers feel it as a slow network. If a second later memory is still above three quarters, the
largest holders are closed (`overload`) until it is not. And a request that would pass the limit
itself is met at once, from whoever holds more than the one that asks, or not at all.
"""

from collections.abc import Hashable

from lpechod.engine.buffers import BufferPool
from lpechod.engine.loop import Loop
from lpechod.engine.wheel import Timer
from lpechod.net.connection import Connection
from lpechod.net.eventlog import EventLog

PATIENCE_SECONDS = 1.0
"""How long a pause may take to relieve memory before connections are shed."""


class MemoryBudget(Timer):
    """Keeps a pool within its limit.

    Args:
        pool: the pool; its owners are connections.
        loop: where they live.
        log: gets one line for each time memory runs short.
    """

    __slots__ = ("_log", "_loop", "_paused", "_pool", "_relieved_below")

    def __init__(self, pool: BufferPool, loop: Loop, log: EventLog) -> None:
        super().__init__()
        self._pool = pool
        self._loop = loop
        self._log = log
        self._paused: set[Connection] = set()
        self._relieved_below = pool.limit // 4 * 3
        pool.alarm = pool.limit // 8 * 7
        pool.on_alarm = self._on_alarm
        pool.make_room = self._make_room

    def on_ready(self, _mask: int, now: float) -> None:
        """Pause the large holders; called in the turn after the alarm."""
        holders = self._pool.held_by
        if self.filed or not holders:
            return
        mean = self._pool.held / len(holders)
        large = [owner for owner, held in holders.items() if held >= mean]
        for owner in large:
            if isinstance(owner, Connection):
                self._paused.add(owner)
                owner.pause(now)
        self._log.warning(
            "memory_short", held=self._pool.held, limit=self._pool.limit, paused=len(large)
        )
        self._loop.schedule(self, now + PATIENCE_SECONDS)

    def on_deadline(self, now: float) -> None:
        """Shed until memory is relieved, and let the others go on."""
        shed = 0
        while self._pool.held > self._relieved_below:
            self._largest().shed(now)
            shed += 1
        for connection in self._paused:
            connection.unpause(now)
        self._paused.clear()
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
        held_by = self._pool.held_by
        largest = max(held_by, key=held_by.__getitem__)
        assert isinstance(largest, Connection)  # noqa: S101 - nobody else owns buffers.
        return largest
