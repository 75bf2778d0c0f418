"""A line chart with logarithmic axes, as SVG: a few lines of text need no library for plots.

Each line has its name at its end instead of a legend, a colour of Okabe and Ito's palette, which
colour-blind people can tell apart ("Color Universal Design", 2008), and a mark of its own shape.
The background is white, so that the chart reads the same on a dark page.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 800, 480
LEFT, RIGHT, TOP, BOTTOM = 66, 704, 110, 418
"""Edges of the plot, in pixels from the upper left corner of the picture."""

INK, FAINT, GRID = "#222222", "#555555", "#dddddd"
STYLES = (
    ("#d55e00", "M-5,-5h10v10h-10z"),
    ("#cc79a7", "M0,-6.5L6,5H-6z"),
    ("#0072b2", "M-5,0a5,5 0 1 0 10,0a5,5 0 1 0 -10,0z"),
    ("#009e73", "M0,-6.5L6.5,0L0,6.5L-6.5,0z"),
)
"""Colours and marks of the lines: a square, a triangle, a circle, a diamond."""

LABEL_PIXELS = 18
"""The least distance of two labels, from base line to base line."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """What belongs together, from left to right."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values to pixels: the same factor is the same distance.

    Args:
        low: the value at ``start``.
        high: the value at ``end``.
        start: in pixels.
        end: in pixels.
        shift: added to each value before its logarithm is taken, so that 0 has a place, too.
    """

    low: float
    high: float
    start: float
    end: float
    shift: float = 0.0

    def __call__(self, value: float) -> float:
        """Return where a value lies."""
        low, high = (math.log(each + self.shift) for each in (self.low, self.high))
        share = (math.log(value + self.shift) - low) / (high - low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return the values of the scale that are 1, 2 or 5 times a power of 10."""
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        values = [digit * 10.0**exponent for exponent in exponents for digit in (1, 2, 5)]
        return [value for value in values if self.low <= value <= self.high]


def around(values: Sequence[float]) -> tuple[float, float]:
    """Return the closest multiples, by 1, 2 or 5, of powers of 10 that hold all values."""
    steps = Scale(min(values) / 10, max(values) * 10, 0, 1).ticks()
    return (
        max(step for step in steps if step <= min(values)),
        min(step for step in steps if step >= max(values)),
    )


def spread(places: Sequence[float], distance: float) -> list[float]:
    """Move places apart until all are so far from each other, in their order, and no further.

    Neighbours that are too close are centred around where they were.
    """
    groups: list[list[int]] = []
    middles: list[float] = []
    for number in sorted(range(len(places)), key=places.__getitem__):
        groups.append([number])
        middles.append(places[number])
        while len(groups) > 1:
            gap = (len(groups[-1]) + len(groups[-2])) / 2 * distance
            if middles[-1] - middles[-2] >= gap:
                break
            groups[-2:] = [groups[-2] + groups[-1]]
            middles[-2:] = [sum(places[each] for each in groups[-1]) / len(groups[-1])]
    moved = list(places)
    for group, middle in zip(groups, middles, strict=True):
        for turn, number in enumerate(group):
            moved[number] = middle + (turn - (len(group) - 1) / 2) * distance
    return moved


@dataclass(frozen=True, slots=True)
class Titles:
    """What is written around a chart.

    Args:
        finding: what is to be seen, in a few words.
        detail: a line under it.
        x: what the values of x are, with their unit.
        y: the same of y.
    """

    finding: str
    detail: str
    x: str
    y: str


def draw(titles: Titles, lines: Sequence[Line], x_shift: float = 0.0) -> str:
    """Return a chart, 800 by 480 pixels.

    Args:
        titles: what is written around it.
        lines: as many as there are `STYLES`, at most.
        x_shift: see `Scale`.
    """
    xs, ys = ([point[axis] for line in lines for point in line.points] for axis in (0, 1))
    across = Scale(min(xs), max(xs), LEFT + 14, RIGHT - 14, x_shift)
    down = Scale(*around(ys), BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img"',
        f'  width="{WIDTH}" height="{HEIGHT}" font-size="14"',
        '  font-family="system-ui, Helvetica, Arial, Liberation Sans, sans-serif">',
        f"<title>{escape(titles.finding)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(20, 34, titles.finding, 'font-size="19" font-weight="bold"'),
        _text(20, 58, titles.detail, colour=FAINT),
        *_grid(across, down, sorted(set(xs))),
        _text((LEFT + RIGHT) / 2, HEIGHT - 18, titles.x, 'text-anchor="middle"', FAINT),
        _text(20, TOP - 16, titles.y, colour=FAINT),
    ]
    for line, style in zip(lines, STYLES, strict=False):
        parts += _line(line, style, across, down)
    parts += _names(lines, across, down)
    return "\n".join([*parts, "</svg>", ""])


def _grid(across: Scale, down: Scale, xs: Sequence[float]) -> Iterator[str]:
    """Yield the axes: x is marked where something was measured."""
    for value in down.ticks():
        y = down(value)
        yield f'<path d="M{LEFT},{y:.1f}H{RIGHT}" stroke="{GRID}"/>'
        yield _text(LEFT - 8, y + 5, f"{value:,g}", 'text-anchor="end"', FAINT)
    yield f'<path d="M{LEFT},{BOTTOM}H{RIGHT}" stroke="{INK}"/>'
    for value in xs:
        x = across(value)
        yield f'<path d="M{x:.1f},{BOTTOM}v6" stroke="{INK}"/>'
        yield _text(x, BOTTOM + 22, f"{value:,g}", 'text-anchor="middle"', FAINT)


def _line(line: Line, style: tuple[str, str], across: Scale, down: Scale) -> Iterator[str]:
    colour, mark = style
    pixels = [(across(x), down(y)) for x, y in line.points]
    path = "L".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
    yield f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>'
    for x, y in pixels:
        yield f'<path d="{mark}" transform="translate({x:.1f},{y:.1f})" fill="{colour}"/>'


def _names(lines: Sequence[Line], across: Scale, down: Scale) -> Iterator[str]:
    """Yield the name of each line: at the right, or above the end of one that ends before."""
    ends = [(across(line.points[-1][0]), down(line.points[-1][1])) for line in lines]
    right = max(x for x, _ in ends)
    at_right = [number for number, (x, _) in enumerate(ends) if x == right]
    places = spread([ends[number][1] for number in at_right], LABEL_PIXELS)
    for number, y in zip(at_right, places, strict=True):
        yield _name(right + 14, y + 5, lines[number].name, STYLES[number][0], "start")
    for number in sorted(set(range(len(lines))) - set(at_right)):
        x, y = ends[number]
        yield _name(x, y - 14, lines[number].name, STYLES[number][0], "middle")


def _name(x: float, y: float, name: str, colour: str, anchor: str) -> str:
    return _text(x, y, name, f'text-anchor="{anchor}" font-weight="bold"', colour)


def _text(x: float, y: float, content: str, more: str = "", colour: str = INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" {more}>{escape(content)}</text>'
