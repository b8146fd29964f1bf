"""The state of a run as its checkpoints hold it: parameters, a tree of training state, and a record.

    training   step, optimizer, routing, and where there are any adapters, collections
    record     position, load: the running load of every stack, as lists

Checkpoints of earlier versions are read too. What they lack is what did not exist.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vl_jax.layout import Layout
from vl_jax.moe import stacks
from vl_jax.train.program import Program
from vl_jax.train.step import TrainState

# In the record of a checkpoint that holds routing by stack; before there was the state of one stack, bare.
_BY_STACK = "routing_by_stack"


def to_saved(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """The training state of a checkpoint, and what its record says of the state."""
    training = {"step": state.step, "optimizer": state.optimizer, "routing": state.routing}
    rest = {"adapters": state.adapters, "collections": state.collections}
    # A few numbers, which a checkpoint that was written without them may lack.
    load = {name: np.asarray(value).tolist() for name, value in state.load.items()}
    return training | {name: tree for name, tree in rest.items() if tree}, {"load": load, _BY_STACK: True}


def abstract(program: Program, record: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes and shardings of the training state that stands beside a record."""
    layout = program.layout
    routing = stacks.init_state(layout.model.config.stacks)

    def replicated(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.replicated)

    rest = {"adapters": program.adapters, "collections": layout.collections}
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
