"""`max_buffered` enforced: close who is overdue, have the others take turns, then shed the largest.

Two marks and the limit. Past the first mark, which is that of overload by number, too (90 % unless
configured), memory is short until it is back below the second one, five sixths of the first, and
nobody waits for it any more. With one mark alone, each frame that begins would make it short again.
Three steps lead there, and each is taken only if the one before has not been enough:

1. at once, and then each second, who holds memory and is overdue by the shorter time-outs of an
   overload is closed in good order, the longest overdue first; and of those whose echoes wait, and
   who have taken nothing for a second, the largest holders are closed at once;
2. those whose frames have outgrown their buffers are paused, and those whose echoes wait if they
   hold more than the mean: their peers feel it as a slow network. Whoever has room for the rest of
   a frame may go on, since its end is what gives memory back. As it does, those who wait are
   promised room for all of their frames and go on themselves, those first of whose frames least is
   missing. So thousands of large frames that have begun at once are served one after the other, of
   which none could be if each had its part of the memory. A promise takes no memory: that still
   grows with what arrives;
3. if nobody could go on for a second, the largest holders are closed, however well they behave;
   and those who have made nothing of a promise wait behind all others.

Frames before sizes, because a peer that dribbles is at fault, and one that holds much may only be
far away. And whatever the marks, a request that would pass the limit itself is met at once, from
whoever holds more than the one that asks, or not at all.
"""

from collections.abc import Callable, Hashable, Iterable
from heapq import heapify, heappop, heappush

from lpechod.engine.buffers import BufferPool, capacity_for
from lpechod.engine.loop import Loop
from lpechod.engine.rotation import UNDIVIDED
from lpechod.engine.wheel import Timer
from lpechod.net.connection import Connection
from lpechod.net.eventlog import EventLog
from lpechod.net.holders import Holders
from lpechod.wire.states import CloseReason

PATIENCE_SECONDS = 1.0
"""How long nobody may be able to go on before connections are shed."""

_PERIOD_SECONDS = 1.0
"""How often those who are overdue are looked for, while memory stays short."""

