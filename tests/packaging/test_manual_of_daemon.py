"""lpechod(8) says what the parser, the metrics and the rest of the code know."""

import argparse
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from manpages import daemon
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from lpechod.cli import build_parser
from lpechod.ops.counters import Totals
from lpechod.ops.metrics import DaemonCollector
from lpechod.process import systemd
from lpechod.wire.states import CloseReason
from tests.packaging.reading import (
    DATE,
    PATIENCE_SECONDS,
    ROOT,
    items,
    program,
    rendered,
    section,
)
from tests.system.daemon import Daemon


def test_every_command_and_option_is_there(command: str) -> None:
    """The command line of the page is that of the parser: synopsis, commands and options."""
    synopsis = section(command, "SYNOPSIS").split("\n")
    commands = items(section(command, "COMMANDS"))
    options = items(section(command, "OPTIONS"))
    parser = build_parser()
    (choice,) = (each for each in parser._actions if each.choices)
    assert isinstance(choice, argparse._SubParsersAction)

    assert list(commands) == list(choice.choices)
    for shown in choice._choices_actions:
        assert commands[shown.dest].lower().startswith(f"{shown.help}. ".lower())
    for name, each in {"": parser, **choice.choices}.items():
        for action in each._actions:
            if action.option_strings:
                (found,) = [tag for tag in options if action.option_strings[-1] in tag]
                assert set(action.option_strings) <= set(re.split(r"[ ,]+", found))
                assert name in options[found] or action.option_strings[-1] == "--help"
    assert "       lpechod serve [--config FILE]" in synopsis
    assert "       lpechod schema" in synopsis
    assert "       lpechod --version" in synopsis
    assert "(default: /etc/lpechod/config.toml)" in options["--config FILE"]


def test_a_change_of_the_command_line_changes_the_page() -> None:
    """A new option appears with its argument, its help and its default."""
    parser = build_parser()
    parser.add_argument("-x", "--extra", default="soon", metavar="WHEN", help="do it %(default)s")
    page = rendered(daemon.page(parser, DATE))

    assert items(section(page, "OPTIONS"))["-x WHEN, --extra WHEN"] == "Do it soon."
    assert "       lpechod --extra WHEN\n" in section(page, "SYNOPSIS")


def test_every_exit_status_is_there(command: str) -> None:
    """The statuses are those that the help of the command line names, with the same meaning."""
    statuses = items(section(command, "EXIT STATUS"))
    known = re.findall(r"(\d+) ([\w ]+)", build_parser().epilog or "")

    assert list(statuses) == ["0", "1", "2", "78"] == [status for status, _ in known]
    for status, meaning in known:
        assert statuses[status].lower().startswith(f"{meaning}: ")


class Described(Collector):
    """What the collector says it collects, for prometheus_client to write down."""

    def collect(self) -> Iterator[Metric]:
        def no_standing() -> None:
            raise AssertionError

        return DaemonCollector(Totals, no_standing).describe()  # type: ignore[arg-type]


def test_every_metric_is_there(command: str) -> None:
    """Each family stands there as it is exposed, with its type, labels, help and reasons."""
    registry = CollectorRegistry()
    registry.register(Described())
    exposed = generate_latest(registry).decode()
    metrics = items(section(command, "METRICS"))
    texts = dict(re.findall(r"^# HELP (\w+) (.*)$", exposed, re.MULTILINE))
    types = dict(re.findall(r"^# TYPE (\w+) (.*)$", exposed, re.MULTILINE))

    tags = [tag for tag in metrics if re.search(r" \(\w+\)$", tag)]
    assert [re.split(r"[{ ]", tag)[0] for tag in tags] == list(texts)
    for tag, name in zip(tags, texts, strict=True):
        assert tag.endswith(f" ({types[name]})")
        assert metrics[tag].startswith(texts[name])
        reasons = re.findall(rf'^{name}{{reason="(\w+)"}}', exposed, re.MULTILINE)
        assert ("{reason}" in tag) == bool(reasons)
        for reason in reasons:
            assert re.search(rf"\b{reason}\b", metrics[tag].rpartition("Reasons: ")[2])
    assert "lpechod_workers{state} (gauge)" in tags
    assert "lpechod_build_info{version, python_version} (gauge)" in tags


def test_every_reason_is_explained(command: str) -> None:
    """Each reason for which a connection can end has an explanation."""
    explained = items(section(command, "CONNECTIONS"))
    assert all(explained[reason.value] for reason in CloseReason)


def test_every_variable_is_there(command: str) -> None:
    """Each variable of the environment that the code looks at is in the page."""
    logs = (ROOT / "lpechod" / "ops" / "logs.py").read_text()
    read = set(re.findall(r'environ\.get\("(\w+)"\)', logs)) | set(systemd._VARIABLES)
    tags = items(section(command, "ENVIRONMENT"))

    # The descriptor of a process is taken away from children, but nobody looks at it.
    assert {name for tag in tags for name in tag.split(", ")} == read - {"LISTEN_PIDFDID"}


def test_the_echo_example_is_real(command: str, tmp_path: Path) -> None:
    """The commands of the example print what the page shows, of a daemon elsewhere."""
    program("nc", "netcat-openbsd")
    program("xxd", "xxd")
    found = re.search(r"^ +\$ (printf .*)\n +(0000.*)$", section(command, "EXAMPLES"), re.MULTILINE)
    assert found
    with Daemon(tmp_path) as running:
        host, port = running.address.split(":")
        run = subprocess.run(
            ["sh", "-c", found[1].replace("localhost 9000", f"{host} {port}")],
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=True,
        )
    assert run.stdout.rstrip("\n") == found[2]
