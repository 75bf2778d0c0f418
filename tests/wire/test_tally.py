"""The histogram of durations, and a tally's beginning."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpechod.wire.frames import SIZE_CLASSES
from lpechod.wire.tally import Histogram, Tally


def class_of(seconds: float, first: float = 1.0, classes: int = 5) -> int:
    """Return the class that a single observation falls into."""
    histogram = Histogram(first, classes)
    histogram.observe(seconds)
    return histogram.counts.index(1)


class TestHistogram:
    """Classes that double."""

    @pytest.mark.parametrize(
        ("seconds", "expected"), [(0.0, 0), (0.99, 0), (1.5, 1), (3.9, 2), (4.1, 3), (7.9, 3)]
    )
    def test_classes(self, seconds: float, expected: int) -> None:
        """Class k ends at ``first * 2**k``."""
        assert class_of(seconds) == expected

    @pytest.mark.parametrize("seconds", [8.1, 15.9, 16.1, 1e9])
    def test_last_class_takes_the_rest(self, seconds: float) -> None:
        """Whatever is longer than all classes falls into the last one."""
        assert class_of(seconds) == 4

    def test_weight(self) -> None:
        """A weight stands for so many observations of the same duration."""
        histogram = Histogram(1.0, 5)
        histogram.observe(1.5, 3)
        histogram.observe(100.0, 2)
        assert histogram.counts == [0, 3, 0, 0, 2]
        assert histogram.seconds == 204.5

    @given(st.lists(st.floats(0, 1e6), max_size=20), st.floats(1e-6, 10))
    def test_every_observation_counts_once(self, durations: list[float], first: float) -> None:
        """No duration is lost or counted twice, and each class holds what its bounds say."""
        histogram = Histogram(first, 21)
        for seconds in durations:
            histogram.observe(seconds)
        assert sum(histogram.counts) == len(durations)
        for k in range(20):
            upper = first * 2**k
            inside = sum(histogram.counts[: k + 1])
            assert inside >= sum(seconds < upper * (1 - 1e-9) for seconds in durations)
            assert inside <= sum(seconds < upper * (1 + 1e-9) for seconds in durations)


class TestTally:
    """What a worker starts with."""

    def test_starts_at_zero(self) -> None:
        """Every count exists from the start, at zero, and no two tallies share one."""
        one, other = Tally(), Tally()
        assert one.frame_sizes == [0] * SIZE_CLASSES
        assert one.frames == one.received_bytes == one.echoed_bytes == one.unsent_bytes == 0
        one.frame_sizes[3] += 1
        one.echo_delays.observe(1.0)
        assert sum(other.frame_sizes) == sum(other.echo_delays.counts) == 0
