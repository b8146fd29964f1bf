"""The page of a scaling curve, also as Markdown, CSV, LaTeX, SVG and PDF; its answer as an exit status."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from vl_jax.ablation import page as ablation_page
from vl_jax.ablation import results
from vl_jax.ablation.results import Results
from vl_jax.ablation.scaling import declared, judged
from vl_jax.ablation.scaling.declared import Expect
from vl_jax.ablation.scaling.fit import Estimate
from vl_jax.ablation.scaling.judged import Curve, CurvePoint
from vl_jax.report import figure, loglog
from vl_jax.report.charts import absent, number
from vl_jax.report.loglog import LogLogPanel, Trace
from vl_jax.report.run import page
from vl_jax.report.tables import Cell, TextTable, to_csv, to_html, to_latex, to_markdown
from vl_jax.runtime import disk
from vl_jax.runtime.errors import UserError

PAGE_FILE = "scaling.html"
_BETWEEN = 12  # points of a drawn line between two points of the grid


def write(folder: Path) -> tuple[Curve, Results]:
    """Writes ``scaling.html``, .md, .csv, .tex, .svg, .pdf and ``record.json`` from the files of the runs.

    Raises:
      UserError: a finished run has no such metric, or it is not finite or not above zero.
      ConfigError, ValueError: a file is damaged.
    """
    scaling, record = declared.read(folder)
    found = results.read(folder)
    curve = judged.judge(scaling, found)
    drawing = draw(curve)
    svg = figure.to_svg(drawing)
    tables = (expectation_table(curve, record), parameter_table(curve), point_table(curve))
    answers, parameters, points = tables
    said = "".join(f'<p class="note">{escape(line)}</p>' for line in notes(curve))
    answer = to_html(answers) if curve.fulfilments else absent("Nothing is expected of this law.")
    sections = [
        ("Answer", answer + said + f'<div class="card wide">{svg}</div>'),
        ("Law", to_html(parameters)),
        ("Points", to_html(points)),
        ("Runs", to_html(ablation_page.run_table(found))),
        ("How it was done", _protocol(curve, record)),
    ]
    name, target = found.stored.name, folder / PAGE_FILE
    done = sum(o.status == "finished" for o in found.outcomes)
    total = len(found.outcomes)
    lead = f"{len(curve.points)} points, {scaling.seeds} seeds, {done} of {total} runs finished"
    disk.write_text(target, page(name, lead, sections, kind="scaling curve"))
    texts = [f"# {name}", lead, *notes(curve), *map(to_markdown, tables)]
    disk.write_text(target.with_suffix(".md"), "\n\n".join(texts))
    disk.write_text(target.with_suffix(".csv"), to_csv(points))
    disk.write_text(target.with_suffix(".tex"), to_latex(parameters) + "\n" + to_latex(points))
    disk.write_text(target.with_suffix(".svg"), svg)
    disk.write_bytes(target.with_suffix(".pdf"), figure.to_pdf(drawing))
    text = json.dumps(record_of(curve, found, record), indent=1, ensure_ascii=False)
    disk.write_text(folder / results.RECORD_FILE, text + "\n")
    return curve, found


def conclude(folder: Path) -> None:
    """Writes the page, prints the law, and fails if something that was expected did not come true.

    Raises:
      UserError: as ``write``; or an expectation did not hold, or runs failed; one line.
    """
    curve, found = write(folder)
    for line in [*notes(curve), *map(sentence, curve.fulfilments)]:
        print(line)
    where = folder / PAGE_FILE
    print(where)
    ablation_page.refuse_failed(found, where)
    wrong = [f for f in curve.fulfilments if f.fails]
    if wrong:
        said = "; ".join(f"{f.expect.parameter}: {f.word}" for f in wrong)
        raise UserError(
            f"{len(wrong)} of {len(curve.fulfilments)} expectations did not hold ({said}); see {where}"
        )


def notes(curve: Curve) -> list[str]:
    """The law, its parameters and how well it predicts, in lines."""
    law, lines = curve.scaling.fitted, []
    lines.append(f"{law.equation}" + (f" ({law.source})" if law.source else ""))
    if curve.fit is None:
        return [*lines, f"No law is fitted: {curve.why_not}."]
    for estimate in curve.fit.estimates:
        lines.append(f"{estimate.name} = {_interval(estimate)}" + _doubt(estimate))
    spread = float(np.mean(np.abs(curve.fit.errors)))
    lines.append(f"The law is off by {spread:.2%} in the mean at the points that it is fitted to.")
    if curve.forecast is None:
        lines.append("Without the costliest points there are too few to predict them: not checked.")
    else:
        lines.append(
            f"Fitted without {', '.join(curve.forecast.names)}, it predicts them within "
            f"{curve.forecast.error:.2%} in the mean; the lowest loss of the other points alone is off by "
            f"{curve.forecast.plain:.2%}."
        )
    missing = sum(point.missing for point in curve.points)
    if missing:
        lines.append(f"{missing} runs are missing, so nothing that is expected can hold.")
    return lines


def sentence(found: judged.Fulfilment) -> str:
    """What became of an expectation, in one line."""
    measured = _interval(found.estimate) if found.estimate else "–"
    return f"{found.expect.parameter}: {measured}, expected {_range(found.expect)}: {found.word}"


def expectation_table(curve: Curve, record: Sequence[Mapping[str, Any]]) -> TextTable:
    """A row for everything that was expected."""
    rows = []
    for found in curve.fulfilments:
        late = " (said late)" if is_late(found.expect, record) else ""
        cells = (found.expect.parameter, found.expect.says, _range(found.expect) + late)
        measured = _interval(found.estimate) if found.estimate else "–"
        verdict = Cell(found.word, mood="bad" if found.fails else "good")
        rows.append([*map(Cell, cells), verdict, Cell(measured)])
    return TextTable(["parameter", "claim", "expected", "verdict", _level(curve, "measured")], rows, left=4)


def is_late(expect: Expect, record: Sequence[Mapping[str, Any]]) -> bool:
    """Whether something was first expected when runs were finished already."""
    bounds = {"parameter": expect.parameter, "low": expect.low, "high": expect.high}
    for entry in record:
        if any(bounds.items() <= known.items() for known in entry["expects"]):
            return bool(entry["finished"])
    return True


def parameter_table(curve: Curve) -> TextTable:
    """A row for every parameter of the law."""
    rows = []
    for estimate in curve.fit.estimates if curve.fit else ():
        value, low, high = estimate.interval
        words = "not identified" if estimate.why_not else "identified"
        state = Cell(words, mood="bad" if estimate.why_not else "")
        values = [Cell(number(x), repr(x)) for x in (value, low, high)]
        rows.append([Cell(estimate.name), state, Cell(estimate.why_not or "–"), *values])
    ends = f"{100 * curve.scaling.confidence:.3g} %"
    return TextTable(["parameter", "state", "why", "value", f"from ({ends})", "to"], rows, left=3)


def point_table(curve: Curve) -> TextTable:
    """A row for every point of the grid: what was measured, what the law gives, and what was predicted."""
    forecast = curve.forecast
    predicted = dict(zip(forecast.names, forecast.errors, strict=True)) if forecast else {}
    errors = curve.fit.errors if curve.fit else [math.nan] * len(curve.known)
    error = {point.arm: float(e) for point, e in zip(curve.known, errors, strict=True)}
    rows = []
    for point in curve.points:
        cells = [Cell(point.arm), Cell(f"{len(point.losses)} of {len(point.losses) + point.missing}")]
        cells += [Cell(number(x), repr(x)) for x in (*point.at.values(), point.flops)]
        cells.append(Cell(number(point.mean), repr(point.mean)) if point.losses else Cell("–"))
        cells += [_percent(table.get(point.arm)) for table in (error, predicted)]
        rows.append(cells)
    return TextTable(
        [
            *("point", "runs", *curve.scaling.variables, "flops", curve.scaling.metric),
            *("law off by", "predicted off by"),
        ],
        rows,
    )


def draw(curve: Curve) -> figure.Figure:
    """A panel for each axis: losses over its variable, a colour for each point of the other axes."""
    return loglog.panels([_panel(curve, number) for number in range(len(curve.scaling.axes))])


def _panel(curve: Curve, axis: int) -> LogLogPanel:
    scaling = curve.scaling
    along = scaling.axes[axis]
    groups: dict[str, list[CurvePoint]] = {}
    for point in curve.known:
        places = scaling.grid[point.arm]
        others = [f"{a.name} {p}" for a, p in zip(scaling.axes, places, strict=True) if a is not along]
        groups.setdefault(", ".join(others) or scaling.metric, []).append(point)
    x = along.variables[0]
    name = f"{x} ({scaling.size.replace('_', ' ')})" if x == "size" else x
    traces = [_trace(curve, group, points, x) for group, points in groups.items()]
    return LogLogPanel(f"{scaling.metric} over {along.name}", name, traces)


def _trace(curve: Curve, name: str, points: Sequence[CurvePoint], x: str) -> Trace:
    points = sorted(points, key=lambda point: point.at[x])
    dots = [(point.at[x], loss) for point in points for loss in point.losses]
    if curve.fit is None or len(points) < 2:
        return Trace(name, dots)
    places = np.arange((len(points) - 1) * _BETWEEN + 1) / _BETWEEN
    xs = {
        variable: np.exp(
            np.interp(places, range(len(points)), np.log([p.at[variable] for p in points]))
        ).tolist()
        for variable in curve.scaling.variables
    }
    line = zip(xs[x], curve.fit.predict(xs).tolist(), strict=True)
    return Trace(name, dots, list(line))


def record_of(curve: Curve, found: Results, record: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is kept of a scaling curve: that of its runs, its law, and what became of what was expected."""

    def plain(value: float) -> float | None:
        return float(f"{value:.8g}") if math.isfinite(value) else None

    fit, forecast = curve.fit, curve.forecast
    return {
        **results.record(found),
        "declared": list(record),
        "scaling": declared.to_json(curve.scaling),
        "equation": curve.scaling.fitted.equation,
        "parameters": [
            {
                "name": e.name,
                **dict(zip(("value", "low", "high"), map(plain, e.interval), strict=True)),
                "not_identified": e.why_not,
            }
            for e in (fit.estimates if fit else ())
        ],
        "why_not": curve.why_not,
        "points": [
            {"arm": p.arm, **p.at, "flops": p.flops, "losses": [plain(x) for x in p.losses]}
            for p in curve.points
        ],
        "forecast": forecast
        and {"points": list(forecast.names), "error": forecast.error, "plain": forecast.plain},
        "expects": [
            {
                "parameter": f.expect.parameter,
                "expected": _range(f.expect),
                "says": f.expect.says,
                "measured": _interval(f.estimate) if f.estimate else "–",
                "verdict": f.word,
            }
            for f in curve.fulfilments
        ],
        "notes": notes(curve),
    }


