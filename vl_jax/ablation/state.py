"""What an ablation keeps in its folder.

Beside the folders of its runs::

    plan.json                        what was declared, when, and which runs belong to it
    <arm>,seed=<n>,<digest>/         a run, see docs/workdir.md
    .../failed.json                  in the folder of a run: why it failed, until it is tried again

A changed experiment has another digest and so another folder: no result of what it was before is used.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vl_jax.ablation import plan as plans
from vl_jax.ablation.plan import Ablation
from vl_jax.metrics import METRICS_FILE, read_metrics
from vl_jax.report.row import FAILED_FILE
from vl_jax.runtime import disk
from vl_jax.schema import ConfigError

PLAN_FILE, FINISHED_FILE = "plan.json", "run.json"


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A run of an ablation, as its plan names it."""

    arm: str
    seed: int
    folder: str  # its name; empty while the arm waits for its tuning
    candidate: int = -1  # number of the candidate that it tries; -1: it is compared


@dataclasses.dataclass(frozen=True)
class Stored:
    """The content of ``plan.json``.

    Attributes:
      name: of the ablation in its file.
      costs: what each arm costs, by name; see ``budget.ArmCost``.
      chosen: the number of the best candidate of each arm that was tuned.
      declared: every set of claims there has been: its date, its commit, how many runs were finished then.
    """

    name: str
    plan: Ablation
    entries: tuple[PlannedRun, ...]
    costs: Mapping[str, Mapping[str, Any]]
    chosen: Mapping[str, int]
    declared: Sequence[Mapping[str, Any]]


def is_ablation(folder: Path) -> bool:
    """Whether a folder is one of an ablation."""
    return (folder / PLAN_FILE).is_file()


def read(folder: Path) -> Stored | None:
    """What the folder holds; None before the first launch.

    Raises:
      ConfigError: the file is damaged.
    """
    path = folder / PLAN_FILE
    if not path.is_file():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        entries = tuple(PlannedRun(**entry) for entry in tree["entries"])
        found = {**tree, "plan": plans.from_json(tree["plan"]), "entries": entries}
        return Stored(**found)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: damaged ({error}); delete it and run `sweep` again") from None


def write(folder: Path, stored: Stored) -> None:
    """Writes ``plan.json``."""
    tree = {
        "name": stored.name,
        "plan": plans.to_json(stored.plan),
        "entries": [dataclasses.asdict(entry) for entry in stored.entries],
        **{name: getattr(stored, name) for name in ("costs", "chosen", "declared")},
    }
    disk.write_text(folder / PLAN_FILE, json.dumps(tree, indent=1, ensure_ascii=False) + "\n")


def declared(before: Stored | None, plan: Ablation, *, finished: int, commit: str) -> list[dict[str, Any]]:
    """The record of declarations with the claims of a plan added, if they are new."""
    record = [dict(entry) for entry in before.declared] if before else []
    known = {
        name: plans.to_json(plan)[name] for name in ("claims", "metric", "better", "seeds", "confidence")
    }
    if not record or any(record[-1][name] != value for name, value in known.items()):
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record.append({"date": now, "commit": commit, "finished": finished, **known})
    return record


def status(folder: Path) -> str:
    """What has become of a run, in words: finished, failed and why, at which step it is, or missing."""
    if (folder / FINISHED_FILE).is_file():
        return "finished"
    if (folder / FAILED_FILE).is_file():
        return f"failed: {failure(folder)}"
    lines = read_metrics(folder / METRICS_FILE)
    if lines:
        return f"unfinished, at step {lines[-1]['step']}"
    return "unfinished" if (folder / "config.json").is_file() else "missing"


def failure(folder: Path) -> str | None:
    """Why a run failed; None if it did not."""
    path = folder / FAILED_FILE
    if not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["reason"])
    except (ValueError, KeyError, TypeError):
        return f"{path} cannot be read"


def fail(folder: Path, reason: str) -> None:
    """Notes why a run failed."""
    folder.mkdir(parents=True, exist_ok=True)
    disk.write_text(folder / FAILED_FILE, json.dumps({"reason": reason}, ensure_ascii=False) + "\n")
