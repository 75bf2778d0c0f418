"""The tables of the configuration file: every key, its default and what it is for.

These models are the only definition of the keys. The example file, the JSON Schema and the output
of ``lpechod config`` come from their descriptions and defaults, or are tested against them. A check
that spans keys of a table stands at the later key: so it is reported along with all other problems.
"""

from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from lpechod.engine.buffers import RECEIVE_BYTES, capacity_for
from lpechod.net.address import TcpAddress
from lpechod.net.networks import AccessList
from lpechod.ops.config_errors import Conflict, refuse
from lpechod.ops.config_types import (
    Count,
    Duration,
    FilePath,
    ListenAddress,
    Network,
    OptionalAddress,
    Poller,
    Rate,
    Size,
    Switch,
    Timeout,
    Workers,
)
from lpechod.ops.units import format_duration, format_size
from lpechod.wire.frames import HEADER_BYTES

# Descriptors are C ints: nothing that is counted here can outnumber them.
_MAX_COUNT: Final = 2**31 - 1

# Workers give a sign of life five times a second at least, between two turns of their loop.
_MIN_WATCHDOG_SECONDS: Final = 1.0


def _describe_defaults(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Show each default as it stands in a file, and leave out titles that only repeat the key.

    A key that is absent by default has none: in TOML there is no null to write. Bounds are put in
    where a type has a schema of its own, for which pydantic leaves them out.
    """
    defaults = model.model_construct().model_dump(mode="json")
    for key, of in schema["properties"].items():
        of.pop("title", None)
        of.pop("default", None)
        if defaults.get(key) is not None:
            of["default"] = defaults[key]
        elif "anyOf" in of:
            of.update(next(each for each in of.pop("anyOf") if each != {"type": "null"}))
        for each in model.model_fields[key].metadata:
            for name, keyword in (("ge", "minimum"), ("le", "maximum")):
                if hasattr(each, name):
                    of[keyword] = getattr(each, name)


class Table(BaseModel):
    """What all tables share: no unknown keys, no changes, defaults that pass the same checks."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        json_schema_extra=_describe_defaults,
    )


class ServerConfig(Table):
    """The processes."""

    workers: Workers = Field(
        default=1,
        description='Worker processes: 1 to 1024, or "auto" for one per CPU.',
    )
    poller: Poller = Field(
        default="auto",
        description="How readiness is asked for: auto, epoll, epoll-et, poll, select or kqueue.",
    )
    drain_timeout: Duration = Field(
        default=30.0,
        description='Time connections have to end on stop or reload; "0s" closes them at once.',
    )
    watchdog: Timeout = Field(
        default=10.0,
        description="Time without a sign of life after which a worker is killed and replaced.",
    )

    @field_validator("watchdog")
    @classmethod
    def _is_patient(cls, watchdog: float) -> float:
        if watchdog < _MIN_WATCHDOG_SECONDS:
            raise ValueError(
                f"{format_duration(watchdog)} would kill workers that are only busy; "
                f'write at least {format_duration(_MIN_WATCHDOG_SECONDS)}, or "off"'
            )
        return watchdog


class TlsConfig(Table):
    """What TLS is spoken with."""

    certificate: FilePath = Field(
        description="PEM file of the certificate, followed by those between it and a root.",
    )
    key: FilePath = Field(
        description="PEM file of its private key, without a passphrase.",
    )
    client_ca: FilePath | None = Field(
        default=None,
        description="PEM file of authorities; each client must present a certificate "
        "issued by one of them.",
    )
    min_version: Literal["1.2", "1.3"] = Field(
        default="1.2",
        description='Oldest version of TLS that is spoken: "1.2" or "1.3".',
    )


