"""The page of a run: ``report.html``, one file that needs nothing else, not even a network.

Reads what a run leaves in its folder and imports no model, so a run can be looked at on any machine::

    config.json                          the resolved configuration
    run.json                             facts of the run (machine, versions, ...), any JSON object
    metrics.jsonl                        see metrics.py
    goodput.jsonl                        see runtime/spent.py
    eval/<task>/                         see results.py

A task's scores are shown by their names: the headline, what it is compared with, all others, and the same by
group. Whatever is absent is said to be absent, in its place on the page.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vl_jax.metrics import METRICS_FILE, objective_metrics, read_metrics
from vl_jax.report import goodput, matrices, results
from vl_jax.report.charts import NUM_COLOURS, Band, Series, absent, line_chart, number, percent
from vl_jax.report.gallery import gallery
from vl_jax.report.load import (
    EXPECTED,
    ROUTING_CHARTS,
    figures_of,
    layer_series,
    load_cards,
    logged_stacks,
    own_charts,
)
from vl_jax.runtime import disk
from vl_jax.runtime.spent import GOODPUT_FILE, read_ledger
from vl_jax.schema import TYPE_KEY

REPORT_FILE = "report.html"


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """The files of a run, parsed: the results of every task by step, and the samples of its last step."""

    folder: Path
    config: Mapping[str, Any] | None
    facts: Mapping[str, Any] | None
    lines: Sequence[Mapping[str, Any]]
    history: Mapping[str, Sequence[Mapping[str, Any]]]
    samples: Mapping[str, Sequence[Mapping[str, Any]]]
    ledger: Sequence[Mapping[str, Any]] = ()


def write_report(workdir: str | Path) -> Path:
    """Writes ``report.html`` into the folder of a run and returns its path.

    Raises:
      ValueError: the folder does not exist, or one of its files is not valid JSON.
      OSError: it cannot be written, such as on a full disk.
    """
    run = read_run(workdir)
    path = run.folder / REPORT_FILE
    disk.write_text(path, render(run))
    return path


def is_run(folder: Path) -> bool:
    """Whether a folder holds any file that a run leaves; the config.json of a published model is none."""
    if any((folder / name).exists() for name in (METRICS_FILE, "run.json")) or any(
        folder.glob("eval/*/*.json")
    ):
        return True
    config = folder / "config.json"
    return config.is_file() and f'"{TYPE_KEY}"' in config.read_text(encoding="utf-8", errors="replace")


def read_run(workdir: str | Path) -> RunFiles:
    """Parses the files of a run; an absent file is None or empty."""
    folder = Path(workdir)
    if not folder.is_dir():
        raise ValueError(f"workdir={str(workdir)!r}: no such folder")
    history: dict[str, list[Mapping[str, Any]]] = {}
    samples = {}
    for task in sorted(p for p in folder.glob("eval/*") if p.is_dir()):
        steps = sorted((p for p in task.glob("*.json") if p.stem.isdigit()), key=lambda p: int(p.stem))
        if steps:
            history[task.name] = [results.read_result(p) for p in steps]
            samples[task.name] = results.read_records(steps[-1])
    return RunFiles(
        folder=folder,
        config=results.read_json(folder / "config.json"),
        facts=results.read_json(folder / "run.json"),
        lines=read_metrics(folder / METRICS_FILE),
        history=history,
        samples=samples,
        ledger=read_ledger(folder / GOODPUT_FILE),
    )


def render(run: RunFiles) -> str:
    """The whole page as text."""
    sections = [
        ("Result", _headline(run)),
        ("Training", _training(run)),
        ("By group", _groups(run)),
        ("Samples", "".join(_gallery(run, task) for task in run.history)),
        ("Routing", _routing(run)),
        ("Time", goodput.section(run.ledger)),
        ("Configuration", _config(run)),
        ("Run", _facts(run)),
    ]
    return page(run.folder.resolve().name, _lead(run), sections)


def page(name: str, lead: str, sections: Sequence[tuple[str, str]], *, kind: str = "run") -> str:
    """A whole page: title, first line, and sections of HTML under their headings."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    # The policy makes the browser itself refuse anything that is not in this file.
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    body = "".join(
        f"<section><h2>{title}</h2>{content or absent('No evaluation yet.')}</section>"
        for title, content in sections
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)} – {kind} report</title><style>{style}</style></head>"
        f"<body><main><h1>{escape(name)}</h1><p class='lead'>{escape(lead)}</p>{body}</main></body></html>\n"
    )


