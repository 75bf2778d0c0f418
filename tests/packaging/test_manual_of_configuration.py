"""lpechod.toml(5) says what the models know, and what it says besides is true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from manpages import configuration
from pydantic import Field

from lpechod.ops import toml
from lpechod.ops.config import Config, ConfigError, TlsConfig, json_schema, load_config
from lpechod.ops.config_tables import Table
from lpechod.ops.config_types import Count, Duration
from tests.packaging.reading import DATE, PATIENCE_SECONDS, ROOT, items, rendered, section


def keys(text: str) -> dict[str, str]:
    """Return what is said of each key in the section of a table."""
    return {tag: about for tag, about in items(text).items() if " = " in tag}


def test_every_key_is_there(file: str) -> None:
    """Each table has its keys in order, with description, default, choices and bounds."""
    schema = json_schema()
    for name, of in schema["properties"].items():
        repeated = "items" in of
        reference = (of["items"] if repeated else of)["$ref"]
        table = schema["$defs"][reference.rpartition("/")[2]]
        text = section(file, f"[[{name}]]" if repeated else f"[{name}]")
        found = keys(text)
        assert f"       {Config.model_fields[name].description}\n" in text
        assert [tag.partition(" = ")[0] for tag in found] == list(table["properties"])
        for about, (key, field) in zip(found.values(), table["properties"].items(), strict=True):
            default = field.get("default")
            shown = toml.dumps({"is": default}).removeprefix("is = ").strip()
            assert about.startswith(field["description"]), key
            shown = shown or "none."
            assert re.search(rf"\nDefault: {re.escape(shown)}( \(|$)", about), key
            for choice in field.get("enum", ()):
                assert re.search(rf"\b{choice}\b", about), key
    text = section(file, "[listen.tls], [metrics.tls]")
    assert [tag.partition(" = ")[0] for tag in keys(text)] == list(TlsConfig.model_fields)
    for key, of in TlsConfig.model_fields.items():
        assert f"{of.description}" in " ".join(text.split()), key
    assert text.count("No default: it has to be written.") == 2
    assert "Default: 4096 (at least 1, at most 65535)" in file
    assert "Default: 5 (more than 0, at most 1000000)" in file


class Small(Table):
    """A table that nobody has written about."""

    patience: Duration = Field(default=90.0, description="How long to bear with a - b.")
    count: Count = Field(default=3, gt=1, lt=9, description="How often.")


class Odd(Table):
    """A configuration that no daemon has."""

    small: Small = Field(default_factory=Small, description="Small things.")
    many: tuple[Small, ...] = Field(
        default_factory=lambda: (Small(),), description="Many of those."
    )


def test_a_change_of_the_models_changes_the_page() -> None:
    """The page is made from the models it is given: tables, keys, types, defaults and bounds."""
    page = rendered(configuration.page(Odd, DATE))
    expected = {
        "patience = duration": 'How long to bear with a - b.\nDefault: "1min 30s"',
        "count = integer": "How often.\nDefault: 3 (more than 1, less than 9)",
    }

    assert keys(section(page, "[small]")) == expected
    assert keys(section(page, "[[many]]")) == expected
    assert "Small things." in section(page, "[small]")
    assert "Many of those." in section(page, "[[many]]")
    assert "[server]" not in re.findall(r"^\S+$", page, re.MULTILINE)


NOTES = [
    ("limits.max_connections is at most 960", 'server.poller = "select"\nlimits.max_connections = ',
     "960", "961"),
    ('At least "1s".', "server.watchdog = ", '"1s"', '"999ms"'),
    ("Less than high_watermark.", "limits.low_watermark = ", '"255KiB"', '"256KiB"'),
    ("that is 3585 KiB by default", "limits.max_buffered = ", '"3585KiB"', '"3584KiB"'),
    ("Between 50 and 100.", "limits.overload_threshold = ", "50", "49"),
    ("Between 50 and 100.", "limits.overload_threshold = ", "100", "101"),
    ("K, M, G and T are refused", "limits.max_frame = ", '"1KiB"', '"1K"'),
    ("the absolute path of a file", "metrics.bearer_token_file = ", '"/x"', '"x"'),
    ('"1h 30min"', "timeouts.idle = ", '"1h 30min"', '"1h 30"'),
    ("Units are us, ms, s, min, h, d and w", "timeouts.idle = ", '"1w 1d 1h 1min 1s 1ms 1us"',
     '"1 month"'),
    ("a number of bytes without", "limits.max_frame = ", "65536", "65536.5"),
    ("The path of a UNIX socket is absolute", "listen = ", '[{ address = "unix:/run/a" }]',
     '[{ address = "unix:run/a" }]'),
    ("A whole number, without quotes.", "log.burst = ", "3", "3.0"),
    ("It may have a fraction.", "log.rate = ", "0.5", '"0.5"'),
    ('Where "off" can be written', "timeouts.idle = ", '"off"', '"none"'),
]  # fmt: skip


@pytest.mark.parametrize(("claim", "key", "good", "bad"), NOTES)
def test_what_it_says_of_values_is_true(
    file: str, tmp_path: Path, claim: str, key: str, good: str, bad: str
) -> None:
    """A value that the page allows is taken, and one that it rules out is refused."""
    path = tmp_path / "config.toml"
    assert claim in " ".join(file.split())
    path.write_text(f"{key}{good}\n")
    load_config(path)
    path.write_text(f"{key}{bad}\n")
    with pytest.raises(ConfigError):
        load_config(path)


def test_off_and_zero_are_the_same(tmp_path: Path) -> None:
    """Where "off" can be written, 0 and "0s" mean it, too, as the page says."""
    path = tmp_path / "config.toml"
    read = []
    for value in ('"off"', "0", '"0s"'):
        path.write_text(f"timeouts.idle = {value}\nserver.watchdog = {value}\n")
        read.append(load_config(path))
    assert read[0] == read[1] == read[2]


def test_its_examples_are_valid(file: str, command: str, tmp_path: Path) -> None:
    """Each example of a configuration can be used as it stands."""
    path = tmp_path / "config.toml"
    pages = [*section(file, "EXAMPLES").split(":\n"), section(command, "EXAMPLES")]
    examples = [
        "\n".join(line.strip() for line in each.splitlines() if re.match(r" {11}[\[a-z]", line))
        for each in pages
    ]
    assert [each.count("[[listen]]") for each in examples] == [0, 2, 1, 1, 1, 1]
    for each in examples[1:]:
        path.write_text(each)
        assert len(load_config(path).listen) == each.count("[[listen]]")


def test_its_problems_are_real(file: str, tmp_path: Path) -> None:
    """The problems shown are what `lpechod check` prints for such a file."""
    (tmp_path / "config.toml").write_text('[server]\nworker = 2\n\n[limits]\nmax_frame = "1M"\n')
    run = subprocess.run(
        [sys.executable, "-m", "lpechod", "check", "--config", "config.toml"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    shown = re.findall(r"^ +(config\.toml:.*)$", section(file, "DESCRIPTION"), re.MULTILINE)

    assert len(shown) == 2
    assert run.stderr.splitlines() == shown
    assert run.returncode == 78
