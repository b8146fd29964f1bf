"""What a batch brings of routing: routes that its tokens take, and logits that routers are drawn to.

    routes of a pass --Batch.routes--> the same experts, gates of today's scores        (*replay*)
    logits of a teacher --Batch.router_logits--> a loss beside the others               (*distillation*)

A rollout's routes are those it had in generation (R3, arXiv 2510.11370). Rows stand first, so that batches
are cut and sharded as ever; g is the number of routing groups of a row, such as its pictures in an encoder.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vl_jax.batch import Batch
from vl_jax.moe.routing import ROUTES, TAUGHT
from vl_jax.moe.stacks import RoutingState


def guided(state: RoutingState, batch: Batch) -> RoutingState:
    """The routing state, with what the batch brings."""
    for name, given in ((ROUTES, batch.routes), (TAUGHT, batch.router_logits)):
        state = _with(state, name, given)
    return state


def _with(state: RoutingState, name: str, given: Mapping[str, jax.Array]) -> RoutingState:
    if not given:
        return state
    layered = {stack: jnp.moveaxis(jnp.asarray(x), 2, 0) for stack, x in given.items()}  # [L B g ...]
    own = {stack: x.reshape(x.shape[0], -1, *x.shape[3:]) for stack, x in layered.items()}
    return {**state, **{stack: {**state.get(stack, {}), name: x} for stack, x in own.items()}}


def by_row(
    found: Int[Array, "L G T K"] | Float[Array, "L G T N"], rows: int
) -> Int[Array, "B g L T K"] | Float[Array, "B g L T N"]:
    """What layers of a stack decided, as a batch of some rows brings it."""
    layers, groups = found.shape[:2]
    return jnp.moveaxis(found.reshape(layers, rows, groups // rows, *found.shape[2:]), 0, 2)
