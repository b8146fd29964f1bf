"""What a batch brings of routing: routes that its tokens take, and logits that routers are drawn to.

    routes of a pass --media["language/routes"]--> the same experts, gates of today's scores       (*replay*)
    logits of a teacher --media["language/router_logits"]--> a loss beside the others        (*distillation*)

Before the slash stands the name of the stack. A rollout's routes are those it had in generation (R3, arXiv
2510.11370). Rows stand first, so that batches are cut and sharded as ever; every row brings them. g is the
number of routing groups of a row, such as its pictures in an encoder.

    routes         i32[B g L T K]      experts, E for none
    router_logits  f32[B g L T N+1]    the logits, and last how much they count
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vl_jax.batch import Batch, Given
from vl_jax.moe.routing import ROUTES, TAUGHT
from vl_jax.moe.stacks import RoutingState

_NAMES = {"routes": ROUTES, "router_logits": TAUGHT}  # of what a batch brings, and in the routing state


def guided(state: RoutingState, batch: Batch) -> RoutingState:
    """The routing state, with what the batch brings."""
    for name, given in batch.media.items():
        stack, _, what = name.rpartition("/")
        if what in _NAMES:
            layered = jnp.moveaxis(jnp.asarray(given.values), 2, 0)  # [L B g ...]
            own = layered.reshape(layered.shape[0], -1, *layered.shape[3:])
            state = {**state, stack: {**state.get(stack, {}), _NAMES[what]: own}}
    return state


def with_routes(batch: Batch, routes: Mapping[str, Int[Array, "L G T K"]]) -> Batch:
    """The batch with routes for its tokens, by stack."""
    return _with(batch, "routes", routes)


def with_logits(batch: Batch, logits: Mapping[str, Float[Array, "L G T N"]], weight: float) -> Batch:
    """The batch with logits that routers are drawn to, by stack, each of which counts as much."""
    counted = {
        stack: jnp.concatenate([z, jnp.full((*z.shape[:-1], 1), weight, z.dtype)], axis=-1)
        for stack, z in logits.items()
    }
    return _with(batch, "router_logits", counted)


def _with(batch: Batch, what: str, found: Mapping[str, jax.Array]) -> Batch:
    rows, there = batch.tokens.shape[0], jnp.any(jnp.asarray(batch.segment_ids) > 0, axis=1)

    def by_row(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], rows, -1, *x.shape[2:]), 0, 2)

    given = {f"{stack}/{what}": Given(by_row(x), there) for stack, x in found.items()}
    return dataclasses.replace(batch, media={**batch.media, **given})
