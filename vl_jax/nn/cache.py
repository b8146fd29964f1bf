"""The cache of attention: for every layer and token what its kind of attention keeps.

Latent attention keeps R + H_rope numbers a token and layer, no keys and no values; grouped-query attention
keeps the keys and values of its few key heads. Layers read the cache and say what they keep of new tokens;
that is written at once behind the last layer, so that no layer has to make a cache of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

from vl_jax.params import Leaf


@struct.dataclass
class Cache:
    """What attention kept of the tokens seen so far; slots past ``length`` are not yet filled."""

    runs: Leaf  # for each run of layers a tuple of [L B S ...]
    segment_ids: Leaf  # i32[B S] 0 in slots that hold padding or nothing
    length: Leaf  # i32[] filled slots, the same for all rows
    empty: bool = struct.field(
        pytree_node=False
    )  # known to hold nothing: the first tokens see only each other


def create(
    *,
    runs: Sequence[int],
    batch: int,
    slots: int,
    kept: Sequence[tuple[int, ...]],
    dtype: Any,
    passable: Sequence[int] = (),
) -> Cache:
    """An empty cache.

    Args:
      runs: the number of layers in each run.
      kept: the shapes of what one layer keeps of one token.
      passable: numbers of the runs that tokens may pass by: whether they did is kept too, 1 or 0.
    """
    shapes = [(*kept, ()) if number in passable else kept for number in range(len(runs))]
    return Cache(
        runs=tuple(
            tuple(jnp.zeros((layers, batch, slots, *shape), dtype) for shape in of_run)
            for layers, of_run in zip(runs, shapes, strict=True)
        ),
        segment_ids=jnp.zeros((batch, slots), jnp.int32),
        length=jnp.zeros((), jnp.int32),
        empty=True,
    )


def append(cache: Cache, kept: Sequence[tuple[Leaf, ...]], segment_ids: Int[Array, "B T"]) -> Cache:
    """The cache with T more tokens.

    Args:
      kept: what the layers keep of them, for each run a tuple of [L B T ...].
      segment_ids: their segments; 0 for padding.
    """

    def write(old: jax.Array, new: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), cache.length, axis)

    return Cache(
        runs=jax.tree.map(lambda old, new: write(old, new, 2), cache.runs, tuple(kept)),
        segment_ids=write(cache.segment_ids, segment_ids, 1),
        length=cache.length + segment_ids.shape[1],
        empty=False,
    )


def causal_mask(cache: Cache, segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T S"]:
    """What the next T tokens may see: the slots that are filled, if there can be any, then one another."""
    order = jnp.arange(segment_ids.shape[1])
    seen = jnp.broadcast_to(order[:, None] >= order[None, :], (len(segment_ids), *2 * order.shape))
    keys = segment_ids
    if not cache.empty:
        slots = cache.segment_ids.shape[1]
        filled = jnp.broadcast_to(jnp.arange(slots) < cache.length, (*segment_ids.shape, slots))
        seen = jnp.concatenate([filled, seen], axis=2)
        keys = jnp.concatenate([cache.segment_ids, segment_ids], axis=1)
    return seen & (segment_ids[:, :, None] == keys[:, None, :]) & (keys[:, None, :] > 0)
