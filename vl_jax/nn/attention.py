"""Attention as a pure function.

``attend`` is the one way in for whole sequences: it says how the result is computed. Masks are in ``masks``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vl_jax.nn.chunked import attend_in_chunks
from vl_jax.nn.masks import PackedMask

# So many queries at most are scored at once where each of them may look at all keys.
WHOLE = 512


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    *,
    mask: Bool[Array, "B #T S"] | PackedMask | None,
    scale: float,
    sinks: Float[Array, " N"] | None = None,
    causal: bool = False,
) -> Float[Array, "B T N V"]:
    """Softmax attention, scores and softmax in float32. A query with nothing to see gets zeros.

    K key heads serve N query heads, N / K each (arXiv 2305.13245). Memory grows with the length of causal and
    of long sequences, not with its square.

    Args:
      sinks: a logit per head that joins the softmax and is then dropped: a way to attend to nothing.
      causal: the mask lets no query see a key of a later index. The same result, with less work and memory.
    """
    if (causal and mask is not None) or query.shape[1] > WHOLE:
        return attend_in_chunks(query, key, value, mask, sinks, scale, causal and mask is not None)
    return weighted_sum(attention_weights(query, key, mask=mask, scale=scale, sinks=sinks), value)


def attend_cached(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K V"],
    cached: tuple[Float[Array, "B S K H"], Float[Array, "B S K V"]],
    *,
    mask: Bool[Array, "B T ST"],
    scale: float,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N V"]:
    """``attend`` over the keys and values of a cache's S slots and of T new tokens, without joining them."""
    products = jnp.concatenate([dot_products(query, k) for k in (cached[0], key)], axis=-1)
    weights = masked_softmax(products * scale, mask[:, None], sinks)
    before, now = jnp.split(weights, [cached[0].shape[1]], axis=-1)
    return weighted_sum(before, cached[1]) + weighted_sum(now, value)


def attention_weights(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    *,
    mask: Bool[Array, "B #T S"] | PackedMask | None,
    scale: float,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B N T S"]:
    """The probabilities of ``attend``."""
    mask = mask.whole if isinstance(mask, PackedMask) else mask
    return masked_softmax(dot_products(query, key) * scale, None if mask is None else mask[:, None], sinks)


def dot_products(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"]) -> Float[Array, "B N T S"]:
    """The products of queries and keys, in float32."""
    batch, length, heads, width = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, width)
    products = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, key, preferred_element_type=jnp.float32)
    return products.reshape(batch, heads, length, -1)


def weighted_sum(weights: Float[Array, "B N T S"], value: Float[Array, "B S K V"]) -> Float[Array, "B T N V"]:
    """The sums of values by their weights, which are cast to their dtype."""
    grouped = weights.reshape(weights.shape[0], value.shape[2], -1, *weights.shape[2:])
    mixed = jnp.einsum("BKGTS,BSKV->BTKGV", grouped.astype(value.dtype), value)
    return mixed.reshape(*mixed.shape[:2], -1, value.shape[-1])


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
