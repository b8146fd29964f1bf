"""Runs of an experiment: begin or resume one, evaluate it, export it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import vl_jax
from vl_jax import config as config_lib
from vl_jax import params as params_lib
from vl_jax import schema
from vl_jax.batch import Batch
from vl_jax.checkpoint import CHECKPOINTS, Checkpointer
from vl_jax.data.config import opened
from vl_jax.data.images.resolution import resolution_warning
from vl_jax.data.stream.held_out_batches import held_out_batches
from vl_jax.evaluate.runner import evaluate, forget_results
from vl_jax.experiment import (
    RUN_CONFIG,
    Experiment,
    first_weights,
    model_spec,
    open_stream,
    plan,
    read_run,
    resolve,
)
from vl_jax.fit import chips, useful
from vl_jax.fit.flops import STEP_PASSES
from vl_jax.fit.spent import Spent
from vl_jax.interop import pretrained
from vl_jax.interop.run_as import run_as
from vl_jax.layout import Layout, rows_here
from vl_jax.report.results import read_result
from vl_jax.report.run import write_report
from vl_jax.runtime import allocator, disk, lock, trace
from vl_jax.runtime.hosts.joined import joined
from vl_jax.runtime.ledger import Ledger
from vl_jax.runtime.spent import EVALUATION, REPORT
from vl_jax.runtime.storage import buckets
from vl_jax.runtime.version import commit
from vl_jax.train import initial, lockstep, loop, resume, saved, signals
from vl_jax.train.evaluation import EvaluationHook
from vl_jax.train.hooks import Hook
from vl_jax.train.hosts import agreement
from vl_jax.train.probe import Probe
from vl_jax.train.program import Program, programs
from vl_jax.train.specialise import guide
from vl_jax.train.stages import Stage
from vl_jax.train.step import TrainState
from vl_jax.train.watchdog import Watchdog

logger = logging.getLogger(__name__)


def run(
    experiment: Experiment, workdir: Path, *, profile: str = "", began: float | None = None
) -> dict[str, Any]:
    """Trains (or resumes), evaluates and writes the report. Returns the evaluation results by task.

    Args:
      began: when the launch did, in seconds since the epoch; None: now.
      profile: the steps of which a trace is written, such as 10-12; none if it is empty.

    Raises:
      loop.Stopped: the run was asked to stop and saved its state.
      ValueError: the configuration does not fit the machine, the data or an earlier run of this folder, or
        another process runs there.
    """
    allocator.keep_freed_memory()
    start = time.time() if began is None else began
    experiment = resolve(experiment)
    total = sum(stage.steps for stage in experiment.stages)
    steps = trace.steps_of(profile, total) if profile else None
    _open_data(experiment, workdir)
    with signals.noted(joined()) as stop, _launched(experiment, workdir, start) as launched:
        made = programs(launched.layout, experiment.stages, seed=experiment.seed)
        with trace.traced(steps, workdir) as hooks:
            state = loop.drive(launched.course(made, stop, hooks=hooks))
        return launched.conclude(state)


def run_together(experiments: Sequence[Experiment], workdirs: Sequence[Path]) -> list[Exception | None]:
    """Does for each what ``run`` does; experiments that differ only in their seed train as one program.

    Their figures are those of single runs, up to the rounding of sums; times are those of all runs together.
    It is for one process.

    Returns:
      Why each run failed; None where it did not.

    Raises:
      loop.Stopped: the runs were asked to stop and saved their state.
      ValueError: the experiments differ in more than their seed.
    """
    allocator.keep_freed_memory()
    start, first = time.time(), resolve(experiments[0])
    if any(dataclasses.replace(other, seed=experiments[0].seed) != experiments[0] for other in experiments):
        raise ValueError("runs that train together may differ in their seed and in nothing else")
    _open_data(first, workdirs[0])
    layout, reasons = plan(first), dict[int, Exception | None]()
    with signals.noted() as stop, contextlib.ExitStack() as stack:
        launched: dict[int, _Launched] = {}
        for number, (experiment, workdir) in enumerate(zip(experiments, workdirs, strict=True)):
            mine = dataclasses.replace(first, seed=experiment.seed)
            try:
                launched[number] = stack.enter_context(_launched(mine, workdir, start, layout))
            except Exception as error:
                reasons[number] = error
        made = programs(layout, first.stages)
        lead = min(launched, default=0)
        ends = lockstep.drive(
            [functools.partial(one.course, made, quiet=number != lead) for number, one in launched.items()],
            layout=layout,
            seeds=[one.experiment.seed for one in launched.values()],
            stop=stop,
        )
        for (number, one), end in zip(launched.items(), ends, strict=True):
            reasons[number] = end if isinstance(end, Exception) else None
            if not isinstance(end, Exception):
                try:
                    one.conclude(end, together=len(ends))
                except Exception as error:
                    reasons[number] = error
    return [reasons[number] for number in range(len(experiments))]


def _open_data(experiment: Experiment, workdir: Path) -> None:
    """Opens every source, so that one that cannot be read ends a run before it has a folder.

    Several hosts make sure that they have the same experiment and the same data.
    """
    data, hosts = experiment.data, joined()
    if hosts is not None:
        agreement.on_configuration(hosts, workdir, json.loads(schema.to_json(experiment)))
    sources = {source.name: opened(data, source) for source in data.sources}
    held_out = {source.name: opened(data, source) for source in data.evaluation}
    if hosts is not None:
        agreement.on_data(hosts, workdir, held_out | sources)
    if jax.process_index() == 0 and (warning := resolution_warning(sources, data.tiling)):
        logger.warning(warning)


@contextlib.contextmanager
def _launched(
    experiment: Experiment, workdir: Path, start: float, layout: Layout | None = None
) -> Iterator[_Launched]:
    """A run of a resolved experiment, about to begin in a folder of its own, which is watched meanwhile."""
    hosts = joined()
    follows = hosts is not None and hosts.number > 0  # the first process holds the folder
    watchdog = Watchdog(experiment.loop.watchdog, workdir / loop.LOGS, hosts=hosts)
    peaks = [chips.peak_of(device.device_kind) for device in jax.devices()]
    peak = None if None in peaks else sum(filter(None, peaks))
    ledger = Ledger(None if follows else workdir, began=start, peak=peak)
    with contextlib.nullcontext() if follows else lock.held(workdir), watchdog:
        if hosts is not None:
            agreement.on_folder(hosts, workdir)
        layout = plan(experiment) if layout is None else layout
        _claim(experiment, workdir)
        with ledger:
            yield _Launched(experiment, workdir, layout, start, watchdog, ledger)


@dataclasses.dataclass(frozen=True)
class _Launched:
    """A run of a resolved experiment, in a folder where no other process runs."""

    experiment: Experiment
    workdir: Path
    layout: Layout
    start: float  # seconds since the epoch
    watchdog: Watchdog
    ledger: Ledger

    def alive(self, task: str, *, compiles: bool = False) -> None:
        """Tells the watchdog and the ledger that the run has moved."""
        self.watchdog.alive(task, compiles=compiles)
        self.ledger.beat()

    def course(
        self,
        made: Sequence[Program],
        stop: Callable[[], int | None],
        *,
        hooks: tuple[Hook, ...] = (),
        quiet: bool = False,
    ) -> loop.Course:
        """Its training, step by step; ``hooks`` stand closest to the steps."""
        experiment, layout = self.experiment, self.layout
        return loop.course(
            layout,
            made,
            self._stream_of,
            begin=lambda: first_weights(experiment, layout),
            workdir=self.workdir,
            config=experiment.loop,
            seed=experiment.seed,
            stop=stop,
            hooks=(*hooks, *self._hooks()),
            alive=self.alive,
            go_on_from=lambda step: forget_results(self.workdir, after=step),
            ledger=self.ledger,
            flops_of=self._flops_of,
            averaged=experiment.evaluation.average,
            quiet=quiet,
        )

    def _stream_of(self, stage: Stage) -> loop.TrainingStream:
        stream = open_stream(self.experiment, stage, rows_here(self.layout, stage.batch_size))
        config = self.experiment.guide
        if config is None or not config.run or (config.stages and stage.name not in config.stages):
            return stream
        _, layout, state, _ = restore(buckets.here(config.run))
        return guide.guided(stream, config, self.layout, layout, state)

    def _flops_of(self, stage: Stage) -> Callable[[Batch], float] | None:
        """What the model needs for a batch, forwards and backwards; None where no peak is known."""
        if self.ledger.peak is None:
            return None
        need = useful.of_stage(self.experiment, stage)
        return lambda batch: STEP_PASSES * need.of(batch)

    def _hooks(self) -> tuple[Hook, ...]:
        """What the experiment wants to be done around the steps."""
        experiment, hooks = self.experiment, list[Hook]()
        if experiment.loop.churn:
            with contextlib.closing(self._stream_of(experiment.stages[0])) as stream:
                hooks.append(Probe(self.layout, next(stream), every=experiment.loop.routing_every))
        if experiment.loop.flops:
            hooks.append(Spent(experiment))
        if experiment.loop.evaluate_every:
            hooks.append(_evaluation_hook(experiment, self.layout, self.workdir, self.alive, self.ledger))
        return tuple(hooks)

    def conclude(self, state: TrainState, *, together: int = 1) -> dict[str, Any]:
        """Evaluates the trained model and writes the report; returns the results by task."""
        workdir, layout = self.workdir, self.layout
        self.ledger.turn(EVALUATION)
        results = evaluate_all(self.experiment, layout, state, workdir, alive=self.alive)
        if jax.process_index() == 0:
            self.alive("writing the report")
            self.ledger.turn(REPORT)
            self.ledger.write()  # which the report shows
            facts = {"wall_time_s": round(time.time() - self.start, 1), **_facts(layout)}
            if together > 1:
                facts["runs_together"] = together
            disk.write_text(workdir / "run.json", json.dumps(facts, indent=2) + "\n")
            write_report(workdir)
        return results


def _evaluation_hook(
    experiment: Experiment, layout: Layout, workdir: Path, alive: loop.Alive, ledger: Ledger
) -> EvaluationHook:
    """The hook that examines the model while it trains, as it is examined at the end."""
    config = experiment.evaluation

    def held_out(source: str, stage: Stage) -> Iterator[Batch]:
        batches = held_out_batches(
            experiment.data,
            model_spec(experiment),
            source,
            targets=stage.targets,
            batch_size=config.batch_size,
            limit=config.limit,
        )
        for batch in batches:
            alive(f"computing the loss on {source}", compiles=True)
            yield batch

    def examine(source: str, state: TrainState, step: int) -> dict[str, float | None]:
        return evaluate_task(experiment, layout, state, workdir, source, step, alive=alive)["scores"]

    sources = [source.name for source in experiment.data.evaluation]
    every = experiment.loop.evaluate_every
    return EvaluationHook(
        layout,
        sources,
        every=every,
        held_out=held_out,
        examine=examine,
        ledger=ledger,
        averaged=config.average,
    )


def evaluate_all(
    experiment: Experiment,
    layout: Layout,
    state: TrainState,
    workdir: Path,
    *,
    alive: loop.Alive = loop.unwatched,
) -> dict[str, Any]:
    """Evaluates every held-out source of the experiment that has no result of this step yet."""
    step, results = sum(stage.steps for stage in experiment.stages), {}
    for source in experiment.data.evaluation:
        done = workdir / "eval" / source.name / f"{step}.json"
        if done.exists():
            results[source.name] = read_result(done)
        else:
            results[source.name] = evaluate_task(
                experiment, layout, state, workdir, source.name, step, alive=alive
            )
    return results


def evaluate_task(
    experiment: Experiment,
    layout: Layout,
    state: TrainState,
    workdir: Path,
    task: str,
    step: int,
    *,
    alive: loop.Alive = loop.unwatched,
) -> dict[str, Any]:
    """Evaluates one held-out source; writes ``eval/<task>/<step>.json`` and returns its content."""
    return evaluate(
        layout,
        state.params,
        state.routing,
        collections=state.collections,
        data=experiment.data,
        spec=model_spec(experiment),
        config=experiment.evaluation,
        task=task,
        step=step,
        workdir=workdir,
        alive=lambda: alive(f"evaluating {task} after step {step}", compiles=True),
    )


def evaluate_run(workdir: Path, tasks: Sequence[str], overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Evaluates the newest checkpoint of a run anew, on the named tasks or, with none named, on all.

    Args:
      overrides: changes to the run's ``evaluation`` and ``data``, by dotted path.

    Raises:
      ValueError: the folder holds no run, it has no such task, or an override concerns what was trained.
    """
    check_overrides(overrides)
    experiment, layout, state, step = restore(workdir, overrides)
    names = _tasks(experiment, tasks)
    results = {name: evaluate_task(experiment, layout, state, workdir, name, step) for name in names}
    if jax.process_index() == 0:
        write_report(workdir)
    return results


