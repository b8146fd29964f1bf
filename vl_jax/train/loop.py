"""The training loop: stages one after another, checkpoints, resume, metrics and a progress line.

A run is a position (stage, step, data cursor) and arrays. Both are in every checkpoint, so a killed run that
is launched again continues with the batch it would have seen next, and ends with the same losses. What a
stage computes is its program; what else is done around the steps are hooks. Updates that would harm the model
are skipped: ``guard``.

    course(...)    a generator: it reads, logs and saves, and asks for each step of its program
    drive(course)  takes the steps; ``lockstep`` takes those of several courses at once
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from vl_jax import sharding
from vl_jax.batch import Batch, without
from vl_jax.checkpoint import CHECKPOINTS, Checkpointer, CheckpointError, NotFiniteError
from vl_jax.layout import Layout, Variables, put_batch
from vl_jax.metrics import MetricsWriter
from vl_jax.runtime.hosts.joined import joined
from vl_jax.runtime.ledger import Ledger
from vl_jax.runtime.spent import CHECKPOINT, DATA, INITIALISATION, RESTORE, STEP
from vl_jax.train import saved
from vl_jax.train.best import Best, BestConfig
from vl_jax.train.clock import Clock
from vl_jax.train.guard import BEHIND, SKIPPED, Guard, GuardConfig
from vl_jax.train.hooks import Hook, Moment
from vl_jax.train.optimizer import schedule
from vl_jax.train.program import Program
from vl_jax.train.progress import Progress
from vl_jax.train.saved import Position
from vl_jax.train.stages import Stage, trainable_table
from vl_jax.train.step import Metrics, TrainState
from vl_jax.train.watchdog import WatchdogConfig

logger = logging.getLogger(__name__)

LOGS = "logs"  # the folder of a run for what is written of its troubles


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How often things happen, in optimiser steps."""

    log_every: int = 10
    routing_every: int = 50  # vector-valued routing statistics
    churn: bool = False  # among them: how many choices of a fixed batch the step changed (see ``probe``)
    flops: bool = False  # log what training has taken so far, counted from shapes (see ``fit.spent``)
    checkpoint_every: int = 500
    keep_checkpoints: int = 3  # the newest ones
    keep_every: int = 0  # besides, those of steps that are a multiple of it; 0: none
    best: BestConfig = BestConfig()  # those that stay besides
    evaluate_every: int = 0  # and as a stage ends; 0: only as the run ends
    guard: GuardConfig = GuardConfig()  # which updates are skipped
    watchdog: WatchdogConfig = WatchdogConfig()  # how long the run may stand still

    def __post_init__(self):
        if self.evaluate_every < 0:
            raise ValueError(
                f"evaluate_every={self.evaluate_every} must be >= 0; 0 evaluates at the end only"
            )
        if self.keep_every < 0:
            raise ValueError(f"keep_every={self.keep_every} must be >= 0; 0 keeps no other checkpoints")
        if self.best.keep and not self.evaluate_every:
            raise ValueError(f"best.keep={self.best.keep} needs evaluate_every > 0, for scores to choose by")
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


@runtime_checkable
class Alive(Protocol):
    """Is told that the run has moved and what it does next; see ``Watchdog.alive``."""

    def __call__(self, task: str, *, compiles: bool = False) -> None: ...


FlopsOf = Callable[[Stage], Callable[[Batch], float] | None]  # of the steps of a stage, by batch


def uncounted(stage: Stage) -> None:
    """Where nobody counts operations."""


def unwatched(task: str, *, compiles: bool = False) -> None:
    """Where nobody watches."""