def _lead(run: RunFiles) -> str:
    if not run.lines:
        return "No training steps logged yet."
    stages = " → ".join(band.name for band in _stages(run.lines) if band.name)
    return f"{run.lines[-1]['step']:,} steps" + (f": {stages}" if stages else "")


def _headline(run: RunFiles) -> str:
    cards = "".join(_task_card(task, evals[-1]) for task, evals in run.history.items())
    for name in dict.fromkeys(evals[-1]["headline"] for evals in run.history.values()):
        found = {t: [e for e in evals if e["headline"] == name] for t, evals in run.history.items()}
        found = {task: evals for task, evals in found.items() if len(evals) > 1}
        if found:
            series = [
                Series(t, [(e["step"], results.headline(e)) for e in evals]) for t, evals in found.items()
            ]
            is_share = all(results.is_share(evals[-1], name) for evals in found.values())
            title = f"{results.label(name).capitalize()} over training"
            cards += _chart_card(title, series, run, show=percent if is_share else number)
    return f'<div class="grid headline">{cards}</div>' if cards else ""


def _task_card(task: str, result: Mapping[str, Any]) -> str:
    name, scores, compared = result["headline"], result["scores"], results.baselines(result)
    value = results.headline(result)
    bars = gains = ""
    if results.is_share(result, name) and value is not None:
        rows = [(name, results.label(name)), *compared.items()]
        bars = "".join(
            f"<span>{escape(text)}</span>{_bar(scores[key], n)}"
            f"<span class='num'>{percent(scores[key])}</span>"
            for n, (key, text) in enumerate(rows, start=1)
        )
        known = [(text, scores[key]) for key, text in compared.items() if scores[key] is not None]
        gains = ", ".join(f"{100 * (value - score):+.1f} points beside {text}" for text, score in known)
    shown = compared if bars else ()
    tags = "".join(
        f'<span class="tag num">{escape(results.label(key))} {results.show(result, key, scores[key])}</span>'
        for key in results.others(result, scores)
        if key not in shown
    )
    count = f"step {result.get('step', 0):,}"
    if results.COUNT in scores:
        count += f" · {scores[results.COUNT]:,} samples"
    ends = (result.get("intervals") or {}).get(name, ())
    if ends and None not in ends:
        low, high = (results.show(result, name, end) for end in ends)
        count += f" · 95 % interval {low} to {high}"
    return (
        f'<div class="card task"><header><b>{escape(task)}</b><span class="num">{count}</span></header>'
        f'<div class="big num">{results.show(result, name, value)}'
        f"<small>{escape(results.label(name))}</small></div>"
        f'<div class="compare">{bars}</div>{f"<div class=soft>{escape(gains)}.</div>" if gains else ""}'
        f"{f'<div>{tags}</div>' if tags else ''}</div>"
    )


def _bar(share: float | None, colour: int = 1, marks: Sequence[float | None] = ()) -> str:
    """A share as a bar in a colour of the palette, with marks in the colours after the first."""
    width = 100 * min(max(share or 0.0, 0.0), 1.0)
    ticks = "".join(
        f'<b style="left:{100 * value:.1f}%;background:{_colour(n)}"></b>'
        for n, value in enumerate(marks, start=2)
        if value is not None
    )
    return f'<div class="bar"><i style="width:{width:.1f}%;background:{_colour(colour)}"></i>{ticks}</div>'


def _colour(number: int) -> str:
    return f"var(--c{(number - 1) % NUM_COLOURS + 1})"


