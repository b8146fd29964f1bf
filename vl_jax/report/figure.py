"""Figures for papers: intervals on one axis, as SVG and as PDF, without any package.

    shapes = forest([Panel("loss", rows)], title=...)
    to_svg(shapes), to_pdf(shapes)

A figure is a list of lines, dots and texts in points, from the top left. The text of a PDF is Helvetica,
which every reader has; it knows the letters of western Europe, and others become a question mark.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from vl_jax.report.charts import number, ticks

_LINE, _PLOT, _MARGIN, _GAP, _SIZE, _TITLE, _AXIS = 22, 260, 8, 12, 10.0, 24, 34
_NARROW = 330  # the width of a phone less the margins of a page
INK, SOFT, GOOD, BAD = "#16191d", "#8a939e", "#1a7f4b", "#b3362b"
# The colours of a page, which follow its colour scheme; a file of its own is dark on white.
PAGE_COLOURS = {INK: "var(--ink)", SOFT: "var(--soft)", GOOD: "var(--good)", BAD: "var(--bad)"}
_CODES = {"−": "-", "–": "-", "≤": "<=", "≥": ">="}


@dataclasses.dataclass(frozen=True)
class Stroke:
    """A line between two points."""

    start: tuple[float, float]
    stop: tuple[float, float]
    colour: str = INK
    width: float = 1.0
    dashed: bool = False


@dataclasses.dataclass(frozen=True)
class Dot:
    """A filled circle."""

    centre: tuple[float, float]
    radius: float = 3.5
    colour: str = INK


@dataclasses.dataclass(frozen=True)
class Words:
    """A line of text; ``anchor`` is start, middle or end."""

    at: tuple[float, float]
    text: str
    anchor: str = "start"
    colour: str = INK
    size: float = 10.0


@dataclasses.dataclass(frozen=True)
class Figure:
    """Shapes on a page of a size."""

    width: float
    height: float
    shapes: Sequence[Stroke | Dot | Words]


@dataclasses.dataclass(frozen=True)
class ForestRow:
    """An estimate with its interval; ends that are not finite are drawn to the edge."""

    name: str
    estimate: float
    low: float
    high: float
    said: str  # at the right
    colour: str = INK
    points: Sequence[float] = ()  # what the estimate is of


@dataclasses.dataclass(frozen=True)
class Panel:
    """Estimates of one figure, which share an axis."""

    name: str
    rows: Sequence[ForestRow]
    show: Callable[[float | None], str] = number  # numbers of the axis


def forest(panels: Sequence[Panel], *, title: str, is_narrow: bool = False) -> Figure:
    """Estimates below one another, with a line at zero: an axis for every panel, as units differ.

    Args:
      is_narrow: names stand above the intervals instead of beside them, as on a phone.
    """
    rows = [row for panel in panels for row in panel.rows]
    said = max((_width(row.said) * _SIZE for row in rows), default=0.0)
    if is_narrow:
        left, line = float(_MARGIN), 2 * _LINE - 6
        plot = _NARROW - left - _GAP - said - _MARGIN
    else:
        names = max((_width(row.name) * _SIZE for row in rows), default=0.0)
        left, line, plot = 2 * _MARGIN + names, _LINE, float(_PLOT)
    shapes: list[Stroke | Dot | Words] = [Words((_MARGIN, 18), title, size=12)]
    top = float(_TITLE)
    for panel in panels:
        shapes.append(Words((_MARGIN, top + 14), panel.name, colour=SOFT))
        top += _TITLE
        shapes += _panel(panel, left, plot, top, line, is_narrow)
        top += line * len(panel.rows) + _AXIS
    heading = 2 * _MARGIN + max(12 * _width(title), *(_SIZE * _width(p.name) for p in panels), 0.0)
    return Figure(max(left + plot + _GAP + said + _MARGIN, heading), top, shapes)


def _panel(
    panel: Panel, left: float, plot: float, top: float, line: float, is_narrow: bool
) -> list[Stroke | Dot | Words]:
    """The rows of a panel from ``top`` on, and the axis below them."""
    known = [v for r in panel.rows for v in (r.estimate, r.low, r.high, *r.points) if math.isfinite(v)]
    low, high = min([0.0, *known]), max([0.0, *known])
    air = 0.06 * (high - low) or 1.0
    low, high, bottom = low - air, high + air, top + line * len(panel.rows)

    def x(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * plot

    shapes: list[Stroke | Dot | Words] = []
    shapes.append(Stroke((x(0), top - 4), (x(0), bottom), SOFT, dashed=True))
    shapes.append(Stroke((left, bottom), (left + plot, bottom), SOFT))
    for value in ticks(low, high, count=4 if is_narrow else 5):
        shapes.append(Stroke((x(value), bottom), (x(value), bottom + 4), SOFT))
        text = panel.show(0.0 if abs(value) < 1e-12 else value)
        shapes.append(Words((x(value), bottom + 16), text, "middle", SOFT, 9))
    for n, row in enumerate(panel.rows):
        y = top + line * n + (line - _LINE / 2 if is_narrow else line / 2)
        shapes.append(Words((_MARGIN, y - (_LINE - 8 if is_narrow else -3.5)), row.name))
        shapes += [Dot((x(value), y), 2.0, SOFT) for value in row.points if math.isfinite(value)]
        if math.isfinite(row.estimate):
            shapes.append(Stroke((x(row.low), y), (x(row.high), y), row.colour, 2.0))
            shapes.append(Dot((x(row.estimate), y), 4.0, row.colour))
        shapes.append(Words((left + plot + _GAP, y + 3.5), row.said, colour=row.colour))
    return shapes


def to_svg(figure: Figure, colours: Mapping[str, str] | None = None) -> str:
    """The figure as SVG: a file that needs nothing else, or a part of a page in the page's ``colours``."""
    parts, colours = [], colours or {}
    for shape in figure.shapes:
        colour = colours.get(shape.colour, shape.colour)
        if isinstance(shape, Stroke):
            (x1, y1), (x2, y2) = shape.start, shape.stop
            dash = ' stroke-dasharray="3 3"' if shape.dashed else ""
            parts.append(
                f'<line x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}" style="stroke:{colour}" '
                f'stroke-width="{shape.width}"{dash}/>'
            )
        elif isinstance(shape, Dot):
            x, y = shape.centre
            parts.append(f'<circle cx="{x:.2f}" cy="{y:.2f}" r="{shape.radius}" style="fill:{colour}"/>')
        else:
            x, y = shape.at
            parts.append(
                f'<text x="{x:.2f}" y="{y:.2f}" font-size="{shape.size}" style="fill:{colour}" '
                f'text-anchor="{shape.anchor}">{escape(shape.text)}</text>'
            )
    size = f'width="{figure.width:.0f}" height="{figure.height:.0f}"'
    box = f'viewBox="0 0 {figure.width:.0f} {figure.height:.0f}"'
    paper = "" if colours else '<rect width="100%" height="100%" fill="#fff"/>'
    font = 'font-family="Helvetica, Arial, sans-serif"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {box} {font}>{paper}{"".join(parts)}</svg>\n'


