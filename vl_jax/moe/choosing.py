"""Choosing experts by score, so that given routes are taken and excluded experts passed over."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vl_jax.moe.assignment import RoutingContext

MASKED = -1e9  # the logit of an expert that may not be chosen


def of_columns(excluded: Bool[Array, "*G E"], values: Float[Array, "*G N"]) -> Bool[Array, "*G N"]:
    """Columns after those of the experts are never excluded."""
    others = values.shape[-1] - excluded.shape[-1]
    return jnp.concatenate([excluded, jnp.zeros((*excluded.shape[:-1], others), bool)], axis=-1)


def best(choice: Float[Array, "T N"], count: int, context: RoutingContext) -> Int[Array, "T K"]:
    """The ``count`` experts of highest selection score; or the given routes, if there are any.

    An excluded expert has no score; where too few are left, the ids past them are N: unused.
    """
    if context.routes is not None:
        return context.routes
    if context.excluded is None:
        return jax.lax.top_k(choice, count)[1]
    excluded = of_columns(context.excluded, choice)
    experts = jax.lax.top_k(jnp.where(excluded, -jnp.inf, choice), count)[1]
    return jnp.where(jnp.take_along_axis(excluded, experts, axis=-1), choice.shape[-1], experts)


def gates_of(
    scores: Float[Array, "T N"], experts: Int[Array, "T K"], *, unused: float = 0.0
) -> Float[Array, "T K"]:
    """The score of every chosen expert, and ``unused`` for ids past the last."""
    return jnp.take_along_axis(scores, experts, axis=-1, mode="fill", fill_value=unused)