def _training(run: RunFiles) -> str:
    if not run.lines:
        return absent("No metrics.jsonl yet.")
    names = list(
        dict.fromkeys(n for line in run.lines for n, v in line.items() if _is_number(v) and n != "step")
    )
    measured = objective_metrics(dict.fromkeys(names, 0))
    held_out = [n for n in names if n.startswith("eval/") and n.endswith("/loss")]
    rates = [n for n in names if n.startswith("learning_rate")]
    weights = [n for n in names if n.startswith("gate/weight/")]
    main = [
        ("Loss", [n for n in names if n == "loss" or n.startswith("loss/")], number),
        *([("Loss on held-out sources", held_out, number)] if held_out else []),
        *((results.label(n).capitalize(), [n], number) for n in measured if n not in weights),
        *([("How much each modality counts", weights, percent)] if weights else []),
        ("Learning rate", rates, number),
        ("Tokens per second", [n for n in names if n == "tokens_per_second"], number),
    ]
    cards = [
        _chart_card(title, [_series(run.lines, n) for n in chosen], run, show=show)
        if chosen
        else f'<div class="card"><h3>{title}</h3>{absent("Not logged.")}</div>'
        for title, chosen, show in main
    ]
    shown = {n for _, chosen, _ in main for n in chosen}
    rest = [_chart_card(n, [_series(run.lines, n)], run) for n in names if n not in shown]
    more = f'<details><summary class="soft">All other logged values ({len(rest)})</summary>'
    more += f'<div class="grid" style="margin-top:12px">{"".join(rest)}</div></details>'
    return f'<div class="grid">{"".join(cards)}</div>' + (
        f'<div style="margin-top:14px">{more}</div>' if rest else ""
    )


def _chart_card(
    title: str, series: Sequence[Series], run: RunFiles, *, show: Any = number, note: str = ""
) -> str:
    """A chart under its title, its last value and, for several lines, a legend."""
    last = (
        next((y for _, y in reversed(series[0].points) if y is not None), None) if len(series) == 1 else None
    )
    side = f'<span class="num">last {show(last)}</span>' if last is not None else ""
    legend = ""
    if series[0].colour is not None and len(series) > 1:
        legend = f'<span>{escape(series[0].name)} <i class="ramp"></i> {escape(series[-1].name)}</span>'
    elif len(series) > 1:
        legend = "".join(
            f'<span><i style="background:var(--c{n % 8 + 1})"></i>{escape(s.name)}</span>'
            for n, s in enumerate(series)
        )
    chart = line_chart(series, title=title, bands=_stages(run.lines), show=show)
    return (
        f'<div class="card"><div class="top"><h3>{escape(title)}</h3>{side}</div>'
        f"{f'<p class=note>{note}</p>' if note else ''}"
        f"{f'<div class=legend>{legend}</div>' if legend else ''}{chart}</div>"
    )


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> Series:
    points = [(line["step"], line[name]) for line in lines if name in line]
    short = name.removeprefix("learning_rate/").removeprefix("eval/").removeprefix("gate/weight/")
    return Series(short, points)


def _stages(lines: Sequence[Mapping[str, Any]]) -> list[Band]:
    """The stretch of steps of every training stage, in order."""
    bands: list[Band] = []
    for line in lines:
        name, step = line.get("stage", ""), line["step"]
        if bands and bands[-1].name == name:
            bands[-1] = dataclasses.replace(bands[-1], stop=step)
        else:
            bands.append(Band(name, bands[-1].stop if bands else step, step))
    return bands


def _groups(run: RunFiles) -> str:
    """The breakdowns of every task, and the tables that tell of several of them."""
    content = "".join(_breakdowns(task, evals[-1]) for task, evals in run.history.items())
    tables = "".join(map(matrices.matrix_card, matrices.joined(evals[-1] for evals in run.history.values())))
    return content + (f'<div class="card wide">{tables}</div>' if tables else "")


def _breakdowns(task: str, result: Mapping[str, Any]) -> str:
    content = "".join(_table(kind, rows, result) for kind, rows in result["groups"].items() if rows)
    if not content:
        content = absent("This evaluation has no breakdown.")
    elif results.is_share(result, result["headline"]):
        content = _legend(result) + content
    content += matrices.cards(result.get("matrices", ()))
    return f'<div class="card wide"><div class="top"><h3>{escape(task)}</h3></div>{content}</div>'


