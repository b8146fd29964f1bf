"""The cache of attention: for every layer and token what its kind of attention keeps.

Latent attention keeps R + H_rope numbers a token and layer, no keys and no values; grouped-query attention
keeps the keys and values of its few key heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

Leaf = Any


@struct.dataclass
class Cache:
    """What attention kept of the tokens seen so far; slots past ``length`` are not yet filled."""

    runs: Leaf  # for each run of layers a tuple of [L B S ...]
    segment_ids: Leaf  # i32[B S] 0 in slots that hold padding or nothing
    length: Leaf  # i32[] filled slots, the same for all rows


def create(
    *, runs: Sequence[int], batch: int, slots: int, kept: Sequence[tuple[int, ...]], dtype: Any
) -> Cache:
    """An empty cache.

    Args:
      runs: the number of layers in each run.
      kept: the shapes of what one layer keeps of one token.
    """
    return Cache(
        runs=tuple(
            tuple(jnp.zeros((layers, batch, slots, *shape), dtype) for shape in kept) for layers in runs
        ),
        segment_ids=jnp.zeros((batch, slots), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def append(kept: Sequence[Leaf], new: Sequence[Leaf], length: Int[Array, ""]) -> tuple[Leaf, ...]:
    """Writes what T new tokens bring, each [B T ...], at slot ``length`` of one layer's [B S ...]."""
    return tuple(
        jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), length, axis=1)
        for old, x in zip(kept, new, strict=True)
    )


def append_segments(cache: Cache, segment_ids: Int[Array, "B T"]) -> Cache:
    """Marks the next T slots with the segments of the tokens about to be written."""
    updated = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segment_ids, cache.length, axis=1)
    return dataclasses.replace(cache, segment_ids=updated)


def causal_mask(cache: Cache, segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T S"]:
    """Which slots the T tokens written at ``length`` may see (their segments already appended)."""
    slots = jnp.arange(cache.segment_ids.shape[1])
    index = jnp.arange(segment_ids.shape[1]) + cache.length
    same_segment = segment_ids[:, :, None] == cache.segment_ids[:, None, :]
    return same_segment & (slots[None, :] <= index[:, None])[None] & (cache.segment_ids[:, None, :] > 0)
