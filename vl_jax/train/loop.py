"""The training loop: stages one after another, checkpoints, resume, metrics and a progress line.

A run is a position (stage, step, data cursor) and arrays. Both are in every checkpoint, so a killed run that
is launched again continues with the batch it would have seen next, and ends with the same losses. What a
stage computes is its program; what else is done around the steps are hooks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils

from vl_jax import sharding
from vl_jax.batch import Batch
from vl_jax.checkpoint import CHECKPOINTS, Checkpointer
from vl_jax.layout import Layout, Variables, put_batch
from vl_jax.metrics import MetricsWriter
from vl_jax.train import saved
from vl_jax.train.best import Best, BestConfig
from vl_jax.train.hooks import Hook, Moment
from vl_jax.train.optimizer import schedule
from vl_jax.train.program import Program, programs
from vl_jax.train.progress import Progress
from vl_jax.train.stages import Stage, trainable_table
from vl_jax.train.step import TrainState

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How often things happen, in optimiser steps."""

    log_every: int = 10
    routing_every: int = 50  # vector-valued routing statistics
    churn: bool = False  # among them: how many choices of a fixed batch the step changed (see ``probe``)
    checkpoint_every: int = 500
    keep_checkpoints: int = 3  # the newest ones
    best: BestConfig = BestConfig()  # those that stay besides

    def __post_init__(self):
        for name in ("log_every", "routing_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")


@runtime_checkable
class TrainingStream(Protocol):
    """An endless iterator of host batches whose position can be saved and set."""

    @property
    def skipped(self) -> dict[str, int]: ...
    def __next__(self) -> Batch: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


class Stopped(Exception):
    """The run was asked to stop by a signal and has saved its state; carries the signal number."""

    def __init__(self, number: int, step: int):
        super().__init__(
            f"stopped at step {step} by {signal.Signals(number).name}; state is saved, run again to resume"
        )
        self.number = number


@dataclasses.dataclass
class Session:
    """The moving parts of a run, handed from stage to stage."""

    layout: Layout
    programs: tuple[Program, ...]  # of every stage
    open_stream: Callable[[Stage], TrainingStream]
    hooks: tuple[Hook, ...]
    config: LoopConfig
    checkpointer: Checkpointer
    writer: MetricsWriter | None  # None on all processes but one
    progress: Progress
    stop: Callable[[], int | None]  # number of the signal that asked to stop, if any
    seed: int


@dataclasses.dataclass
class Position:
    """Where a run stands; the JSON side of a checkpoint."""

    stage: int = 0  # the last one when the run is at its end, from where a longer stage goes on
    step: int = 0  # optimiser steps done in this stage
    global_step: int = 0
    data: dict[str, Any] | None = None  # cursor of the stage's stream; None at its beginning


def train(
    layout: Layout,
    stages: tuple[Stage, ...],
    open_stream: Callable[[Stage], TrainingStream],
    *,
    begin: Callable[[], Variables],
    workdir: Path,
    config: LoopConfig,
    seed: int,
    hooks: tuple[Hook, ...] = (),
) -> TrainState:
    """Runs the stages, from the newest checkpoint in ``workdir`` if there is one.

    Args:
      begin: gives what a run begins with, where it lives.
      seed: of fresh adapters, and of the noise of routing.
      hooks: what is done around every step, in this order.

    Returns:
      The state at the end, adapters merged into the parameters.

    Raises:
      Stopped: after SIGTERM or SIGINT, once the state is on disk.
    """
    best = Best(config.best, workdir)
    checkpointer = Checkpointer(workdir / CHECKPOINTS, keep=config.keep_checkpoints, others=best.steps)
    try:
        restored = restore(checkpointer, layout, stages, mend=True)
        made = programs(layout, stages, seed=seed)
        if restored is None:
            restored = made[0].begin(begin(), _key(seed, 0)), Position()
        state, position = restored
        total = sum(stage.steps for stage in stages)
        lead = jax.process_index() == 0  # the one process that writes the log and talks
        with (
            _writer(workdir, position.global_step, lead=lead) as writer,
            Progress(total, position.global_step, quiet=not lead) as progress,
            _signals() as stop,
        ):
            run = Session(
                layout, made, open_stream, hooks, config, checkpointer, writer, progress, stop, seed
            )
            while not _finished(position, stages):
                state, position = _run_stage(run, state, position)
        return made[-1].merge(state)
    finally:
        checkpointer.close()


def _key(seed: int, stage: int) -> jax.Array:
    """Of the fresh adapters of a stage."""
    return jax.random.fold_in(jax.random.key(seed), stage)


def restore(
    checkpointer: Checkpointer,
    layout: Layout,
    stages: tuple[Stage, ...],
    *,
    before: int | None = None,
    mend: bool = False,
) -> tuple[TrainState, Position] | None:
    """State and position of the newest sound checkpoint, or None if there is no checkpoint.

    Args:
      before: only checkpoints of earlier steps than this one.
      mend: sets damaged ones aside, for a run that goes on.

    Raises:
      CheckpointError: there are checkpoints, and none of them can be used.
    """

    def abstract(record: dict[str, Any]) -> Any:
        stage = stage_at(stages, Position(**record["position"]))
        return saved.abstract(Program.of(layout, stage), record)

    restored = checkpointer.restore(params=layout.params, training_of=abstract, before=before, mend=mend)
    if restored is None:
        return None
    step, params, training, record = restored
    logger.info("resumed from checkpoint %d", step)
    position = Position(**record["position"])
    if position.stage == len(stages):  # the end of a run, as earlier versions wrote it
        done = position.global_step - sum(stage.steps for stage in stages[:-1])
        position = Position(len(stages) - 1, done, position.global_step)
    return saved.from_saved(layout, params, training, record), position


