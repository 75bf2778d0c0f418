"""The dashboard: drawn without faults, complete, and made of expressions that have results.

There is no Grafana here: its variables are put into the expressions as it does it, and a real
Prometheus that watches a real daemon answers them.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from lpechod.ops.counters import Totals
from lpechod.ops.metrics import DaemonCollector, Standing
from tests.deploy.prometheus import DEPLOY, Prometheus, watched_daemon

TEXT = (DEPLOY / "grafana" / "lpechod.json").read_text()
DASHBOARD: dict[str, Any] = json.loads(TEXT)
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
GRAPHS = [panel for panel in PANELS if panel["type"] != "row"]
VARIABLES: dict[str, dict[str, Any]] = {
    each["name"]: each for each in DASHBOARD["templating"]["list"]
}
GRID_WIDTH = 24

METRIC = re.compile(r"\b(?:(?:lpechod|process)_\w+|up)\b")
SELECTOR = 'job="$job", instance=~"$instance"'


def expressions() -> list[str]:
    """Return every expression of the dashboard: of its panels, and of its annotations."""
    panels = [target["expr"] for panel in GRAPHS for target in panel["targets"]]
    return panels + [each["expr"] for each in DASHBOARD["annotations"]["list"] if "expr" in each]


def as_grafana_asks(expression: str, instance: str) -> str:
    """Put the variables' values in: for one of several instances, and for a graph of some minutes.

    Grafana escapes the value of a variable that may have several, as it goes into an expression of
    the kind ``=~``; the rate interval is at least four times that of the scrapes.
    """
    escaped = re.escape(instance).replace("\\", "\\\\")
    return (
        expression.replace("$job", "lpechod")
        .replace("$instance", f"({escaped})")
        .replace("$__rate_interval", "30s")
    )


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with watched_daemon(tmp_path_factory.mktemp("dashboard")) as watching:
        yield watching


def test_the_file_is_in_its_one_form() -> None:
    """The file has two spaces and sorted keys, so that it differs only where it was changed."""
    assert json.dumps(DASHBOARD, indent=2, sort_keys=True, ensure_ascii=False) + "\n" == TEXT


def test_each_panel_is_told_apart() -> None:
    """No two panels have the same id or the same title."""
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)


def test_each_panel_has_a_place_of_its_own() -> None:
    """Panels lie within the grid, none over another, and rows take its whole width."""
    taken: dict[tuple[int, int], str] = {}
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= GRID_WIDTH, panel["title"]
        for x in range(place["x"], place["x"] + (place["w"] if panel in GRAPHS else GRID_WIDTH)):
            for y in range(place["y"], place["y"] + place["h"]):
                other = taken.setdefault((x, y), panel["title"])
                assert other == panel["title"], f"{panel['title']} lies over {other}"


@pytest.mark.parametrize("panel", GRAPHS, ids=[panel["title"] for panel in GRAPHS])
def test_a_panel_explains_itself(panel: dict[str, Any]) -> None:
    """A panel has a description, a unit, the data source that was chosen, and named series."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["targets"]
    assert all(each["datasource"] == source for each in (panel, *panel["targets"]))
    assert all(target["legendFormat"] for target in panel["targets"])
    references = [target["refId"] for target in panel["targets"]]
    assert len(set(references)) == len(references)


def test_each_metric_is_of_the_chosen_instances() -> None:
    """Every metric in an expression is restricted to the job and the instances that were chosen."""
    unrestricted = [
        (expression, found[0])
        for expression in expressions()
        for found in METRIC.finditer(expression)
        if not expression[found.end() :].startswith("{" + SELECTOR)
    ]
    assert unrestricted == []


def test_the_dashboard_is_complete() -> None:
    """Every metric of the daemon is shown, so that a new one is not forgotten."""
    shown = " ".join(target["expr"] for panel in GRAPHS for target in panel["targets"])
    families = DaemonCollector(Totals, lambda: Standing({}, 0, 0, True, 0.0)).collect()
    names = [f"{each.name}_total" if each.type == "counter" else each.name for each in families]
    assert [
        name for name in names if not re.search(rf"\b{name}(_bucket|_sum|_count)?\b", shown)
    ] == []


def test_each_expression_has_a_result(prometheus: Prometheus) -> None:
    """With a daemon under load, no expression of the dashboard is wrong or without a result."""
    (scraped,) = prometheus.ask('last_over_time(up{job="lpechod"}[1m])')
    asked = [as_grafana_asks(each, scraped["metric"]["instance"]) for each in expressions()]
    assert prometheus.without_result(asked) == []


def test_each_legend_names_labels_that_exist(prometheus: Prometheus) -> None:
    """A legend, or the buckets of a heatmap, are made of labels that its series have."""
    (scraped,) = prometheus.ask('last_over_time(up{job="lpechod"}[1m])')
    for target in (target for panel in GRAPHS for target in panel["targets"]):
        asked = as_grafana_asks(target["expr"], scraped["metric"]["instance"])
        assert prometheus.without_result([asked]) == []
        labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        assert all(labels <= sample["metric"].keys() for sample in prometheus.ask(asked)), asked


def test_the_variables_have_values(prometheus: Prometheus) -> None:
    """The jobs and instances to choose from are labels of a metric that exists."""
    (scraped,) = prometheus.ask('last_over_time(up{job="lpechod"}[1m])')
    offered = re.compile(r"label_values\((.+), (\w+)\)")
    for name in ("job", "instance"):
        found = offered.fullmatch(VARIABLES[name]["definition"])
        assert found
        (sample,) = prometheus.ask(found[1].replace("$job", "lpechod"))
        assert sample["metric"][found[2]] == scraped["metric"][name]


def test_the_dashboard_names_what_exists(prometheus: Prometheus) -> None:
    """Every metric that the dashboard names has been scraped."""
    used = {name for expression in expressions() for name in METRIC.findall(expression)}
    assert used - prometheus.names() == set()
