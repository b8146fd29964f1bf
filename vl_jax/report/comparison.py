"""The page that puts runs side by side: a row for every kind of run, its seeds together, and all curves.

Reads the folders that ``sweep`` (or any number of ``train`` commands) left below one folder, and imports no
model. The table of single runs is also written as ``comparison.csv``, that of the page as ``comparison.md``
and ``comparison.tex``.
"""

from __future__ import annotations

import csv
import fnmatch
import functools
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vl_jax.evaluate.statistics import t_interval
from vl_jax.metrics import objective_metrics
from vl_jax.report.charts import Series, colour, line_chart, number, percent, with_error
from vl_jax.report.pairs import NOTE, against_first
from vl_jax.report.results import label, read_json
from vl_jax.report.row import FAILED_FILE, better, points, row, shares
from vl_jax.report.run import RunFiles, is_run, page, read_run
from vl_jax.report.tables import Cell, TextTable, mark_best, to_csv, to_html, to_latex, to_markdown
from vl_jax.runtime import disk
from vl_jax.runtime.errors import UserError

__all__ = ["is_collection", "row", "write_comparison"]

COMPARISON_FILE, TABLE_FILE, PAIRED_FILE = "comparison.html", "comparison.csv", "paired.csv"
LABELS_FILE = "labels.json"  # readable names of folders, where a sweep knows any
# Columns of the page where none are chosen; scores of tasks come before them, without those of groups.
_USUAL = ("failed", "eval/*", "steps", "loss", "routing/maxvio_mean", "tokens_per_second", "wall_time_s")
# Plotted after loss and what the objectives measure: field of the log, title.
_MAXVIO = ("routing/maxvio_mean", "Busiest expert above the even share (MaxVio), mean of layers")

_BY_FLOPS = ("flops", "Loss against the flops that training took")


def is_collection(folder: Path) -> bool:
    """Whether a folder holds runs and is none itself."""
    return not is_run(folder) and bool(_runs(folder))


def write_comparison(folder: Path, columns: Sequence[str] = ()) -> Path:
    """Writes ``comparison.html`` and the tables beside it, and returns the path of the page.

    Args:
      columns: patterns of the columns that the page has, such as ``routing/*``; empty: the usual ones.

    Raises:
      ValueError: there is no run below the folder, a file of one is not valid JSON, or no column has such
        a name.
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
    labels = read_json(folder / LABELS_FILE) or {}
    grouped = groups(runs, labels)
    table = summary(grouped, choose(names, columns), shares(runs))
    single = [
        [Cell(r["run"], link=f"{r['run']}/report.html"), *_cells(r, names[1:], shares(runs))] for r in rows
    ]
    sections = [("Results", to_html(table)), ("Training", charts(grouped))]
    first = _first(grouped, labels)
    tests = against_first(grouped, choose(names, columns), shares(runs), first=first)
    if tests is not None:
        note = f'<p class="note">{escape(NOTE)}</p>'
        sections.insert(1, (f"Paired with {first}", note + to_html(tests)))
        disk.write_text(folder / PAIRED_FILE, to_csv(tests))
    if len(grouped) < len(runs) or len(table.head) - 2 < len(names) - 1:
        sections.append(("Single runs", to_html(TextTable(names, single))))
    target = folder / COMPARISON_FILE
    lead = f"{len(runs)} runs" + (f" of {len(grouped)} kinds" if len(grouped) < len(runs) else "")
    disk.write_text(target, page(folder.resolve().name, lead, sections))
    disk.write_text(target.with_suffix(".md"), to_markdown(table))
    disk.write_text(target.with_suffix(".tex"), to_latex(table))
    return target


def _runs(folder: Path) -> list[Path]:
    found = {path.parent for path in folder.glob("*/config.json") if is_run(path.parent)}
    return sorted(found | {path.parent for path in folder.glob(f"*/{FAILED_FILE}")})


def groups(runs: Sequence[RunFiles], labels: Mapping[str, str]) -> dict[str, list[RunFiles]]:
    """Runs that differ in nothing but their seed, by the readable name of what they have in common."""
    by_config: dict[str, list[RunFiles]] = {}
    for run in runs:
        config = {k: v for k, v in (run.config or {"folder": run.folder.name}).items() if k != "seed"}
        by_config.setdefault(json.dumps(config, sort_keys=True), []).append(run)
    named: dict[str, list[RunFiles]] = {}
    for members in by_config.values():
        name = labels.get(members[0].folder.name, members[0].folder.name)
        if len(members) > 1:
            name = re.sub(r"(^|,)seed=\d+", "", name).strip(",") or "base"
        while name in named:
            name += "'"
        named[name] = members
    return named


def _first(grouped: Mapping[str, Sequence[RunFiles]], labels: Mapping[str, str]) -> str:
    """The kind of runs that others are compared with: of a sweep, the variant that it names first."""
    told = next(iter(labels), None)
    named = (name for name, runs in grouped.items() if any(run.folder.name == told for run in runs))
    return next(named, next(iter(grouped)))


def choose(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The columns that patterns name, in the order of the patterns; the usual ones without any.

    Raises:
      UserError: a pattern matches no column.
    """
    known = [name for name in names if name != "run"]
    if not patterns:
        scores = [name for name in known if ": " in name and "=" not in name]
        return list(dict.fromkeys([*scores, *(n for p in _USUAL for n in fnmatch.filter(known, p))]))
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise UserError(f"--columns={pattern}: no figure is called so; there are {', '.join(known)}")
    return list(dict.fromkeys(n for pattern in patterns for n in fnmatch.filter(known, pattern)))


