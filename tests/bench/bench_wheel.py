"""What a timer costs: `TimerWheel` against `heapq` and asyncio, in nanoseconds per operation.

All three live through the same load, which is a daemon's: N timers are scheduled over five minutes,
each is moved once to a later deadline (there was traffic), nine of ten are cancelled (the
connection was closed), and time runs until the rest have fired. Run it with
``python tests/bench/bench_wheel.py``.

To be fair:

- deadlines are multiples of the wheel's tick for all, so that all wake up equally often, and each
  is asked when to wake up and then jumps there: no time passes, and none is spent waiting;
- timers exist before the measurement. That is what happens in the daemon, where a connection *is* a
  timer; an entry of the heap and the handle of asyncio have to be made for each schedule;
- the heap deletes lazily, as the documentation of `heapq` shows, and is rebuilt when more than half
  of it is dead, as asyncio's is: without that it would only get slower;
- asyncio is its real event loop with ``time()`` overridden and a selector that returns at once and
  moves that time. Its turn does more than expire timers; that part is spread over all timers that a
  turn fires, and is what asyncio users pay;
- "expire" is per timer scheduled, not per timer fired: clearing away the dead is part of it;
- what counts is the processor time of this process, with the collector of cyclic garbage off.
"""

import asyncio
import gc
import heapq
import random
import selectors
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).parents[2]))

from lpechod.engine.wheel import NEVER, Timer, TimerWheel

SIZES = (1_000, 100_000)
REPEATS = 5
TICKS_PER_SECOND = 10
HORIZON_TICKS = 300 * TICKS_PER_SECOND
CANCELLED = 0.9

PHASES = ("schedule", "move", "cancel", "expire")


class Task(Timer):
    """A timer that counts how often it fires.

    Args:
        fired: one entry for each firing.
    """

    __slots__ = ("fired", "handle")

    def __init__(self, fired: list[float]) -> None:
        super().__init__()
        self.fired = fired
        self.handle: Any = None
        """The entry or handle that stands for the task in the other two."""

    def on_deadline(self, now: float) -> None:
        """Fire."""
        self.fired.append(now)


class Contender(Protocol):
    """A place for timers."""

    def schedule(self, task: Task, tick: int) -> None:
        """File a task."""

    def move(self, task: Task, tick: int) -> None:
        """File a task anew that is filed already."""

    def cancel(self, task: Task) -> None:
        """Take a task out."""

    def expire(self) -> None:
        """Let time pass until no task is left."""


class Wheel:
    """The wheel of the daemon."""

    def __init__(self) -> None:
        wheel = self._wheel = TimerWheel()
        self.schedule = wheel.schedule
        self.move = wheel.schedule
        self.cancel = wheel.cancel

    def expire(self) -> None:
        """Jump from wake-up to wake-up, firing as the loop does."""
        wheel = self._wheel
        while (tick := wheel.next_tick()) != NEVER:
            for timer in wheel.advance(tick):
                if timer.claim():
                    timer.on_deadline(tick)


class Heap:
    """A heap of entries, deleted by marking them."""

    def __init__(self) -> None:
        self._heap: list[list[Any]] = []
        self._dead = 0
        self._sequence = 0

    def schedule(self, task: Task, tick: int) -> None:
        """Push an entry; its sequence number settles ties."""
        self._sequence += 1
        entry = task.handle = [tick, self._sequence, task]
        heapq.heappush(self._heap, entry)

    def move(self, task: Task, tick: int) -> None:
        """Mark the entry, and push another."""
        self.cancel(task)
        self.schedule(task, tick)

    def cancel(self, task: Task) -> None:
        """Mark the entry, and rebuild the heap when most of it is marked."""
        task.handle[2] = None
        self._dead += 1
        if self._dead > 100 and self._dead * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2] is not None]
            heapq.heapify(self._heap)
            self._dead = 0

    def expire(self) -> None:
        """Pop until the heap is empty."""
        while self._heap:
            now = self._heap[0][0]
            due = []
            while self._heap and self._heap[0][0] <= now:
                task = heapq.heappop(self._heap)[2]
                if task is not None:
                    due.append(task)
            for task in due:
                task.on_deadline(now)


