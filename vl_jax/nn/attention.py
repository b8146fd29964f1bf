"""Attention as a pure function, and the masks of packed, branched and cached sequences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N V"],
    *,
    mask: Bool[Array, "B #T S"] | None,
    scale: float,
) -> Float[Array, "B T N V"]:
    """Softmax attention, scores and softmax in float32. A query with nothing to see gets zeros."""
    scores = jnp.einsum("BTNH,BSNH->BNTS", query, key, preferred_element_type=jnp.float32) * scale
    weights = masked_softmax(scores, None if mask is None else mask[:, None])
    return jnp.einsum("BNTS,BSNV->BTNV", weights.astype(value.dtype), value)


def masked_softmax(
    scores: Float[Array, "B N T S"], mask: Bool[Array, "B 1 #T S"] | None
) -> Float[Array, "B N T S"]:
    """Softmax over the allowed keys; rows with no allowed key are all zero instead of NaN."""
    if mask is None:
        return jax.nn.softmax(scores, axis=-1)
    lowest = jnp.finfo(scores.dtype).min
    shifted = jnp.where(mask, scores, lowest)
    shifted = shifted - jax.lax.stop_gradient(jnp.max(shifted, axis=-1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(shifted), 0.0)
    return weights / jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), jnp.finfo(scores.dtype).tiny)


def causal_mask(segment_ids: Int[Array, "B T"], branch_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Who sees whom in a packed, branched row: earlier or same index, same segment, trunk or own branch."""
    order = jnp.arange(segment_ids.shape[1])
    earlier = order[:, None] >= order[None, :]
    same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
    reachable = (branch_ids[:, None, :] == 0) | (branch_ids[:, :, None] == branch_ids[:, None, :])
    return earlier & same_segment & reachable & (segment_ids[:, None, :] > 0)


def cross_mask(
    segment_ids: Int[Array, "B T"],
    visual_start: Int[Array, "B S"],
    visual_segment_ids: Int[Array, "B S"],
    *,
    offset: Int[Array, ""] | int = 0,
) -> Bool[Array, "B T S"]:
    """Which visual tokens a text token may look at: those of its segment whose image already appeared.

    Args:
      offset: sequence index of the first query (the filled length of a cache).
    """
    index = jnp.arange(segment_ids.shape[1]) + offset
    same_segment = segment_ids[:, :, None] == visual_segment_ids[:, None, :]
    appeared = visual_start[:, None, :] <= index[None, :, None]
    return same_segment & appeared & (visual_segment_ids[:, None, :] > 0)