def check_overrides(overrides: Sequence[tuple[str, str]]) -> None:
    """Makes sure that overrides concern no more than how a finished run is evaluated; ValueError if not."""
    wrong = next((path for path, _ in overrides if path.split(".")[0] not in ("evaluation", "data")), None)
    if wrong is not None:
        raise ValueError(
            f"--config.{wrong}: of a finished run only config.evaluation and config.data may change"
        )


def evaluate_published(experiment: Experiment, tasks: Sequence[str], workdir: Path) -> dict[str, Any]:
    """Evaluates the published checkpoint ``experiment.init`` as it is, on tasks of the experiment."""
    names, experiment = _tasks(experiment, tasks), resolve(experiment)
    layout = plan(experiment)
    begun = first_weights(experiment, layout)
    state = TrainState(
        np.zeros((), np.int32), begun.params, None, begun.routing, collections=dict(begun.collections)
    )
    return {name: evaluate_task(experiment, layout, state, workdir, name, 0) for name in names}


def _tasks(experiment: Experiment, names: Sequence[str]) -> Sequence[str]:
    known = [source.name for source in experiment.data.evaluation]
    for name in names or known[:1] or [""]:
        if name not in known:
            raise ValueError(f"--task={name}: config.data.evaluation has {', '.join(known) or 'no source'}")
    return names or known


