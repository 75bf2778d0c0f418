"""What the benchmarks write: tables and the chart that lies beside them."""

from pathlib import Path

import pytest

from tests.bench.bench_echo import best_by_loop, markdown_head, markdown_row
from tests.bench.bench_pollers import Table, chart, fitting, load, save
from tests.bench.rounds import Figures, Workload

HERE = Path(__file__).resolve().parent


def test_a_row_of_markdown_fits_its_head() -> None:
    """A row has a cell for each column of the head: CPU, ratio, and latency but for the bare."""
    figures = {
        "lpechod": [Figures(10.04, 5, 1234.4, 2000)],
        "bare": [Figures(9.04, 5, 80, 100)],
        "uvloop": [Figures(20.08, 6, 99.94, 100)],
    }
    head, line = markdown_head(figures).splitlines()
    row = markdown_row(Workload("64 B", 1, 64), figures)

    assert head.split(" | ") == [
        "| workload",
        "lpechod, CPU",
        "bare, CPU",
        "uvloop, CPU",
        "lpechod, p50",
        "uvloop, p50 |",
    ]
    assert line == "|---|---:|---:|---:|---:|---:|"
    assert row == "| 64 B | 10.0 | 9.0 (0.90x) | 20.1 (2.00x) | 1,234 | 99.9 |"


def test_peers_are_shown_at_their_best() -> None:
    """Of the two protocols on a loop, the one that costs less CPU stands in the table."""
    one, other = [Figures(10, 1, 1, 1)], [Figures(9, 1, 1, 1)]
    better = {"lpechod": one, "uvloop": one, "uvloop-buffered": other}
    worse = {"lpechod": other, "asyncio": other, "asyncio-buffered": one}

    assert best_by_loop(better) == {"lpechod": one, "uvloop": other}
    assert best_by_loop(worse) == {"lpechod": other, "asyncio": other}


def test_a_table_can_be_read_again(tmp_path: Path) -> None:
    """What is read is what was written, rounded to hundredths."""
    table: Table = {"poll": {0: 17.234, 8000: 291.9}, "select": {0: 20.0}}
    save(table, tmp_path / "it.csv")

    assert load(tmp_path / "it.csv") == {"poll": {0: 17.23, 8000: 291.9}, "select": {0: 20.0}}


def test_what_needs_more_descriptors_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers of connections that this machine does not allow are named, and not measured."""
    assert fitting((0, 900, 2000, 4000), 4096) == [0, 900, 2000]
    assert "4096 descriptors are too few for 4,000" in capsys.readouterr().out


def test_the_chart_is_of_the_table_beside_it() -> None:
    """The picture that README.md shows is drawn from the figures in the repository."""
    drawn = chart(load(HERE / "idle_connections.csv"))

    assert (HERE / "idle_connections.svg").read_text() == drawn
