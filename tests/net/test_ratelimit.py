"""The rate limit: held against its definition, and against those who want to exhaust its memory.

Where results have to be exact, rates are eighths and times are 64ths, which binary fractions hold.
"""

from collections import defaultdict
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lpechod.net.ratelimit import RateLimit

RATES = st.integers(1, 80).map(lambda eighths: eighths / 8)
BURSTS = st.integers(1, 6)
STARTS = st.integers(0, 1 << 30).map(lambda ticks: ticks / 64)


def within(times: list[Fraction], rate: float, burst: int) -> bool:
    """Look at every interval that ends with the last of some times: is none too full?"""
    return all(
        len(times) - first <= burst + Fraction(rate) * (times[-1] - times[first])
        for first in range(len(times))
    )


class TestExactness:
    """Neither too many nor too few."""

    @given(
        RATES,
        BURSTS,
        STARTS,
        st.lists(
            st.tuples(st.integers(0, 20) | st.integers(0, 2000), st.integers(0, 4)), max_size=80
        ),
    )
    @settings(deadline=None)
    def test_refuses_exactly_what_would_be_too_much(
        self, rate: float, burst: int, start: float, asked: list[tuple[int, int]]
    ) -> None:
        """A key is admitted if and only if no interval then holds more than it may."""
        limit = RateLimit(rate, burst)
        admitted: defaultdict[int, list[Fraction]] = defaultdict(list)
        now = start
        for gap, key in asked:
            now += gap / 64
            times = [*admitted[key], Fraction(now)]
            expected = within(times, rate, burst)
            if expected:
                admitted[key] = times

            assert limit.admits(key, now) is expected

        assert limit.evictions == 0

    @given(
        st.floats(1e-3, 1e4),
        BURSTS,
        st.floats(0, 1e7),
        st.lists(st.floats(0, 3) | st.just(0.0), max_size=60),
    )
    @settings(deadline=None)
    def test_any_rate_at_any_time(
        self, rate: float, burst: int, start: float, gaps: list[float]
    ) -> None:
        """With numbers that have to be rounded, too, no interval gets more than it may."""
        limit = RateLimit(rate, burst)
        admitted: list[Fraction] = []
        now = start
        for gap in gaps:
            now += gap / rate
            if limit.admits("key", now):
                admitted.append(Fraction(now))
                slack = Fraction(1, 10**4)
                assert all(
                    len(admitted) - first
                    <= burst + slack + Fraction(rate) * (admitted[-1] - admitted[first])
                    for first in range(len(admitted))
                )

    @given(
        st.floats(1e-3, 1e4),
        BURSTS,
        st.floats(0, 1e7),
        st.lists(st.floats(1.0001, 3), max_size=60),
        st.integers(1, 70),
    )
    @settings(deadline=None)
    def test_who_keeps_to_the_rate_is_never_refused(
        self, rate: float, burst: int, start: float, gaps: list[float], capacity: int
    ) -> None:
        """A client below the rate gets in each time, while others exhaust the memory or not."""
        limit = RateLimit(rate, burst, capacity)
        now = start
        for turn, gap in enumerate(gaps):
            now += gap / rate
            for other in range(3):
                limit.admits((turn, other), now)
                limit.admits("greedy", now)

            assert limit.admits("modest", now)

    def test_a_bucket_fills_up_one_by_one(self) -> None:
        """After a burst one more is admitted each 1/rate seconds, and a full burst after a rest."""
        limit = RateLimit(2.0, 3)

        assert [limit.admits("a", 100.0) for _ in range(5)] == [True] * 3 + [False] * 2
        assert not limit.admits("a", 100.499)
        assert [limit.admits("a", 100.5) for _ in range(2)] == [True, False]
        assert [limit.admits("a", 102.0) for _ in range(5)] == [True] * 3 + [False] * 2
        assert [limit.admits("a", 1e6) for _ in range(5)] == [True] * 3 + [False] * 2

    def test_a_refusal_costs_nothing(self) -> None:
        """Who keeps asking while refused gets in as soon as one who waits."""
        limit = RateLimit(1.0, 1)
        limit.admits("a", 0.0)

        assert not any(limit.admits("a", tick / 64) for tick in range(64))
        assert limit.admits("a", 1.0)

    def test_no_error_builds_up(self) -> None:
        """A million connections at a rate that no binary fraction holds shift nothing."""
        rate, start = 0.1, 1e6
        limit = RateLimit(rate, 1)

        admitted = sum(limit.admits("a", start + second) for second in range(1_000_000))

        assert admitted == 100_000