def restore(
    workdir: Path,
    overrides: Sequence[tuple[str, str]] = (),
    *,
    before: int | None = None,
    change: Callable[[Experiment], Experiment] = lambda experiment: experiment,
    averaged: bool | None = None,
) -> tuple[Experiment, Layout, TrainState, int]:
    """The experiment of a run, its newest state on the devices here, adapters merged, and the state's step.

    Args:
      before: the newest state of an earlier step than this one.
      change: what is done to the experiment before the overrides.
      averaged: takes the average of what trains; None: as ``evaluation.average`` says.

    Raises:
      ValueError: the folder holds no run, no sound checkpoint, or no average.
    """
    experiment, layout, state, position = restore_at(
        workdir, overrides, before=before, change=change, averaged=averaged
    )
    return experiment, layout, state, position.global_step


def restore_at(
    workdir: Path,
    overrides: Sequence[tuple[str, str]] = (),
    *,
    before: int | None = None,
    change: Callable[[Experiment], Experiment] = lambda experiment: experiment,
    averaged: bool | None = None,
) -> tuple[Experiment, Layout, TrainState, saved.Position]:
    """The same as ``restore``, with where the run stands in place of the step."""
    experiment = change(read_run(workdir))
    if overrides:
        experiment = config_lib.replace(experiment, overrides)
    layout = plan(experiment)
    checkpointer = Checkpointer(workdir / CHECKPOINTS, read_only=True)
    try:
        restored = saved.restore(checkpointer, layout, experiment.stages, before=before)
    finally:
        checkpointer.close()
    if restored is None:
        when = "" if before is None else f" of a step before {before}"
        raise ValueError(f"--workdir={workdir} holds no checkpoint{when} yet")
    state, position = restored
    program = Program.of(layout, saved.stage_at(experiment.stages, position))
    takes_average = experiment.evaluation.average if averaged is None else averaged
    return experiment, layout, program.merge(state, averaged=takes_average), position


