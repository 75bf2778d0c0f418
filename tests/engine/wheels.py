"""Timers and wheels that tell tests what happens to them."""

from collections.abc import Iterator

import pytest

from lpechod.engine.wheel import Timer, TimerWheel

SLOTS = pytest.mark.parametrize("slots", [1, 2, 8, 1024])


class Alarm(Timer):
    """A timer that can be told from others in a failure report."""

    __slots__ = ("name",)

    def __init__(self, name: str = "alarm") -> None:
        super().__init__()
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name} at {self.tick}>"

    def on_deadline(self, now: float) -> None:
        raise NotImplementedError(now)


class CountingWheel(TimerWheel):
    """A wheel that records which of its slots `advance` has opened."""

    __slots__ = ("opened",)

    def __init__(self, slots: int, tick: int = 0) -> None:
        super().__init__(slots, tick)
        self.opened: list[int] = []

    def _passed(self, tick: int) -> Iterator[int]:
        for count, slot in enumerate(super()._passed(tick)):
            assert count < len(self._slots), "more than one rotation"
            self.opened.append(slot)
            yield slot