def to_card(panels: Sequence[Panel], *, title: str) -> str:
    """The figure as a card of a page: names beside the intervals, or above them on a phone."""
    sizes = {"on-wide": False, "on-narrow": True}
    inside = "".join(
        f'<div class="{name}">{to_svg(forest(panels, title=title, is_narrow=narrow), PAGE_COLOURS)}</div>'
        for name, narrow in sizes.items()
    )
    return f'<div class="card wide forest">{inside}</div>'


def to_pdf(figure: Figure) -> bytes:
    """The figure as a PDF file of one page."""
    commands = "\n".join(_pdf_shape(shape, figure.height) for shape in figure.shapes).encode("latin-1")
    font = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>"
    box = f"[0 0 {figure.width:.0f} {figure.height:.0f}]"
    page = (
        f"<< /Type /Page /Parent 2 0 R /MediaBox {box} /Contents 5 0 R "
        "/Resources << /Font << /F1 4 0 R >> >> >>"
    )
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        page.encode("latin-1"),
        font,
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(commands), commands),
    ]
    content, places = b"%PDF-1.4\n", []
    for n, body in enumerate(objects, start=1):
        places.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (n, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    count = len(objects) + 1
    tail = b"xref\n0 %d\n0000000000 65535 f \n%strailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n"
    return content + tail % (count, table, count, len(content))


def _pdf_shape(shape: Stroke | Dot | Words, height: float) -> str:
    red, green, blue = (int(shape.colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    colour = f"{red:.3f} {green:.3f} {blue:.3f}"
    if isinstance(shape, Stroke):
        (x1, y1), (x2, y2) = shape.start, shape.stop
        dash = "[3 3] 0 d" if shape.dashed else "[] 0 d"
        ends = f"{x1:.2f} {height - y1:.2f} m {x2:.2f} {height - y2:.2f} l S"
        return f"{colour} RG {shape.width} w {dash} {ends}"
    if isinstance(shape, Dot):
        return f"{colour} rg {_circle(shape.centre[0], height - shape.centre[1], shape.radius)}"
    text = shape.text
    for code, plain in _CODES.items():
        text = text.replace(code, plain)
    known = text.encode("cp1252", errors="replace").decode("latin-1")
    known = "".join(f"\\{c}" if c in "\\()" else c for c in known)
    shift = {"start": 0.0, "middle": 0.5, "end": 1.0}[shape.anchor] * _width(text) * shape.size
    x, y = shape.at
    return f"{colour} rg BT /F1 {shape.size} Tf {x - shift:.2f} {height - y:.2f} Td ({known}) Tj ET"


def _circle(x: float, y: float, r: float) -> str:
    """Four curves, with which a circle is off by less than a thousandth."""
    k = 0.5523 * r
    corners = [(r, k, k, r, 0, r), (-k, r, -r, k, -r, 0), (-r, -k, -k, -r, 0, -r), (k, -r, r, -k, r, 0)]
    curves = " ".join(
        " ".join(f"{(x if n % 2 == 0 else y) + value:.2f}" for n, value in enumerate(corner)) + " c"
        for corner in corners
    )
    return f"{x + r:.2f} {y:.2f} m {curves} f"


def _width(text: str) -> float:
    """About how wide a text is in Helvetica, in multiples of its size."""
    return sum(0.28 if c in "il.,:;|' " else 0.556 for c in text)
