"""The page that puts runs side by side: one table, and the curves of all of them in one chart each.

Reads the folders that ``sweep`` (or any number of ``train`` commands) left below one folder, and imports no
model. The table is also written as ``comparison.csv``.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vl_jax.metrics import objective_metrics
from vl_jax.report.charts import Series, line_chart, number, percent
from vl_jax.report.results import is_share, label, others
from vl_jax.report.run import RunFiles, is_run, page, read_run

COMPARISON_FILE, TABLE_FILE = "comparison.html", "comparison.csv"
# Plotted after loss and what the objectives measure: field of the log, title.
_MAXVIO = ("routing/maxvio_mean", "Busiest expert above the even share (MaxVio), mean of layers")
_LAST_LINES = 10  # the log's end, over which noisy values are averaged


def is_collection(folder: Path) -> bool:
    """Whether a folder holds runs and is none itself."""
    return not is_run(folder) and bool(_runs(folder))


def write_comparison(folder: Path) -> Path:
    """Writes ``comparison.html`` and ``comparison.csv`` and returns the path of the page.

    Raises:
      ValueError: there is no run below the folder, or a file of one is not valid JSON.
    """
    found = _runs(folder)
    if not found:
        raise ValueError(f"{folder}: no run below it (a folder with config.json)")
    runs = [read_run(path) for path in found]
    rows = [row(run) for run in runs]
    names = list(dict.fromkeys(name for entry in rows for name in entry))
    with (folder / TABLE_FILE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    target = folder / COMPARISON_FILE
    sections = [("Results", _table(rows, names, _shares(runs))), ("Training", _charts(runs))]
    target.write_text(page(folder.resolve().name, f"{len(runs)} runs", sections), encoding="utf-8")
    return target


def _runs(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/config.json") if is_run(path.parent))


def row(run: RunFiles) -> dict[str, Any]:
    """What the table says of one run; an unfinished run has fewer entries."""
    result: dict[str, Any] = {"run": run.folder.name}
    for task, history in run.history.items():
        last = history[-1]
        first, scores = last["headline"], last["scores"]
        names = [name for name in (first, *others(last, scores)) if name in scores]
        result |= {f"{task}: {name}": scores[name] for name in names}
        for kind, groups in last["groups"].items():
            result |= {f"{task}: {kind}={group}": found.get(first) for group, found in groups.items()}
    result["steps"] = run.lines[-1]["step"] if run.lines else 0
    for name in ("loss", _MAXVIO[0], "tokens_per_second"):
        values = [value for _, value in _points(run, name)][-_LAST_LINES:]
        if values:
            result[name] = statistics.fmean(values)
    if run.facts and "wall_time_s" in run.facts:
        result["wall_time_s"] = run.facts["wall_time_s"]
    return result


def _shares(runs: Sequence[RunFiles]) -> set[str]:
    """The entries of ``row`` that are shares of one."""
    names: set[str] = set()
    for task, last in ((task, history[-1]) for run in runs for task, history in run.history.items()):
        names |= {f"{task}: {name}" for name in last["shares"]}
        if is_share(last, last["headline"]):
            names |= {f"{task}: {kind}={group}" for kind, found in last["groups"].items() for group in found}
    return names


def _points(run: RunFiles, name: str) -> list[tuple[float, float]]:
    """A value of the log by step; ``routing/<x>_mean`` is the mean of ``routing/<x>`` over layers."""
    source = name.removesuffix("_mean")
    points = []
    for line in run.lines:
        value = line.get(source)
        if isinstance(value, list):
            known = [v for v in value if v is not None]
            value = statistics.fmean(known) if known else None
        if value is not None:
            points.append((line["step"], value))
    return points


def _table(rows: Sequence[Mapping[str, Any]], names: Sequence[str], shares: set[str]) -> str:
    """A column for each run, which leads to its own page."""
    links = (f'<a href="{escape(r["run"])}/report.html">{escape(r["run"])}</a>' for r in rows)
    head = "<th></th>" + "".join(f'<th class="num">{link}</th>' for link in links)
    body = ""
    for name in names[1:]:
        cells = "".join(
            f'<td class="num">{(percent if name in shares else number)(r.get(name))}</td>' for r in rows
        )
        body += f"<tr><th>{escape(name)}</th>{cells}</tr>"
    table = f'<table class="comparison"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="card wide"><div class="scroll">{table}</div></div>'


def _charts(runs: Sequence[RunFiles]) -> str:
    cards = ""
    measured = dict.fromkeys(name for run in runs for line in run.lines for name in objective_metrics(line))
    curves = [(name, label(name).capitalize()) for name in ("loss", *measured)]
    for name, title in [*curves, _MAXVIO]:
        series = [Series(run.folder.name, _points(run, name)) for run in runs]
        series = [s for s in series if s.points]
        if series:
            legend = "".join(
                f'<span><i style="background:var(--c{n % 8 + 1})"></i>{escape(s.name)}</span>'
                for n, s in enumerate(series)
            )
            cards += (
                f'<div class="card"><h3>{escape(title)}</h3><div class="legend">{legend}</div>'
                f"{line_chart(series, title=title)}</div>"
            )
    return f'<div class="grid">{cards}</div>'