def export(workdir: Path, target: Path, *, averaged: bool = False) -> None:
    """Writes the model of a run, adapters merged, in the form of the published checkpoint it began with.

    A run may have begun with another run, and so on; the first of them began with the published checkpoint.

    Args:
      averaged: writes the average of what trains.

    Raises:
      ValueError: none of them did, the model is another one since, or the target exists.
    """
    origin = _published_origin(workdir)
    experiment, _, state, _ = restore(workdir, averaged=averaged)
    published = pretrained.read_published(origin)
    expected = run_as(published.config, experiment.model)
    if expected != experiment.model:
        parts = [f.name for f in dataclasses.fields(expected)]
        other = [n for n in parts if getattr(expected, n) != getattr(experiment.model, n)]
        raise ValueError(
            f"{workdir}: config.model.{', config.model.'.join(other)} differ from the published checkpoint "
            f"{origin} that it began with, and have no published form"
        )
    pretrained.write_published(target, state.params, state.routing, published.as_run_by(experiment.model))


def _published_origin(workdir: Path) -> Path:
    """The published checkpoint that a run began with, or the run that it began with, and so on."""
    folder, seen = workdir, set()
    while folder.resolve() not in seen:
        seen.add(folder.resolve())
        experiment = read_run(folder)
        begun = buckets.here(experiment.init)
        if not experiment.init:
            kind = type(experiment.model).__name__
            raise ValueError(
                f"{workdir}: its model ({kind}) has no published form: {folder} did not begin with a "
                "published checkpoint (config.init is empty), whose config.json and names it could take; "
                "vl_jax.load_run(...).params gives its parameters"
            )
        if not begun.is_dir():
            raise ValueError(f"{workdir}: {folder} began with {begun}, which is not there any more")
        origin = initial.find(begun)
        if origin is None:
            return begun
        folder = origin.checkpoints.parent
    raise ValueError(f"{workdir}: its config.init leads back to itself")


