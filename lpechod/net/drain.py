"""Drains the connections of a worker: tells each to end at a frame boundary, not all at once."""

import math
from collections.abc import Iterable

from lpechod.engine.loop import TICKS_PER_SECOND, Loop
from lpechod.engine.wheel import Timer
from lpechod.net.connection import Connection
from lpechod.wire.states import State

_DRAINS_PER_TURN = 256
"""Connections told to drain in one turn: some milliseconds, in which the others wait."""

_DRAINS_PER_BATCH_MIN = 10
"""Connections told to drain in a tenth of a second at least: so few may well come back at once."""

_DRAIN_WINDOW = 1 / 3
"""Part of the drain time over which connections are told, so that a thousand clients do not come
back in the same instant (HAProxy's ``close-spread-time``). Two thirds are left to those told last,
to come to a frame boundary."""

_DRAIN_GREETING_SECONDS = 1.0
"""Age up to which a connection that has sent nothing yet is not told: its first frame is mostly on
its way, and a client that connects during a reload should not have done so in vain."""


class Drain(Timer):
    """Tells connections to drain: a batch at once, and one with each tick of the loop's wheel.

    Within one drain the order is none in particular, that of a set. Those not told yet are served
    as usual, and one that ends by itself meanwhile leaves its place in the batch to another; so
    does one that is too young.
    A defect is passed on to the loop's owner: a drain that stops half-way would never end.
    """

    __slots__ = ("_batch", "_due", "_loop", "_until", "_untold", "_young")

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self._loop = loop
        self._untold: list[Connection] = []
        self._young: list[Connection] = []
        self._until = 0.0
        self._batch = 0
        self._due = 0

    def begin(self, connections: Iterable[Connection], until: float) -> None:
        """Tell connections, spread over `_DRAIN_WINDOW` of the time that is left."""
        self._untold = list(connections)
        self._young = []
        self._until = until
        window = (until - self._loop.now) * _DRAIN_WINDOW
        ticks = max(1, round(window * TICKS_PER_SECOND))
        self._batch = max(_DRAINS_PER_BATCH_MIN, math.ceil(len(self._untold) / ticks))
        self._due = self._batch
        self._loop.again(self, 0)
        self._loop.schedule(self, self._loop.now)

    def hurry(self, connection: Connection) -> None:
        """Tell a connection that came after `begin`, in the next turn."""
        self._untold.append(connection)
        self._due += 1
        self._loop.again(self, 0)
        if not self.filed:
            self._loop.schedule(self, self._loop.now)

    def on_deadline(self, now: float) -> None:
        """Tell the next batch; all that are left, if the process was stopped for so long."""
        self._untold += self._young
        self._young = []
        if self._untold:
            self._due = len(self._untold) if now >= self._until else self._due + self._batch
            # The next tick: a whole tick from now is the one after that, since now is past a tick.
            self._loop.schedule(self, now)
            self.on_ready(0, now)

    def on_ready(self, _mask: int, now: float) -> None:
        """Tell as many as are due, `_DRAINS_PER_TURN` at most."""
        told = 0
        while self._untold and self._due and told < _DRAINS_PER_TURN:
            connection = self._untold.pop()
            if connection.protocol.state is State.CLOSED:
                continue
            if self._is_young(connection, now):
                self._young.append(connection)
                continue
            self._due -= 1
            told += 1
            try:
                connection.drain(self._until, now)
            except Exception as error:  # noqa: BLE001 - a defect ends its own connection only.
                connection.on_failure(error, now)
        if self._untold:
            if self._due:
                self._loop.again(self, 0)
        elif not self._young:
            self._due = 0
            self._loop.cancel(self)

    def _is_young(self, connection: Connection, now: float) -> bool:
        of_age_at = min(connection.opened_at + _DRAIN_GREETING_SECONDS, self._until)
        return now < of_age_at and not connection.protocol.received_bytes