class Stopped(Exception):
    """A run, or many of them, were asked to stop by a signal and have saved; carries the signal number.

    Args:
      step: of the run; None where there were many.
    """

    def __init__(self, number: int, step: int | None):
        where = "" if step is None else f" at step {step}"
        super().__init__(
            f"stopped{where} by {signal.Signals(number).name}; state is saved, run again to resume"
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
    best: Best
    writer: MetricsWriter | None  # None on all processes but one
    progress: Progress
    stop: Callable[[], int | None]  # number of the signal that asked to stop, if any
    guard: Guard
    alive: Alive
    ledger: Ledger
    flops_of: FlopsOf
    seed: int


class StepDue(NamedTuple):
    """A step that a course is about to take."""

    program: Program
    state: Callable[[], TrainState]  # what the step consumes
    batch: Batch  # on the host
    absent: frozenset[str]  # the inputs that its program does without; the same in every process
    learning_rate: np.float32
    limit: np.float32  # of the gradient norm


class StepDone(NamedTuple):
    """What came of a step."""

    state: Callable[[], TrainState]
    metrics: Metrics


Course = Generator[StepDue, StepDone, TrainState]


def drive(running: Course) -> TrainState:
    """Takes the steps of a course, each with its own program; returns what the course returns."""
    with contextlib.closing(running):
        taken: Any = None
        while True:
            try:
                program, state, batch, absent, rate, limit = running.send(taken)
            except StopIteration as end:
                return end.value
            layout, batch = program.layout, without(batch, absent)
            with sharding.use_mesh(layout.mesh, layout.rules):
                after, metrics = program.step(state(), put_batch(batch, layout), rate, limit)
            taken = StepDone(_at_hand(after), metrics)


def _at_hand(state: TrainState) -> Callable[[], TrainState]:
    return lambda: state


def course(
    layout: Layout,
    made: Sequence[Program],
    open_stream: Callable[[Stage], TrainingStream],
    *,
    begin: Callable[[], Variables],
    workdir: Path,
    config: LoopConfig,
    seed: int,
    stop: Callable[[], int | None],
    hooks: tuple[Hook, ...] = (),
    alive: Alive = unwatched,
    go_on_from: Callable[[int], None] = lambda step: None,
    ledger: Ledger | None = None,
    flops_of: FlopsOf = uncounted,
    quiet: bool = False,
    averaged: bool = False,
) -> Course:
    """The course of a run, from the newest checkpoint in ``workdir`` if there is one.

    Args:
      made, begin: the programs of its stages; gives what a run begins with, where it lives.
      seed: of fresh adapters.
      stop: the number of the signal that asks to stop, if any.
      hooks: what is done around every step, in this order.
      alive: told again and again that the run has moved.
      go_on_from: told once, in one process, after which step the run begins or goes on.
      ledger: of the time of this launch, if it has one.
      flops_of: what the model needs for the batches of a stage, where that is to be known.
      quiet, averaged: whether nobody watches its progress; the average is what it gives in the end.

    Returns:
      The state at the end, adapters merged into the parameters.

    Raises:
      Stopped: it was asked to stop, and its state is on disk.
      UpdatesSkipped, CheckpointError: too many updates would have harmed the model; it is not finite.
    """
    stages = tuple(program.stage for program in made)
    best, ledger = Best(config.best, workdir), Ledger() if ledger is None else ledger
    checkpointer = Checkpointer(
        workdir / CHECKPOINTS, keep=config.keep_checkpoints, every=config.keep_every, others=best.steps
    )
    try:
        with ledger.spend(RESTORE):
            restored = saved.restore(checkpointer, layout, stages, mend=True)
        state, position = restored or (made[0].begin(begin(), _key(seed, 0)), Position())
        step, total = position.global_step, sum(stage.steps for stage in stages)
        lead = jax.process_index() == 0  # the one process that writes the log and talks
        ledger.goes_on_from(step)
        best.go_on_from(step)
        if lead:
            go_on_from(step)
        with (
            _writer(workdir, position, lead=lead) as writer,
            Progress(total, step, quiet=quiet or not lead) as progress,
        ):
            run = Session(
                layout,
                tuple(made),
                open_stream,
                hooks,
                config,
                checkpointer,
                best,
                writer,
                progress,
                stop,
                Guard(config.guard, workdir / LOGS, state=position.guard, step=step),
                alive=alive,
                ledger=ledger,
                flops_of=flops_of,
                seed=seed,
            )
            while not _finished(position, stages):
                state, position = yield from _run_stage(run, state, position)
        return made[-1].merge(state, averaged=averaged)
    finally:
        with ledger.spend(CHECKPOINT):
            checkpointer.close()


def _key(seed: int, stage: int) -> jax.Array:
    """Of the fresh adapters of a stage."""
    return jax.random.fold_in(jax.random.key(seed), stage)


def _finished(position: Position, stages: tuple[Stage, ...]) -> bool:
    return position.stage == len(stages) - 1 and position.step >= stages[-1].steps


def _run_stage(
    run: Session, begun: TrainState, position: Position
) -> Generator[StepDue, StepDone, tuple[TrainState, Position]]:
    """Runs one stage from ``position`` to its end, and moves on to the beginning of the next, if any."""
    layout, program = run.layout, run.programs[position.stage]
    stage = program.stage
    table = trainable_table(stage, layout.params, layout.roles, layout.model.config.stacks)
    run.progress.announce(stage.name, stage.steps, table)
    stream = run.open_stream(stage)
    rate, flops, clock = schedule(stage.optimizer, stage.steps), run.flops_of(stage), Clock(run.ledger.peak)
    run.guard.begin_stage(program.gradient_names, anew=position.step == 0)
    may_lack: frozenset[str] = getattr(layout.model.config, "may_lack", frozenset())
    # By the inputs that are absent: up to this step, one may wait for a compiler.
    compiled: dict[frozenset[str], int] = {}
    state = _at_hand(begun)
    del begun  # The first step consumes it.
    run.ledger.turn(STEP)
    with contextlib.closing(stream):
        if position.data is not None:
            stream.set_state(position.data)
        else:  # at the beginning of the stage, but for a run that an earlier version took to its end
            for _ in range(position.step):
                next(stream)
        while position.step < stage.steps:
            moment = Moment(stage, position.step + 1, position.global_step + 1)
            run.alive(f"waiting for the data of step {moment.global_step}")
            with clock.waiting(), run.ledger.spend(DATA):
                batch = next(stream)
            learning_rate = float(np.asarray(rate(position.step)))
            position.step, position.global_step = moment.step, moment.global_step
            absent = may_lack & getattr(stream, "absent", frozenset())
            compiled.setdefault(absent, moment.step + BEHIND)
            begins = moment.step <= max(compiled.values())
            run.alive(f"computing step {moment.global_step}", compiles=begins)
            limit = np.float32(run.guard.limit(moment.global_step))
            due = StepDue(program, state, batch, absent, np.float32(learning_rate), limit)
            state, metrics = yield from _step(run, due, moment, stream)
            del due  # what the step consumed
            needed = None if flops is None else flops(batch)
            clock.count(batch, needed or 0.0)
            run.ledger.done(position.global_step, needed)
            _report(run, moment, metrics, learning_rate, clock, stream.skipped)
            ends = position.step == stage.steps
            stopped = _asked_to_stop(run, position.global_step)
            due = position.global_step % run.config.checkpoint_every == 0
            if run.best.add(position.global_step, metrics) or due or stopped or ends:
                position.data = stream.get_state()
                if not ends:
                    position = _save(run, state(), position)
            if stopped and not ends:
                with run.ledger.spend(CHECKPOINT):
                    run.checkpointer.wait()
                raise Stopped(stopped, position.global_step)
    run.guard.settle()
    run.ledger.turn(INITIALISATION)  # of the next stage
    ended = state()
    if position.stage + 1 < len(run.programs):
        position = Position(stage=position.stage + 1, global_step=position.global_step)
        ended = program.merge(ended)
        variables = Variables(ended.params, ended.routing, ended.collections)
        ended = run.programs[position.stage].begin(variables, _key(run.seed, position.stage))
    position = _save(run, ended, position)
    if stopped := _asked_to_stop(run, position.global_step):
        with run.ledger.spend(CHECKPOINT):
            run.checkpointer.wait()
        raise Stopped(stopped, position.global_step)
    return ended, position


def _step(
    run: Session, due: StepDue, moment: Moment, stream: TrainingStream
) -> Generator[StepDue, StepDone, StepDone]:
    """One step with what stands around it; its figures may still be on their way."""
    layout = run.layout
    with sharding.use_mesh(layout.mesh, layout.rules):
        for hook in run.hooks:
            hook.before_step(due.state(), moment)
    taken = yield due
    metrics = run.guard.watch(moment, taken.metrics, float(due.limit), getattr(stream, "ids", ()))
    with sharding.use_mesh(layout.mesh, layout.rules):
        for hook in run.hooks:
            metrics = hook.after_step(taken.state(), metrics, moment)
    return StepDone(taken.state, metrics)


def _asked_to_stop(run: Session, step: int) -> int | None:
    """Number of the signal that asks to stop here, if any; on several hosts all stop after the same step."""
    hosts = joined()
    return run.stop() if hosts is None else hosts.asked_to_stop(step)


def _save(run: Session, state: TrainState, position: Position) -> Position:
    """Begins to write a checkpoint, of a state that is finite; gives the position with all it holds.

    Raises:
      CheckpointError: the state is not finite; the checkpoints before stay.
    """
    step = position.global_step
    run.alive(f"saving the checkpoint of step {step}", compiles=True)
    run.guard.settle()  # The steps are over, whatever comes now.
    run.ledger.write()
    line = None if run.writer is None else run.writer.last
    position = dataclasses.replace(position, guard=run.guard.get_state(), line=line)
    if run.writer is not None:
        run.writer.flush()  # The log is never behind a checkpoint.
    training, record = saved.to_saved(state)
    record = {"position": dataclasses.asdict(position), **record}
    try:
        with run.ledger.spend(CHECKPOINT):
            run.checkpointer.save(step, params=state.params, training=training, record=record)
    except NotFiniteError as error:
        raise CheckpointError(
            f"{error}; set a lower learning rate, or mend what the model computes"
        ) from None
    return position


def _report(
    run: Session,
    moment: Moment,
    metrics: Metrics,
    learning_rate: float,
    clock: Clock,
    skipped: dict[str, int],
) -> None:
    """Writes this step's figures when they are due, and moves the progress line."""
    step, stage = moment.global_step, moment.stage
    scalars: dict[str, float] = {}
    config = run.config
    often = [every for every in (config.log_every, config.evaluate_every) if every]
    if moment.step == 1 or any(map(moment.is_due, often)):
        run.guard.settle()
        fetched = jax.device_get(metrics)
        scalars = {k: float(v) for k, v in fetched.items() if np.ndim(v) == 0}
        scalars |= {"learning_rate": learning_rate, "skipped": float(sum(skipped.values()))} | clock.read()
        if run.guard.skipped:
            scalars[SKIPPED] = float(run.guard.skipped)
        arrays = {}
        if moment.is_due(config.routing_every):
            arrays = {k: np.asarray(v).tolist() for k, v in fetched.items() if np.ndim(v) > 0}
        if run.writer is not None:
            run.writer.write(step, scalars, arrays, stage=stage.name)
    run.progress.update(step, scalars)


def _writer(
    workdir: Path, position: Position, *, lead: bool
) -> contextlib.AbstractContextManager[MetricsWriter | None]:
    if not lead:
        return contextlib.nullcontext()
    return MetricsWriter(workdir, resume_step=position.global_step, last=position.line)
