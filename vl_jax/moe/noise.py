"""The noise of routing: a key for every group."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8, UInt32

from vl_jax.moe.assignment import RoutingContext


def group_keys(key: jax.Array, context: RoutingContext) -> jax.Array:
    """A key for every group, from what is in it and not from where it is in the batch.

    So noise is the same on any number of devices and with or without accumulation.
    """
    content = context.content
    if context.tokens is not None:
        content = _number(jnp.where(context.valid, context.tokens + 1, 0).astype(jnp.uint32))
    if content is None:
        return jax.random.split(key, context.valid.shape[0])
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, content)


def content_of(
    pixels: UInt8[Array, "G *shape"] | Float[Array, "G *shape"] | Int[Array, "G *shape"],
) -> UInt32[Array, " G"]:
    """A number of every picture, or other input, by which it has the same noise wherever it stands."""
    if jnp.issubdtype(pixels.dtype, jnp.floating):
        pixels = jax.lax.bitcast_convert_type(pixels.astype(jnp.float32), jnp.uint32)
    return _number(pixels.astype(jnp.uint32).reshape(pixels.shape[0], -1))


def _number(values: UInt32[Array, "G T"]) -> UInt32[Array, " G"]:
    # Odd multipliers, so that no value is lost modulo 2**32.
    odd = jax.random.bits(jax.random.key(0), values.shape[1:], jnp.uint32) | jnp.uint32(1)
    return jnp.sum(values * odd, axis=1, dtype=jnp.uint32)
