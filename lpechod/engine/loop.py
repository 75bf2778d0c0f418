"""The loop: one turn waits for readiness, dispatches it, expires timers and closes what has ended.

Rules that hold for everything that runs in a turn:

- time is read once, when the wait returns, and passed down. Whoever is late is late, nobody early;
- whoever moves little is served in each turn, and those who move much after all others, a few at a
  time (`lpechod.engine.rotation`);
- work created during a turn waits for the next one (`Loop.again`, timers), so a turn always ends;
- a descriptor is closed at the end of the turn only (`Loop.defer_close`). Inside a batch of events
  its number therefore cannot come back as somebody else's;
- what a source raises is a defect of ours. It costs that source, and not the other ten thousand.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import Protocol

from lpechod.engine.clock import Clock
from lpechod.engine.poller import MAX_EVENTS, Poller, Ready
from lpechod.engine.rotation import Rotation
from lpechod.engine.wheel import NEVER, Timer, TimerWheel

TICKS_PER_SECOND = 10
"""Resolution of deadlines. The shortest that make sense over a network are some hundred
milliseconds; a finer tick only wakes the process more often."""

TIMERS_PER_TURN = 256
"""Timers that fire in one turn. Those that are left go before all that is due later, but for urgent
ones. 8,000 connections that came in one tick have deadlines in one tick: a turn of 80 ms."""

_LONGEST_SLEEP_SECONDS = 86_400.0
"""epoll_wait(2) and poll(2) take milliseconds in an int: 24.8 days. A turn a day costs nothing."""


_NOBODY: dict["Source", int] = {}
"""Stands for the empty `again` of the common turn; never modified."""


class Source(Protocol):
    """Owner of a descriptor."""

    def on_ready(self, mask: int, now: float) -> None:
        """Handle readiness: a mask as in `lpechod.engine.poller`, and the time in seconds."""

    def on_failure(self, error: Exception, now: float) -> None:
        """Give up: a call from the loop raised ``error``, which is a defect of ours."""


class Closing(Source, Protocol):
    """A source whose descriptor waits to be closed."""

    def close(self) -> None:
        """Close it now."""


class Loop:
    """An event loop for one thread.

    Args:
        poller: tells readiness; closed with the loop.
        clock: seconds that never go back.
        on_turn: called at the end of each turn with the time it took, in seconds from the return of
            one wait to the start of the next, and the number of events it handled.

    Attributes:
        turns: how many turns it has made.
        ready: what woke the latest turn: descriptors with their masks.
        rotation: sources that are served by turns.
        shortcut: if set, it is given these first, the number of all that the turn will call, and
            the time; it returns those that it leaves to their sources.
    """

    __slots__ = (
        "_again",
        "_clock",
        "_closing",
        "_due",
        "_due_at",
        "_line",
        "_on_turn",
        "_poll",
        "_poller",
        "_sources",
        "_stopped",
        "_wheel",
        "edge_triggered",
        "now",
        "ready",
        "rotation",
        "shortcut",
        "turns",
    )

    def __init__(
        self,
        poller: Poller,
        clock: Clock,
        on_turn: Callable[[float, int], None] = lambda _seconds, _events: None,
    ) -> None:
        self._poller = poller
        self._poll = poller.poll
        self.edge_triggered = poller.edge_triggered
        self._clock = clock
        self._on_turn = on_turn
        self.shortcut: Callable[[Ready, int, float], Ready] | None = None
        self.rotation: Rotation[Source] = Rotation()
        self._line = self.rotation.line
        self._sources: dict[int, Source] = {}
        self._again: dict[Source, int] = {}
        self._closing: list[Closing] = []
        self._stopped = False
        self.turns = 0
        self.ready: Ready = []
        self.now = clock()
        self._due_at = math.inf
        self._due: deque[Timer] = deque()
        self._wheel = TimerWheel(tick=math.floor(self.now * TICKS_PER_SECOND))

    def turn(self) -> None:
        """Wait until something is due, and do it."""
        again, line = self._again, self._line
        if again or line:
            self._again = {}
            sleep: float | None = 0.0
        else:
            again = _NOBODY  # Who asks from now on is for the next turn.
            sleep = self._due_at - self._clock()
            if not 0.0 <= sleep <= _LONGEST_SLEEP_SECONDS:
                sleep = _bounded(sleep)
        # By position: a keyword costs this call a third of its own time.
        ready = self.ready = self._poll(sleep, MAX_EVENTS)
        crowd = events = len(ready) + len(again)
        self.turns += 1
        now = self.now = self._clock()
        if line:
            crowd += len(line)
        if crowd:
            if self.shortcut is not None:
                ready = self.shortcut(ready, crowd, now)
            if ready or again or line:
                events += self._call(ready, again, now)
        if now >= self._due_at:
            self._expire(now)
        if self._closing:
            self._close_deferred(now)
        self._on_turn(self._clock() - now, events)

    def _call(self, ready: Ready, again: dict[Source, int], now: float) -> int:
        """Call sources, last those whose turn it is of all who are served by turns.

        Returns:
            How many more were called than these; fewer if some have to wait for their turn.
        """
        rotation, members = self.rotation, self.rotation.members
        if not members and not self._line:
            self._dispatch(ready, now)
            self._call_again(again, now)
            return 0
        given = len(ready) + len(again)
        for asking in [source for source in again if source in members]:
            rotation.line_up(asking, again.pop(asking))
        others = []
        for fd, mask in ready:
            source = self._sources.get(fd)
            if source in members:
                # Who has asked for the turn, too, is called once, or it would be served twice.
                rotation.line_up(source, mask)
            else:
                others.append((fd, mask))
        called = len(others) + len(again)
        self._dispatch(others, now)
        self._call_again(again, now)
        for source, mask in rotation.turns():
            self._call_again({source: mask}, now)
            called += 1
        return called - given

    def _dispatch(self, ready: Ready, now: float) -> None:
        sources = self._sources
        for fd, mask in ready:
            source = sources.get(fd)
            if source is None:
                continue  # An earlier event of this batch has unregistered it.
            try:
                source.on_ready(mask, now)
            except Exception as error:  # noqa: BLE001 - a defect ends its own source only.
                source.on_failure(error, now)

    def _call_again(self, again: dict[Source, int], now: float) -> None:
        for source, mask in again.items():
            try:
                source.on_ready(mask, now)
            except Exception as error:  # noqa: BLE001 - as for descriptors.
                source.on_failure(error, now)

    def run(self) -> None:
        """Turn until `stop` is called."""
        while not self._stopped:
            self.turn()

    def stop(self) -> None:
        """End `run` after the present turn."""
        self._stopped = True

    def close(self) -> None:
        """Close the poller. The descriptors belong to their sources."""
        self._poller.close()

    def _note_due(self) -> None:
        # (n / 10) * 10 is n for each integer, since 10 is the sum of two powers of two (Kahan), so
        # a time that is not before `_due_at` is not before its tick either.
        tick = self._wheel.next_tick()
        self._due_at = math.inf if tick == NEVER else tick / TICKS_PER_SECOND
        if self._due:
            self._due_at = -math.inf

    def _expire(self, now: float) -> None:
        due = self._due
        for timer in self._wheel.advance(math.floor(now * TICKS_PER_SECOND)):
            if timer.urgent:
                due.appendleft(timer)
            else:
                due.append(timer)
        fired = [due.popleft() for _ in range(min(len(due), TIMERS_PER_TURN))]
        self._note_due()
        for timer in fired:
            if not timer.claim():
                continue  # One that fired before it has called it off.
            try:
                timer.on_deadline(now)
            except Exception as error:  # noqa: BLE001 - as for descriptors.
                timer.on_failure(error, now)

    def _close_deferred(self, now: float) -> None:
        while self._closing:
            closing = self._closing.pop()
            try:
                closing.close()
            except Exception as error:  # noqa: BLE001 - as for descriptors.
                closing.on_failure(error, now)

    # Descriptors.

    def register(self, fd: int, source: Source, mask: int) -> None:
        """Watch a descriptor for a source; see `lpechod.engine.poller` for the mask."""
        self._poller.register(fd, mask)
        self._sources[fd] = source

    def hand_over(self, fd: int, source: Source) -> None:
        """Have another source told of a descriptor's readiness from now on."""
        self._sources[fd] = source

    def modify(self, fd: int, mask: int) -> None:
        """Change what a descriptor is watched for."""
        self._poller.modify(fd, mask)

    def unregister(self, fd: int) -> None:
        """Stop watching a descriptor; before it is closed, since its number may come back."""
        self._poller.unregister(fd)
        del self._sources[fd]

    def forget(self, fd: int) -> None:
        """Stop watching a descriptor that is closed next; only if nobody holds a duplicate of it.

        One that a fork has left in another process would stay watched with epoll(7) when ours is
        closed. `unregister` costs a system call.
        """
        self._poller.forget(fd)
        del self._sources[fd]

    def again(self, source: Source, mask: int) -> None:
        """Call ``source.on_ready(mask, ...)`` in the next turn, which will not wait.

        For work that no descriptor shows: a budget ended it, or a buffer of ours holds the bytes.
        Asking twice in a turn is asking once, with both masks.
        """
        self._again[source] = self._again.get(source, 0) | mask

    @property
    def asking(self) -> list[str]:
        """Kinds of the sources that have asked for the next turn with `again`."""
        return sorted({type(source).__name__ for source in self._again})

    def defer_close(self, closing: Closing) -> None:
        """Close something at the end of this turn, and forget what it asked `again` for."""
        self._closing.append(closing)
        self._again.pop(closing, None)
        if self.rotation.members or self._line:
            self.rotation.forget(closing)

    # Deadlines.

    def schedule(self, timer: Timer, deadline: float) -> None:
        """File a timer, or move it.

        Args:
            timer: fires in the first turn after this whose time is not before the deadline, up to
                a tick and the length of a turn late, never early; later only if `TIMERS_PER_TURN`
                are due before it.
            deadline: in seconds of the loop's clock; infinity cancels.
        """
        if deadline == math.inf:
            self._wheel.cancel(timer)
        else:
            self._wheel.schedule(timer, self._tick_of(deadline))
            self._note_due()

    def hasten(self, timer: Timer, deadline: float) -> None:
        """File a timer, or move it to an earlier deadline; a later one leaves it alone.

        The cheap half of a deadline that moves with each byte: the timer fires at the old time,
        looks where its deadline is by then, and files itself again (as in HAProxy and tokio).
        """
        if deadline != math.inf and not (timer.filed and timer.tick <= self._tick_of(deadline)):
            self.schedule(timer, deadline)

    def _tick_of(self, deadline: float) -> int:
        # What is due already waits for the next turn. The wheel itself can't tell: while nothing is
        # due, it lags behind the clock.
        present = math.floor(self.now * TICKS_PER_SECOND)
        return max(math.ceil(deadline * TICKS_PER_SECOND), present + 1)

    def cancel(self, timer: Timer) -> None:
        """Take a timer out, filed or not."""
        self._wheel.cancel(timer)

    @property
    def timers(self) -> int:
        """How many timers are filed; those due are in it until their turn, called off or not."""
        return len(self._wheel) + len(self._due)


def _bounded(sleep: float) -> float | None:
    """Return how many seconds to wait for what is due at an extreme time; None is for ever."""
    if sleep == math.inf:
        return None
    return min(max(sleep, 0.0), _LONGEST_SLEEP_SECONDS)
