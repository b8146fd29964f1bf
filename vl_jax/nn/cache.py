"""The cache of multi-head latent attention: R + H_rope numbers a token and layer, no keys, no values."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Int

Leaf = Any


@struct.dataclass
class LatentCache:
    """Latents of all layers for the tokens seen so far; slots past ``length`` are not yet filled."""

    latent: Leaf  # [L B S R] normalised latents
    key_rope: Leaf  # [L B S H] rotated shared keys
    segment_ids: Leaf  # i32[B S] 0 in slots that hold padding or nothing
    length: Leaf  # i32[] filled slots, the same for all rows


def create(*, layers: int, batch: int, slots: int, rank: int, rope_dim: int, dtype: Any) -> LatentCache:
    """An empty cache."""
    return LatentCache(
        latent=jnp.zeros((layers, batch, slots, rank), dtype),
        key_rope=jnp.zeros((layers, batch, slots, rope_dim), dtype),
        segment_ids=jnp.zeros((batch, slots), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def append_segments(cache: LatentCache, segment_ids: Int[Array, "B T"]) -> LatentCache:
    """Marks the next T slots with the segments of the tokens about to be written."""
    updated = jax.lax.dynamic_update_slice_in_dim(cache.segment_ids, segment_ids, cache.length, axis=1)
    return dataclasses.replace(cache, segment_ids=updated)


def causal_mask(cache: LatentCache, segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T S"]:
    """Which slots the T tokens written at ``length`` may see (their segments already appended)."""
    slots = jnp.arange(cache.segment_ids.shape[1])
    index = jnp.arange(segment_ids.shape[1]) + cache.length
    same_segment = segment_ids[:, :, None] == cache.segment_ids[:, None, :]
    return same_segment & (slots[None, :] <= index[:, None])[None] & (cache.segment_ids[:, None, :] > 0)
