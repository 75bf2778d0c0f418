"""Places kept free: near `max_connections`, those go first who have been silent for longest.

At the limit itself newcomers are turned away (`lpechod.net.admission`), whoever they are, while
those who hold the places may not even use them. So *overload* begins at a mark below the limit:
shorter time-outs apply, and connections that are overdue by them are closed, the
longest overdue first, until the number is below the mark. Nobody is closed merely because there is
overload, and nobody at all who keeps to the shorter time-outs.

The limit is for all workers together, so is the mark, and each worker makes room in proportion to
what it holds. It knows what the others hold, but not which of those are leaving already; so all
together may close a few more than it takes, all of them overdue.

Finding out who is overdue must not cost the others their latency. Connections keep no order by
their last sign of life, which would have to be changed with each frame. Instead all are looked at,
some in each turn, and who was overdue when that began is kept in a heap. Until the heap is empty
nobody can be overdue for longer than those in it, so no second look is needed before.
"""

from collections.abc import Collection
from heapq import heappop, heappush

from lpechod.engine.loop import Loop
from lpechod.net.admission import Admission
from lpechod.net.connection import Connection
from lpechod.net.eventlog import EventLog

LOOKS_PER_TURN = 256
"""About 0.3 ms. All 25,000 connections of a worker take a hundred such turns, 40 ms in all, and the
list of them that is made first takes 0.2 ms once."""

CLOSES_PER_TURN = 16
"""About 0.3 ms as well: each takes a read, a FIN and a line of the log, or its suppression."""

LOOK_AGAIN_SECONDS = 1.0
"""Time between two looks at all connections that find too few who are overdue."""

CALM_SECONDS = 5.0
"""How long the number has to stay below the mark until overload is over. Under a steady stream of
newcomers it moves around the mark, and each time would be a line of the log."""


class Overload:
    """Makes room among the connections of a worker.

    Args:
        mark: number of connections, those of other workers included, from which on there is
            overload.
        admission: knows these numbers.
        connections: those of this worker; the collection itself, as it changes.
        loop: where they live.
        log: gets one line when overload begins and one when it is over.

    Attributes:
        seconds: how long there has been overload, in all.
    """

    __slots__ = (
        "_admission",
        "_began_at",
        "_checked_at",
        "_closed",
        "_connections",
        "_crowded_at",
        "_due",
        "_leaving",
        "_log",
        "_looked_at",
        "_loop",
        "_mark",
        "_overdue",
        "_unseen",
        "seconds",
    )

    def __init__(
        self,
        mark: int,
        admission: Admission,
        connections: Collection[Connection],
        loop: Loop,
        log: EventLog,
    ) -> None:
        self._mark = mark
        self._admission = admission
        self._connections = connections
        self._loop = loop
        self._log = log
        self._began_at: float | None = None
        self._checked_at = self._crowded_at = loop.now
        self._looked_at = loop.now - LOOK_AGAIN_SECONDS
        self._due = 0
        self._closed = 0
        self._leaving: list[Connection] = []
        self._unseen: list[Connection] = []
        self._overdue: list[tuple[float, int, Connection]] = []
        self.seconds = 0.0

    def check(self, now: float) -> None:
        """Compare with the mark, and begin to make room; to be called several times a second.

        By a timer and not with each accept: the worker that accepts is not always the one that
        holds silent connections, and a tenth of a second of a storm does not fill the last tenth
        of the places.

        Args:
            now: the loop's time, in seconds.
        """
        if self._began_at is not None:
            self.seconds += now - self._checked_at
        self._checked_at = now
        own = self._admission.active
        total = own + self._admission.others()
        if total >= self._mark:
            self._crowded_at = now
            if self._began_at is None:
                self._began_at = now
                self._log.warning("overload_began", connections=total, own=own, mark=self._mark)
            # Who has been told to go keeps its place until its own FIN comes, or 2 s have passed.
            self._leaving = [each for each in self._leaving if each in self._connections]
            share = -(-(total - self._mark + 1) * own // total)
            self._due = share - len(self._leaving)
            self._make_room(now)
        elif self._began_at is not None:
            self._due = 0
            if now - self._crowded_at >= CALM_SECONDS:
                self._end(now - self._began_at)

    def on_ready(self, _mask: int, now: float) -> None:
        """Look at some connections, or close some that are overdue."""
        if self._unseen:
            self._look()
        else:
            self._close(now)
        if self._due > 0 and (self._unseen or self._overdue):
            self._loop.again(self, 0)

    def on_failure(self, error: Exception, _now: float) -> None:
        """Pass a defect on: it is none of a single connection."""
        raise error

    def _make_room(self, now: float) -> None:
        if self._due <= 0:
            return
        exhausted = not self._unseen and not self._overdue
        if exhausted and now - self._looked_at >= LOOK_AGAIN_SECONDS:
            self._looked_at = now
            self._unseen = list(self._connections)
        if self._unseen or self._overdue:
            self._loop.again(self, 0)

    def _look(self) -> None:
        looked_at = self._looked_at
        for _ in range(min(LOOKS_PER_TURN, len(self._unseen))):
            connection = self._unseen.pop()
            overdue_at = connection.protocol.overdue_at()
            # Not the present time: who is overdue since then must not overtake those that this look
            # has already passed by.
            if overdue_at <= looked_at:
                heappush(self._overdue, (overdue_at, connection.number, connection))

    def _close(self, now: float) -> None:
        for _ in range(CLOSES_PER_TURN):
            if self._due <= 0 or not self._overdue:
                break
            overdue_at, _, connection = heappop(self._overdue)
            # Otherwise it has ended or has been active since, and the next look will find it.
            if connection.protocol.overdue_at() == overdue_at and connection.vacate(now):
                self._due -= 1
                self._closed += 1
                self._leaving.append(connection)

    def _end(self, duration: float) -> None:
        self._log.info("overload_ended", closed=self._closed, duration_s=round(duration, 1))
        self._began_at = None
        self._closed = 0
        self._leaving = []
        self._unseen = []
        self._overdue = []
