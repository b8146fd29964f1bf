"""The page of all results: ``RESULTS.md`` and ``RESULTS.html``, from the records of ablations.

records/balance.json, records/shared.json, ...    each a copy of the record.json of an ablation
RESULTS.md                                        beside that folder
"""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vl_jax.ablation.scaling import kept
from vl_jax.report.charts import number
from vl_jax.report.figure import BAD, GOOD, INK, ForestRow, Panel, to_card
from vl_jax.report.run import page
from vl_jax.report.tables import Cell, TextTable, to_html, to_markdown
from vl_jax.runtime import disk
from vl_jax.runtime.errors import UserError

RESULTS_FILE = "RESULTS.md"
_NEEDS = ("name", "plan", "costs", "runs", "claims", "declared")
_HEAD = ("", "claim", "verdict", "expected", "metric", "measured", "p (Holm)", "pairs")
_SUMMARY = ("ablation", "claim", "expected", "measured", "verdict", "commit")
_LEAD = (
    "Every claim, what was measured, and what became of it, those that did not hold included. This page is "
    "written by `vl_jax report --records=...` from the records of the runs."
)
_HOW = (
    "Measured is the mean difference of pairs, the arm minus the baseline, with its 95 % interval. What "
    "was declared is *held* if it was shown, *not shown* if no difference was, *reversed* if the "
    "opposite was. Of open claims nothing was expected."
)