class ListenConfig(Table):
    """An address that clients connect to; repeatable."""

    address: ListenAddress = Field(
        default=TcpAddress("::", 9000),
        description='"host:port", "[v6]:port", ":port" for every interface, or "unix:/path".',
    )
    backlog: Count = Field(
        default=4096,
        ge=1,
        le=65535,
        description="Connections the kernel queues for us, at most net.core.somaxconn.",
    )
    proxy_protocol: Switch = Field(
        default=False,
        description="Whether proxies connect, and send a PROXY header, v1 or v2, for each client.",
    )
    trusted_proxies: tuple[Network, ...] = Field(
        default=(),
        description="Networks of these proxies; nobody else may connect then.",
    )
    allow: tuple[Network, ...] = Field(
        default=(),
        description="Networks of the clients that may connect; if empty, all may.",
    )
    deny: tuple[Network, ...] = Field(
        default=(),
        description="Networks of clients that may not; where several match, "
        "the longest prefix decides.",
    )
    tls: TlsConfig | None = Field(
        default=None,
        description="With this table, TLS is spoken here.",
    )

    @field_validator("trusted_proxies")
    @classmethod
    def _knows_its_proxies(
        cls, proxies: tuple[Network, ...], info: ValidationInfo
    ) -> tuple[Network, ...]:
        expected = info.data.get("proxy_protocol")
        if proxies and expected is False:
            raise ValueError("no proxy is expected here; add proxy_protocol = true")
        if expected and not proxies and isinstance(info.data.get("address"), TcpAddress):
            raise ValueError(
                "with proxy_protocol, name the networks of your proxies: anybody else who connects "
                "could pretend to be any client"
            )
        return proxies

    @field_validator("deny")
    @classmethod
    def _does_not_contradict(
        cls, deny: tuple[Network, ...], info: ValidationInfo
    ) -> tuple[Network, ...]:
        AccessList(info.data.get("allow", ()), deny)
        return deny


class LimitsConfig(Table):
    """What clients may use."""

    max_frame: Size = Field(
        default=1 << 20,
        ge=1,
        le=0xFFFFFFFF,
        description="Longest frame; a client that announces a longer one is disconnected.",
    )
    max_connections: Count = Field(
        default=10_000,
        ge=1,
        le=_MAX_COUNT,
        description="Connections at a time, all workers together.",
    )
    max_connections_per_ip: Count = Field(
        default=0,
        ge=0,
        le=_MAX_COUNT,
        description="Connections at a time from one address, all workers together; 0 is no limit.",
    )
    connection_rate: Rate = Field(
        default=0.0,
        ge=0,
        le=1_000_000,
        description="New connections a second from one address, for each worker; 0 is no limit.",
    )
    connection_burst: Count = Field(
        default=50,
        ge=1,
        le=_MAX_COUNT,
        description="New connections from one address that may come at once, above that rate.",
    )
    ipv4_prefix: Count = Field(
        default=32,
        ge=1,
        le=32,
        description="Bits by which IPv4 clients are told apart for these three limits.",
    )
    ipv6_prefix: Count = Field(
        default=64,
        ge=1,
        le=128,
        description="Bits by which IPv6 clients are told apart: a host has a /64, or more.",
    )
    max_handshakes: Count = Field(
        default=256,
        ge=1,
        le=_MAX_COUNT,
        description="TLS handshakes under way at a time in a worker; further ones wait.",
    )
    high_watermark: Size = Field(
        default=256 << 10,
        ge=1,
        description="Unsent echo bytes at which we stop reading from a connection.",
    )
    low_watermark: Size = Field(
        default=64 << 10,
        ge=1,
        description="Unsent echo bytes under which we read from it again.",
    )
    max_buffered: Size = Field(
        default=256 << 20,
        description="Bytes a worker holds for all its connections; beyond, the largest are shed.",
    )
    overload_threshold: Count = Field(
        default=90,
        ge=50,
        le=100,
        description="Percent of max_connections, and of max_buffered, at which overload begins.",
    )

    @field_validator("low_watermark")
    @classmethod
    def _below_high(cls, low: int, info: ValidationInfo) -> int:
        high = info.data.get("high_watermark")
        if high is not None and low >= high:
            message = (
                f"{format_size(low)} must be less than high_watermark, {format_size(high)}, "
                "or reading would stop and resume with every echo"
            )
            refuse(Conflict(message, because_of=(("limits", "high_watermark"),)))
        return low

    @field_validator("max_buffered")
    @classmethod
    def _has_room_for_frames(cls, size: int, info: ValidationInfo) -> int:
        frame, high = info.data.get("max_frame"), info.data.get("high_watermark")
        if frame is None or high is None:
            return size
        needed = least_buffered(frame, high)
        if size < needed:
            message = (
                f"{format_size(size)} is less than {format_size(needed)}; three buffers for a "
                "frame of max_frame, each up to four times as large as that, and two of "
                f"{format_size(RECEIVE_BYTES)} must fit; and high_watermark, with five of those "
                "or with 2 * max_frame"
            )
            causes = (("limits", "max_frame"), ("limits", "high_watermark"))
            refuse(Conflict(message, because_of=causes))
        return size


