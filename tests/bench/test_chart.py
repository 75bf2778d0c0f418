"""The chart of the benchmarks: what is drawn lies where the numbers say."""

import re
from xml.etree import ElementTree as ET

import pytest

from tests.bench.chart import BOTTOM, LEFT, RIGHT, TOP, Line, Scale, Titles, around, draw, spread

TITLES = Titles("a < b", "c & d", "x, s", "y, m")


def test_a_scale_keeps_factors_apart_equally() -> None:
    """The ends of a scale are where they should be, and a factor is the same distance anywhere."""
    scale = Scale(10, 1000, 400, 100)

    assert [scale(value) for value in (10, 100, 1000)] == pytest.approx([400, 250, 100])


def test_a_shifted_scale_has_a_place_for_nothing() -> None:
    """With a shift, 0 is the lower end, and the logarithm is that of the sum."""
    scale = Scale(0, 990, 0, 200, shift=10)

    assert [scale(value) for value in (0, 90, 990)] == pytest.approx([0, 100, 200])


def test_the_ticks_are_round_values_within() -> None:
    """Ticks are 1, 2 and 5 times powers of ten, with those at the ends and none beyond."""
    assert Scale(5, 200, 0, 1).ticks() == [5, 10, 20, 50, 100, 200]
    assert Scale(0.3, 1.9, 0, 1).ticks() == [0.5, 1]


@pytest.mark.parametrize(
    ("values", "ends"), [([17, 292], (10, 500)), ([20, 200], (20, 200)), ([0.7, 0.7], (0.5, 1))]
)
def test_the_ends_of_an_axis_hold_all_values(
    values: list[float], ends: tuple[float, float]
) -> None:
    """An axis ends at the closest round values that leave no value out."""
    assert around(values) == pytest.approx(ends)


@pytest.mark.parametrize(
    ("places", "moved"),
    [
        ([0, 50, 100], [0, 50, 100]),
        ([100, 0], [100, 0]),
        ([50, 54], [47, 57]),
        ([54, 50, 0], [57, 47, 0]),
        ([0, 8, 13], [-3, 7, 17]),
    ],
)
def test_labels_are_moved_apart(places: list[float], moved: list[float]) -> None:
    """Labels that are too close move by the same distance to both sides, in their order."""
    assert spread(places, 10) == pytest.approx(moved)


def test_a_chart_shows_each_figure_where_it_belongs() -> None:
    """Each line has a mark for each figure, at its place, and its name where it ends."""
    lines = [Line("rises", [(0, 10), (90, 100)]), Line("ends", [(0, 100)])]
    picture = ET.fromstring(draw(TITLES, lines, x_shift=10))  # noqa: S314 - our own.
    marks = [
        tuple(map(float, re.findall(r"[\d.]+", each.get("transform", ""))))
        for each in picture.findall(".//{*}path")
        if each.get("transform")
    ]
    names = {each.text: each for each in picture.findall(".//{*}text")}

    assert marks == [(LEFT + 14, BOTTOM), (RIGHT - 14, TOP), (LEFT + 14, TOP)]
    assert float(names["rises"].get("x", "")) > RIGHT - 14
    assert float(names["ends"].get("y", "")) < TOP
    assert names["rises"].get("fill") != names["ends"].get("fill")
    assert {"a < b", "c & d", "x, s", "y, m", "0", "90", "10", "20", "50", "100"} <= names.keys()
