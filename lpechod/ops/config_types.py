"""The kinds of value a configuration key can hold.

Each type reads the form of the file, keeps the form the daemon computes with, and writes the form
of the file again: a timeout is seconds inside (infinite when off) and ``"5min"`` outside. The
values of a model are valid input too, so that a configuration can also be built in Python.

Bounds belong to the keys, not to these types: where both have some, releases of pydantic differ on
which of them count.
"""

import math
import select
import sys
from ipaddress import IPv4Network, IPv6Network
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    AllowInfNan,
    BeforeValidator,
    PlainSerializer,
    PlainValidator,
    Strict,
    WithJsonSchema,
)

from lpechod.net.address import Address, TcpAddress, UnixAddress, parse_address
from lpechod.net.networks import Network as AnyNetwork
from lpechod.net.networks import parse_network
from lpechod.ops.toml import shown
from lpechod.ops.units import format_duration, format_size, parse_duration, parse_size

_MAX_WORKERS: Final = 1024

# What the select module has to offer for each poller to exist on a platform.
_POLLER_NEEDS: Final = {
    "auto": "select",
    "epoll": "epoll",
    "epoll-et": "epoll",
    "poll": "poll",
    "select": "select",
    "kqueue": "kqueue",
}


def _read_duration(value: object) -> float:
    if value == "off":
        raise ValueError('can\'t be "off"; "0s" means at once')
    return parse_duration(value)


def _read_timeout(value: object) -> float:
    """Read a duration of which zero, like ``"off"``, means that it never runs out."""
    match value:
        case "off" | math.inf:
            return math.inf
    return parse_duration(value) or math.inf


def _write_timeout(seconds: float) -> str:
    return "off" if seconds == math.inf else format_duration(seconds)


def _write_size(size: int) -> str | int:
    text = format_size(size)
    return int(text) if text.isdecimal() else text


def _write_rate(rate: float) -> float:
    return int(rate) if rate.is_integer() else rate


def _read_workers(value: object) -> int | str:
    match value:
        case "auto":
            return "auto"
        case int() if not isinstance(value, bool) and 1 <= value <= _MAX_WORKERS:
            return value
    raise ValueError(f'expected 1 to {_MAX_WORKERS} or "auto", found {shown(value)}')


def _check_poller(poller: str) -> str:
    available = [name for name, need in _POLLER_NEEDS.items() if hasattr(select, need)]
    if poller in available:
        return poller
    raise ValueError(f"{sys.platform} has no {poller}; available are {', '.join(available)}")


def _read_address(value: object) -> Address:
    match value:
        case TcpAddress() | UnixAddress():
            return value
        case str():
            return parse_address(value)
    raise ValueError(f'expected an address such as "[::]:9000", found {shown(value)}')


def _read_optional_address(value: object) -> Address | None:
    return None if value is None or value == "off" else _read_address(value)


def _write_optional_address(address: Address | None) -> str:
    return "off" if address is None else str(address)


def _read_network(value: object) -> AnyNetwork:
    match value:
        case IPv4Network() | IPv6Network():
            return value
        case str():
            return parse_network(value)
    raise ValueError(f'expected a network such as "192.0.2.0/24", found {shown(value)}')


def _read_path(value: object) -> str:
    expected = 'expected an absolute path such as "/etc/lpechod/tls.pem"'
    if not isinstance(value, str):
        raise ValueError(f"{expected}, found {shown(value)}")  # noqa: TRY004 - pydantic's contract.
    if not value.startswith("/"):
        # It is not shown: somebody may have put a key or a token where its file belongs.
        raise ValueError(f"{expected}; it begins with a slash")
    if not value.isprintable():
        # It would stand in messages of one line; and no path holds a NUL.
        raise ValueError("the path holds a character that can't be shown")
    return value


def _schema(*types: str, **rest: object) -> WithJsonSchema:
    """Describe a type to editors by what JSON can say: it knows no durations and no sizes."""
    return WithJsonSchema({"type": types[0] if len(types) == 1 else list(types), **rest})


Duration: TypeAlias = Annotated[
    float,
    BeforeValidator(_read_duration),
    PlainSerializer(format_duration),
    _schema("string", "number", minimum=0, examples=["30s", "1h 30min"]),
]
"""Seconds, 0 meaning at once."""

Timeout: TypeAlias = Annotated[
    float,
    BeforeValidator(_read_timeout),
    PlainSerializer(_write_timeout),
    _schema("string", "number", minimum=0, examples=["30s", "off"]),
]
"""Seconds, infinite when off."""

Size: TypeAlias = Annotated[
    int,
    BeforeValidator(parse_size),
    PlainSerializer(_write_size),
    _schema("string", "integer", minimum=0, examples=["64KiB", "1MB"]),
]
"""Bytes."""

Count: TypeAlias = Annotated[int, Strict()]
"""A whole number, never text and never a boolean."""

Switch: TypeAlias = Annotated[bool, Strict()]
"""True or false, and nothing that only looks like it."""

Rate: TypeAlias = Annotated[
    float,
    Strict(),
    AllowInfNan(allow_inf_nan=False),
    # The type is left open: pydantic would make 5 a float again.
    PlainSerializer(_write_rate, return_type=Any),
]
"""Events per second."""

Workers: TypeAlias = Annotated[
    int | Literal["auto"],
    BeforeValidator(_read_workers),
    _schema("integer", "string", minimum=1, maximum=_MAX_WORKERS, pattern="^auto$"),
]
"""A number of processes, or one for each CPU."""

Poller: TypeAlias = Annotated[
    Literal["auto", "epoll", "epoll-et", "poll", "select", "kqueue"],
    AfterValidator(_check_poller),
]
"""A readiness mechanism that this platform has."""

ListenAddress: TypeAlias = Annotated[
    Address,
    PlainValidator(_read_address),
    PlainSerializer(str),
    _schema("string", examples=["[::1]:9000", ":9000", "unix:/run/echo.sock"]),
]
"""Where to accept connections."""

OptionalAddress: TypeAlias = Annotated[
    Address | None,
    PlainValidator(_read_optional_address),
    PlainSerializer(_write_optional_address),
    _schema("string", examples=["[::1]:10862", ":10862", "off"]),
]
"""Where to accept connections, None when off."""

FilePath: TypeAlias = Annotated[
    str,
    PlainValidator(_read_path),
    _schema("string", pattern="^/", examples=["/etc/lpechod/tls.pem"]),
]
"""An absolute path: a daemon's working directory is nobody's, and a reload must mean the same."""

Network: TypeAlias = Annotated[
    AnyNetwork,
    PlainValidator(_read_network),
    PlainSerializer(str),
    _schema("string", examples=["192.0.2.0/24", "2001:db8::/32", "192.0.2.1"]),
]
"""A set of addresses with a prefix in common."""
