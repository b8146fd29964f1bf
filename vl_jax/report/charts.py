"""Charts as inline SVG text: no script, no font, no file, and colours that follow the page's colour scheme.

Classes and ``--variables`` named here are defined in ``report.css``. Every mark has a ``<title>``, which
browsers show on hover and screen readers read.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Sequence

NUM_COLOURS = 8
# More points than this cannot be told apart at the width of a chart.
_MAX_POINTS = 300
_MAX_HOVER_COLUMNS = 60
_WIDTH, _HEIGHT = 560, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 22, 28


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
      name: shown in the legend and on hover.
      points: (x, y) pairs with rising x; a y of None leaves a gap.
      colour: a CSS colour; None takes the next one of the palette.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    colour: str | None = None


@dataclasses.dataclass(frozen=True)
class Band:
    """A labelled stretch of the x axis, such as a training stage."""

    name: str
    start: float
    stop: float


def number(value: float | None) -> str:
    """A number in at most six characters or so: 12.3k, 0.0123, 3.0e-05."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    for limit, scale, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if size >= limit:
            return f"{value / scale:.3g}{unit}"
    if size != 0 and size < 0.01:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.4g}"


def percent(value: float | None) -> str:
    """A share of one as a percentage with one decimal."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def with_error(mean: float, half: float) -> str:
    """A mean with half the width of its interval, which has two digits: 0.7169 ± 0.0093."""
    decimals = 1 - math.floor(math.log10(half)) if 0 < half < math.inf else -1
    if decimals in range(7) and 0.01 <= abs(mean) < 1e4 and half < abs(mean):
        return f"{mean:.{decimals}f} ± {half:.{decimals}f}"
    return f"{number(mean)} ± {number(half)}"


def absent(reason: str) -> str:
    """A line that says why there is nothing to see."""
    return f'<p class="absent">{html.escape(reason)}</p>'


def ramp(index: int, count: int) -> str:
    """Colour of an ordered series, the ``index``-th of ``count``, between the two ends of the page's ramp."""
    share = 100 * index / max(count - 1, 1)
    return f"color-mix(in oklab, var(--ramp-end) {share:.0f}%, var(--ramp-start))"


def colour(index: int) -> str:
    """The colour of the ``index``-th line: the page's palette, then ever other hues."""
    if index < NUM_COLOURS:
        return f"var(--c{index + 1})"
    return f"hsl({index * 137.5 % 360:.0f} 55% 50%)"  # by the golden angle, so that no two are alike


def ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """About ``count`` round numbers that cover the interval from the inside."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def thin(points: Sequence[tuple[float, float | None]], *, limit: int) -> list[tuple[float, float | None]]:
    """At most ``limit`` points: each is the mean of neighbours, placed at the last of them."""
    size = math.ceil(len(points) / limit) or 1
    result: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        group = points[start : start + size]
        values = [y for _, y in group if y is not None]
        result.append((group[-1][0], sum(values) / len(values) if values else None))
    return result


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    bands: Sequence[Band] = (),
    show: Callable[[float | None], str] = number,
    y_range: tuple[float, float] | None = None,
) -> str:
    """Lines over training steps, with the stretches of ``bands`` shaded in turn and named at the top."""
    series = [
        dataclasses.replace(
            s,
            points=thin(s.points, limit=_MAX_POINTS),
            colour=s.colour or colour(n),
        )
        for n, s in enumerate(series)
    ]
    xs = [x for s in series for x, _ in s.points] + [b.start for b in bands] + [b.stop for b in bands]
    ys = [y for s in series for _, y in s.points if y is not None]
    if not xs or not ys:
        return '<p class="absent">No values.</p>'
    low, high = y_range or _padded(min(ys), max(ys))
    x = _scale(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    y = _scale(low, high, _HEIGHT - _BOTTOM, _TOP)
    parts = [*_bands(bands, x), *_axes(x, y, (min(xs), max(xs)), (low, high), show)]
    for s in series:
        parts.append(f'<path class="line" style="stroke:{s.colour}" d="{_path(s.points, x, y)}"/>')
        parts += _dots(s, x, y)
    parts += _hover(series, x, y, show)
    return _svg(parts, title=title, width=_WIDTH, height=_HEIGHT)


def histogram(values: Sequence[float], *, title: str, limit: float | None = None, bins: int = 30) -> str:
    """How many values fall into each of some stretches of equal width.

    Args:
      limit: a value to mark, such as the most that fits.
    """
    low, high = min(values), max(values)
    width = (high - low) / bins or 1
    if all(v == int(v) for v in values):  # whole numbers get stretches of whole width
        width = max(1, math.ceil((high - low + 1) / bins))
    counts = [0] * (int((high - low) // width) + 1)
    for value in values:
        counts[int((value - low) // width)] += 1
    stop = low + len(counts) * width
    xs = (low, max(stop, limit or low))
    x = _scale(*xs, _LEFT, _WIDTH - _RIGHT)
    y = _scale(0, max(counts), _HEIGHT - _BOTTOM, _TOP)
    parts = _axes(x, y, xs, (0, max(counts)), number)
    for n, count in enumerate(counts):
        start, end = low + n * width, low + (n + 1) * width
        name = f"{number(start)}" if width == 1 else f"{number(start)} to {number(end)}"
        top, left = y(count), x(start)
        parts.append(
            f'<g><title>{name}: {count:,}</title><rect class="column" x="{left:.1f}" y="{top:.1f}" '
            f'width="{max(x(end) - left - 1, 1):.1f}" height="{_HEIGHT - _BOTTOM - top:.1f}"/></g>'
        )
    if limit is not None:
        parts.append(
            f'<line class="edge" x1="{x(limit):.1f}" x2="{x(limit):.1f}" y1="{_TOP}" '
            f'y2="{_HEIGHT - _BOTTOM}"/>'
        )
    return _svg(parts, title=title, width=_WIDTH, height=_HEIGHT)


def heatmap(
    rows: Sequence[Sequence[float | None]],
    *,
    title: str,
    row_name: str = "layer",
    column_name: str = "expert",
    numbers: Sequence[int] = (),
) -> str:
    """Load of every expert of every layer, as a multiple of an even share.

    Rows have the ``numbers`` given, or are counted from 0.

    A cell of value 1 has the page's neutral colour; 1/4 and 4 have the full cold and warm one. An expert
    with no load at all carries a dot.
    """
    width = max((len(row) for row in rows), default=0)
    cell = min(max(760 // max(width, 1), 9), 34)
    left, bottom = 44, 20
    parts = []
    for n, (number_of, row) in enumerate(zip(numbers or range(len(rows)), rows, strict=True)):
        parts.append(_text(left - 8, n * cell + cell / 2 + 3.5, str(number_of), anchor="end"))
        for k, value in enumerate(row):
            name = f"{row_name} {number_of}, {column_name} {k}"
            parts.append(_cell(left + k * cell, n * cell, cell, value, name))
    for k in sorted({round(t) for t in ticks(0, max(width - 1, 0), count=8)}):
        parts.append(_text(left + k * cell + cell / 2, len(rows) * cell + 13, str(k)))
    middle = len(rows) * cell / 2
    parts.append(
        f'<text class="tick" text-anchor="middle" transform="translate(9 {middle:.1f}) rotate(-90)">'
        f"{html.escape(row_name)}</text>"
    )
    size = (left + width * cell + 2, len(rows) * cell + bottom)
    return _svg(parts, title=title, width=size[0], height=size[1], fixed=True)


def _cell(x: float, y: float, size: float, value: float | None, name: str) -> str:
    if value is None:
        return f'<rect class="cell none" x="{x}" y="{y}" width="{size - 1}" height="{size - 1}"/>'
    level = max(-1.0, min(1.0, math.log(value, 4))) if value > 0 else -1.0
    side = "warm" if level >= 0 else "cold"
    box = f'x="{x}" y="{y}" width="{size - 1}" height="{size - 1}"'
    dot = f'<circle class="dead" cx="{x + (size - 1) / 2}" cy="{y + (size - 1) / 2}" r="2"/>'
    return (
        f'<g><title>{html.escape(name)}: {value:.2f} × even share</title><rect class="cell mid" {box}/>'
        f'<rect class="{side}" {box} fill-opacity="{abs(level):.2f}"/>{dot if value == 0 else ""}</g>'
    )


def _padded(low: float, high: float) -> tuple[float, float]:
    """A y range with some air; it starts at zero if the values come near it."""
    if low >= 0 and low < 0.35 * high:
        low = 0.0
    if high == low == 0:
        return 0.0, 1.0  # counts and shares: less than nothing is not on the axis
    if high == low:
        return low - (abs(low) or 1) * 0.5, high + (abs(high) or 1) * 0.5
    air = 0.06 * (high - low)
    return (low if low == 0 else low - air), high + air


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (stop - start)


def _path(points: Sequence[tuple[float, float | None]], x: Callable, y: Callable) -> str:
    parts, pen = [], "M"
    for px, py in points:
        if py is None:
            pen = "M"
            continue
        parts.append(f"{pen}{x(px):.1f} {y(py):.1f}")
        pen = "L"
    return "".join(parts)


def _dots(series: Series, x: Callable, y: Callable) -> list[str]:
    """A line of one or few points is hard to see without marks."""
    points = [(px, py) for px, py in series.points if py is not None]
    if len(points) > 12:
        return []
    style = f'style="fill:{series.colour}"'
    return [f'<circle class="dot" {style} cx="{x(px):.1f}" cy="{y(py):.1f}" r="3"/>' for px, py in points]


def _bands(bands: Sequence[Band], x: Callable) -> list[str]:
    parts = []
    for n, band in enumerate(bands):
        left, right = x(band.start), x(band.stop)
        if n % 2:
            size = f'width="{right - left:.1f}" height="{_HEIGHT - _TOP - _BOTTOM}"'
            parts.append(f'<rect class="band" x="{left:.1f}" y="{_TOP}" {size}/>')
        if n:
            height = f'y1="{_TOP - 12}" y2="{_HEIGHT - _BOTTOM}"'
            parts.append(f'<line class="edge" x1="{left:.1f}" x2="{left:.1f}" {height}/>')
        # A name wider than its stretch would run into the next one.
        if len(band.name) * 6.5 < right - left:
            parts.append(_text((left + right) / 2, _TOP - 8, band.name, kind="stage"))
    return parts


def _axes(
    x: Callable, y: Callable, xs: tuple[float, float], ys: tuple[float, float], show: Callable
) -> list[str]:
    parts = []
    for value in ticks(*ys, count=5):
        at = y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(_LEFT - 7, at + 3.5, show(0.0 if abs(value) < 1e-12 else value), anchor="end"))
    for value in ticks(*xs, count=6):
        parts.append(_text(x(value), _HEIGHT - _BOTTOM + 16, number(value)))
    return parts


def _hover(series: Sequence[Series], x: Callable, y: Callable, show: Callable) -> list[str]:
    """Invisible columns that show a hair line and the values of all lines under the pointer."""
    steps = sorted({px for s in series for px, _ in s.points})
    size = math.ceil(len(steps) / _MAX_HOVER_COLUMNS)
    steps = steps[size - 1 :: size] if size else []
    tables = [dict(s.points) for s in series]
    width, height = (_WIDTH - _LEFT - _RIGHT) / max(len(steps), 1), _HEIGHT - _TOP - _BOTTOM
    parts = []
    for step in steps:
        values = [(s.name, table.get(step)) for s, table in zip(series, tables, strict=True)]
        lines = [f"step {step:g}", *(f"{name}: {show(v)}" for name, v in values if v is not None)]
        at = x(step)
        parts.append(
            f'<g class="hit"><title>{html.escape(chr(10).join(lines))}</title>'
            f'<rect x="{at - width / 2:.1f}" y="{_TOP}" width="{width:.1f}" height="{height}"/>'
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/></g>'
        )
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "middle", kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(parts: Sequence[str], *, title: str, width: float, height: float, fixed: bool = False) -> str:
    """``fixed`` keeps the drawn size on wide pages; otherwise the chart fills its column."""
    style, kind = (f' style="max-width:{width:.0f}px"', "chart fixed") if fixed else ("", "chart")
    return (
        f'<svg class="{kind}" role="img" viewBox="0 0 {width:.0f} {height:.0f}"{style}>'
        f"<title>{html.escape(title)}</title>{''.join(parts)}</svg>"
    )
