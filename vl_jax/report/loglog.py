"""Curves on two logarithmic axes, panel below panel, for pages and papers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from vl_jax.report.charts import number, ticks
from vl_jax.report.figure import SOFT, Dot, Figure, Stroke, Words

_LEFT, _PLOT, _NAMES, _HEIGHT, _TOP, _BOTTOM = 64, 420, 190, 220, 34, 44
_MOST_NAMES = 14
_COLD, _WARM = (43, 95, 179), (194, 87, 26)


@dataclasses.dataclass(frozen=True)
class Trace:
    """What was measured, as dots, and what a law gives, as a line; all values above zero."""

    name: str
    dots: Sequence[tuple[float, float]]
    line: Sequence[tuple[float, float]] = ()


@dataclasses.dataclass(frozen=True)
class LogLogPanel:
    """One pair of axes."""

    title: str
    x_name: str
    traces: Sequence[Trace]


def panels(shown: Sequence[LogLogPanel]) -> Figure:
    """All panels below one another; traces are coloured in their order, from cold to warm."""
    shapes: list[Stroke | Dot | Words] = []
    whole = _TOP + _HEIGHT + _BOTTOM
    for n, panel in enumerate(shown):
        shapes += _panel(panel, n * whole + _TOP)
    return Figure(_LEFT + _PLOT + _NAMES, max(1, len(shown)) * whole, shapes)


def _panel(panel: LogLogPanel, top: float) -> list[Stroke | Dot | Words]:
    points = [point for trace in panel.traces for point in (*trace.dots, *trace.line)]
    if not points:
        return [Words((8, top), f"{panel.title}: nothing is finished", size=12)]
    (x_low, x_high), (y_low, y_high) = (_range([point[axis] for point in points]) for axis in (0, 1))
    bottom = top + _HEIGHT
    x = _scale(x_low, x_high, _LEFT, _LEFT + _PLOT)
    y = _scale(y_low, y_high, bottom, top)
    shapes: list[Stroke | Dot | Words] = [Words((8, top - 14), panel.title, size=12)]
    shapes.append(Stroke((_LEFT, bottom), (_LEFT + _PLOT, bottom), SOFT))
    shapes.append(Stroke((_LEFT, top), (_LEFT, bottom), SOFT))
    for value in marks(x_low, x_high):
        shapes.append(Stroke((x(value), bottom), (x(value), bottom + 4), SOFT))
        shapes.append(Words((x(value), bottom + 16), number(value), "middle", SOFT, 9))
    for value in marks(y_low, y_high):
        shapes.append(Stroke((_LEFT - 4, y(value)), (_LEFT, y(value)), SOFT))
        shapes.append(Words((_LEFT - 8, y(value) + 3), number(value), "end", SOFT, 9))
    shapes.append(Words((_LEFT + _PLOT / 2, bottom + 32), panel.x_name, "middle"))
    for n, trace in enumerate(panel.traces):
        colour = _colour(n, len(panel.traces))
        ends = zip(trace.line[:-1], trace.line[1:], strict=True)
        for (x1, y1), (x2, y2) in ends:
            shapes.append(Stroke((x(x1), y(y1)), (x(x2), y(y2)), colour, 1.5))
        shapes += [Dot((x(a), y(b)), 2.5, colour) for a, b in trace.dots]
        if n < _MOST_NAMES:
            shapes.append(Words((_LEFT + _PLOT + 14, top + 10 + 15 * n), trace.name, colour=colour))
    if len(panel.traces) > _MOST_NAMES:
        more = f"and {len(panel.traces) - _MOST_NAMES} more"
        shapes.append(Words((_LEFT + _PLOT + 14, top + 10 + 15 * _MOST_NAMES), more, colour=SOFT))
    return shapes


def marks(low: float, high: float) -> list[float]:
    """Round numbers between two: 1, 2 and 5 times powers of ten, evenly spaced ones if that gives few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    wide = last - first > 5
    steps = (1,) if wide else (1, 2, 5)
    found = [m * 10.0**power for power in range(first, last + 1) for m in steps]
    found = [value for value in found if low <= value <= high]
    return found if len(found) >= 3 else ticks(low, high, count=5)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    air = (high / low) ** 0.05 if high > low else 1.1
    return low / air, high * air


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    span = math.log(high / low)
    return lambda value: start + math.log(value / low) / span * (stop - start)


def _colour(index: int, count: int) -> str:
    share = index / max(count - 1, 1)
    parts = (round(a + share * (b - a)) for a, b in zip(_COLD, _WARM, strict=True))
    return "#" + "".join(f"{part:02x}" for part in parts)