class TestMemory:
    """Many keys."""

    @given(
        st.integers(1, 200),
        st.lists(st.tuples(st.integers(0, 3), st.integers(0, 300)), max_size=400),
    )
    @settings(deadline=None)
    def test_capacity_is_never_passed(self, capacity: int, asked: list[tuple[int, int]]) -> None:
        """There are never more entries than the capacity allows."""
        limit = RateLimit(1.0, 2, capacity)
        now = 0.0
        for gap, key in asked:
            now += gap
            limit.admits(key, now)

            assert limit.entries <= capacity

    @pytest.mark.parametrize("capacity", [1, 2, 31, 32, 33, 63, 64, 65, 1000])
    def test_no_call_looks_at_more_than_a_small_table(self, capacity: int) -> None:
        """However many keys there are, each lies in a table of at most 63."""
        limit = RateLimit(0.001, 1, capacity)
        for key in range(3 * capacity):
            limit.admits(key, 0.0)

        # Integers are their own hashes, so they are spread as evenly as can be.
        assert capacity * 0.9 <= limit.entries <= capacity
        assert max(map(len, limit._tables)) <= 63
        assert limit.evictions == 3 * capacity - limit.entries

    def test_full_buckets_make_room(self) -> None:
        """Entries that tell nothing any more go all at once and do not count as evicted."""
        limit = RateLimit(1.0, 2, capacity=8)
        for key in range(8):
            limit.admits(key, 0.0)
        for key in (6, 7):
            limit.admits(key, 0.0)

        assert limit.entries == 8
        assert limit.admits("new", 1.0)
        assert limit.entries == 3
        assert limit.evictions == 0
        assert [limit.admits(key, 1.0) for key in (6, 6)] == [True, False]

    def test_an_emptied_bucket_outlives_a_flood(self) -> None:
        """Who has used up a burst is not forgotten by making many other keys connect."""
        limit = RateLimit(0.01, 5, capacity=16)
        for _ in range(5):
            limit.admits("greedy", 0.0)
        for key in range(1000):
            limit.admits(key, key / 100)

            assert not limit.admits("greedy", key / 100)

        assert limit.evictions == 1000 - 15

    def test_the_bucket_that_is_full_first_is_evicted(self) -> None:
        """Of those that are needed still, the one that would have been full first is forgotten."""
        limit = RateLimit(1.0, 3, capacity=3)
        for key in "aaabbccc":
            limit.admits(key, 0.0)

        assert limit.admits("new", 0.0)
        assert limit.evictions == 1
        assert [limit.admits(key, 0.0) for key in "ac"] == [False, False]
        assert [limit.admits("new", 0.0) for _ in range(3)] == [True, True, False]

    def test_one_key_is_enough_to_limit(self) -> None:
        """Even a limit that can remember a single key limits that one."""
        limit = RateLimit(1.0, 2, capacity=1)

        assert [limit.admits("a", 0.0) for _ in range(3)] == [True, True, False]
        assert limit.admits("b", 0.0)
        assert limit.entries == 1


@pytest.mark.parametrize(
    ("rate", "burst", "capacity", "message"),
    [
        (0.0, 1, 1, r"a rate is more than 0 a second, found 0\.0"),
        (-1.0, 1, 1, r"a rate is more than 0 a second, found -1\.0"),
        (float("nan"), 1, 1, "a rate is more than 0 a second, found nan"),
        (float("inf"), 1, 1, "a rate is more than 0 a second, found inf"),
        (1.0, 0, 1, "a burst is 1 or more, found 0"),
        (1.0, 1, 0, "a capacity is 1 or more, found 0"),
    ],
)
def test_an_argument_out_of_range_is_refused(
    rate: float, burst: int, capacity: int, message: str
) -> None:
    """A limit that admits nothing or everything is an error of the caller."""
    with pytest.raises(ValueError, match=f"^{message}$"):
        RateLimit(rate, burst, capacity)
