"""The page of a run: ``report.html``, one file that needs nothing else, not even a network.

Reads what a run leaves in its folder and imports no model, so a run can be looked at on any machine::

    config.json                          the resolved configuration
    run.json                             facts of the run (machine, versions, ...), any JSON object
    metrics.jsonl                        see metrics.py
    eval/<task>/<step>.json              {"task", "step", "num_questions", "exact_match",
                                          "blind_exact_match", "prior_exact_match",
                                          "by_kind": {kind: {"count", "exact_match", ...}},
                                          "by_language": the same by language}
    eval/<task>/<step>.samples.jsonl     {"id", "question", "answer", "prediction", "blind_prediction",
                                          "kind", "language", "image", "correct",
                                          "boxes": [{"label", "corners"}]}

``image`` is a path relative to ``eval/<task>``; ``corners`` are x0, y0, x1, y1 in pixels of that image.
A *blind* answer is given without the image; the *prior* is the most frequent answer to that kind of question.
Whatever is absent is said to be absent, in its place on the page.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vl_jax.batch import MODALITIES
from vl_jax.metrics import METRICS_FILE, read_metrics
from vl_jax.report.charts import Band, Series, heatmap, line_chart, number, percent, ramp
from vl_jax.report.gallery import gallery

REPORT_FILE = "report.html"
_LOAD, _MAXVIO, _DEAD, _DROPS = "routing/load", "routing/maxvio", "routing/dead", "routing/drop_rate"
_RUNNING, _CHURN = "routing/maxvio_running", "routing/churn"
# Lines of the log over which the final expert load is averaged: one step says little about rare experts.
_LOAD_LINES = 10
_SCORES = (
    ("exact_match", "with image", ""),
    ("blind_exact_match", "blind", "blind"),
    ("prior_exact_match", "prior", "prior"),
)


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """The files of a run, parsed; ``evaluations`` and ``samples`` hold the last step of every task."""

    folder: Path
    config: Mapping[str, Any] | None
    facts: Mapping[str, Any] | None
    lines: Sequence[Mapping[str, Any]]
    history: Mapping[str, Sequence[Mapping[str, Any]]]
    samples: Mapping[str, Sequence[Mapping[str, Any]]]


def write_report(workdir: str | Path) -> Path:
    """Writes ``report.html`` into the folder of a run and returns its path.

    Raises:
      ValueError: the folder does not exist, or one of its files is not valid JSON.
    """
    run = read_run(workdir)
    path = run.folder / REPORT_FILE
    path.write_text(render(run), encoding="utf-8")
    return path


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
            history[task.name] = [_read_json(p) for p in steps]
            samples[task.name] = read_metrics(steps[-1].with_suffix(".samples.jsonl"))
    return RunFiles(
        folder=folder,
        config=_read_json(folder / "config.json"),
        facts=_read_json(folder / "run.json"),
        lines=read_metrics(folder / METRICS_FILE),
        history=history,
        samples=samples,
    )


def render(run: RunFiles) -> str:
    """The whole page as text."""
    sections = [
        ("Result", _headline(run)),
        ("Training", _training(run)),
        ("By kind of question", "".join(_breakdowns(task, evals[-1]) for task, evals in run.history.items())),
        ("Samples", "".join(_gallery(run, task) for task in run.history)),
        ("Routing", _routing(run)),
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
        f"<section><h2>{title}</h2>{content or _absent('No evaluation yet.')}</section>"
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
    history = [
        Series(task, [(e["step"], e.get("exact_match")) for e in evals])
        for task, evals in run.history.items()
        if len(evals) > 1
    ]
    if history:
        cards += _chart_card("Exact match over training", history, run, show=percent)
    return f'<div class="grid headline">{cards}</div>' if cards else ""


def _task_card(task: str, result: Mapping[str, Any]) -> str:
    score, blind = result.get("exact_match"), result.get("blind_exact_match")
    bars = "".join(
        f"<span>{label}</span>{_bar(result[key], kind)}<span class='num'>{percent(result[key])}</span>"
        for key, label, kind in _SCORES
        if result.get(key) is not None
    )
    gain = ""
    if score is not None and blind is not None:
        gain = f"<div class='soft'>Seeing the image is worth {100 * (score - blind):+.1f} points.</div>"
    known = {key for key, _, _ in _SCORES} | {"step", "num_questions"}
    others = "".join(
        f'<span class="tag num">{escape(key)} {number(value)}</span>'
        for key, value in result.items()
        if key not in known and isinstance(value, (int, float)) and not isinstance(value, bool)
    )
    count = f"step {result.get('step', 0):,} · {result.get('num_questions', 0):,} questions"
    return (
        f'<div class="card task"><header><b>{escape(task)}</b><span class="num">{count}</span></header>'
        f'<div class="big num">{percent(score)}<small>exact match</small></div>'
        f'<div class="compare">{bars}</div>{gain}{f"<div>{others}</div>" if others else ""}</div>'
    )


def _bar(share: float | None, kind: str = "", marks: Sequence[tuple[str, float | None]] = ()) -> str:
    width = 100 * min(max(share or 0.0, 0.0), 1.0)
    ticks = "".join(
        f'<b class="{name}" style="left:{100 * value:.1f}%"></b>'
        for name, value in marks
        if value is not None
    )
    fill = f'<i{f" class={kind}" if kind else ""} style="width:{width:.1f}%"></i>'
    return f'<div class="bar">{fill}{ticks}</div>'


def _training(run: RunFiles) -> str:
    if not run.lines:
        return _absent("No metrics.jsonl yet.")
    names = list(
        dict.fromkeys(n for line in run.lines for n, v in line.items() if _is_number(v) and n != "step")
    )
    rates = [n for n in names if n.startswith("learning_rate")]
    main = [
        ("Loss", [n for n in names if n == "loss" or n.startswith("loss/")], number),
        ("Accuracy of the next token", [n for n in names if n == "accuracy"], percent),
        ("Learning rate", rates, number),
        ("Tokens per second", [n for n in names if n == "tokens_per_second"], number),
    ]
    cards = [
        _chart_card(title, [_series(run.lines, n) for n in chosen], run, show=show)
        if chosen
        else f'<div class="card"><h3>{title}</h3>{_absent("Not logged.")}</div>'
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
    return Series(name.removeprefix("learning_rate/"), points)


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


def _breakdowns(task: str, result: Mapping[str, Any]) -> str:
    tables = [("kind", result.get("by_kind")), ("language", result.get("by_language"))]
    legend = (
        '<div class="legend"><span><i class="block" style="background:var(--c1)"></i>exact match</span>'
        '<span><i class="tick" style="background:var(--c2)"></i>blind (no image)</span>'
        '<span><i class="tick" style="background:var(--c8)"></i>prior (most frequent answer)</span></div>'
    )
    content = "".join(_table(name, rows) for name, rows in tables if rows)
    if not content:
        content = _absent("This evaluation has no breakdown.")
    return f'<div class="card wide"><div class="top"><h3>{escape(task)}</h3></div>{legend}{content}</div>'


def _table(name: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    head = "".join(f'<th class="num">{h}</th>' for h in ("exact match", "blind", "prior"))
    body = ""
    for key, row in rows.items():
        score, blind, prior = (row.get(field) for field, _, _ in _SCORES)
        body += (
            f'<tr><th>{escape(key)}</th><td class="num">{row.get("count", 0):,}</td>'
            f'<td class="wide">{_bar(score, marks=(("blind", blind), ("prior", prior)))}</td>'
            + "".join(f'<td class="num">{percent(v)}</td>' for v in (score, blind, prior))
            + "</tr>"
        )
    head = f'<tr><th>{name}</th><th class="num">count</th><th></th>{head}</tr>'
    table = f'<table class="scores"><thead>{head}</thead><tbody>{body}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _gallery(run: RunFiles, task: str) -> str:
    cards = gallery(run.samples[task], folder=run.folder / "eval" / task)
    return f'<h3 style="margin:18px 0 10px">{escape(task)}</h3>{cards}'


def _routing(run: RunFiles) -> str:
    lines = [line for line in run.lines if any(name in line for name in (_LOAD, _MAXVIO, _DEAD, _DROPS))]
    if not lines:
        return _absent("No routing statistics: the run logged none, or its model has no experts.")
    cards = _load_cards([line[_LOAD] for line in lines if line.get(_LOAD)][-_LOAD_LINES:])
    charts = [
        (
            "Busiest expert above the even share (MaxVio)",
            _MAXVIO,
            number,
            "0 is perfect balance; 1 is twice the share.",
        ),
        (
            "The same of the running load",
            _RUNNING,
            number,
            "Averaged over about a hundred steps: what remains is no chance of a batch.",
        ),
        ("Experts without a token (dead)", _DEAD, number, ""),
        ("Tokens dropped", _DROPS, percent, ""),
    ]
    if any(_CHURN in line for line in lines):
        charts.append(("Choices that changed (churn)", _CHURN, percent, "Of a fixed batch, in one step."))
    for title, name, show, note in charts:
        series = _layer_series(lines, name)
        if series:
            cards += _chart_card(title, series, run, show=show, note=note)
        else:
            cards += f'<div class="card"><h3>{title}</h3>{_absent("Not logged.")}</div>'
    return f'<div class="grid">{cards}</div>'


def _load_cards(loads: Sequence[Any]) -> str:
    """One heat map for every modality: rows are layers, a cell is load divided by an even share."""
    cards = ""
    for modality, name in enumerate(MODALITIES):
        rows = [
            _relative([load[layer][modality] for load in loads])
            for layer in range(min(map(len, loads), default=0))
        ]
        if not any(value is not None for row in rows for value in row):
            chart = _absent(f"No {name} token was routed.")
        else:
            scale = '<span>¼ <i class="load"></i> 4 × even share</span><span>● no token</span>'
            chart = f'<div class="legend">{scale}</div>'
            chart += heatmap(rows, title=f"Expert load of {name} tokens by layer")
        cards += f'<div class="card"><h3>Expert load of {name} tokens</h3>{chart}</div>'
    return cards


def _relative(loads: Sequence[Sequence[float | None]]) -> list[float | None]:
    """Load of each expert summed over lines, as a multiple of the mean over experts."""
    sums = [sum(v or 0.0 for v in column) for column in zip(*loads, strict=True)]
    total = sum(sums)
    return [value * len(sums) / total if total > 0 else None for value in sums]


def _layer_series(lines: Sequence[Mapping[str, Any]], name: str) -> list[Series]:
    lines = [line for line in lines if line.get(name)]
    count = max((len(line[name]) for line in lines), default=0)
    return [
        Series(
            f"layer {layer}",
            [(line["step"], line[name][layer]) for line in lines if layer < len(line[name])],
            ramp(layer, count),
        )
        for layer in range(count)
    ]


def _config(run: RunFiles) -> str:
    if run.config is None:
        return _absent("No config.json.")
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
        return _absent("No run.json.")
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


def _absent(reason: str) -> str:
    return f'<p class="absent">{escape(reason)}</p>'


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _read_json(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
