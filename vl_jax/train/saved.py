"""The state of a run as its checkpoints hold it: parameters, a tree of training state, and a record.

    params     frozen weights in int8 if the stage keeps them so
    training   step, optimizer, routing, and where there are any adapters, collections, fusing, averages
    record     position, load: the running load of every stack, as lists

Checkpoints of earlier versions are read too. What they lack is what did not exist.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vl_jax.checkpoint import Checkpointer
from vl_jax.layout import Layout
from vl_jax.moe import stacks
from vl_jax.train.program import Program
from vl_jax.train.stages import Stage
from vl_jax.train.step import TrainState

logger = logging.getLogger(__name__)

# In the record of a checkpoint that holds routing by stack; before there was the state of one stack, bare.
_BY_STACK = "routing_by_stack"


@dataclasses.dataclass
class Position:
    """Where a run stands; the JSON side of a checkpoint."""

    stage: int = 0  # the last one when the run is at its end, from where a longer stage goes on
    step: int = 0  # optimiser steps done in this stage
    global_step: int = 0
    data: dict[str, Any] | None = None  # cursor of the stage's stream; None at its beginning
    guard: dict[str, Any] | None = None  # what ``Guard`` knows of the updates before
    line: dict[str, Any] | None = None  # the last one of the log, which a crash may have cut


def to_saved(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """The training state of a checkpoint, and what its record says of the state."""
    training = {"step": state.step, "optimizer": state.optimizer, "routing": state.routing}
    rest = {"adapters": state.adapters, "collections": state.collections, "fusing": state.fusing}
    rest["averages"] = state.averages
    # A few numbers, which a checkpoint that was written without them may lack.
    load = {name: np.asarray(value).tolist() for name, value in state.load.items()}
    return training | {name: tree for name, tree in rest.items() if tree}, {"load": load, _BY_STACK: True}


def abstract(program: Program, record: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes and shardings of the training state that stands beside a record."""
    layout = program.layout
    routing = stacks.init_state(layout.model.config.stacks)

    def replicated(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.replicated)

    rest = {
        "adapters": program.adapters,
        "collections": layout.collections,
        "fusing": program.abstract_fusing,
        "averages": program.abstract_averages,
    }
    return {
        "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=layout.replicated),
        "optimizer": program.abstract_optimizer,
        "routing": jax.tree.map(
            replicated, routing if _BY_STACK in record else routing.get(_only(layout), {})
        ),
        **{name: tree for name, tree in rest.items() if tree},
    }


def from_saved(
    layout: Layout, params: Any, training: Mapping[str, Any], record: Mapping[str, Any]
) -> TrainState:
    """The state that a checkpoint holds."""
    load, only = record.get("load", {}), _only(layout)
    if _BY_STACK not in record:
        load = {only: load} if only and load else {}
    found = {**training, "routing": by_stack(layout, training["routing"], record)}
    return dataclasses.replace(TrainState(params=params, **found), load=_running_load(layout, load))


def by_stack(layout: Layout, routing: Any, record: Mapping[str, Any]) -> dict[str, Any]:
    """The routing state beside a record, by stack."""
    if _BY_STACK in record:
        return routing
    only = _only(layout)
    return {only: routing} if only else {}


def _only(layout: Layout) -> str:
    """The stack of a model that earlier versions trained; empty if it has none."""
    return next(iter(layout.model.config.stacks), "")


def _running_load(layout: Layout, recorded: Mapping[str, list[list[float]]]) -> dict[str, jax.Array]:
    """The running load that a checkpoint recorded, zeros for stacks that it knows nothing of."""
    zeros = stacks.init_load(layout.model.config.stacks)
    load = {name: np.asarray(recorded.get(name, value), np.float32) for name, value in zeros.items()}
    return jax.device_put(load, layout.replicated)


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

    def program_of(record: dict[str, Any]) -> Program:
        return Program.of(layout, stage_at(stages, Position(**record["position"])))

    restored = checkpointer.restore(
        params=lambda record: program_of(record).abstract_params,
        training_of=lambda record: abstract(program_of(record), record),
        before=before,
        mend=mend,
    )
    if restored is None:
        return None
    step, params, training, record = restored
    logger.info("resumed from checkpoint %d", step)
    position = Position(**record["position"])
    if position.stage == len(stages):  # the end of a run, as earlier versions wrote it
        done = position.global_step - sum(stage.steps for stage in stages[:-1])
        position = Position(len(stages) - 1, done, position.global_step)
    return from_saved(layout, params, training, record), position


def stage_at(stages: tuple[Stage, ...], position: Position) -> Stage:
    """The stage whose state a checkpoint holds; that of a finished run is the last."""
    return stages[min(position.stage, len(stages) - 1)]
