"""The record of a scaling curve as a section of the page of all results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vl_jax.report.tables import Cell, TextTable


def is_curve(record: Mapping[str, Any]) -> bool:
    """Whether a record is of a scaling curve, and not of an ablation."""
    return "scaling" in record


def count(records: Sequence[Mapping[str, Any]]) -> str:
    """How many curves there are, what was expected of them, and what became of it."""
    verdicts = Counter(found["verdict"] for record in records for found in record["expects"])
    what = ", ".join(f"{times} {verdict}" for verdict, times in sorted(verdicts.items())) or "nothing"
    noun = "scaling curve" if len(records) == 1 else "scaling curves"
    return f"{len(records)} {noun}, of which {verdicts.total()} exponents were expected: {what}."


def expected(record: Mapping[str, Any]) -> list[list[Cell]]:
    """What was expected, as cells: of what, how much, what was measured, and the verdict."""
    return [
        [Cell(found["parameter"]), Cell(found["expected"]), Cell(found["measured"]), _verdict(found)]
        for found in record["expects"]
    ]


def expectations(record: Mapping[str, Any]) -> TextTable:
    """A row for everything that was expected."""
    rows = []
    for found in record["expects"]:
        cells = [Cell(found[name]) for name in ("parameter", "says", "expected", "measured")]
        rows.append([*cells, _verdict(found)])
    return TextTable(("parameter", "claim", "expected", "measured", "verdict"), rows, left=3)


def _verdict(found: Mapping[str, Any]) -> Cell:
    mood = "good" if found["verdict"] == "held" else "bad"
    return Cell(found["verdict"], best=mood == "good", mood=mood)


def lines(record: Mapping[str, Any]) -> list[str]:
    """The question, what was run for it, and the law that was found."""
    plan, says = record["plan"], record["scaling"]["says"]
    done = sum(r["status"] == "finished" for r in record["runs"])
    commits = sorted({r["figures"]["commit"] for r in record["runs"] if r["figures"].get("commit")})
    return [
        *([says] if says else []),
        f"{len(plan['arms'])} points, {plan['seeds']} seeds, {done} of {len(record['runs'])} runs finished.",
        f"Declared {record['declared'][0]['date']}; measured with commit {', '.join(commits) or 'unknown'}.",
        *record["notes"],
    ]
