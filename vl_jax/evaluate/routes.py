"""Which experts tokens chose, and how many of the choices change while a model trains."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vl_jax import sharding
from vl_jax.batch import Batch
from vl_jax.layout import NO_COLLECTIONS, Layout, put_batch
from vl_jax.moe.assignment import TokenChoice
from vl_jax.moe.stacks import Routed, RoutingState, Stack, sown


def routes(
    params: Any,
    state: RoutingState,
    batch: Batch,
    *,
    model: nn.Module,
    collections: Mapping[str, Any] = NO_COLLECTIONS,
) -> dict[str, Int[Array, "L B T K"]]:
    """The experts every token chose, by stack: what ``routing.ROUTES`` of its state replays.

    Raises:
      ValueError: tokens of the scheme have no choice of their own.
    """
    kept = model.apply({"params": params, **collections}, batch, state, mutable=["intermediates"])[1]
    return {
        name: jnp.stack([token_choice(found, stack).experts for found in sown(kept["intermediates"], stack)])
        for name, stack in model.config.stacks.items()  # pyright: ignore[reportAttributeAccessIssue]
    }


def churn(
    before: Int[Array, "L B T K"], after: Int[Array, "L B T K"], *, num_experts: int
) -> Float[Array, " L"]:
    """The share of a layer's choices that the same token had not made before."""
    chosen = after < num_experts
    new = chosen & ~jnp.any(after[..., None] == before[..., None, :], axis=-1)
    return jnp.sum(new, axis=(1, 2, 3)) / jnp.maximum(jnp.sum(chosen, axis=(1, 2, 3)), 1)


def all_routes(
    layout: Layout,
    params: Any,
    state: RoutingState,
    batches: Sequence[Batch],
    *,
    collections: Mapping[str, Any] = NO_COLLECTIONS,
) -> dict[str, np.ndarray]:
    """``routes`` of host batches, one after the other along B."""
    with sharding.use_mesh(layout.mesh, layout.rules):
        compiled = jax.jit(functools.partial(routes, model=layout.model))
        found = [
            jax.device_get(compiled(params, state, put_batch(b, layout), collections=collections))
            for b in batches
        ]
    return {name: np.concatenate([each[name] for each in found], axis=1) for name in found[0]}


def token_choice(found: Routed, stack: Stack) -> TokenChoice:
    """The assignment of a layer, if tokens choose their experts.

    Raises:
      ValueError: they have no choice of their own.
    """
    if not isinstance(found.assignment, TokenChoice):
        raise ValueError(f"scheme={stack.moe.scheme!r}: its tokens have no choice to be changed")
    return found.assignment
