"""Attention as a pure function, and the masks of packed, branched and cached sequences."""

from __future__ import annotations

import functools

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
    causal: bool = False,
) -> Float[Array, "B T N V"]:
    """Softmax attention, scores and softmax in float32. A query with nothing to see gets zeros.

    K key heads serve N query heads, N / K each (arXiv 2305.13245).

    Args:
      sinks: a logit per head that joins the softmax and is then dropped: a way to attend to nothing.
      causal: the mask lets no query see a key of a later index. The same result, with less work and memory.
    """
    if causal and mask is not None and sinks is None:
        return _causal(query, key, value, mask, scale)
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
    mask: Bool[Array, "B #T S"] | None,
    scale: float,
    sinks: Float[Array, " N"] | None = None,
) -> Float[Array, "B N T S"]:
    """The probabilities of ``attend``."""
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


# Queries are taken so many at a time, or more where that would give too many pieces to compile.
QUERY_CHUNK, MOST_CHUNKS = 128, 8

# The score of a key that may not be seen; beside half of it as the highest score, its weight is exactly 0.
UNSEEN = float(jnp.finfo(jnp.float32).min)


def _chunks(length: int) -> list[slice]:
    """Consecutive pieces of a sequence, all but the last a multiple of ``QUERY_CHUNK`` long."""
    size = -(-length // (MOST_CHUNKS * QUERY_CHUNK)) * QUERY_CHUNK
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _causal(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, scale: float) -> jax.Array:
    """``attend`` in chunks of queries, each of which looks no further than its end.

    Forward keeps the logarithm of every softmax's denominator instead of the probabilities, and backward
    computes them anew (FlashAttention-2, arXiv 2307.08691, section 3.1).
    """
    return _causal_forward(query, key, value, mask, scale)[0]


def _causal_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, scale: float
) -> tuple[jax.Array, tuple]:
    batch, length, heads, _ = query.shape
    # Heads first, so that no chunk has to be transposed.
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    query = query.swapaxes(1, 2).reshape(batch, key.shape[1], -1, length, query.shape[-1])
    mixed, normalizers = [], []
    for rows in _chunks(length):
        seen = slice(0, rows.stop)
        scores = _scores(query[..., rows, :], key[..., seen, :], mask[:, None, None, rows, seen], scale)
        highest = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), UNSEEN / 2)
        weights = jnp.exp(scores - highest)
        total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), jnp.finfo(scores.dtype).tiny)
        mixed.append(_mix("BKGTS,BKSV->BKGTV", weights, value[..., seen, :]) / total)
        normalizers.append(highest + jnp.log(total))
    out = jnp.concatenate(mixed, axis=3).astype(value.dtype)
    out = out.reshape(batch, heads, length, -1).swapaxes(1, 2)
    return out, (query, key, value, mask, out, jnp.concatenate(normalizers, axis=3))


def _causal_backward(
    scale: float, residual: tuple, grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    query, key, value, mask, out, normalizer = residual
    # What every row of the softmax's gradient is reduced by: the sum of weights times their gradients.
    mean = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    mean = mean.swapaxes(1, 2).reshape(normalizer.shape)
    grad = grad.swapaxes(1, 2).reshape(*query.shape[:-1], value.shape[-1])
    chunks = _chunks(query.shape[3])
    grad_query, grad_key, grad_value = [], [], []
    for rows in chunks:
        seen = slice(0, rows.stop)
        q, k, v, g = query[..., rows, :], key[..., seen, :], value[..., seen, :], grad[..., rows, :]
        scores = _scores(q, k, mask[:, None, None, rows, seen], scale)
        weights = jnp.exp(scores - normalizer[..., rows, :])
        grad_weights = jnp.einsum("BKGTV,BKSV->BKGTS", g, v, preferred_element_type=jnp.float32)
        grad_scores = weights * (grad_weights - mean[..., rows, :]) * scale
        grad_query.append(_mix("BKGTS,BKSH->BKGTH", grad_scores, k))
        # The small operand is the one to transpose: these give [H S], not [S H].
        grad_key.append(_mix("BKGTS,BKGTH->BKHS", grad_scores, q))
        grad_value.append(_mix("BKGTS,BKGTV->BKVS", weights, g))
    grad_query = jnp.concatenate(grad_query, axis=3)
    grad_query = grad_query.reshape(grad_query.shape[0], -1, *grad_query.shape[3:]).swapaxes(1, 2)
    return (
        grad_query.astype(query.dtype),
        jnp.moveaxis(_total(grad_key, chunks), 3, 1).astype(key.dtype),
        jnp.moveaxis(_total(grad_value, chunks), 3, 1).astype(value.dtype),
        None,
    )


_causal.defvjp(_causal_forward, _causal_backward)


def _total(parts: list[jax.Array], chunks: list[slice]) -> jax.Array:
    """The sum of what every chunk of queries gives the keys up to its end, [... S].

    Piece by piece: padding the parts to one length costs three times as much.
    """
    pieces = [sum(p[..., keys] for p in parts[i:]) for i, keys in enumerate(chunks)]
    return jnp.concatenate(pieces, axis=-1)


def _scores(query: jax.Array, key: jax.Array, visible: jax.Array, scale: float) -> jax.Array:
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", query, key, preferred_element_type=jnp.float32) * scale
    return jnp.where(visible, scores, UNSEEN)


def _mix(equation: str, weights: jax.Array, values: jax.Array) -> jax.Array:
    """A product whose first operand was computed in float32; the sum stays so."""
    return jnp.einsum(equation, weights.astype(values.dtype), values, preferred_element_type=jnp.float32)


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
      mask: of the T queries themselves, the last T keys, and the slots of a cache before them, if any.
      offset: sequence index of the first query (the filled length of the cache).
    """
    queries, slots = jnp.arange(mask.shape[1]) + offset, mask.shape[2] - mask.shape[1]
    keys = jnp.concatenate([jnp.arange(slots), queries])
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