def write(folder: Path) -> Path:
    """Writes both pages beside a folder of records and returns the path of the first.

    Raises:
      UserError: there is no record, or a file is none.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(f"--records={folder}: no record there; copy the record.json of an ablation to it")
    found = [_read(path) for path in files]
    target = folder.resolve().parent / RESULTS_FILE
    overview = f"{_count(found)}\n\n{_HOW}\n\n{to_markdown(summary(found))}"
    text = "\n".join([f"# Results\n\n{_LEAD}\n\n{overview}", *map(_markdown, found)])
    disk.write_text(target, text)
    notes = "".join(f'<p class="note">{escape(line)}</p>' for line in (_count(found), _HOW.replace("*", "")))
    sections = [("Overview", notes + to_html(summary(found, is_page=True)))]
    sections += [(f'<a id="{_anchor(r["name"])}">{escape(r["name"])}</a>', _html(r)) for r in found]
    disk.write_text(
        target.with_suffix(".html"), page("Results", _LEAD.replace("`", ""), sections, kind="results")
    )
    return target


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        missing = [name for name in _NEEDS if name not in found]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if missing:
        raise UserError(f"{path} is no record of an ablation: it has no {missing[0]}")
    return found


def _anchor(name: str) -> str:
    return re.sub(r"[^a-z0-9_-]", "-", name.lower())


def _count(records: Sequence[Mapping[str, Any]]) -> str:
    """How many claims there are, and what became of them."""
    ablations = [record for record in records if not kept.is_curve(record)]
    claims = [claim for record in ablations for claim in record["claims"]]
    declared = Counter(c["verdict"] for c in claims if c["expected"] != "open")
    opened = Counter(c["verdict"] for c in claims if c["expected"] == "open")
    what = ", ".join(f"{times} {verdict}" for verdict, times in sorted(declared.items())) or "none"
    shown = sum(times for verdict, times in opened.items() if verdict in ("lower", "higher"))
    found = (
        f"{len(ablations)} ablations with {len(claims)} claims. {declared.total()} had a direction: "
        f"{what}. {opened.total()} were open: {shown} showed a difference."
    )
    curves = [record for record in records if kept.is_curve(record)]
    return f"{found} {kept.count(curves)}" if curves else found


def summary(records: Sequence[Mapping[str, Any]], *, is_page: bool = False) -> TextTable:
    """A row for every claim of all records, and for what is expected of every curve.

    Args:
      is_page: names lead to their sections; in Markdown they do where it is shown.
    """
    rows = []
    for record in records:
        name, commits = record["name"], ", ".join(_commits(record)) or "unknown"
        link = f"#{_anchor(name)}"
        first = Cell(name, link=link) if is_page else Cell(f"[{name}]({link})", value=name)
        for claim in record["claims"]:
            compared = f"{claim['arm']} against {claim['baseline']}: {claim['metric']}"
            cells = (Cell(compared), Cell(_expected(claim)), Cell(_measured(claim)))
            rows.append([first, *cells, _verdict(claim), Cell(commits)])
        for cells in kept.expected(record) if kept.is_curve(record) else ():
            rows.append([first, *cells, Cell(commits)])
    return TextTable(_SUMMARY, rows, left=len(_SUMMARY))


def table(record: Mapping[str, Any]) -> TextTable:
    """A row for every claim of a record."""
    rows = []
    for number_of, claim in enumerate(record["claims"], start=1):
        cells = (
            _expected(claim),
            claim["metric"],
            _measured(claim),
            number(claim["p_holm"]),
            str(claim["pairs"]),
        )
        name = f"{claim['arm']} against {claim['baseline']}"
        rows.append([Cell(str(number_of)), Cell(name), _verdict(claim), *map(Cell, cells)])
    return TextTable(_HEAD, rows, left=5)


def arms(record: Mapping[str, Any]) -> TextTable:
    """A row for every arm: what it changes, what it costs, and mean and deviation of claimed figures."""
    plan, claims = record["plan"], record["claims"]
    metrics = list(dict.fromkeys([plan["metric"], *(claim["metric"] for claim in claims)]))
    rows = []
    for arm in plan["arms"]:
        changes = ", ".join(f"{path}={value}" for path, value in arm["changes"].items()) or "nothing"
        cost = record["costs"].get(arm["name"]) or {}
        sizes = (number(cost.get(name)) for name in ("parameters", "active_parameters", "flops"))
        cells = [Cell(arm["name"]), Cell(changes), *map(Cell, sizes)]
        for metric in metrics:
            values = list(_values(record, arm["name"], metric).values())
            spread = f" ± {number(statistics.stdev(values))}" if len(values) > 1 else ""
            cells.append(Cell(f"{number(statistics.fmean(values))}{spread}" if values else "–"))
        rows.append(cells)
    head = ("arm", "what it changes", "parameters", "active", "flops", *metrics)
    return TextTable(head, rows, left=2)


def _values(record: Mapping[str, Any], arm: str, metric: str) -> dict[int, float]:
    """A figure of the finished runs of an arm, by seed."""
    runs = (r for r in record["runs"] if r["arm"] == arm and r["status"] == "finished")
    return {r["seed"]: r["figures"][metric] for r in runs if r["figures"].get(metric) is not None}


def _expected(claim: Mapping[str, Any]) -> str:
    margin = f" (margin {number(claim['margin'])})" if claim["margin"] else ""
    return claim["expected"].replace("_", " ") + margin


def _measured(claim: Mapping[str, Any]) -> str:
    return f"{number(claim['effect'])} [{number(claim['low'])}, {number(claim['high'])}]"


def _verdict(claim: Mapping[str, Any]) -> Cell:
    mood = "" if claim["expected"] == "open" else ("good" if claim["verdict"] == "held" else "bad")
    return Cell(claim["verdict"], best=mood == "good", mood=mood)


def _commits(record: Mapping[str, Any]) -> list[str]:
    return sorted({r["figures"]["commit"] for r in record["runs"] if r["figures"].get("commit")})


def _setup(record: Mapping[str, Any]) -> list[str]:
    """The question, and what was run for it."""
    plan = record["plan"]
    done = sum(r["status"] == "finished" for r in record["runs"])
    cost = next(filter(None, record["costs"].values()), None)
    size = f" A run of {cost['steps']:,} steps has {cost['tokens']:,} tokens." if cost else ""
    declared = record["declared"][0]
    equal = ", ".join(plan["equal"]) or "nothing"
    line = (
        f"{len(plan['arms'])} arms, {plan['seeds']} paired seeds, {done} of {len(record['runs'])} runs "
        f"finished. Equal, up to {100 * plan['tolerance']:.3g} %: {equal}.{size} "
        f"Declared {declared['date']}; measured with commit {', '.join(_commits(record)) or 'unknown'}."
    )
    return [*([plan["says"]] if plan["says"] else []), line]


def _remarks(record: Mapping[str, Any]) -> list[str]:
    """By the number of the claim: what was said, by whom, and what has to be known of the figures."""
    lines = []
    for number_of, claim in enumerate(record["claims"], start=1):
        said = [claim["says"]] if claim["says"] else []
        if text := ". ".join([*said, *claim["notes"]]):
            lines.append(f"Claim {number_of}: {text}.")
    return lines


def _markdown(record: Mapping[str, Any]) -> str:
    if kept.is_curve(record):
        parts = (f"## {record['name']}", *kept.lines(record), to_markdown(kept.expectations(record)))
        return "\n\n".join(parts)
    parts = (
        f"## {record['name']}",
        *_setup(record),
        to_markdown(arms(record)).rstrip(),
        to_markdown(table(record)).rstrip(),
        "\n".join(f"- {line}" for line in _remarks(record)),
    )
    return "\n\n".join(filter(None, parts)) + "\n"


def _html(record: Mapping[str, Any]) -> str:
    def notes(lines: Sequence[str]) -> str:
        return "".join(f'<p class="note">{escape(line)}</p>' for line in lines)

    if kept.is_curve(record):
        return notes(kept.lines(record)) + to_html(kept.expectations(record))
    panels = _panels(record)
    tables = to_html(arms(record)) + to_html(table(record))
    card = to_card(panels, title="Differences, arm minus baseline") if panels else ""
    return notes(_setup(record)) + tables + notes(_remarks(record)) + card


def _panels(record: Mapping[str, Any]) -> list[Panel]:
    """The claims about each metric, which has a scale of its own, with the differences of their pairs."""

    def end(value: float | None, other: float) -> float:
        return other if value is None else value

    by_metric: dict[str, list[ForestRow]] = {}
    for claim in record["claims"]:
        first, second = (_values(record, claim[side], claim["metric"]) for side in ("arm", "baseline"))
        good = GOOD if claim["verdict"] == "held" else BAD
        row = ForestRow(
            f"{claim['arm']} against {claim['baseline']}",
            end(claim["effect"], float("nan")),
            end(claim["low"], float("-inf")),
            end(claim["high"], float("inf")),
            claim["verdict"],
            INK if claim["expected"] == "open" else good,
            tuple(first[seed] - second[seed] for seed in first if seed in second),
        )
        by_metric.setdefault(claim["metric"], []).append(row)
    return [Panel(metric, rows) for metric, rows in by_metric.items()]
