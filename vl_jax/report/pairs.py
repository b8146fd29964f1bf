"""Kinds of runs against the first of them, seed by seed: mean difference, interval, and a paired test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from vl_jax.evaluate.statistics import holm, paired
from vl_jax.report.charts import number, with_error
from vl_jax.report.results import label
from vl_jax.report.row import better, row
from vl_jax.report.run import RunFiles
from vl_jax.report.tables import Cell, TextTable

NOTE = (
    "Differences of runs with the same seed, with the 95 % interval of their mean (Student's t); p of the "
    "exact test over signs, and the same by Holm for as many tests as the column has."
)


def against_first(
    grouped: Mapping[str, Sequence[RunFiles]], names: Sequence[str], shares: set[str], *, first: str
) -> TextTable | None:
    """A row for every kind of run but the first; None where no two share two seeds.

    Args:
      names: of figures; those of which nobody can say which way is better are left out.
      first: the kind that the others are compared with.
    """
    columns = [name for name in names if better(name, shares) is not None]
    by_seed = {kind: _by_seed(members) for kind, members in grouped.items()}
    found: dict[str, dict[str, Any]] = {}
    for kind in (kind for kind in grouped if kind != first):
        seeds = sorted(by_seed[first].keys() & by_seed[kind].keys())
        differences = {
            name: [by_seed[kind][seed][name] - by_seed[first][seed][name] for seed in seeds]
            for name in columns
            if all(_known(by_seed[of][seed].get(name)) for of in (first, kind) for seed in seeds)
        }
        if len(seeds) > 1 and differences:
            found[kind] = {name: paired(values) for name, values in differences.items()}
    if not found:
        return None
    columns = [name for name in columns if any(name in tests for tests in found.values())]
    rows: dict[str, list[Cell]] = {kind: [Cell(kind)] for kind in found}
    for name in columns:
        tested = [kind for kind, tests in found.items() if name in tests]
        adjusted = dict(zip(tested, holm([found[kind][name].p for kind in tested]), strict=True))
        for kind, tests in found.items():
            rows[kind] += [Cell("–"), Cell("–"), Cell("–")]
            if name in tests:
                mean, low, high = tests[name].effect
                rows[kind][-3:] = [
                    Cell(with_error(mean, (high - low) / 2), value=repr(mean)),
                    Cell(number(tests[name].p), value=repr(tests[name].p)),
                    Cell(number(adjusted[kind]), value=repr(adjusted[kind])),
                ]
    head = [f"less {first}", *(text for name in columns for text in (label(name), "p", "p, Holm"))]
    return TextTable(head, list(rows.values()))


def _by_seed(members: Sequence[RunFiles]) -> dict[int, dict[str, Any]]:
    """The figures of every run, by its seed."""
    return {(run.config or {}).get("seed", 0): row(run) for run in members}


def _known(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
