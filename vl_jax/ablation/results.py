"""The runs of an ablation as figures: by arm and seed, with those that failed, and the record to be kept."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vl_jax import parts
from vl_jax.ablation import plan as plans
from vl_jax.ablation import state
from vl_jax.ablation.figures import metrics_of
from vl_jax.ablation.judgement import Values, Verdict, judge
from vl_jax.ablation.state import PlannedRun, Stored
from vl_jax.report.row import row, shares
from vl_jax.report.run import RunFiles, is_run, read_run
from vl_jax.runtime import disk
from vl_jax.runtime.errors import UserError

RECORD_FILE = "record.json"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One run: what it came to, or why it came to nothing."""

    planned: PlannedRun
    status: str
    figures: Mapping[str, Any]  # a ``row``; empty before the run begins
    files: RunFiles | None


@dataclasses.dataclass(frozen=True)
class Results:
    """All of an ablation."""

    stored: Stored
    outcomes: tuple[Outcome, ...]  # of the runs that are compared
    trials: tuple[Outcome, ...]  # of candidates
    verdicts: tuple[Verdict, ...]
    shares: set[str]

    def of(self, arm: str) -> list[Outcome]:
        """The runs of an arm that are compared."""
        return [outcome for outcome in self.outcomes if outcome.planned.arm == arm]


def read(folder: Path) -> Results:
    """Reads the runs of an ablation and judges its claims.

    Raises:
      UserError: the folder holds no ablation, or a metric is no figure of its runs.
      ValueError: a file of a run is damaged.
    """
    stored = state.read(folder)
    if stored is None:
        raise UserError(f"--workdir={folder} holds no ablation: there is no {state.PLAN_FILE}")
    found = [_outcome(folder, planned, stored) for planned in stored.entries]
    compared = tuple(o for o in found if o.planned.candidate < 0)
    metrics = metrics_of(stored.plan)
    _check_known(metrics, compared)
    values = {name: _values(compared, name) for name in metrics}
    files = [outcome.files for outcome in found if outcome.files is not None]
    trials = tuple(o for o in found if o.planned.candidate >= 0)
    verdicts = tuple(_with_unmeasured(verdict, compared) for verdict in judge(stored.plan, values))
    return Results(stored, compared, trials, verdicts, shares(files))


def _check_known(metrics: Sequence[str], outcomes: Sequence[Outcome]) -> None:
    """Refuses a metric that none of the finished runs has."""
    finished = [outcome.figures for outcome in outcomes if outcome.status == "finished"]
    known = dict.fromkeys(name for figures in finished for name in figures if name != "run")
    for metric in metrics:
        if finished and metric not in known:
            raise UserError(f"metric={metric!r} is no figure of these runs; {parts.near(metric, known)}")


def _with_unmeasured(verdict: Verdict, outcomes: Sequence[Outcome]) -> Verdict:
    """A verdict with a note for every run of its arms that is finished without a number."""
    arms, metric = (verdict.claim.arm, verdict.claim.baseline), verdict.metric
    lost = [
        f"{o.planned.folder} is finished, but its {metric} is no finite number"
        for o in outcomes
        if o.planned.arm in arms and o.status == "finished" and _number(o.figures.get(metric)) is None
    ]
    return dataclasses.replace(verdict, notes=(*verdict.notes, *lost)) if lost else verdict


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _outcome(folder: Path, planned: PlannedRun, stored: Stored) -> Outcome:
    if not planned.folder:
        return Outcome(planned, "waits for the tuning of its arm", {}, None)
    path = folder / planned.folder
    files = read_run(path) if path.is_dir() and is_run(path) else None
    figures = row(files) if files else {}
    cost = stored.costs.get(planned.arm)
    if cost and figures:
        tokens = max(cost["tokens"], 1)
        more = {"active_parameters": cost["active_parameters"], "flops_per_token": cost["flops"] / tokens}
        figures |= {"parameters": cost["parameters"], **more, "flops": cost["flops"]}
    return Outcome(planned, state.status(path), figures, files)


def _values(outcomes: tuple[Outcome, ...], name: str) -> Values:
    """A figure of the runs that are finished."""
    values: dict[str, dict[int, float | None]] = {}
    for outcome in outcomes:
        value = outcome.figures.get(name) if outcome.status == "finished" else None
        values.setdefault(outcome.planned.arm, {})[outcome.planned.seed] = _number(value)
    return values


def record(results: Results) -> dict[str, Any]:
    """What is kept of an ablation: its plan, its figures, and what became of its claims; small."""
    stored = results.stored
    columns = sorted({name for o in results.outcomes for name in o.figures if "=" not in name} - {"run"})
    return {
        "name": stored.name,
        "plan": plans.to_json(stored.plan),
        "costs": {arm.name: stored.costs.get(arm.name) for arm in stored.plan.arms},
        "chosen": stored.chosen,
        "declared": stored.declared,
        "runs": [
            {
                "arm": o.planned.arm,
                "seed": o.planned.seed,
                "status": o.status,
                "figures": {n: _short(o.figures[n]) for n in columns if o.figures.get(n) is not None},
            }
            for o in results.outcomes
        ],
        "claims": [_verdict(verdict) for verdict in results.verdicts],
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    effect = [value if math.isfinite(value) else None for value in verdict.effect]
    return {
        **dataclasses.asdict(verdict.claim),
        "metric": verdict.metric,
        "verdict": verdict.word,
        **dict(zip(("effect", "low", "high"), effect, strict=True)),
        "p": verdict.p,
        "p_holm": verdict.adjusted,
        "pairs": verdict.pairs,
        "notes": list(verdict.notes),
    }


def _short(value: Any) -> Any:
    return float(f"{value:.8g}") if isinstance(value, float) else value


def write_record(folder: Path, results: Results) -> Path:
    """Writes ``record.json``, which the results page is made of."""
    path = folder / RECORD_FILE
    disk.write_text(path, json.dumps(record(results), indent=1, ensure_ascii=False) + "\n")
    return path
