"""The training loop: stages one after another, checkpoints, resume, metrics and a progress line.

A run is a position (stage, step, data cursor) and arrays. Both are in every checkpoint, so a killed run that
is launched again continues with the batch it would have seen next, and ends with the same losses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.batch import Batch
from vl_jax.checkpoint import Checkpointer
from vl_jax.layout import Layout, put_batch
from vl_jax.metrics import MetricsWriter
from vl_jax.model import init_routing_state
from vl_jax.moe.routing import State
from vl_jax.train import lora
from vl_jax.train.optimizer import make_optimizer, schedule
from vl_jax.train.probe import Probe
from vl_jax.train.progress import Progress
from vl_jax.train.stages import Stage, adapter_shapes, trainable_paths, trainable_table
from vl_jax.train.step import TrainState, make_train_step, split_trained

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How often things happen, in optimiser steps."""

    log_every: int = 10
    routing_every: int = 50  # vector-valued routing statistics
    churn: bool = False  # among them: how many choices of a fixed batch the step changed
    checkpoint_every: int = 500
    keep_checkpoints: int = 3

    def __post_init__(self):
        for name in ("log_every", "routing_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")


@runtime_checkable
class Stream(Protocol):
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
    config: LoopConfig
    checkpointer: Checkpointer
    writer: MetricsWriter | None  # None on all processes but one
    progress: Progress
    stop: Callable[[], int | None]  # number of the signal that asked to stop, if any
    seed: int
    probe: Probe | None  # where ``config.churn`` asks for one


@dataclasses.dataclass
class Position:
    """Where a run stands; the JSON side of a checkpoint."""

    stage: int = 0
    step: int = 0  # optimiser steps done in this stage
    global_step: int = 0
    data: dict[str, Any] | None = None  # cursor of the stage's stream; None at its beginning


def train(
    layout: Layout,
    stages: tuple[Stage, ...],
    open_stream: Callable[[Stage], Stream],
    *,
    begin: Callable[[], tuple[Any, State]],
    workdir: Path,
    config: LoopConfig,
    seed: int,
) -> TrainState:
    """Runs the stages, from the newest checkpoint in ``workdir`` if there is one.

    Args:
      begin: gives the parameters and the routing state that a run begins with, where they live.
      seed: of fresh adapters.

    Returns:
      The state at the end, adapters merged into the parameters.

    Raises:
      Stopped: after SIGTERM or SIGINT, once the state is on disk.
    """
    checkpointer = Checkpointer(workdir / "checkpoints", keep=config.keep_checkpoints)
    try:
        restored = restore(checkpointer, layout, stages)
        if restored is None:
            params, routing = begin()
            restored = _begin_stage(layout, stages, 0, params, routing, seed), Position()
        state, position = restored
        total = sum(stage.steps for stage in stages)
        lead = jax.process_index() == 0  # the one process that writes the log and talks
        with (
            _writer(workdir, position.global_step, lead=lead) as writer,
            Progress(total, position.global_step, quiet=not lead) as progress,
            _signals() as stop,
        ):
            probe = Probe(layout, _first_batch(open_stream(stages[0]))) if config.churn else None
            run = Session(layout, config, checkpointer, writer, progress, stop, seed, probe)
            while position.stage < len(stages):
                state, position = _run_stage(run, stages, open_stream, state, position)
        return merge_adapters(layout, stages[-1], state)
    finally:
        checkpointer.close()


def _first_batch(stream: Stream) -> Batch:
    """What a stream begins with; it is closed."""
    with contextlib.closing(stream):
        return next(stream)


def merge_adapters(layout: Layout, stage: Stage, state: TrainState) -> TrainState:
    """The state with the stage's adapters added to their weights, and none left; it consumes ``state``."""
    if stage.lora is None:
        return state
    paths = set(lora.select(stage.lora, layout.params, layout.roles))
    weights, rest = params_lib.split(state.params, paths)
    targets = jax.tree.map(lambda leaf: leaf.sharding, params_lib.split(layout.params, paths)[0])
    add = functools.partial(lora.merge, scale=stage.lora.scale, roles=layout.roles)
    merge = jax.jit(add, donate_argnums=0, out_shardings=targets)
    weights = merge(weights, state.adapters)
    return dataclasses.replace(state, params=params_lib.merge(weights, rest), adapters={})