_RATION_BYTES = 4096
"""What anybody receives who holds nothing, while memory is short: thousands may come meanwhile, and
of those whose frames are large, it has to be kept. Smaller frames are echoed as ever."""


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
        "_asked", "_holders", "_late", "_log", "_looked_at", "_loop", "_owed", "_paused", "_pool",
        "_promised", "_relieved_below", "_shed_by_now", "_short_since", "_stuck_since", "_waiting",
        "seconds",
    )  # fmt: skip

    def __init__(self, pool: BufferPool, loop: Loop, log: EventLog, overload_percent: int) -> None:
        super().__init__()
        self._pool = pool
        self._loop = loop
        self._log = log
        self._holders = Holders(pool.held_by, loop)
        self._asked: dict[Hashable, None] = {}
        """Who has asked for more of late, while memory was short."""
        self._paused: set[Connection] = set()
        self._waiting: list[tuple[bool, int, int, Connection]] = []
        """A heap of those who need more, by what is missing of their frames, late ones last."""
        self._promised: dict[Hashable, int] = {}
        """Those who go on, and how many bytes their frames will hold."""
        self._owed = 0
        """The sum of these."""
        self._late: set[Hashable] = set()
        """Who has made nothing of a promise, while others waited for as long as patience lasts."""
        self._short_since = self._stuck_since = self._looked_at = 0.0
        self._shed_by_now = 0
        self.seconds = 0.0
        pool.alarm = pool.limit * overload_percent // 100
        self._relieved_below = pool.alarm * 5 // 6
        pool.on_alarm = self._on_alarm
        pool.make_room = self._make_room

    def on_ready(self, _mask: int, now: float) -> None:
        """Act on an alarm, and on memory that has come back since; called in the turn after it."""
        if self.filed:
            self._pause(self._asked, now)
            self._asked.clear()
            self._let_go(now)
        elif self._pool.held > self._pool.alarm:
            self._begin(now)

    def on_deadline(self, now: float) -> None:
        """Look again; when patience is at its end, shed until memory is back below the mark."""
        if self._is_short():
            if now >= self._stuck_since + PATIENCE_SECONDS:
                self._shed(now)
            elif now >= self._looked_at + _PERIOD_SECONDS:
                self._close_overdue(now)
                self._shed_stuck(now)
            self._pause(self._pool.held_by, now)
            self._spare(now)
            self._let_go(now)
        if self._is_short():
            self._loop.schedule(self, now)
        else:
            self._relieve(now)

    def _is_short(self) -> bool:
        # While somebody waits, too: if thousands went on at once, none could be completed.
        return self._pool.held > self._relieved_below or bool(self._waiting)

    def _begin(self, now: float) -> None:
        pool = self._pool
        held = pool.held
        self._short_since = self._stuck_since = now
        closed = self._close_overdue(now)
        if pool.held > self._relieved_below:
            self._pause(pool.held_by, now)
        self._log.warning(
            "memory_short", held=held, limit=pool.limit, closed=closed, paused=len(self._paused)
        )
        if pool.held > self._relieved_below:
            self._loop.schedule(self, now)
            self._let_go(now)
            pool.tell(self._on_release)
            self._loop.rotation.ration(_RATION_BYTES)
        else:
            self._relieve(now)

    def _close_overdue(self, now: float) -> int:
        self._looked_at = now
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

    def _pause(self, holders: Iterable[Hashable], now: float) -> None:
        """Pause those of some holders who need more, or are to be read from no more."""
        pool = self._pool
        mean = pool.held / max(len(pool.held_by), 1)
        paused = [
            owner
            for owner in holders
            if isinstance(owner, Connection)
            and owner not in self._paused
            and owner not in self._promised
            and (
                owner.protocol.outgrown is not None
                or (owner.protocol.unsent_bytes and pool.held_by.get(owner, 0) >= mean)
            )
        ]
        for connection in paused:
            self._paused.add(connection)
            _tell(connection, connection.pause, now)
            if (frame := connection.protocol.outgrown) is not None:
                missing = frame.need - frame.have
                late = connection in self._late
                heappush(self._waiting, (late, missing, connection.number, connection))

    def _let_go(self, now: float) -> None:
        """Have those who wait go on, as many as there will be room for all of their frames."""
        pool, waiting = self._pool, self._waiting
        # What is left above is for those who begin.
        most = (pool.alarm + pool.limit) // 2
        while waiting:
            connection = waiting[0][-1]
            frame = connection.protocol.outgrown
            needed = 0 if frame is None else capacity_for(frame.need)
            full = pool.held + self._owed + needed > most
            # With nobody to wait for, there will never be more room than now.
            if needed and full and (self._owed or pool.held > self._relieved_below):
                break
            heappop(waiting)
            self._paused.discard(connection)
            if needed:
                self._promised[connection] = needed
                self._owed += needed
                _tell(connection, connection.unpause, now)
                self._stuck_since = now

    def _spare(self, now: float) -> None:
        """Let go of those who were paused for their echoes, and have none left; or have ended."""
        for connection in tuple(self._paused):
            protocol = connection.protocol
            idle = protocol.outgrown is None and not protocol.wants_write
            if idle or connection not in self._pool.held_by:
                self._paused.discard(connection)
                _tell(connection, connection.unpause, now)
        self._late.intersection_update(self._pool.held_by)
        if len(self._waiting) > 2 * len(self._paused):
            self._waiting = [each for each in self._waiting if each[-1] in self._paused]
            heapify(self._waiting)

    def _shed_stuck(self, now: float) -> None:
        stuck = [
            (-held, owner.number, owner)
            for owner, held in self._pool.held_by.items()
            if isinstance(owner, Connection)
            and now >= owner.protocol.stuck_since() + PATIENCE_SECONDS
        ]
        for _, _, connection in sorted(stuck):
            if self._pool.held <= self._relieved_below:
                break
            connection.abort(CloseReason.OVERLOAD, now)
            self._shed_by_now += 1

    def _shed(self, now: float) -> None:
        while self._pool.held > self._relieved_below:
            self._largest().abort(CloseReason.OVERLOAD, now)
            self._shed_by_now += 1
        self._late.update(self._promised)
        self._forget_promises()

    def _forget_promises(self) -> None:
        self._promised.clear()
        self._owed = 0

    def _relieve(self, now: float) -> None:
        """Let those who were paused go on."""
        self._pool.tell(None)
        self._loop.rotation.ration(UNDIVIDED)
        for connection in self._paused:
            _tell(connection, connection.unpause, now)
        self._paused.clear()
        self._waiting.clear()
        self._forget_promises()
        self._late.clear()
        self._asked.clear()
        self._holders.forget()
        self.seconds += now - self._short_since
        self._log.warning("memory_relieved", held=self._pool.held, shed=self._shed_by_now)
        self._shed_by_now = 0

    def on_failure(self, error: Exception, _now: float) -> None:
        """Pass a defect on: without this budget there is no bound on memory."""
        raise error

    def _on_alarm(self, owner: Hashable) -> None:
        if self.filed:
            self._asked[owner] = None
        self._loop.again(self, 0)

    def _on_release(self, owner: Hashable) -> None:
        """Forget a promise that is kept, as the frame has room now, or whose owner has ended."""
        if owner in self._promised:
            assert isinstance(owner, Connection)  # noqa: S101 - nobody else waits.
            if owner.protocol.outgrown is None or owner not in self._pool.held_by:
                self._owed -= self._promised.pop(owner)
                self._stuck_since = self._loop.now
        if self._waiting:
            self._loop.again(self, 0)

    def _make_room(self, size: int, owner: Hashable) -> None:
        pool = self._pool
        while pool.held_by and pool.held + size > pool.limit:
            largest = self._largest()
            if largest is owner or pool.held_by[largest] <= pool.held_by.get(owner, 0):
                return
            largest.abort(CloseReason.OVERLOAD, self._loop.now)

    def _largest(self) -> Connection:
        pool = self._pool
        largest = self._holders.largest()
        if pool.held_by[largest] * len(pool.held_by) < pool.held:
            # Who holds most holds the mean at least: others have grown since that was looked at.
            self._holders.forget()
            largest = self._holders.largest()
        assert isinstance(largest, Connection)  # noqa: S101 - nobody else owns buffers.
        return largest


def _tell(connection: Connection, what: Callable[[float], None], now: float) -> None:
    try:
        what(now)
    except Exception as error:  # noqa: BLE001 - a defect ends its own connection only.
        connection.on_failure(error, now)
