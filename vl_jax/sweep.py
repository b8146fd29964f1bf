"""Many runs of one experiment that differ in some values, each in a folder named after its differences.

    sweep_top_k() in the experiment file --> [{"model.moe.top_k": 1}, ...] --> WORKDIR/top_k=1/, ...

Every configuration is checked before the first run begins. A finished run is not repeated and an unfinished
one resumes, so the same command continues a sweep that was stopped; a finished run of another configuration
is refused. ``ablation_NAME()`` and ``scaling_NAME()`` of the file are run by ``ablation`` instead.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import jax

from vl_jax import config, experiment
from vl_jax.ablation import figures, identity, state, workers
from vl_jax.ablation.ablation import Launch
from vl_jax.ablation.plan import Ablation
from vl_jax.ablation.scaling import declared as scalings
from vl_jax.ablation.scaling import judged
from vl_jax.ablation.scaling.declared import Scaling
from vl_jax.ablation.workers import Job
from vl_jax.moe import routing
from vl_jax.report import comparison
from vl_jax.runtime import disk
from vl_jax.runtime.version import commit
from vl_jax.schema import ConfigError

SWEEP, ABLATION, SCALING = "sweep_", "ablation_", "scaling_"
Declared = TypeVar("Declared", Ablation, Scaling)


def names_of(spec: str, given: str | None) -> list[str]:
    """What is to be run of an experiment file: the names given, or the only one there is.

    Raises:
      ConfigError: none is given, and there are none or several.
    """
    if given is not None:
        return given.split(",")
    known = [name for prefix in (ABLATION, SCALING, SWEEP) for name in config.functions(spec, prefix)]
    if len(known) != 1:
        raise ConfigError(f"--sweep is missing: {spec} has {', '.join(known) or 'no sweep and no ablation'}")
    return known


def find_ablation(spec: str, names: Sequence[str]) -> Ablation | None:
    """The ablation that is named; None where names are of something else.

    Raises:
      ConfigError: an ablation is named beside something else, or the function gives something else.
    """
    return _found(spec, names, ABLATION, "an ablation", Ablation)


def find_scaling(spec: str, names: Sequence[str]) -> Scaling | None:
    """The scaling curve that is named; raises as ``find_ablation``."""
    return _found(spec, names, SCALING, "a scaling curve", Scaling)


def _found(spec: str, names: Sequence[str], prefix: str, what: str, cls: type[Declared]) -> Declared | None:
    known = config.functions(spec, prefix)
    named = [name for name in names if name in known]
    if not named:
        return None
    if len(names) > 1:
        raise ConfigError(f"--sweep={','.join(names)}: {named[0]} is {what}, which is run by itself")
    found = config.call(spec, f"{prefix}{named[0]}")
    if not isinstance(found, cls):
        raise ConfigError(f"{prefix}{named[0]}() gave {type(found).__name__}, no {cls.__name__}")
    return found


def launch(
    spec: str,
    name: str,
    declared: Ablation,
    workdir: Path,
    overrides: Iterable[tuple[str, str]] = (),
    *,
    seeds: int | None = None,
) -> Launch:
    """An ablation, checked and counted, that is to be run in a folder.

    Args:
      seeds: runs of every arm, in place of what it declares.

    Raises:
      ConfigError: see ``Launch``.
    """
    if scalings.is_scaling(workdir):
        raise ConfigError(f"--workdir={workdir} holds a scaling curve; choose another for an ablation")
    return _checked(Launch(name, _with_seeds(declared, seeds), spec, overrides, workdir))


def launch_scaling(
    spec: str,
    name: str,
    declared: Scaling,
    workdir: Path,
    overrides: Iterable[tuple[str, str]] = (),
    *,
    seeds: int | None = None,
) -> tuple[Launch, Scaling]:
    """The runs of a scaling curve, checked and counted, and the curve with the seeds that it is run with.

    Raises:
      ConfigError: see ``Launch``; or the folder holds an ablation, or the grid cannot tell the law.
    """
    if state.is_ablation(workdir) and not scalings.is_scaling(workdir):
        raise ConfigError(f"--workdir={workdir} holds an ablation; choose another for a scaling curve")
    declared = _with_seeds(declared, seeds)
    found = _checked(Launch(name, scalings.ablation_of(declared), spec, overrides, workdir))
    judged.check(declared, {arm: dataclasses.asdict(cost) for arm, cost in found.costs.items()})
    return found, declared


def keep_scaling(found: Launch, declared: Scaling) -> None:
    """Notes in the folder of a scaling curve what is declared of it, before it runs."""
    if jax.process_index() == 0:
        found.folder.mkdir(parents=True, exist_ok=True)
        finished = sum(job.is_finished for job in found.jobs.values())
        scalings.write(found.folder, declared, finished=finished, commit=commit())


def _checked(found: Launch) -> Launch:
    figures.check_sources(found.plan, (job.experiment for job in found.jobs.values()))
    return found


def _with_seeds(declared: Declared, seeds: int | None) -> Declared:
    if seeds is None:
        return declared
    try:
        return dataclasses.replace(declared, seeds=seeds)
    except ValueError as error:
        raise ConfigError(f"--seeds={seeds}: {error}") from None


def variants_of(spec: str, names: Sequence[str], seeds: int | None = None) -> list[dict[str, str]]:
    """The variants of the product of some sweeps, each with so many seeds from 0 on if that is asked for."""
    variants = config.sweep(spec, names)
    if seeds is None:
        return variants
    return [{**variant, "seed": str(seed)} for variant in variants for seed in range(seeds)]


def jobs_of(
    spec: str,
    names: Sequence[str],
    workdir: Path,
    overrides: Iterable[tuple[str, str]] = (),
    *,
    seeds: int | None = None,
) -> list[Job]:
    """The runs of the product of some sweeps.

    Args:
      spec: experiment file, as for ``config.load``.
      overrides: what all runs share.
      seeds: runs of every variant; None: one, with the experiment's own seed.

    Raises:
      ConfigError: a configuration is wrong, two runs would share a folder, or a folder holds a finished run
        of another configuration.
    """
    variants = variants_of(spec, names, seeds)
    folders = [workdir / folder_name(variant) for variant in variants]
    twice = next((f.name for f in folders if folders.count(f) > 1), None)
    if twice is not None:
        raise ConfigError(f"--sweep={','.join(names)}: two variants are called {twice!r}")
    shared, jobs = tuple(overrides), []
    for variant, folder in zip(variants, folders, strict=True):
        changes = (*variant.items(), *shared)
        jobs.append(Job(folder, experiment.load(spec, changes), spec, changes))
    for job in jobs:
        if job.is_finished and (line := identity.difference(job.folder, job.experiment)) is not None:
            raise ConfigError(
                f"{job.folder} holds a finished run of another configuration: {line}; choose another "
                "--workdir, or delete that folder"
            )
    return jobs


def run(
    spec: str,
    names: Sequence[str],
    workdir: Path,
    overrides: Iterable[tuple[str, str]] = (),
    *,
    parallel: int = 1,
    seeds: int | None = None,
) -> Path:
    """Trains every variant that has not finished yet and compares all of them; returns the page's path.

    Args:
      parallel: runs at once, each in a process of its own.
      seeds: as for ``jobs_of``.

    Raises:
      ConfigError: a configuration is wrong; nothing has run then.
      ValueError: some runs failed; the others are there, and compared.
    """
    jobs = jobs_of(spec, names, workdir, overrides, seeds=seeds)
    failed = workers.run(jobs, parallel=parallel)
    labels = {
        folder_name(variant): label_of(variant) + _mark(job)
        for variant, job in zip(variants_of(spec, names, seeds), jobs, strict=True)
    }
    disk.write_text(workdir / comparison.LABELS_FILE, json.dumps(labels, indent=1, ensure_ascii=False) + "\n")
    page = comparison.write_comparison(workdir)
    if failed:
        raise ValueError(f"{len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}; see {page}")
    return page


def _mark(job: Job) -> str:
    """What has to be known of a variant beside what it varies: that it cannot write as it was trained."""
    causal = all(routing.is_causal(stack.moe) for stack in job.experiment.model.stacks.values())
    return "" if causal else " (not causal)"


def listing(jobs: Sequence[Job]) -> str:
    """Every run and what has become of it."""
    lines = [f"{job.folder.name}{_mark(job)}: {state.status(job.folder)}" for job in jobs]
    return "\n".join([*lines, f"{sum(job.is_finished for job in jobs)} of {len(jobs)} runs are finished"])


def folder_name(variant: Mapping[str, str]) -> str:
    """``top_k=2,scheme=switch``: the last part of every path, and its value; ``base`` without any.

    Whatever is no good in the name of a file becomes a dash.
    """
    pairs = (f"{path.rpartition('.')[2]}={value}" for path, value in variant.items())
    text = "".join(c if c.isalnum() or c in "=,._+-" else "-" for c in ",".join(pairs))
    return text.strip("-.") or "base"


def label_of(variant: Mapping[str, str]) -> str:
    """The same to be read: a part of a file of one's own by its name and that of the file."""

    def shown(value: str) -> str:
        file, colon, name = value.rpartition(":")
        return f"{name} ({Path(file).name})" if colon and file.endswith(".py") else value

    pairs = (f"{path.rpartition('.')[2]}={shown(value)}" for path, value in variant.items())
    return ",".join(pairs) or "base"
