"""Attention as a pure function, and the masks of packed, branched and cached sequences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    *,
    mask: Bool[Array, "B #T S"] | None,
    scale: float,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N V"]:
    """Softmax attention, scores and softmax in float32. A query with nothing to see gets zeros.

    K key heads serve N query heads, N / K each (arXiv 2305.13245).

    Args:
      sinks: a logit per head that joins the softmax and is then dropped: a way to attend to nothing.
    """
    weights = attention_weights(query, key, mask=mask, scale=scale, sinks=sinks)
    weights = weights.reshape(weights.shape[0], key.shape[2], -1, *weights.shape[2:])
    mixed = jnp.einsum("BKGTS,BSKV->BTKGV", weights.astype(value.dtype), value)
    return mixed.reshape(*query.shape[:3], value.shape[-1])


def attention_weights(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    *,
    mask: Bool[Array, "B #T S"] | None,
    scale: float,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B N T S"]:
    """The probabilities of ``attend``."""
    batch, length, heads, width = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, width)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, key, preferred_element_type=jnp.float32) * scale
    scores = scores.reshape(batch, heads, length, -1)
    return masked_softmax(scores, None if mask is None else mask[:, None], sinks)


def masked_softmax(
    scores: Float[Array, "B N T S"],
    mask: Bool[Array, "B 1 #T S"] | None,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B N T S"]:
    """Softmax over the allowed keys; rows with no allowed key are all zero instead of NaN."""
    if mask is None and sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    allowed = scores if mask is None else jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
    highest = jnp.max(allowed, axis=-1, keepdims=True)
    if sinks is not None:
        sink = sinks.astype(scores.dtype)[None, :, None, None]
        highest = jnp.maximum(highest, sink)
    highest = jax.lax.stop_gradient(highest)
    weights = jnp.exp(allowed - highest)
    if mask is not None:
        weights = jnp.where(mask, weights, 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sink - highest)
    return weights / jnp.maximum(total, jnp.finfo(scores.dtype).tiny)


def causal_mask(segment_ids: Int[Array, "B T"], branch_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Who sees whom in a packed, branched row: earlier or same index, same segment, trunk or own branch."""
    order = jnp.arange(segment_ids.shape[1])
    earlier = order[:, None] >= order[None, :]
    same_segment = segment_ids[:, :, None] == segment_ids[:, None, :]
    reachable = (branch_ids[:, None, :] == 0) | (branch_ids[:, :, None] == branch_ids[:, None, :])
    return earlier & same_segment & reachable & (segment_ids[:, None, :] > 0)


def within_window(
    mask: Bool[Array, "B T S"], window: Int[Array, ""], *, offset: Int[Array, ""] | int = 0
) -> Bool[Array, "B T S"]:
    """The mask without keys that stand ``window`` or more indices before the query; 0 leaves it as it is.

    Args:
      offset: sequence index of the first query (the filled length of a cache).
    """
    queries, keys = jnp.arange(mask.shape[1]) + offset, jnp.arange(mask.shape[2])
    near = queries[:, None] - keys[None, :] < window
    return mask & (near | (window == 0))


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
