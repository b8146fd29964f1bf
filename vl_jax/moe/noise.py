"""The noise of routing: a key for every group."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vl_jax.moe.assignment import RoutingContext


def group_keys(key: jax.Array, context: RoutingContext) -> jax.Array:
    """A key for every group, from what is in it and not from where it is in the batch.

    So noise is the same on any number of devices and with or without accumulation.
    """
    groups, length = context.valid.shape
    if context.tokens is None:
        return jax.random.split(key, groups)
    # Odd multipliers, so that no token is lost modulo 2**32.
    odd = jax.random.bits(jax.random.key(0), (length,), jnp.uint32) | jnp.uint32(1)
    tokens = jnp.where(context.valid, context.tokens + 1, 0).astype(jnp.uint32)
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
        key, jnp.sum(tokens * odd, axis=1, dtype=jnp.uint32)
    )