def _legend(result: Mapping[str, Any]) -> str:
    names = [("block", results.label(result["headline"]))]
    names += [("tick", text) for text in results.baselines(result).values()]
    entries = "".join(
        f'<span><i class="{kind}" style="background:{_colour(n)}"></i>{escape(text)}</span>'
        for n, (kind, text) in enumerate(names, start=1)
    )
    return f'<div class="legend">{entries}</div>'


def _table(kind: str, rows: Mapping[str, Mapping[str, Any]], result: Mapping[str, Any]) -> str:
    """A row for each group of a kind, with a bar of the headline, or of what groups have in its place."""
    found, compared = dict.fromkeys(name for row in rows.values() for name in row), results.baselines(result)
    others = results.others(result, found)
    first = others[0] if others and result["headline"] not in found else result["headline"]
    names = list(dict.fromkeys([first, *others]))
    head = "".join(f'<th class="num">{escape(compared.get(n, results.label(n)))}</th>' for n in names)
    body = ""
    for group, row in rows.items():
        bar = (
            _bar(row.get(first), marks=[row.get(n) for n in compared])
            if results.is_share(result, first)
            else ""
        )
        cells = "".join(f'<td class="num">{results.show(result, n, row.get(n))}</td>' for n in names)
        count = f"{row[results.COUNT]:,}" if results.COUNT in row else ""
        body += (
            f'<tr><th>{escape(group)}</th><td class="num">{count}</td><td class="wide">{bar}</td>{cells}</tr>'
        )
    head = f'<tr><th>{escape(results.label(kind))}</th><th class="num">count</th><th></th>{head}</tr>'
    table = f'<table class="scores"><thead>{head}</thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _gallery(run: RunFiles, task: str) -> str:
    kinds = tuple(run.history[task][-1]["groups"])
    cards = gallery(run.samples[task], folder=run.folder / "eval" / task, kinds=kinds)
    return f'<h3 style="margin:18px 0 10px">{escape(task)}</h3>{cards}'


def _routing(run: RunFiles) -> str:
    """The cards of every stack of sparse layers that the log tells of."""
    stacks = logged_stacks(run.lines)
    if not stacks:
        return absent("No routing statistics: the run logged none, or its model has no experts.")
    sections = ""
    for stack in stacks:
        heading = f'<h3 style="margin:18px 0 10px">{escape(stack)}</h3>' if stack else ""
        sections += f'{heading}<div class="grid">{_routing_of(run, stack)}</div>'
    return sections


def _routing_of(run: RunFiles, stack: str) -> str:
    lines = figures_of(run.lines, stack)
    cards = load_cards(lines)
    for title, name, show, note in ROUTING_CHARTS:
        series = layer_series(lines, name)
        if series:
            cards += _chart_card(title, series, run, show=show, note=note)
        elif name in EXPECTED:
            cards += f'<div class="card"><h3>{title}</h3>{absent("Not logged.")}</div>'
    for title, name in own_charts(lines):
        cards += _chart_card(title, layer_series(lines, name), run)
    return cards


def _config(run: RunFiles) -> str:
    if run.config is None:
        return absent("No config.json.")
    return f'<div class="card tree">{_tree(run.folder.resolve().name, run.config, is_open=True)}</div>'


def _tree(name: str, value: Any, *, is_open: bool = False) -> str:
    """A nested mapping as nested ``details``; the class of a group stands beside its name."""
    if not isinstance(value, Mapping):
        text = json.dumps(value, ensure_ascii=False)
        return f'<div class="leaf"><code>{escape(name)} = {escape(text)}</code></div>'
    kind = str(value.get("_type", "")).rpartition(":")[2]
    inner = "".join(_tree(key, item) for key, item in value.items() if key != "_type")
    label = f'<code>{escape(name)}</code><span class="kind">{escape(kind)}</span>'
    return f"<details{' open' if is_open else ''}><summary>{label}</summary>{inner}</details>"


def _facts(run: RunFiles) -> str:
    if run.facts is None:
        return absent("No run.json.")
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in _flat(run.facts))
    return f'<div class="card"><dl class="facts">{rows}</dl></div>'


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            text = (
                f"{value:,}" if _is_number(value) else value if isinstance(value, str) else json.dumps(value)
            )
            rows.append((f"{prefix}{name}", text))
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
