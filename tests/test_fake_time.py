"""The clock and the poller that other tests believe."""

import os
from contextlib import ExitStack

import pytest

from lpechod.engine.poller import READABLE, open_poller
from tests.fake_time import FakeClock, FakeTimePoller


class TestFakeTime:
    """Time that stands still until somebody would wait."""

    def test_clock(self) -> None:
        """The clock stands still until it is moved, counts who asks, and does not go back."""
        clock = FakeClock(5.0)
        assert (clock(), clock(), clock.readings) == (5.0, 5.0, 2)
        clock.advance(0.5)
        assert (clock.now, clock.readings) == (5.5, 2)

        with pytest.raises(ValueError, match="does not go back"):
            clock.advance(-0.1)

    @pytest.mark.parametrize(
        ("timeout", "passed"), [(0.0, 0.0), (0.25, 0.25), (1e-12, 0.001), (0.0011, 0.002)]
    )
    def test_poller_skips_the_wait(self, timeout: float, passed: float) -> None:
        """Where nothing is ready the clock moves by the time-out, rounded up to a millisecond."""
        clock = FakeClock(5.0)
        poller = FakeTimePoller(open_poller("auto"), clock)

        assert poller.poll(timeout) == []
        assert clock.now == 5.0 + passed
        assert (poller.timeouts, poller.idle_polls) == ([timeout], 1)
        poller.close()

    def test_poller_sees_real_descriptors(self) -> None:
        """What is ready is returned, and the clock stands still."""
        stack = ExitStack()
        clock = FakeClock(5.0)
        poller = FakeTimePoller(open_poller("auto"), clock)
        reader, writer = os.pipe()
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        poller.register(reader, READABLE)
        os.write(writer, b"x")

        assert poller.poll(60.0) == [(reader, READABLE)]
        assert (clock.now, poller.idle_polls) == (5.0, 0)
        stack.close()
        poller.close()
