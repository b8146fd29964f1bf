"""Which experts tokens chose, and how many of the choices change while a model trains."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vl_jax import sharding
from vl_jax.batch import Batch
from vl_jax.layout import Layout, put_batch
from vl_jax.model import VisionLanguage
from vl_jax.moe.assignment import TokenChoice
from vl_jax.moe.routing import State


def routes(params: Any, state: State, batch: Batch, *, model: VisionLanguage) -> Int[Array, "L B T K"]:
    """The experts every token chose in every sparse layer: what ``routing.ROUTES`` of a state replays.

    Raises:
      ValueError: tokens of the scheme have no choice of their own.
    """
    kept = model.apply({"params": params}, batch, state, mutable=["intermediates"])[1]
    layers = by_layer(kept["intermediates"], model)
    return jnp.stack([token_choice(found, model).experts for _, found in layers])


def churn(
    before: Int[Array, "L B T K"], after: Int[Array, "L B T K"], *, num_experts: int
) -> Float[Array, " L"]:
    """The share of a layer's choices that the same token had not made before."""
    chosen = after < num_experts
    new = chosen & ~jnp.any(after[..., None] == before[..., None, :], axis=-1)
    return jnp.sum(new, axis=(1, 2, 3)) / jnp.maximum(jnp.sum(chosen, axis=(1, 2, 3)), 1)


def all_routes(layout: Layout, params: Any, state: State, batches: Sequence[Batch]) -> np.ndarray:
    """``routes`` of host batches, one after the other along B."""
    with sharding.use_mesh(layout.mesh, layout.rules):
        compiled = jax.jit(functools.partial(routes, model=layout.model))
        found = [jax.device_get(compiled(params, state, put_batch(b, layout))) for b in batches]
    return np.concatenate(found, axis=1)


def token_choice(assignment: Any, model: VisionLanguage) -> TokenChoice:
    """The assignment, if tokens choose their experts.

    Raises:
      ValueError: they have no choice of their own.
    """
    if not isinstance(assignment, TokenChoice):
        raise ValueError(f"scheme={model.config.moe.scheme!r}: its tokens have no choice to be changed")
    return assignment


def by_layer(intermediates: Any, model: VisionLanguage) -> list[tuple[jax.Array, Any]]:
    """(router logits, assignment) of every sparse layer, in order, as they were sown."""
    runs = [run for run in model.config.language.runs if run.sparse]
    result = []
    for run in runs:
        sown = intermediates["language"][run.name]["moe"]
        for i in range(len(run.layers)):
            logits, assignment = jax.tree.map(lambda a, i=i: a[i], (sown["logits"][0], sown["assignment"][0]))
            result.append((logits, assignment))
    return result
