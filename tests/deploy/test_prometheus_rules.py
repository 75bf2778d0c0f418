"""The rules: well-formed, each with a unit test, and about what a daemon really shows.

An alert that does not fire has no result, just as one that never could. So that the two can be
told apart, each alert is "measured value, comparison, bound" (or `absent(...)`), and Prometheus is
asked for the measured value alone. To record each of these values was rejected: it would store
series that only this test reads.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.prometheus import SHIPPED, Prometheus, promtool, watched_daemon

RULES = SHIPPED / "lpechod.rules.yml"
UNIT_TESTS = SHIPPED / "lpechod.rules.test.yml"

MEASURED = re.compile(r"(?:absent\((?P<series>.+)\)|(?P<value>.+) (?:==|<|>) [0-9.]+)")
NAMES = re.compile(r"[a-z_]+:\w+:\w+|\b(?:lpechod|process|probe)_\w+|\bup\b")


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with watched_daemon(tmp_path_factory.mktemp("rules")) as watching:
        yield watching


def rules(kind: str) -> list[str]:
    """Return the names of the rules of a kind, ``alert`` or ``record``."""
    return re.findall(rf"- {kind}: (\S+)", RULES.read_text())


def measured(alert: str) -> str:
    """Return what an alert compares with its bound."""
    found = MEASURED.fullmatch(alert)
    assert found, f"not of the form 'measured > bound': {alert}"
    return found["series"] or found["value"]


@pytest.mark.parametrize(
    "check",
    [
        ("check", "rules", RULES),
        ("check", "config", SHIPPED / "prometheus.yml"),
        ("test", "rules", UNIT_TESTS),
    ],
    ids=["rules", "configuration", "unit tests"],
)
def test_promtool_is_content(check: tuple[str | Path, ...]) -> None:
    """Prometheus' own tool accepts the rules and the configuration, and their unit tests pass."""
    run = promtool(*check)
    assert run.returncode == 0, run.stdout
    assert "FAILED" not in run.stdout


def test_each_rule_has_a_unit_test() -> None:
    """Each recorded value is tried, and each alert both when it fires and when it does not."""
    text = UNIT_TESTS.read_text()
    assert set(re.findall(r"- expr: (\S+)\n", text)) == set(rules("record"))
    assert set(re.findall(r"alertname: (\w+)\n\s+exp_alerts:", text)) == set(rules("alert"))
    assert set(re.findall(r"alertname: (\w+), exp_alerts: \[\]", text)) == set(rules("alert"))


ALERT = re.compile(r"- alert: (?P<name>\w+)\n +expr: (?P<expr>.+)\n(?P<waits> +for: \w+\n)?")


@pytest.mark.parametrize("change", ["fires always", "never fires", "does not wait"])
def test_the_unit_tests_notice(change: str, tmp_path: Path) -> None:
    """The unit test of each alert fails if the alert loses its bound, or its patience."""
    changed = []

    def changes(found: re.Match[str]) -> str:
        name, expr, waits = found["name"], found["expr"], found["waits"] or ""
        if change == "does not wait":
            changed.extend([name] if waits else [])
            return found[0].removesuffix(waits)
        changed.append(name)
        bound = "> -1" if change == "fires always" else "> 1e9"
        return found[0].replace(expr, f"{measured(expr)} {bound}")

    (tmp_path / RULES.name).write_text(ALERT.sub(changes, RULES.read_text()))
    run = promtool("test", "rules", shutil.copy(UNIT_TESTS, tmp_path))
    assert run.returncode == 1
    assert set(re.findall(r"alertname: (\w+), time", run.stdout)) == set(changed)


def test_each_rule_has_something_to_measure(prometheus: Prometheus) -> None:
    """With a daemon under load, each recording rule and what each alert measures have a value."""
    found = [rule for group in prometheus.api("rules")["groups"] for rule in group["rules"]]
    wanted = {
        rule["name"]: measured(rule["query"]) if rule["type"] == "alerting" else rule["name"]
        for rule in found
    }
    assert sorted(wanted) == sorted(rules("alert") + rules("record"))
    assert prometheus.without_result(wanted.values()) == []


def test_the_rules_name_what_exists(prometheus: Prometheus) -> None:
    """Every metric that a rule names has been scraped, or recorded by another rule."""
    found = [rule for group in prometheus.api("rules")["groups"] for rule in group["rules"]]
    used = {name for rule in found for name in NAMES.findall(rule["query"])}
    assert prometheus.without_result(rules("record")) == []
    assert used - prometheus.names() == set()


def test_a_probe_is_named_after_its_target(prometheus: Prometheus) -> None:
    """The instance of a probe is the address that is probed, and asked is the exporter."""
    prometheus.wait_for("probe_success == 1")
    (probe,) = prometheus.ask("last_over_time(probe_success[1m])")
    (target,) = [
        each
        for each in prometheus.api("targets")["activeTargets"]
        if each["labels"]["job"] == "lpechod-probe"
    ]
    assert probe["metric"]["instance"] == target["discoveredLabels"]["__address__"]