def _claim(experiment: Experiment, workdir: Path) -> None:
    """Writes the resolved config; refuses a folder that holds a run which differs where it must not.

    Of a run begun by an earlier version, fields that did not exist yet have their defaults.
    """
    path, text = workdir / RUN_CONFIG, schema.to_json(experiment)
    before = schema.to_json(read_run(workdir)) if path.exists() else text
    allowed, refused = resume.changes(json.loads(before), json.loads(text))
    if refused:
        names = ", ".join(line.split()[0] for line in refused[:3])
        more = f" (and {len(refused) - 3} more)" if len(refused) > 3 else ""
        raise ValueError(
            f"--workdir={workdir} holds a run with another configuration (differs at {names}): "
            f"{'; '.join(refused[:3])}{more}; resume it with the same options, or choose another folder, and "
            f"begin there with --config.init={workdir}"
        )
    if jax.process_index() != 0:
        return
    for line in allowed:
        logger.info("the run goes on with %s", line)
    workdir.mkdir(parents=True, exist_ok=True)
    disk.write_text(path, text)


def _facts(layout: Layout) -> dict[str, Any]:
    """What the report says about the machine and the model."""
    device = jax.devices()[0]
    parameters = sum(math.prod(leaf.shape) for leaf in params_lib.flatten(layout.params).values())
    return {
        "parameters": parameters,
        "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "host": f"{os.cpu_count()} cores, {platform.machine()}",
        "vl_jax": vl_jax.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "peak_memory_mb": _peak_memory(device),
    }


def _peak_memory(device: Any) -> int:
    """The most that was in use at once, in MB: of a device that counts it, else of this process."""
    used = (device.memory_stats() or {}).get("peak_bytes_in_use")
    if used is None:
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return round(used / 1e6)
