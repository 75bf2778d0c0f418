"""Connections that the timer wheel does not know yet, and mostly never will.

A connection has a deadline from its first moment, but to file and to cancel its timer is a tenth of
all that a short one costs. So newcomers wait for the wheel's next tick, for a tenth of a second at
most. Those who are still there then are filed; those whose deadline has come meet it in the same
turn in which the wheel would have fired, or in the next ones if they are many.
"""

from lpechod.engine.loop import Loop
from lpechod.engine.wheel import Timer
from lpechod.net.connection import Connection

_FILED_PER_TURN = 256
"""About a millisecond: a storm brings ten times as many in a tick, and must not hold up others."""


class Newcomers(Timer):
    """The connections of one worker since the last tick.

    Args:
        loop: where they live.
    """

    __slots__ = ("_connections", "_loop", "discard")

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self._loop = loop
        self._connections: set[Connection] = set()
        self.discard = self._connections.discard
        """Forget a connection that has ended, whether it is among them or not."""

    def add(self, connection: Connection) -> None:
        """File a connection with the next tick."""
        self._connections.add(connection)
        if not self.filed:
            self._loop.schedule(self, self._loop.now)

    def on_deadline(self, now: float) -> None:
        """File those who are still there."""
        self.on_ready(0, now)

    def on_ready(self, _mask: int, now: float) -> None:
        """File some of them, and the others in the turns that follow."""
        for _ in range(min(_FILED_PER_TURN, len(self._connections))):
            connection = self._connections.pop()
            try:
                connection.on_deadline(now)
            except Exception as error:  # noqa: BLE001 - a defect ends its own connection only.
                connection.on_failure(error, now)
        if self._connections:
            self._loop.again(self, 0)
