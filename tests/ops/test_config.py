"""The configuration: defaults, the forms a value may have, and that writing it loses nothing."""

import math
import re
import select
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from lpechod.net.address import TcpAddress, UnixAddress
from lpechod.ops.config import (
    Config,
    ConfigError,
    LimitsConfig,
    ListenConfig,
    LogConfig,
    MetricsConfig,
    ServerConfig,
    TimeoutsConfig,
    TlsConfig,
    dump_config,
    json_schema,
    load_config,
)
from lpechod.ops.config_tables import least_buffered

EXAMPLE = Path(__file__).parents[2] / "config.example.toml"

TABLES: dict[str, type[BaseModel]] = {
    "server": ServerConfig,
    "listen": ListenConfig,
    "limits": LimitsConfig,
    "timeouts": TimeoutsConfig,
    "log": LogConfig,
    "metrics": MetricsConfig,
}

TIME_OUTS = [key for key in TimeoutsConfig.model_fields if key != "min_rate"]


def loads(text: str) -> Config:
    """Load a text as a file would be."""
    with tempfile.NamedTemporaryFile("w", suffix=".toml", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        return load_config(file.name)


def test_an_empty_file_means_the_defaults() -> None:
    """Nothing has to be configured; this is what then holds, in the units of the daemon."""
    config = loads("")

    assert config == Config()
    assert [listen.address for listen in config.listen] == [TcpAddress("::", 9000)]
    assert config.listen[0].backlog == 4096
    assert config.metrics.address == TcpAddress("127.0.0.1", 10862)
    assert config.server.model_dump(mode="python") == {
        "workers": 1,
        "poller": "auto",
        "drain_timeout": "30s",
        "watchdog": "10s",
    }
    assert config.limits == LimitsConfig(
        max_frame=1 << 20,
        max_connections=10_000,
        max_connections_per_ip=0,
        high_watermark=256 << 10,
        low_watermark=64 << 10,
        max_buffered=256 << 20,
        overload_threshold=90,
    )
    assert config.timeouts == TimeoutsConfig(
        idle=300.0,
        frame=30.0,
        min_rate=1024,
        write=30.0,
        handshake=10.0,
        lifetime=math.inf,
        overload_idle=10.0,
        overload_frame=5.0,
    )
    assert (config.log.level, config.log.format) == ("info", "auto")
    assert (config.log.burst, config.log.rate) == (20, 5.0)


def test_the_example_is_the_defaults_with_each_key_explained() -> None:
    """Every key stands in the example at its default, under its own description."""
    text = EXAMPLE.read_text()
    lines = text.splitlines()
    bare = "\n".join(line for line in lines if not line.startswith("#")).strip() + "\n"

    assert load_config(EXAMPLE) == Config()
    assert bare == dump_config(Config())
    for name, table in Config():
        for key, value in table[0] if name == "listen" else table:
            described = f"# {TABLES[name].model_fields[key].description}\n"
            commented = "# " if value is None and key != "address" else ""
            assert f"{described}{commented}{key} = " in text, f"{name}.{key}"
    for key, field in TlsConfig.model_fields.items():
        assert f"#   {key}: {field.description}\n" in text


def test_a_key_that_is_absent_by_default_stands_in_a_comment_of_the_example() -> None:
    """Without their comment signs, these lines set every such key to something the models take."""
    text, count = re.subn(r"^# (\w+ = )", r"\1", EXAMPLE.read_text(), flags=re.MULTILINE)
    config = loads(text)

    assert count == 3
    assert None not in {value for table in (config.listen[0], config.metrics) for _, value in table}


def test_every_key_and_table_has_a_description_of_one_line() -> None:
    """Descriptions are short sentences: they become comments, table cells and editor hints."""
    models: list[type[BaseModel]] = [Config, TlsConfig, *TABLES.values()]
    for model in models:
        for key, field in model.model_fields.items():
            assert field.description is not None, key
            assert re.fullmatch(r"[^\n|]{10,96}\.", field.description), key


@pytest.mark.parametrize("off", ['"off"', '"0"', "0", "0.0", '"0s"', "inf"])
@pytest.mark.parametrize("key", TIME_OUTS)
def test_a_timeout_can_be_turned_off(key: str, off: str) -> None:
    """Zero and "off" both mean that a timeout never runs out."""
    timeouts = loads(f"[timeouts]\n{key} = {off}\n").timeouts

    assert getattr(timeouts, key) == math.inf


@pytest.mark.parametrize(
    ("text", "seconds"), [('"0"', 0.0), ("0", 0.0), ('"1h 30m"', 5400.0), ("2.5", 2.5)]
)
def test_draining_can_be_at_once_and_is_never_off(text: str, seconds: float) -> None:
    """A zero drain timeout stays zero."""
    assert loads(f"[server]\ndrain_timeout = {text}\n").server.drain_timeout == seconds


def test_the_watchdog_is_patient_or_off() -> None:
    """Less than a second would kill workers that are only busy; "off" kills none."""
    assert loads('[server]\nwatchdog = "1s"\n').server.watchdog == 1.0
    assert loads('[server]\nwatchdog = "off"\n').server.watchdog == math.inf
    with pytest.raises(ConfigError, match=r"2: server\.watchdog: 999ms would kill"):
        loads('[server]\nwatchdog = "999ms"\n')


@pytest.mark.parametrize(("text", "workers"), [("1", 1), ("1024", 1024), ('"auto"', "auto")])
def test_workers_are_a_number_or_one_for_each_cpu(text: str, workers: object) -> None:
    """Both ends of the range and "auto" are accepted."""
    assert loads(f"[server]\nworkers = {text}\n").server.workers == workers


def test_listen_tables_repeat_and_metrics_can_be_off() -> None:
    """Each [[listen]] is an address with its own settings; "off" leaves no metrics address."""
    config = loads(
        '[[listen]]\naddress = ":9000"\nbacklog = 1\n'
        '[[listen]]\naddress = "unix:/run/e.sock"\n'
        '[metrics]\naddress = "off"\n'
    )

    assert [listen.address for listen in config.listen] == [
        TcpAddress(None, 9000),
        UnixAddress("/run/e.sock"),
    ]
    assert [listen.backlog for listen in config.listen] == [1, 4096]
    assert config.metrics.address is None


def test_port_0_may_be_listened_on_twice() -> None:
    """The kernel makes different ports of it, so it is no duplicate, of metrics neither."""
    entry = '[[listen]]\naddress = "127.0.0.1:0"\n'

    config = loads(f'{entry}{entry}[metrics]\naddress = "127.0.0.1:0"\n')

    assert len(config.listen) == 2


@pytest.mark.parametrize(
    "text",
    [
        '[server]\npoller = "select"\n[limits]\nmax_connections = 960\n',
        '[limits]\nlow_watermark=1\nhigh_watermark=2\nmax_frame=4\nmax_buffered="1281KiB"\n',
        '[limits]\nmax_frame = 4294967295\nmax_buffered = "49GiB"\n',
        "[log]\nburst = 1\nrate = 0.001\n",
    ],
)
def test_values_on_the_edge_of_what_fits_together_are_accepted(text: str) -> None:
    """Each limit is inclusive."""
    assert loads(text) == loads(dump_config(loads(text)))


def test_a_configuration_does_not_change() -> None:
    """What was validated stays valid: no key can be set afterwards."""
    with pytest.raises(ValidationError, match="frozen"):
        Config().metrics = MetricsConfig()


TIMEOUTS = st.just(math.inf) | st.floats(1e-6, 1e9)
SIZES = st.integers(1, 1 << 40)
COUNTS = st.integers(1, 2**31 - 1)
PORTS = st.integers(1, 65535)
ADDRESSES = st.builds(
    TcpAddress, st.ip_addresses().map(str) | st.none() | st.just("localhost"), PORTS
) | st.builds(UnixAddress, st.from_regex(r"/[a-z\"\\{}]{0,90}", fullmatch=True))
PATHS = st.text(st.characters(categories=["L", "N", "P", "S"])).map("/".__add__)
TLS = st.none() | st.fixed_dictionaries(
    {"certificate": PATHS, "key": PATHS},
    optional={"client_ca": PATHS, "min_version": st.sampled_from(["1.2", "1.3"])},
)
POLLERS = [name for name in ("auto", "epoll", "poll", "select") if hasattr(select, name)]


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """Draw any configuration that fits together."""
    frame, high = draw(st.integers(1, 0xFFFFFFFF)), draw(st.integers(2, 1 << 40))
    poller = draw(st.sampled_from(["auto", *POLLERS]))
    *listen, metrics = draw(st.lists(ADDRESSES, min_size=2, max_size=4, unique=True))
    values: dict[str, Any] = {
        "server": {
            "workers": draw(st.just("auto") | st.integers(1, 1024)),
            "poller": poller,
            "drain_timeout": draw(st.just(0.0) | st.floats(1e-6, 1e9)),
            "watchdog": draw(st.just(math.inf) | st.floats(1.0, 1e9)),
        },
        "listen": [
            {"address": each, "backlog": draw(st.integers(1, 65535)), "tls": draw(TLS)}
            for each in listen
        ],
        "limits": {
            "max_frame": frame,
            "max_connections": draw(st.integers(1, 960) if poller == "select" else COUNTS),
            "max_connections_per_ip": draw(st.just(0) | COUNTS),
            "high_watermark": high,
            "low_watermark": draw(st.integers(1, high - 1)),
            "max_buffered": least_buffered(frame, high) + draw(st.just(0) | SIZES),
            "overload_threshold": draw(st.integers(50, 100)),
        },
        "timeouts": {
            "min_rate": draw(SIZES),
            **{key: draw(TIMEOUTS) for key in TIME_OUTS},
        },
        "log": {
            "level": draw(st.sampled_from(["debug", "info", "warning", "error"])),
            "format": draw(st.sampled_from(["auto", "console", "json"])),
            "burst": draw(COUNTS),
            "rate": draw(st.floats(1e-9, 1e6)),
        },
        "metrics": {
            "address": draw(st.sampled_from([metrics, None])),
            "bearer_token_file": draw(st.none() | PATHS),
            "tls": draw(TLS),
        },
    }
    return Config.model_validate(values)


@given(configs())
def test_what_is_written_loads_as_the_same_configuration(config: Config) -> None:
    """The effective configuration can be used as the file, with nothing lost."""
    assert config == loads(dump_config(config))


def test_the_written_form_is_the_one_a_human_would_choose() -> None:
    """Sizes and durations are written in units, and what is off as "off"."""
    text = dump_config(
        loads(
            "[server]\ndrain_timeout = 5400\n"
            "[limits]\nmax_frame = 1500\nhigh_watermark = 131072\n"
            "[timeouts]\nidle = 0\nwrite = 0.5\n"
            '[metrics]\naddress = "off"\n'
        )
    )

    for line in (
        'drain_timeout = "1h 30min"',
        "max_frame = 1500",
        'high_watermark = "128KiB"',
        'idle = "off"',
        'write = "500ms"',
        'address = "off"',
    ):
        assert f"\n{line}\n" in text


def test_the_schema_tells_editors_every_key_with_its_default() -> None:
    """Each table is closed, and each key has a description and the default as a file has it."""
    schema = json_schema()
    defaults = Config().model_dump(mode="json")

    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"] == "lpechod configuration"
    assert schema["additionalProperties"] is False
    assert list(schema["properties"]) == list(Config.model_fields) == list(TABLES)
    for name, model in TABLES.items():
        table = schema["$defs"][model.__name__]
        values = defaults[name][0] if name == "listen" else defaults[name]
        assert table["additionalProperties"] is False
        assert list(table["properties"]) == list(model.model_fields)
        for key, field in model.model_fields.items():
            assert table["properties"][key]["description"] == field.description
            assert table["properties"][key].get("default") == values[key]
            assert "title" not in table["properties"][key]


def test_the_schema_takes_sizes_and_durations_as_text_or_number() -> None:
    """An editor accepts both forms a file may have, and knows the bounds of plain numbers."""
    tables = json_schema()["$defs"]

    max_frame = tables["LimitsConfig"]["properties"]["max_frame"]
    assert max_frame["type"] == ["string", "integer"]
    assert (max_frame["minimum"], max_frame["maximum"]) == (1, 0xFFFFFFFF)
    assert tables["TimeoutsConfig"]["properties"]["idle"]["type"] == ["string", "number"]
    assert tables["TimeoutsConfig"]["properties"]["lifetime"]["default"] == "off"
    assert tables["ListenConfig"]["properties"]["backlog"]["maximum"] == 65535
    assert json_schema()["properties"]["listen"]["minItems"] == 1
