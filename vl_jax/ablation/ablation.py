"""Runs an ablation: checks it whole, tunes every arm alike, and trains every arm with every seed."""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from vl_jax.ablation import budget, identity, plan, state, workers
from vl_jax.ablation.plan import Ablation, Arm
from vl_jax.ablation.state import PlannedRun, Stored
from vl_jax.ablation.workers import Job
from vl_jax.experiment import Experiment, load
from vl_jax.report.comparison import row
from vl_jax.report.run import read_run
from vl_jax.runtime.version import commit
from vl_jax.schema import ConfigError

logger = logging.getLogger(__name__)

Overrides = tuple[tuple[str, str], ...]


class Launch:
    """An ablation that is to be run in a folder.

    Raises:
      ConfigError: an arm cannot be built, its budget differs, or two arms are the same; nothing has run then.
    """

    def __init__(
        self, name: str, declared: Ablation, spec: str, overrides: Iterable[tuple[str, str]], folder: Path
    ):
        """Builds every arm with every candidate, and counts what the arms cost.

        Args:
          spec: the experiment file, as for ``config.load``.
          overrides: what all runs share.
        """
        self.name, self.plan, self.folder = name, declared, folder
        self._spec, self._shared = spec, tuple(overrides)
        fixed = next((path for path, _ in self._shared if path == "seed"), None)
        if fixed is not None:
            raise ConfigError("--config.seed: the seeds are those of the ablation; set --seeds or first_seed")
        self._before = state.read(folder)
        self._chosen = dict(self._before.chosen) if self._before else {}
        self.jobs: dict[PlannedRun, Job] = {}
        self._known: dict[tuple[str, int], Experiment] = {}
        tuned = {arm.name: len(declared.candidates(arm)) > 1 for arm in declared.arms}
        self.costs = self._count()
        budget.check(self.costs, declared.equal, declared.tolerance)
        for arm in declared.arms:
            for number in range(len(declared.candidates(arm)) if tuned[arm.name] else 0):
                for seed in plan.tuning_seeds_of(declared):
                    self._add(arm, seed, number, is_trial=True)
        self._tuned = tuned
        for arm in declared.arms:
            self._add_compared(arm)

    def _add_compared(self, arm: Arm) -> None:
        """Adds the runs of an arm that are compared, if it is known what it is run with."""
        number = self._choose(arm) if self._tuned[arm.name] else 0
        if number is not None:
            for seed in plan.seeds_of(self.plan):
                self._add(arm, seed, number)

    def _choose(self, arm: Arm) -> int | None:
        """The number of the best candidate; None while they are not all tried, or where all failed."""
        trials: dict[int, list[float]] = {}
        for entry, job in self.jobs.items():
            if entry.arm == arm.name and entry.candidate >= 0:
                if not job.is_finished and state.failure(job.folder) is None:
                    return None
                value = metric(job.folder, self.plan.metric) if job.is_finished else None
                trials.setdefault(entry.candidate, []).append(math.nan if value is None else value)
        sign = 1 if self.plan.better == "lower" else -1
        scores = {n: sign * statistics.fmean(found) for n, found in trials.items()}
        sound = [n for n, score in scores.items() if math.isfinite(score)]
        if not sound:
            return None
        self._chosen[arm.name] = min(sound, key=lambda n: scores[n])
        return self._chosen[arm.name]

    def _add(self, arm: Arm, seed: int, number: int, *, is_trial: bool = False) -> None:
        overrides = self._overrides(arm, number, seed)
        experiment = self._built(arm, number, seed)
        trial = f",candidate={number}" if is_trial else ""
        name = f"{arm.name}{trial},seed={seed},{identity.digest(experiment)}"
        entry = PlannedRun(arm.name, seed, name, number if is_trial else -1)
        self.jobs[entry] = Job(self.folder / name, experiment, self._spec, overrides)

    def _overrides(self, arm: Arm, number: int, seed: int) -> Overrides:
        changes = plan.texts({**arm.changes, **self.plan.candidates(arm)[number]})
        if "seed" in changes:
            raise ConfigError(
                f"arm {arm.name!r} changes seed, which pairs the runs; set seeds and first_seed"
            )
        return (*self._shared, *changes.items(), ("seed", str(seed)))

    def _built(self, arm: Arm, number: int, seed: int) -> Experiment:
        """An arm with a candidate and a seed, on which nothing else in it depends."""
        if (arm.name, number) not in self._known:
            self._known[arm.name, number] = self._load(arm, self._overrides(arm, number, seed))
        return dataclasses.replace(self._known[arm.name, number], seed=seed)

    def _load(self, arm: Arm, overrides: Overrides) -> Experiment:
        try:
            return load(self._spec, overrides)
        except ConfigError as error:
            raise ConfigError(f"arm {arm.name!r}: {error}") from None

    def _count(self) -> dict[str, budget.ArmCost]:
        """What every arm costs, with every candidate; what the folder knows is not counted again."""
        known = dict(self._before.costs) if self._before else {}
        costs: dict[str, budget.ArmCost] = {}
        self._counted: dict[str, dict[str, Any]] = {}
        for arm in self.plan.arms:
            for number in range(len(self.plan.candidates(arm))):
                experiment = self._built(arm, number, self.plan.first_seed)
                mark = identity.digest(experiment)
                cost = budget.ArmCost(**known[mark]) if mark in known else budget.cost_of(experiment)
                self._counted[mark] = dataclasses.asdict(cost)
                label = arm.name if not number else f"{arm.name}, candidate {number}"
                costs[label] = cost
        return costs

    @property
    def stored(self) -> Stored:
        """What the folder keeps of it."""
        finished = sum(job.is_finished for entry, job in self.jobs.items() if entry.candidate < 0)
        known = {entry.arm for entry in self.jobs if entry.candidate < 0}
        waiting = [
            PlannedRun(arm.name, seed, "")
            for arm in self.plan.arms
            if arm.name not in known
            for seed in plan.seeds_of(self.plan)
        ]
        return Stored(
            name=self.name,
            plan=self.plan,
            entries=(*self.jobs, *waiting),
            costs=self._counted | {name: dataclasses.asdict(cost) for name, cost in self.costs.items()},
            chosen=self._chosen,
            declared=state.declared(self._before, self.plan, finished=finished, commit=commit()),
        )

    def run(self, *, parallel: int = 1, together: int = 0) -> list[str]:
        """Runs what is missing; returns the folders of the runs that failed.

        Args:
          parallel, together: as for ``workers.run``.
        """
        lead = jax.process_index() == 0
        if lead:
            self.folder.mkdir(parents=True, exist_ok=True)
            state.write(self.folder, self.stored)
        self._before = state.read(self.folder)
        trials = [job for entry, job in self.jobs.items() if entry.candidate >= 0]
        how = {"parallel": parallel, "together": together}
        failed = workers.run(trials, **how) if trials else []
        for arm in self.plan.arms:
            if self._tuned[arm.name]:
                self._add_compared(arm)
        failed += workers.run([j for e, j in self.jobs.items() if e.candidate < 0], **how)
        if lead:
            state.write(self.folder, self.stored)
        return failed


def metric(folder: Path, name: str) -> float | None:
    """A figure of a finished run; None where it has none of that name."""
    value = row(read_run(folder)).get(name)
    return float(value) if isinstance(value, (int, float)) else None


def listing(launch: Launch) -> str:
    """Every run and what has become of it, and what the arms cost."""
    stored = launch.stored
    found = [
        (e, state.status(launch.folder / e.folder) if e.folder else "waits for tuning")
        for e in stored.entries
    ]
    lines = [f"{e.folder or f'{e.arm},seed={e.seed}'}: {what}" for e, what in found]
    done = sum(what == "finished" for _, what in found)
    return "\n".join([*_cost_lines(launch.costs), *lines, f"{done} of {len(found)} runs are finished"])


def _cost_lines(costs: Mapping[str, budget.ArmCost]) -> list[str]:
    return [
        f"{name}: {cost.steps:,} steps, {cost.tokens:,} tokens, {cost.parameters:,} parameters "
        f"({cost.active_parameters:,} active), {cost.flops:.3g} flops"
        for name, cost in costs.items()
    ]
