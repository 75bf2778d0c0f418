"""Durations and sizes: what is read, what is refused and why, and that writing loses nothing."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lpechod.ops.units import format_duration, format_size, parse_duration, parse_size

CENTURY_S = 36500 * 86400


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (30, 30.0),
        (0.25, 0.25),
        ("30", 30.0),
        ("0", 0.0),
        (-0.0, 0.0),
        ("1us", 1e-6),
        ("1usec", 1e-6),
        ("3\u00b5s", 3e-6),
        ("3\u03bcs", 3e-6),
        ("500ms", 0.5),
        ("500 msec", 0.5),
        ("1.5s", 1.5),
        ("2sec", 2.0),
        ("1second", 1.0),
        ("2 seconds", 2.0),
        ("5m", 300.0),
        ("5min", 300.0),
        ("1minute", 60.0),
        ("5 minutes", 300.0),
        ("1h", 3600.0),
        ("1hr", 3600.0),
        ("1hour", 3600.0),
        ("2hours", 7200.0),
        ("1d", 86400.0),
        ("1day", 86400.0),
        ("2days", 172800.0),
        ("1w", 604800.0),
        ("1week", 604800.0),
        ("2weeks", 1209600.0),
        ("1h 30m", 5400.0),
        ("1min30s", 90.0),
        (" 1 h  30 min ", 5400.0),
        ("0.1s", 0.1),
        ("36500d", float(CENTURY_S)),
    ],
)
def test_durations_are_read_as_systemd_does(text: object, seconds: float) -> None:
    """Every unit of systemd.time(7) up to weeks is understood, alone, fractional and compound."""
    assert seconds == parse_duration(text)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, 'expected a duration such as "30s", found true'),
        (None, 'expected a duration such as "30s", found None'),
        ([1], 'expected a duration such as "30s", found an array'),
        ("", 'expected a duration such as "30s" or "1h 30min", found ""'),
        ("soon", 'expected a duration such as "30s" or "1h 30min", found "soon"'),
        ("-5s", 'expected a duration such as "30s" or "1h 30min", found "-5s"'),
        ("1h 30", 'expected a duration such as "30s" or "1h 30min", found "1h 30"'),
        ("30 1h", 'expected a duration such as "30s" or "1h 30min", found "30 1h"'),
        ("1h, 3s", 'expected a duration such as "30s" or "1h 30min", found "1h, 3s"'),
        ("\u0663s", 'expected a duration such as "30s" or "1h 30min", found "\u0663s"'),
        ("5 parsecs", 'unknown unit "parsecs" in "5 parsecs"; use us, ms, s, min, h, d or w'),
        ("1M", 'unknown unit "M" in "1M"; use us, ms, s, min, h, d or w'),
        (-1, "a duration can't be negative, found -1"),
        (-math.inf, "a duration can't be negative, found -inf"),
        (math.inf, "a duration is at most 36500d, found inf"),
        ("36501d", 'a duration is at most 36500d, found "36501d"'),
        (10**400, "a duration is at most 36500d, found an integer of 1329 bits"),
        (math.nan, "a duration must be a number, found nan"),
        (1e-7, "a duration is at least 1us, found 1e-07"),
        ("0.1us", 'a duration is at least 1us, found "0.1us"'),
    ],
)
def test_what_is_no_duration_is_refused_with_the_reason(value: object, message: str) -> None:
    """A mistake names what was expected and what was found."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared.
        parse_duration(value)

    assert message == str(caught.value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (1e-6, "1us"),
        (0.0015, "1.5ms"),
        (0.5, "500ms"),
        (1.5, "1.5s"),
        (30, "30s"),
        (90.25, "1min 30.25s"),
        (300, "5min"),
        (5400, "1h 30min"),
        (86400, "1d"),
        (86460, "1d 1min"),
        (604800, "1w"),
        (CENTURY_S, "5214w 2d"),
    ],
)
def test_durations_are_written_as_a_human_would(seconds: float, text: str) -> None:
    """The largest units that fit are used, and fractions stay with the smallest."""
    assert text == format_duration(seconds)


@given(st.just(0.0) | st.floats(1e-6, CENTURY_S) | st.integers(1, CENTURY_S).map(float))
def test_a_written_duration_reads_back_as_the_same(seconds: float) -> None:
    """Writing a duration loses nothing, not even the last bit."""
    assert seconds == parse_duration(format_duration(seconds))