def stage_at(stages: tuple[Stage, ...], position: Position) -> Stage:
    """The stage whose state a checkpoint holds; that of a finished run is the last."""
    return stages[min(position.stage, len(stages) - 1)]


def _finished(position: Position, stages: tuple[Stage, ...]) -> bool:
    return position.stage == len(stages) - 1 and position.step >= stages[-1].steps


def _run_stage(run: Session, state: TrainState, position: Position) -> tuple[TrainState, Position]:
    """Runs one stage from ``position`` to its end, and moves on to the beginning of the next, if any."""
    layout, program = run.layout, run.programs[position.stage]
    stage = program.stage
    run.progress.announce(stage.name, stage.steps, trainable_table(stage, layout.params, layout.roles))
    stream = run.open_stream(stage)
    rate, clock = schedule(stage.optimizer, stage.steps), _Clock()
    with contextlib.closing(stream), sharding.use_mesh(layout.mesh, layout.rules):
        if position.data is not None:
            stream.set_state(position.data)
        else:  # at the beginning of the stage, but for a run that an earlier version took to its end
            for _ in range(position.step):
                next(stream)
        while position.step < stage.steps:
            with clock.waiting():
                batch = next(stream)
            learning_rate = float(np.asarray(rate(position.step)))
            position.step += 1
            position.global_step += 1
            moment = Moment(stage, position.step, position.global_step)
            for hook in run.hooks:
                hook.before_step(state, moment)
            state, metrics = program.step(state, put_batch(batch, layout), np.float32(learning_rate))
            for hook in run.hooks:
                metrics = hook.after_step(state, metrics, moment)
            _report(run, moment, batch, metrics, learning_rate, clock, stream.skipped)
            ends = position.step == stage.steps
            stopped = _asked_to_stop(run, position.global_step)
            if stopped or ends or position.global_step % run.config.checkpoint_every == 0:
                position.data = stream.get_state()
                if not ends:
                    _save(run, state, position)
            if stopped and not ends:
                run.checkpointer.wait()
                raise Stopped(stopped, position.global_step)
    if position.stage + 1 < len(run.programs):
        position = Position(stage=position.stage + 1, global_step=position.global_step)
        state = program.merge(state)
        variables = Variables(state.params, state.routing, state.collections)
        state = run.programs[position.stage].begin(variables, _key(run.seed, position.stage))
    _save(run, state, position)
    if stopped := _asked_to_stop(run, position.global_step):
        run.checkpointer.wait()
        raise Stopped(stopped, position.global_step)
    return state, position


def _asked_to_stop(run: Session, step: int) -> int | None:
    """Number of the signal that asks to stop here, if any.

    Several processes have to stop after the same step; they agree about it at the steps that are logged.
    """
    number = run.stop() or 0
    if jax.process_count() > 1:
        if step % run.config.log_every:
            return None
        number = int(np.max(multihost_utils.process_allgather(np.int32(number))))
    return number or None


def _save(run: Session, state: TrainState, position: Position) -> None:
    training, record = saved.to_saved(state)
    record = {"position": dataclasses.asdict(position), **record}
    run.checkpointer.save(position.global_step, params=state.params, training=training, record=record)


class _Clock:
    """Tokens per second and milliseconds waited for data, since the last reading."""

    def __init__(self):
        self._reset()

    def _reset(self) -> None:
        self._start, self._waited, self._steps = time.perf_counter(), 0.0, 0
        self._tokens = self._samples = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start
        self._steps += 1

    def count(self, batch: Batch) -> None:
        self._tokens += int(np.count_nonzero(batch.segment_ids))
        self._samples += int(batch.segment_ids.max(axis=1).sum())

    def read(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self._start
        result = {
            "tokens_per_second": self._tokens / elapsed,
            "samples_per_second": self._samples / elapsed,
            "data_wait_ms": 1000 * self._waited / max(1, self._steps),
            "step_ms": 1000 * elapsed / max(1, self._steps),
        }
        self._reset()
        return result


def _report(
    run: Session,
    moment: Moment,
    batch: Batch,
    metrics: dict[str, jax.Array],
    learning_rate: float,
    clock: _Clock,
    skipped: dict[str, int],
) -> None:
    """Writes this step's figures when they are due, and moves the progress line."""
    clock.count(batch)
    step, stage = moment.global_step, moment.stage
    scalars: dict[str, float] = {}
    if moment.is_due(run.config.log_every) or moment.step == 1:
        fetched = {k: v for k, v in jax.device_get(metrics).items()}
        scalars = {k: float(v) for k, v in fetched.items() if np.ndim(v) == 0}
        scalars |= {"learning_rate": learning_rate, "skipped": float(sum(skipped.values()))} | clock.read()
        arrays = {}
        if moment.is_due(run.config.routing_every):
            arrays = {k: np.asarray(v).tolist() for k, v in fetched.items() if np.ndim(v) > 0}
        if run.writer is not None:
            run.writer.write(step, scalars, arrays, stage=stage.name)
    run.progress.update(step, scalars)


def _writer(
    workdir: Path, step: int, *, lead: bool
) -> contextlib.AbstractContextManager[MetricsWriter | None]:
    return MetricsWriter(workdir, resume_step=step) if lead else contextlib.nullcontext()


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[], int | None]]:
    """Notes SIGTERM and SIGINT instead of dying of them; a second one gets through."""
    noted: list[int] = []

    def note(number: int, _: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: noted[0] if noted else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
