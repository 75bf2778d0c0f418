"""README.md is held to the code: its tables and its examples are what the program does."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lpechod.ops import toml
from lpechod.ops.config import Config, TlsConfig, dump_config
from lpechod.ops.counters import Totals
from lpechod.ops.metrics import DaemonCollector, Standing
from lpechod.wire.states import CloseReason
from tests.bench.bench_echo import WORKLOADS
from tests.bench.bench_tls import BULK, PING_PONG
from tests.bench.rounds import Workload

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()

BAD_CONFIG = """\
[server]
worker = 2
poller = "iocp"

[limits]
max_frame = "1M"
low_watermark = "1MiB"

[[listen]]
address = "::1:9000"
"""


def table_rows(heading: str) -> list[str]:
    """Return the rows of the first table under a heading."""
    section = README.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\|.*\|$", section, re.MULTILINE)
    return rows[2:]


def test_the_configuration_table_is_the_models() -> None:
    """Each key stands in the table, in order, with its default and its description."""
    defaults = tomllib.loads(dump_config(Config()))
    expected = []
    for section, value in Config():
        table, prefix = (value[0], "[[listen]] ") if section == "listen" else (value, f"{section}.")
        shown = defaults[section][0] if section == "listen" else defaults[section]
        for key, field in type(table).model_fields.items():
            default = toml.dumps({"is": shown.get(key)}).removeprefix("is = ").strip()
            default = f"`{default}`" if default else "none"
            expected.append(f"| `{prefix}{key}` | {default} | {field.description} |")
    for key, field in TlsConfig.model_fields.items():
        default = "needed" if field.is_required() else f'`"{field.default}"`'
        default = "none" if field.default is None else default
        expected.append(f"| `tls.{key}` | {default} | {field.description} |")

    assert table_rows("Configuration") == expected


def test_the_metrics_table_is_the_collector() -> None:
    """Each metric family stands in the table, in order, with its labels, type and help."""
    standing = Standing({"ready": 1, "draining": 0}, 0, 1, True, 0.0, {":9000": 0.0})
    expected = []
    for family in DaemonCollector(Totals, lambda: standing).collect():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        shown = f"{name}{{{','.join(labels)}}}" if labels else name
        expected.append(f"| `{shown}` | {family.type} | {family.documentation} |")

    assert table_rows("Metrics") == expected


@pytest.mark.parametrize(
    ("heading", "workloads", "columns"),
    [("How fast it is", WORKLOADS, 8), ("How fast it is over TLS", PING_PONG + BULK, 7)],
)
def test_the_tables_of_figures_are_of_the_benchmarks(
    heading: str, workloads: tuple[Workload, ...], columns: int
) -> None:
    """Each workload of a benchmark stands in its table, in order, with figures of each server."""
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table_rows(heading)]

    assert [row[0] for row in rows] == [workload.name for workload in workloads]
    assert {len(row) for row in rows} == {columns}
    assert all(re.search(r"\d", cell) for row in rows for cell in row)


def test_the_wire_table_names_every_reason_there_is() -> None:
    """Each close reason that this version can give stands in the table of the wire."""
    named = set(
        re.findall(r"`(\w+)`", " ".join(row.split("|")[3] for row in table_rows("The wire")))
    )

    assert named == {reason.value for reason in CloseReason} - {"internal_error"}


def test_the_example_of_bad_configuration_is_real(tmp_path: Path) -> None:
    """The faults shown are what `lpechod check` prints for such a file."""
    (tmp_path / "bad.toml").write_text(BAD_CONFIG)
    run = subprocess.run(
        [sys.executable, "-m", "lpechod", "check", "--config", "bad.toml"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    shown = README.split("$ lpechod check --config bad.toml\n", 1)[1].split("\n\n", 1)[0]

    assert run.stderr.splitlines() == [line.strip() for line in shown.splitlines()]


def test_the_commands_are_targets_of_the_makefile() -> None:
    """Every `make` command of the README exists."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= targets


def test_the_folders_it_names_exist() -> None:
    """Every path in backticks that looks like one of the repository's is there."""
    paths = re.findall(r"`((?:lpechod|tests)/[\w./]+)`", README)

    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []
