"""Charts as inline SVG: no script, no network, colours from the page so that light, dark and print all work.

Each is 440 units wide, which a phone shows at almost full size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from softprompt.comparison.arm import ARMS
from softprompt.report.curves import DRAWN_AS_LINE, is_logarithmic

WIDTH = 440
CHARACTER = 7.4  # units a character of bold text takes, on the wide side


@dataclass(frozen=True)
class Bar:
    """A figure with its interval; `arm` picks the colour."""

    arm: str
    label: str
    value: float
    low: float
    high: float
    hover: str


@dataclass(frozen=True)
class Point:
    arm: str
    label: str
    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    arm: str
    points: Sequence[tuple[float, float]]
    faint: bool = False


def bars(given: Sequence[Bar], *, title: str, axis: str) -> Markup:
    """A row for each arm: its figure as a dot, its interval as a line."""
    left = 14 + CHARACTER * max(len(bar.label) for bar in given)
    row = 30
    height = 12 + row * len(given) + 40
    values = [v for bar in given for v in (bar.low, bar.value, bar.high) if math.isfinite(v)]
    low, high, ticks = _ticks(
        min([0.0, *values]) if min(values, default=0) >= 0 else min(values), max(values, default=1)
    )
    across = _scale(low, high, left, WIDTH - 16)
    parts = [_grid_x(ticks, across, 8, height - 36, axis, height)]
    for i, bar in enumerate(given):
        y = 12 + row * i + row / 2
        parts.append(_text(0, y + 4, bar.label, "name"))
        if not math.isfinite(bar.value):
            parts.append(_text(left, y + 4, "unknown", "faint"))
            continue
        parts.append(
            f'<g class="{_class(bar.arm)}"><title>{escape(bar.hover)}</title>'
            f'<line class="reach" x1="{across(bar.low):.1f}" x2="{across(bar.high):.1f}" y1="{y}" y2="{y}"/>'
            f'<circle cx="{across(bar.value):.1f}" cy="{y}" r="5"/></g>'
        )
    return _svg(height, title, parts)


def scatter(given: Sequence[Point], *, title: str, x_axis: str, y_axis: str, better: str) -> Markup:
    """Quality against a cost. Costs that are far apart are on a logarithmic axis, with 0 marked at its left edge."""
    height, top, bottom, left, right = 300, 30, 256, 44, WIDTH - 16
    shown = [point for point in given if math.isfinite(point.x) and math.isfinite(point.y)]
    if not shown:
        return Markup("")
    across, grid = _cost_axis([point.x for point in shown], left, right)
    values = [v for point in shown for v in (point.low, point.y, point.high) if math.isfinite(v)]
    low, high, ticks = _ticks(min(values), max(values))
    up = _scale(low, high, bottom, top)
    parts = [_grid_y(ticks, up, left, right)]
    for x, label in grid:
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(_text(x, bottom + 16, label, "tick", "middle"))
    parts.append(_text((left + right) / 2, height - 8, x_axis, "axis", "middle"))
    parts.append(_text(0, 10, f"{y_axis} ({better} is better)", "axis"))
    taken: list[tuple[float, float, float, float]] = []
    dots = [(point, across(point.x), up(point.y)) for point in shown]
    best = pareto_front(shown, higher=better == "higher")
    if len(best) > 1:  # stairs: between two costs, the cheaper arm's figure is the best that can be had
        corners = [f"{across(best[0].x):.1f},{up(best[0].y):.1f}"]
        for cheaper, dearer in pairwise(best):
            corners += [f"{across(dearer.x):.1f},{up(y):.1f}" for y in (cheaper.y, dearer.y)]
        parts.append(f'<polyline class="front" points="{" ".join(corners)}"/>')
    taken += [(x - 7, y - 7, x + 7, y + 7) for _, x, y in dots]
    for point, x, y in dots:
        parts.append(
            f'<g class="{_class(point.arm)}"><title>{escape(point.label)}: {point.y:.3f} at {point.x:,.0f}</title>'
        )
        if math.isfinite(point.low) and math.isfinite(point.high):
            parts.append(
                f'<line class="reach" x1="{x:.1f}" x2="{x:.1f}" y1="{up(point.low):.1f}" y2="{up(point.high):.1f}"/>'
            )
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>')
        label_x, label_y, anchor = _free(x, y, point.label, taken, (left, top, right, bottom))
        parts.append(_text(label_x, label_y, point.label, "mark", anchor) + "</g>")
    return _svg(height, title, parts)


def pareto_front(points: Sequence[Point], *, higher: bool) -> list[Point]:
    """The points that no other point beats, from the cheapest on: none is as good or better at a lower or the same cost."""
    sign = 1 if higher else -1
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -sign * point.y)):
        if not front or sign * point.y > sign * front[-1].y:
            front.append(point)
    return front


def _cost_axis(
    costs: Sequence[float], left: float, right: float
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """The axis of costs: its position function, and the grid with labels."""
    positive = [cost for cost in costs if cost > 0]
    zero = left + 8.0
    if not positive:
        return (lambda cost: zero), [(zero, "0")]
    if max(positive) < 20 * min(positive):
        low, high, ticks = _ticks(0.0, max(positive))
        linear = _scale(low, high, zero, right)
        return linear, [(linear(tick), _short(tick)) for tick in ticks]
    first, last = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
    has_zero = len(positive) < len(costs)
    across = _scale(first, last, left + 36 if has_zero else zero, right)
    every = max(1, math.ceil((last - first) / 6))
    grid = [(across(power), _short(10.0**power)) for power in range(first, last + 1, every)]
    return (lambda cost: across(math.log10(cost)) if cost > 0 else zero), [(zero, "0")] * has_zero + grid


def lines(given: Sequence[Line], *, title: str, x_axis: str, y_axis: str) -> Markup:
    """Curves over steps, each named at its end."""
    height, top, bottom, left = 300, 30, 256, 44
    points = [(x, y) for line in given for x, y in line.points if math.isfinite(y)]
    if not points:
        return Markup("")
    names = [line.arm for line in given if not line.faint]
    right = WIDTH - 14 - CHARACTER * max((len(name) for name in names), default=0)
    x_low, x_high, x_ticks = _ticks(min(x for x, _ in points), max(x for x, _ in points), 5)
    across, (up, y_ticks) = (
        _scale(x_low, x_high, left + 6, right),
        _loss_axis([y for _, y in points], bottom, top),
    )
    parts = [_grid_y(y_ticks, up, left, right)]
    for tick in x_ticks:
        parts.append(_text(across(tick), bottom + 16, _tick(tick), "tick", "middle"))
    parts.append(_text((left + right) / 2, height - 8, x_axis, "axis", "middle"))
    parts.append(_text(0, 10, y_axis, "axis"))
    ends: list[tuple[float, str]] = []
    for line in given:
        positions = [(across(x), up(y)) for x, y in line.points if math.isfinite(y)]
        if not positions:
            continue
        parts.append(f'<g class="{_class(line.arm)}">')
        if len(positions) >= DRAWN_AS_LINE:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in positions)
            parts.append(f'<polyline class="{"faint-line" if line.faint else "line"}" points="{path}"/>')
        dots = positions[-1:] if len(positions) >= DRAWN_AS_LINE else positions
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
            for x, y in dots
            if not line.faint or len(positions) < DRAWN_AS_LINE
        ]
        if not line.faint:
            ends.append((positions[-1][1], line.arm))
        parts.append("</g>")
    for y, (_, arm) in zip(_apart([y + 4 for y, _ in sorted(ends)], bottom), sorted(ends), strict=True):
        parts.append(f'<g class="{_class(arm)}">{_text(right + 8, y, arm, "mark")}</g>')
    return _svg(height, title, parts)


def _loss_axis(
    losses: Sequence[float], bottom: float, top: float
) -> tuple[Callable[[float], float], list[float]]:
    """The axis of losses with its grid: logarithmic where losses fall by orders of magnitude, so that the end stays readable."""
    low, high = min(losses), max(losses)
    if not is_logarithmic(losses):
        first, last, ticks = _ticks(low, high)
        return _scale(first, last, bottom, top), ticks
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    round_numbers = [float(f"{digit}e{power}") for power in powers for digit in (1, 2, 5)]
    first = max(number for number in round_numbers if number <= low)
    last = min((number for number in round_numbers if number >= high), default=high)
    up = _scale(math.log10(first), math.log10(last), bottom, top)
    return (lambda loss: up(math.log10(loss))), [
        number for number in round_numbers if first <= number <= last
    ]


def _apart(places: Sequence[float], bottom: float) -> list[float]:
    """Places of labels, in order, moved so that none covers another and the last stays above the axis."""
    moved: list[float] = []
    for position in places:
        moved.append(max(position, moved[-1] + 14) if moved else position)
    limit = bottom
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - 14
    return moved


def norms(values: Sequence[float], low: float, middle: float, high: float, *, title: str) -> Markup:
    """A prompt's norms, one bar a vector, with the embedding table's usual range behind them."""
    height, top, bottom, left, right = 190, 20, 150, 44, WIDTH - 8
    _, most, ticks = _ticks(0.0, max([*values, high]))
    up = _scale(0.0, most, bottom, top)
    width = (right - left) / len(values)
    parts = [
        f'<rect class="band" x="{left}" width="{right - left}" y="{up(high):.1f}" height="{up(low) - up(high):.1f}"/>',
        _grid_y(ticks, up, left, right),
        f'<line class="middle" x1="{left}" x2="{right}" y1="{up(middle):.1f}" y2="{up(middle):.1f}"/>',
    ]
    for i, value in enumerate(values):
        parts.append(
            f'<rect class="bar" x="{left + i * width + width * 0.15:.1f}" width="{width * 0.7:.1f}" '
            f'y="{up(value):.1f}" height="{bottom - up(value):.1f}"><title>vector {i}: {value:.3f}</title></rect>'
        )
    every = max(1, len(values) // 10)
    for i in range(0, len(values), every):
        parts.append(_text(left + (i + 0.5) * width, bottom + 16, str(i), "tick", "middle"))
    parts.append(_text((left + right) / 2, height - 8, "vector", "axis", "middle"))
    parts.append(_text(0, 10, "norm; shaded: 98 of 100 tokens of the base's own table", "axis"))
    return _svg(height, title, parts)


def _svg(height: float, title: str, parts: Sequence[str]) -> Markup:
    return Markup(
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _class(arm: str) -> str:
    return f"arm arm-{arm}" if arm in ARMS else f"arm arm-other-{sum(arm.encode()) % 4}"


def _scale(low: float, high: float, start: float, end: float) -> _Scale:
    return _Scale(low, high if high > low else low + 1, start, end)


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _ticks(low: float, high: float, count: int = 5) -> tuple[float, float, list[float]]:
    """Round numbers that span low to high."""
    if not high > low:
        low, high = (low - 0.5, high + 0.5) if low else (0.0, 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return first * step, last * step, [i * step for i in range(first, last + 1)]


def _tick(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.10g}"


def _short(value: float) -> str:
    """A round number in few letters: 500, 20k, 1M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _grid_x(
    ticks: Sequence[float], across: _Scale, top: float, bottom: float, axis: str, height: float
) -> str:
    parts = []
    for tick in ticks:
        x = across(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(_text(x, bottom + 14, _tick(tick), "tick", "middle"))
    parts.append(_text((across.start + across.end) / 2, height - 4, axis, "axis", "middle"))
    return "".join(parts)


def _grid_y(ticks: Sequence[float], up: Callable[[float], float], left: float, right: float) -> str:
    return "".join(
        f'<line class="grid" x1="{left}" x2="{right}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
        + _text(left - 6, up(tick) + 4, _tick(tick), "tick", "end")
        for tick in ticks
    )


def _free(
    x: float,
    y: float,
    label: str,
    taken: list[tuple[float, float, float, float]],
    frame: tuple[float, float, float, float],
) -> tuple[float, float, str]:
    """A position for a label clear of what is drawn already: right, left, above, below, then further out."""
    width = CHARACTER * len(label)
    left, top, right, bottom = frame
    for far in (0, 14, 28, 42):
        for dx, dy, anchor in (
            (11, 4 - far, "start"),
            (-11, 4 - far, "end"),
            (11, 4 + far, "start"),
            (-11, 4 + far, "end"),
            (0, -10 - far, "middle"),
            (0, 19 + far, "middle"),
        ):
            start = x + dx - {"start": 0.0, "end": width, "middle": width / 2}[anchor]
            box = (start - 3, y + dy - 10, start + width + 3, y + dy + 3)
            inside = box[0] >= left and box[2] <= right + 12 and box[1] >= top - 8 and box[3] <= bottom
            clear = all(
                box[2] < other[0] or box[0] > other[2] or box[3] < other[1] or box[1] > other[3]
                for other in taken
            )
            if inside and clear:
                taken.append(box)
                return x + dx, y + dy, anchor
    return x + 11, y + 4, "start"
