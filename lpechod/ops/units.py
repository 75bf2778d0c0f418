"""Durations and sizes, in the units that operators already write elsewhere.

Durations are those of systemd.time(7). Sizes name their base: KiB is 1024 and kB is 1000; a bare K
is refused, because tools read it both ways. What a `format_` function writes, its `parse_`
counterpart reads back as exactly the same value: arithmetic is decimal, so that 0.1 s stays 0.1 s.
"""

import math
import re
from decimal import Decimal
from typing import Final

from lpechod.ops.toml import shown

_SECONDS: Final = {
    name: Decimal(seconds)
    for names, seconds in (
        # The micro sign and the Greek letter mu both occur in practice; systemd accepts both.
        ("us usec \u00b5s \u03bcs", "0.000001"),
        ("ms msec", "0.001"),
        ("s sec second seconds", "1"),
        ("m min minute minutes", "60"),
        ("h hr hour hours", "3600"),
        ("d day days", "86400"),
        ("w week weeks", "604800"),
    )
    for name in names.split()
}
_WHOLE_UNITS: Final = ("w", "d", "h", "min", "s")

_BYTES: Final = {
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "kB": 10**3,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
# KB reads like KiB to many, so it is understood but never written.
_WRITTEN_SIZES: Final = ("KiB", "MiB", "GiB", "TiB", "kB", "MB", "GB", "TB")

# A century. Longer ones are slips of the keyboard, and shorter ones fit every kernel timer.
_MAX_DURATION_S: Final = 36500 * 86400
_MIN_DURATION_S: Final = 1e-6
# The largest integer of TOML and of off_t.
_MAX_SIZE_BYTES: Final = 2**63 - 1

# Twenty digits hold every shortest decimal form of a float in range; more would only cost time.
_NUMBER: Final = r"([0-9]{1,20}(?:\.[0-9]{1,20})?)"
_QUANTITY: Final = re.compile(rf"{_NUMBER}\s*([^\W\d_]*)\s*")


def parse_duration(value: object) -> float:
    """Read a duration as systemd.time(7) writes it.

    Args:
        value: Text such as ``"500ms"``, ``"1.5s"`` or ``"1h 30min"``, or a number of seconds.

    Returns:
        Seconds: 0, or from 1 microsecond to 100 years.

    Raises:
        ValueError: The value is no duration, has an unknown unit, or is out of range.

    """
    seconds: Decimal | float
    match value:
        case str():
            seconds = _parse_compound(value)
        case int() | float() if not isinstance(value, bool):
            seconds = value
        case _:
            raise ValueError(f'expected a duration such as "30s", found {shown(value)}')
    if seconds < 0:
        raise ValueError(f"a duration can't be negative, found {shown(value)}")
    if seconds > _MAX_DURATION_S:
        raise ValueError(f"a duration is at most 36500d, found {shown(value)}")
    if 0 < seconds < _MIN_DURATION_S:
        raise ValueError(f"a duration is at least 1us, found {shown(value)}")
    if math.isnan(seconds):
        raise ValueError("a duration must be a number, found nan")
    # Minus zero is a float too, and would be written "-0".
    return abs(float(seconds))


def _parse_compound(text: str) -> Decimal:
    """Add up the terms of a duration, in seconds; a term without a unit must stand alone."""
    total, position, terms = Decimal(0), 0, 0
    text = text.strip()
    while term := _QUANTITY.match(text, position):
        number, unit = term.groups()
        if unit and unit not in _SECONDS:
            raise ValueError(
                f"unknown unit {shown(unit)} in {shown(text)}; use us, ms, s, min, h, d or w"
            )
        if not unit and (terms or term.end() != len(text)):
            break
        total += Decimal(number) * _SECONDS[unit or "s"]
        position, terms = term.end(), terms + 1
    if position == len(text) and terms:
        return total
    raise ValueError(f'expected a duration such as "30s" or "1h 30min", found {shown(text)}')


def parse_size(value: object) -> int:
    """Read a number of bytes.

    Args:
        value: Text such as ``"64KiB"``, ``"1MB"`` or ``"1.5MiB"``, or a whole number of bytes.

    Returns:
        Bytes, from 0 to 2**63 - 1.

    Raises:
        ValueError: The value is no size, its unit is unknown or ambiguous, it is not a whole number
            of bytes, or it is out of range.

    """
    match value:
        case str():
            size = _parse_quantity(value.strip())
        case int() if not isinstance(value, bool):
            size = value
        case _:
            raise ValueError(
                f'expected a size such as "64KiB" or a whole number of bytes, found {shown(value)}'
            )
    if size < 0:
        raise ValueError(f"a size can't be negative, found {shown(value)}")
    if size > _MAX_SIZE_BYTES:
        raise ValueError(f"a size is at most {_MAX_SIZE_BYTES} bytes, found {shown(value)}")
    return size


def _parse_quantity(text: str) -> int:
    """Multiply a number by its unit, in bytes."""
    quantity = _QUANTITY.fullmatch(text)
    if quantity is None:
        raise ValueError(f'expected a size such as "64KiB" or "1MB", found {shown(text)}')
    number, unit = quantity.groups()
    if unit.upper() in {"K", "M", "G", "T"}:
        prefix = unit.upper()
        decimal = "k" if prefix == "K" else prefix
        raise ValueError(
            f"{shown(text)} is ambiguous; write {number}{prefix}iB or {number}{decimal}B"
        )
    factor = _BYTES.get(unit or "B")
    if factor is None:
        meant = next((known for known in _BYTES if known.lower() == unit.lower()), None)
        hint = f"did you mean {meant}?" if meant else "use B, KiB, MiB, GiB, TiB, kB, MB, GB or TB"
        raise ValueError(f"unknown unit {shown(unit)} in {shown(text)}; {hint}")
    size = Decimal(number) * factor
    if size != int(size):
        raise ValueError(f"a size is a whole number of bytes, found {shown(text)}")
    return int(size)


def format_duration(seconds: float) -> str:
    """Write a duration in the largest units that fit: ``"5min"``, ``"1h 30min"``, ``"500ms"``.

    Args:
        seconds: A duration that `parse_duration` accepts.

    Raises:
        ValueError: The duration is negative, not finite, or out of range.

    """
    rest = Decimal(repr(parse_duration(seconds)))
    if rest == 0:
        return "0s"
    if rest < 1:
        unit = "ms" if rest >= _SECONDS["ms"] else "us"
        return f"{_plain(rest / _SECONDS[unit])}{unit}"
    terms = []
    for unit in _WHOLE_UNITS:
        count, rest = divmod(rest, _SECONDS[unit])
        # A fraction stays with the seconds: 1.5s, not "1s 500ms".
        number = count + rest if unit == "s" else count
        if number:
            terms.append(f"{_plain(number)}{unit}")
    return " ".join(terms)


def _plain(number: Decimal) -> str:
    """Write a decimal without an exponent and without trailing zeros."""
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def format_size(size: int) -> str:
    """Write a size in the unit that makes it shortest: ``"64KiB"``, ``"1MB"``, ``"1500"``.

    Args:
        size: Bytes, as `parse_size` returns them.

    Raises:
        ValueError: The size is negative or out of range.

    """
    size = parse_size(size)
    exact = [f"{size // _BYTES[unit]}{unit}" for unit in _WRITTEN_SIZES if size % _BYTES[unit] == 0]
    # Zero is divisible by everything; a plain number is the form for what no unit divides.
    return min(exact, key=len) if size and exact else str(size)
