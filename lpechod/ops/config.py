"""The configuration file as a whole: reading it, checking it, and writing it back.

Reading either gives a complete, frozen `Config` or raises one `ConfigError` with everything that is
wrong; nothing is half configured. The keys are defined in `lpechod.ops.config_tables`; what has to
be true across tables is checked here.
"""

import codecs
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from lpechod.net.address import Address, TcpAddress
from lpechod.ops import toml
from lpechod.ops.config_errors import ConfigError, Conflict, Problem, explain, refuse
from lpechod.ops.config_tables import (
    LimitsConfig,
    ListenConfig,
    LogConfig,
    MetricsConfig,
    ServerConfig,
    Table,
    TimeoutsConfig,
    TlsConfig,
)
from lpechod.ops.toml import KeyPath

__all__ = [
    "DEFAULT_PATH",
    "Config",
    "ConfigError",
    "LimitsConfig",
    "ListenConfig",
    "LogConfig",
    "MetricsConfig",
    "Problem",
    "ServerConfig",
    "TimeoutsConfig",
    "TlsConfig",
    "dump_config",
    "json_schema",
    "load_config",
    "locate_config",
]

DEFAULT_PATH: Final = Path("/etc/lpechod/config.toml")

# select(2) can't hold a descriptor past FD_SETSIZE, 1024; 64 are for listeners, logs and metrics.
_MAX_CONNECTIONS_OF_SELECT: Final = 1024 - 64


class Config(Table):
    """Configuration of lpechod."""

    server: ServerConfig = Field(default_factory=ServerConfig, description="The processes.")
    listen: tuple[ListenConfig, ...] = Field(
        default_factory=lambda: (ListenConfig(),),
        description="Addresses that clients connect to, a table for each.",
        json_schema_extra={"minItems": 1},
    )
    limits: LimitsConfig = Field(default_factory=LimitsConfig, description="What clients may use.")
    timeouts: TimeoutsConfig = Field(
        default_factory=TimeoutsConfig,
        description='How long clients may take; "off" or 0 is for ever.',
    )
    log: LogConfig = Field(
        default_factory=LogConfig, description="What is written to standard error."
    )
    metrics: MetricsConfig = Field(
        default_factory=MetricsConfig, description="What Prometheus scrapes."
    )

    @field_validator("listen", mode="before")
    @classmethod
    def _has_a_listener(cls, tables: object) -> object:
        # Not min_length: pydantic counts what is left of a list after dropping invalid elements.
        if tables in ([], ()):
            raise ValueError("at least one [[listen]] is needed")
        return tables

    @field_validator("listen")
    @classmethod
    def _listens_once(cls, listen: tuple[ListenConfig, ...]) -> tuple[ListenConfig, ...]:
        first: dict[Address, int] = {}
        refuse(
            *(
                Conflict(
                    f"{table.address} is the address of listen[{other}] already", (index, "address")
                )
                for index, table in enumerate(listen)
                if (other := first.setdefault(table.address, index)) != index
                and not _chosen_by_kernel(table.address)
            )
        )
        return listen

    @field_validator("limits")
    @classmethod
    def _fits_the_poller(cls, limits: LimitsConfig, info: ValidationInfo) -> LimitsConfig:
        server = info.data.get("server")
        if server is None or server.poller != "select":
            return limits
        if limits.max_connections > _MAX_CONNECTIONS_OF_SELECT:
            message = (
                f"{limits.max_connections} is more than {_MAX_CONNECTIONS_OF_SELECT}, the most "
                'that poller "select" can serve; lower it or use another server.poller'
            )
            refuse(Conflict(message, ("max_connections",), (("server", "poller"),)))
        return limits

    @field_validator("metrics")
    @classmethod
    def _keeps_metrics_apart(cls, metrics: MetricsConfig, info: ValidationInfo) -> MetricsConfig:
        for index, table in enumerate(info.data.get("listen", ())):
            if table.address == metrics.address and not _chosen_by_kernel(table.address):
                message = f"{table.address} is the address of listen[{index}] already"
                refuse(Conflict(message, ("address",), (("listen", index, "address"),)))
        return metrics


def _chosen_by_kernel(address: Address) -> bool:
    """Return whether the port is 0: then equal addresses still become different ones."""
    return isinstance(address, TcpAddress) and address.port == 0


def load_config(path: str | Path) -> Config:
    """Read and check a configuration file, but none of the files that it names.

    Args:
        path: The TOML file; it is named in every message as it is given here.

    Raises:
        ConfigError: The file can't be read or can't be used, with every reason.

    """
    return locate_config(path)[0]


def locate_config(path: str | Path) -> tuple[Config, Mapping[KeyPath, int]]:
    """Read a configuration file as `load_config` does; tell also on which line each key stands."""
    file = str(path)
    text = _read_text(file)
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError([_syntax_problem(file, text, error)]) from None
    lines = toml.locate(text)
    try:
        return Config.model_validate(document), lines
    except ValidationError as error:
        raise ConfigError(explain(error, file, lines, Config)) from None


def _read_text(file: str) -> str:
    """Return the text of a file, or say why there is none and what to do about it."""
    try:
        with Path(file).open("rb") as opened:
            data = opened.read()
            is_pipe = stat.S_ISFIFO(os.fstat(opened.fileno()).st_mode)
    except OSError as error:
        match error:
            case FileNotFoundError():
                way_out = "create it, or name another: lpechod serve --config FILE"
            case PermissionError():
                way_out = "the user that lpechod runs as must be able to read it"
            case _:
                way_out = "name a file: lpechod serve --config FILE"
        reason = f"can't be read: {error.strerror}; {way_out}"
        raise ConfigError([Problem(file, None, "", reason)]) from None
    if is_pipe and not data:
        # Read once more by a reload, it would stand for all defaults, and open us to everybody.
        reason = "is a pipe with nothing in it; what is read at each reload has to be a file"
        raise ConfigError([Problem(file, None, "", reason)])
    if data.startswith(codecs.BOM_UTF8):
        reason = "begins with a byte order mark; save it as UTF-8 without one"
        raise ConfigError([Problem(file, 1, "", reason)])
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        reason = f"byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        raise ConfigError([Problem(file, line, "", reason)]) from None


def _syntax_problem(file: str, text: str, error: Exception) -> Problem:
    """Say what tomllib stumbled over, and on which line."""
    match error:
        case tomllib.TOMLDecodeError():
            reason, _, place = str(error).rpartition(" (at ")
            known = re.match(r"line (\d+)", place)
            # Otherwise the place is "end of document".
            line = int(known[1]) if known else text.rstrip().count("\n") + 1
            return Problem(file, line, "", f"not TOML: {reason}")
        case RecursionError():
            return Problem(file, None, "", "arrays or tables are nested too deeply")
        case _:
            # int() refuses numbers of thousands of digits, and tomllib passes that on.
            return Problem(file, None, "", "a number has too many digits")


def dump_config(config: Config) -> str:
    """Write the effective configuration as TOML that `load_config` reads back as an equal one."""
    return toml.dumps(config.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of the file, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Config.model_json_schema(),
        "title": "lpechod configuration",
    }