def _training_tree(state: TrainState) -> dict[str, Any]:
    tree = {"step": state.step, "optimizer": state.optimizer, "routing": state.routing}
    return {**tree, "adapters": state.adapters} if state.adapters else tree


def _optimizer_of(stage: Stage, layout: Layout):
    paths = trainable_paths(stage, layout.params)
    adapters = params_lib.flatten(adapter_shapes(stage, layout.params, layout.roles))
    roles = layout.roles | dict.fromkeys(adapters, lora.FACTOR)
    return make_optimizer(stage.optimizer, paths | adapters.keys(), roles), paths


def _abstract_optimizer(layout: Layout, stage: Stage) -> Any:
    """Shapes and shardings of the optimiser state: moments live where their parameters live."""
    optimizer, paths = _optimizer_of(stage, layout)
    trained, _ = split_trained(layout.params, adapter_shapes(stage, layout.params, layout.roles), paths)

    shardings = {path: leaf.sharding for path, leaf in params_lib.flatten(trained).items()}

    def placed(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        # A moment hangs in the state under the keys of its parameter, whatever stands before them.
        keys = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        ends = ("/".join(keys[start:]) for start in range(len(keys)))
        sharding = next((shardings[end] for end in ends if end in shardings), layout.replicated)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(placed, jax.eval_shape(optimizer.init, trained))


def _begin_stage(
    layout: Layout, stages: tuple[Stage, ...], number: int, params: Any, routing: State, seed: int
) -> TrainState:
    """Fresh adapters, and fresh optimiser state for all that the stage trains."""
    stage = stages[number]
    optimizer, paths = _optimizer_of(stage, layout)
    adapters = {}
    if stage.lora is not None:
        targets = jax.tree.map(lambda leaf: leaf.sharding, adapter_shapes(stage, layout.params, layout.roles))
        key = jax.random.fold_in(jax.random.key(seed), number)
        init = functools.partial(lora.init, stage.lora, layout.params, layout.roles)
        adapters = jax.jit(init, out_shardings=targets)(key)
    trained, _ = split_trained(params, adapters, paths)
    targets = jax.tree.map(lambda leaf: leaf.sharding, _abstract_optimizer(layout, stage))
    state = jax.jit(optimizer.init, out_shardings=targets)(trained)
    step = jax.device_put(jnp.zeros((), jnp.int32), layout.replicated)
    load = _running_load(layout, None)
    return TrainState(step, params, state, jax.device_put(routing, layout.replicated), adapters, load=load)


def _running_load(layout: Layout, recorded: list[list[float]] | None) -> jax.Array | None:
    """The running load that a checkpoint recorded, or zeros; None for a model without experts."""
    config = layout.model.config
    shape = (config.num_sparse_layers, config.moe.num_experts)
    value = np.zeros(shape, np.float32) if recorded is None else np.asarray(recorded, np.float32)
    return jax.device_put(value, layout.replicated) if shape[0] else None


def restore(
    checkpointer: Checkpointer, layout: Layout, stages: tuple[Stage, ...], *, before: int | None = None
) -> tuple[TrainState, Position] | None:
    """State and position of the newest sound checkpoint, or None if there is no checkpoint.

    Args:
      before: only checkpoints of earlier steps than this one.

    Raises:
      CheckpointError: there are checkpoints, and none of them can be used.
    """
    routing = init_routing_state(layout.model.config)

    def abstract(record: dict[str, Any]) -> Any:
        stage = stage_at(stages, Position(**record["position"]))
        adapters = adapter_shapes(stage, layout.params, layout.roles)
        return {
            "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.replicated),
            "optimizer": _abstract_optimizer(layout, stage),
            "routing": jax.tree.map(
                lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=layout.replicated), routing
            ),
            **({"adapters": adapters} if adapters else {}),
        }

    restored = checkpointer.restore(params=layout.params, training_of=abstract, before=before)
    if restored is None:
        return None
    step, params, training, record = restored
    logger.info("resumed from checkpoint %d", step)
    load = _running_load(layout, record.get("load"))
    return TrainState(params=params, load=load, **training), Position(**record["position"])