def summary(grouped: Mapping[str, Sequence[RunFiles]], names: Sequence[str], shares: set[str]) -> TextTable:
    """A row for each group: means over seeds, half the width of their 95 % intervals, the best marked."""
    rows = {name: [row(run) for run in members] for name, members in grouped.items()}
    values = [[_mean([entry.get(n) for entry in entries]) for n in names] for entries in rows.values()]
    ways = {n: way for n, name in enumerate(names) if (way := better(name, shares)) is not None}
    best, cells = mark_best(ways, values), []
    for r, (name, entries) in enumerate(rows.items()):
        link = f"{entries[0]['run']}/report.html" if len(entries) == 1 else ""
        line = [Cell(name, link=link), Cell(str(len(entries)))]
        for c, column in enumerate(names):
            line.append(spread([entry.get(column) for entry in entries], column in shares, (r, c) in best))
        cells.append(line)
    return TextTable(["", "runs", *(label(name) for name in names)], cells)


def spread(values: Sequence[Any], is_share: bool, is_best: bool = False) -> Cell:
    """The mean of a figure over runs, and half the width of its interval if there are several."""
    known = [float(v) for v in values if isinstance(v, (int, float))]
    if not known:
        texts = sorted({str(v) for v in values if v is not None})
        return Cell(", ".join(texts) or "–")
    mean, low, high = t_interval(known)
    half = (high - low) / 2
    text = percent(mean) if is_share else number(mean)
    if len(known) > 1 and half > 0:
        text = f"{text} ± {percent(half)}" if is_share else with_error(mean, half)
    return Cell(text, value=repr(mean), best=is_best)


def _mean(values: Sequence[Any]) -> float | None:
    known = [float(v) for v in values if isinstance(v, (int, float))]
    return statistics.fmean(known) if known else None


def _cells(entry: Mapping[str, Any], names: Sequence[str], shares: set[str]) -> list[Cell]:
    return [spread([entry.get(name)], name in shares) for name in names]


def charts(grouped: Mapping[str, Sequence[RunFiles]]) -> str:
    """A card for every figure of the log: a curve for each group, the mean of its runs."""
    cards, runs = "", [run for members in grouped.values() for run in members]
    measured = dict.fromkeys(name for run in runs for line in run.lines for name in objective_metrics(line))
    held_out = dict.fromkeys(n for run in runs for line in run.lines for n in line if n.startswith("eval/"))
    curves = [(name, label(name).capitalize()) for name in ("loss", *measured, *held_out)]
    for name, title in [*curves, _BY_FLOPS, _MAXVIO]:
        of = _against_flops if (name, title) == _BY_FLOPS else functools.partial(points, name=name)
        series = [
            Series(group, _mean_curve([of(run) for run in members]), colour(n))
            for n, (group, members) in enumerate(grouped.items())
        ]
        series = [s for s in series if s.points]
        if series:
            legend = "".join(
                f'<span><i style="background:{s.colour}"></i>{escape(s.name)}</span>' for s in series
            )
            cards += (
                f'<div class="card"><h3>{escape(title)}</h3><div class="legend">{legend}</div>'
                f"{line_chart(series, title=title)}</div>"
            )
    return f'<div class="grid">{cards}</div>'


def _against_flops(run: RunFiles) -> list[tuple[float, float]]:
    """The loss by what training had taken, where that is logged."""
    return [(line["flops"], line["loss"]) for line in run.lines if "flops" in line and "loss" in line]


def _mean_curve(curves: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float | None]]:
    """The mean of curves at every step that all of them have."""
    tables = [dict(curve) for curve in curves if curve]
    steps = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    return [(step, statistics.fmean(table[step] for table in tables)) for step in steps]