def _protocol(curve: Curve, record: Sequence[Mapping[str, Any]]) -> str:
    scaling = curve.scaling
    facts = [
        (
            "metric",
            f"{scaling.metric}, the geometric mean of {scaling.seeds} seeds",
        ),
        ("size", f"{scaling.size.replace('_', ' ')}, counted from the model"),
        *(
            (f"axis {axis.name}", f"{', '.join(axis.points)}; varies {', '.join(axis.variables)}")
            for axis in scaling.axes
        ),
        *(
            (
                f"declared {entry['date']}",
                f"commit {entry['commit'] or 'unknown'}, {entry['finished']} runs finished",
            )
            for entry in record
        ),
        (
            "fitted by",
            "Huber's loss of the logarithms, from many starts. Intervals are of a bootstrap: what the law "
            "leaves over at the points is drawn again, and widened for few points. They are of these "
            "held-out samples, and hold as far as the law does: they say nothing of another law.",
        ),
    ]
    body = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts)
    return f'<div class="card"><dl class="facts">{body}</dl></div>'


def _level(curve: Curve, text: str) -> str:
    return f"{text} [{100 * curve.scaling.confidence:.3g} %]"


def _interval(estimate: Estimate) -> str:
    value, low, high = map(number, estimate.interval)
    return f"{value} [{low}, {high}]"


def _doubt(estimate: Estimate) -> str:
    return f": not identified ({estimate.why_not})" if estimate.why_not else ""


def _range(expect: Expect) -> str:
    if expect.low is None or expect.high is None:
        return f"below {number(expect.high)}" if expect.low is None else f"above {number(expect.low)}"
    return f"from {number(expect.low)} to {number(expect.high)}"


def _percent(value: float | None) -> Cell:
    if value is None or not math.isfinite(value):
        return Cell("–")
    return Cell(f"{100 * value:+.2f} %".replace("-", "−"), repr(value))