def stage_at(stages: tuple[Stage, ...], position: Position) -> Stage:
    """The stage whose state a checkpoint holds; that of a finished run is the last."""
    return stages[min(position.stage, len(stages) - 1)]


def _run_stage(
    run: Session,
    stages: tuple[Stage, ...],
    open_stream: Callable[[Stage], Stream],
    state: TrainState,
    position: Position,
) -> tuple[TrainState, Position]:
    """Runs one stage from ``position`` to its end, and moves on to the beginning of the next."""
    layout, stage = run.layout, stages[position.stage]
    optimizer, paths = _optimizer_of(stage, layout)
    run.progress.announce(stage.name, stage.steps, trainable_table(stage, layout.params, layout.roles))
    stream = open_stream(stage)
    if position.data is not None:
        stream.set_state(position.data)
    lora_scale = 1.0 if stage.lora is None else stage.lora.scale
    step = make_train_step(
        layout.model,
        optimizer,
        trainable=paths,
        accumulation=stage.accumulation,
        lora_scale=lora_scale,
        objective=stage.objective,
        roles=layout.roles,
    )
    rate = schedule(stage.optimizer, stage.steps)
    clock = _Clock()
    try:
        with sharding.use_mesh(layout.mesh, layout.rules):
            compiled = jax.jit(step, donate_argnums=0)
            while position.step < stage.steps:
                with clock.waiting():
                    batch = next(stream)
                learning_rate = float(np.asarray(rate(position.step)))
                position.step += 1
                position.global_step += 1
                probe = run.probe if _routing_due(run, stage, position) else None
                before = None if probe is None else probe.look(state, lora_scale=lora_scale)
                state, metrics = compiled(state, put_batch(batch, layout), np.float32(learning_rate))
                if probe is not None and before is not None:
                    metrics |= probe.compare(before, probe.look(state, lora_scale=lora_scale))
                _report(run, stage, position, batch, metrics, learning_rate, clock, stream.skipped)
                ends = position.step == stage.steps
                stopped = _asked_to_stop(run, position.global_step)
                if stopped or (position.global_step % run.config.checkpoint_every == 0 and not ends):
                    position.data = stream.get_state()
                    if not ends:
                        _save(run, state, position)
                if stopped and not ends:
                    run.checkpointer.wait()
                    raise Stopped(stopped, position.global_step)
    finally:
        stream.close()
    position = Position(stage=position.stage + 1, global_step=position.global_step)
    if position.stage < len(stages):
        state = merge_adapters(layout, stage, state)
        state = _begin_stage(layout, stages, position.stage, state.params, state.routing, run.seed)
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
    # A few numbers, which a checkpoint that was written without them may lack.
    load = {} if state.load is None else {"load": np.asarray(state.load).tolist()}
    record = {"position": dataclasses.asdict(position), **load}
    run.checkpointer.save(
        position.global_step, params=state.params, training=_training_tree(state), record=record
    )


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
    stage: Stage,
    position: Position,
    batch: Batch,
    metrics: dict[str, jax.Array],
    learning_rate: float,
    clock: _Clock,
    skipped: dict[str, int],
) -> None:
    """Writes this step's figures when they are due, and moves the progress line."""
    clock.count(batch)
    step, last = position.global_step, position.step == stage.steps
    scalars: dict[str, float] = {}
    if step % run.config.log_every == 0 or last or position.step == 1:
        fetched = {k: v for k, v in jax.device_get(metrics).items()}
        scalars = {k: float(v) for k, v in fetched.items() if np.ndim(v) == 0}
        scalars |= {"learning_rate": learning_rate, "skipped": float(sum(skipped.values()))} | clock.read()
        arrays = {}
        if _routing_due(run, stage, position):
            arrays = {k: np.asarray(v).tolist() for k, v in fetched.items() if np.ndim(v) > 0}
        if run.writer is not None:
            run.writer.write(step, scalars, arrays, stage=stage.name)
    run.progress.update(step, scalars)


def _routing_due(run: Session, stage: Stage, position: Position) -> bool:
    return position.global_step % run.config.routing_every == 0 or position.step == stage.steps


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