def least_buffered(max_frame: int, high_watermark: int) -> int:
    """Return the least ``limits.max_buffered`` that suffices to echo every frame, in bytes.

    That is, of a client that reads its echoes. While one frame is sent back, the next is collected;
    and when that has outgrown its buffer, it is copied to one of two or four times the size
    (`lpechod.engine.buffers`). Of many small frames that come with one read, what has not been
    looked at yet is in a buffer of its own, and is copied from there. And what is sent back may
    come to the high watermark. Together that is less than what is taken for a want of memory by
    default (``limits.overload_threshold``).

    Args:
        max_frame: the longest body, in bytes.
        high_watermark: pending bytes at which reading stops.
    """
    read = capacity_for(RECEIVE_BYTES)
    needed = max(
        3 * capacity_for(max_frame + HEADER_BYTES) + 2 * read,
        5 * read + high_watermark,
        2 * max_frame + high_watermark,
    )
    return -(-needed // 1024) * 1024


class TimeoutsConfig(Table):
    """How long clients may take; "off" or 0 is for ever."""

    idle: Timeout = Field(
        default=300.0,
        description="Silence with nothing pending after which a connection is closed.",
    )
    frame: Timeout = Field(
        default=30.0,
        description="Time a frame has to arrive whole, not counting what min_rate adds.",
    )
    min_rate: Size = Field(
        default=1 << 10,
        ge=1,
        description="Bytes per second: a frame gets its length divided by this as extra time.",
    )
    write: Timeout = Field(
        default=30.0,
        description="Time without a byte of echo taken after which a connection is closed.",
    )
    handshake: Timeout = Field(
        default=10.0,
        description="Time for what precedes the first frame, such as a TLS handshake.",
    )
    lifetime: Timeout = Field(
        default=float("inf"),
        description="Age at which a connection is closed, at its next frame boundary.",
    )
    overload_idle: Timeout = Field(
        default=10.0,
        description="Under overload, silence after which a connection may be closed for others.",
    )
    overload_frame: Timeout = Field(
        default=5.0,
        description="Under overload, takes the place of frame: who exceeds it "
        "may be closed for others.",
    )


class LogConfig(Table):
    """What is written to standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info",
        description="Least severe lines to write: debug, info, warning or error.",
    )
    format: Literal["auto", "console", "json"] = Field(
        default="auto",
        description="console, json, or auto: console on a terminal, json otherwise.",
    )
    burst: Count = Field(
        default=20,
        ge=1,
        le=_MAX_COUNT,
        description="Lines of one event that are written before its rate is limited.",
    )
    rate: Rate = Field(
        default=5.0,
        gt=0,
        le=1_000_000,
        description="Lines of one event per second from then on.",
    )


class MetricsConfig(Table):
    """What Prometheus scrapes."""

    address: OptionalAddress = Field(
        default=TcpAddress("127.0.0.1", 10862),
        description='Where /metrics is served, written like a listen address, or "off".',
    )
    bearer_token_file: FilePath | None = Field(
        default=None,
        description="File with the bearer token that a scraper must send.",
    )
    tls: TlsConfig | None = Field(
        default=None,
        description="With this table, the pages are served over HTTPS.",
    )