@pytest.mark.parametrize("seconds", [-1.0, math.inf, math.nan])
def test_what_is_no_duration_is_not_written(seconds: float) -> None:
    """The writer refuses what the reader would."""
    with pytest.raises(ValueError, match="a duration "):
        format_duration(seconds)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (1500, 1500),
        ("1500", 1500),
        ("1500B", 1500),
        ("64KiB", 65536),
        (" 64 KiB ", 65536),
        ("1MiB", 1 << 20),
        ("1GiB", 1 << 30),
        ("1TiB", 1 << 40),
        ("64kB", 64_000),
        ("64KB", 64_000),
        ("1MB", 1_000_000),
        ("1GB", 10**9),
        ("1TB", 10**12),
        ("1.5MiB", 1_572_864),
        (2**63 - 1, 2**63 - 1),
    ],
)
def test_sizes_are_read_with_the_base_their_unit_names(text: object, size: int) -> None:
    """KiB and its kin are powers of 1024, kB and its kin of 1000."""
    assert size == parse_size(text)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            True,
            'expected a size such as "64KiB" or a whole number of bytes, found true',
        ),
        (
            1024.0,
            'expected a size such as "64KiB" or a whole number of bytes, found 1024.0',
        ),
        (
            math.nan,
            'expected a size such as "64KiB" or a whole number of bytes, found nan',
        ),
        ("", 'expected a size such as "64KiB" or "1MB", found ""'),
        ("-1KiB", 'expected a size such as "64KiB" or "1MB", found "-1KiB"'),
        ("1MiB 1KiB", 'expected a size such as "64KiB" or "1MB", found "1MiB 1KiB"'),
        ("64k", '"64k" is ambiguous; write 64KiB or 64kB'),
        ("64K", '"64K" is ambiguous; write 64KiB or 64kB'),
        ("1M", '"1M" is ambiguous; write 1MiB or 1MB'),
        ("1.5g", '"1.5g" is ambiguous; write 1.5GiB or 1.5GB'),
        ("64kib", 'unknown unit "kib" in "64kib"; did you mean KiB?'),
        ("8Mb", 'unknown unit "Mb" in "8Mb"; did you mean MB?'),
        (
            "2 pages",
            'unknown unit "pages" in "2 pages"; use B, KiB, MiB, GiB, TiB, kB, MB, GB or TB',
        ),
        ("1.5B", 'a size is a whole number of bytes, found "1.5B"'),
        (-1, "a size can't be negative, found -1"),
        (2**63, "a size is at most 9223372036854775807 bytes, found 9223372036854775808"),
        (
            "99999999TiB",
            'a size is at most 9223372036854775807 bytes, found "99999999TiB"',
        ),
    ],
)
def test_what_is_no_size_is_refused_with_the_reason(value: object, message: str) -> None:
    """A mistake names what was expected and what was found, an ambiguous unit both readings."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the whole message is compared.
        parse_size(value)

    assert message == str(caught.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0"),
        (1, "1"),
        (1500, "1500"),
        (1000, "1kB"),
        (1024, "1KiB"),
        (65536, "64KiB"),
        (1_000_000, "1MB"),
        (1 << 20, "1MiB"),
        (10**12, "1TB"),
        (1 << 50, "1024TiB"),
        (2**63 - 1, "9223372036854775807"),
    ],
)
def test_sizes_are_written_in_the_shortest_form(size: int, text: str) -> None:
    """A unit is used when it divides the size exactly and makes it shorter to read."""
    assert text == format_size(size)


@given(
    st.integers(0, 2**63 - 1)
    | st.builds(lambda n, unit: n * unit, st.integers(0, 9999), st.sampled_from([1024, 10**6]))
)
def test_a_written_size_reads_back_as_the_same(size: int) -> None:
    """Writing a size loses nothing."""
    assert size == parse_size(format_size(size))


@given(st.text(max_size=20) | st.from_regex(r"[0-9. ]{1,6}[a-zA-Z]{0,4}", fullmatch=True))
def test_any_text_is_read_or_refused(text: str) -> None:
    """Reading ends in a value or in ValueError, never in anything else."""
    for parse in (parse_duration, parse_size):
        try:
            value = parse(text)
        except ValueError:
            continue

        assert value >= 0