class _JumpingSelector(selectors.SelectSelector):
    """Instead of waiting, moves the time of a loop."""

    loop: "_JumpingLoop"

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.loop.now += timeout or 0.0
        return []


class _JumpingLoop(asyncio.SelectorEventLoop):
    """asyncio's own loop, but for where it takes the time from."""

    now = 0.0

    def time(self) -> float:
        return self.now


class Asyncio:
    """``call_later`` and ``cancel`` of asyncio."""

    def __init__(self) -> None:
        selector = _JumpingSelector()
        self._loop = selector.loop = _JumpingLoop(selector)

    def schedule(self, task: Task, tick: int) -> None:
        """Call later."""
        seconds = tick / TICKS_PER_SECOND
        task.handle = self._loop.call_later(seconds, task.on_deadline, seconds)

    def move(self, task: Task, tick: int) -> None:
        """Cancel, and call later: there is no other way."""
        task.handle.cancel()
        self.schedule(task, tick)

    def cancel(self, task: Task) -> None:
        """Cancel."""
        task.handle.cancel()

    def expire(self) -> None:
        """Turn the loop until it has no timers."""
        loop: Any = self._loop  # Its turn and its heap are private, and typeshed keeps to that.
        while loop._scheduled:
            loop._run_once()
        while loop._ready:
            loop._run_once()
        loop.close()


CONTENDERS: Mapping[str, Callable[[], Contender]] = {
    "wheel": Wheel,
    "heapq": Heap,
    "asyncio": Asyncio,
}


def live(contender: Contender, size: int) -> dict[str, float]:
    """Take one contender through the load.

    Args:
        contender: the contender, empty.
        size: how many timers.

    Returns:
        Nanoseconds for each timer that the phase is about ("expire": for each scheduled).
    """
    chance = random.Random(size)  # noqa: S311 - the same load for all.
    fired: list[float] = []
    tasks = [Task(fired) for _ in range(size)]
    first = [chance.randint(1, HORIZON_TICKS) for _ in tasks]
    second = [tick + chance.randint(1, HORIZON_TICKS // 10) for tick in first]
    doomed = chance.sample(tasks, int(size * CANCELLED))

    def schedule() -> None:
        for task, tick in zip(tasks, first, strict=True):
            contender.schedule(task, tick)

    def move() -> None:
        for task, tick in zip(tasks, second, strict=True):
            contender.move(task, tick)

    def cancel() -> None:
        for task in doomed:
            contender.cancel(task)

    steps = (
        ("schedule", schedule, size),
        ("move", move, size),
        ("cancel", cancel, len(doomed)),
        ("expire", contender.expire, size),
    )
    costs = {}
    for phase, step, count in steps:
        gc.collect()
        gc.disable()
        start = time.process_time_ns()
        step()
        costs[phase] = (time.process_time_ns() - start) / count
        gc.enable()
    if len(fired) != size - len(doomed):
        raise AssertionError(f"{len(fired)} timers fired instead of {size - len(doomed)}")
    return costs


def measure(size: int) -> dict[str, dict[str, float]]:
    """Return the median cost of each phase, by contender; repeats are interleaved."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(REPEATS):
        for name, contender in CONTENDERS.items():
            runs[name].append(live(contender(), size))
    return {
        name: {phase: statistics.median(run[phase] for run in costs) for phase in PHASES}
        for name, costs in runs.items()
    }


def main() -> None:
    """Print the table."""
    print(f"ns per operation, median of {REPEATS}; in brackets: times the wheel's")
    header = "".join(f"{name:>18}" for name in CONTENDERS)
    print(f"{'timers':>8}  {'operation':<10}{header}")
    for size in SIZES:
        costs = measure(size)
        for phases in [(phase,) for phase in PHASES] + [PHASES]:
            label = phases[0] if len(phases) == 1 else "whole life"
            sums = {name: sum(cost[phase] for phase in phases) for name, cost in costs.items()}
            cells = "".join(
                f"{value:>10.0f} ({value / sums['wheel']:4.1f}x)" for value in sums.values()
            )
            print(f"{size:>8}  {label:<10}{cells}")


if __name__ == "__main__":
    main()
