"""Attention in chunks of queries, whose memory grows with the length and not with its square.

    queries [T] -> pieces, each a loop over chunks of equal size -> scores [chunk, keys], then gone

Forward keeps the logarithm of every softmax's denominator instead of the probabilities, and backward computes
them anew (FlashAttention-2, arXiv 2307.08691, section 3.1). Where no query sees a later key, a piece looks no
further than its end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vl_jax.nn.masks import PackedMask

# A causal row is cut into so many pieces at most, each of chunks of this size; others into chunks of at most
# ``LONGEST`` queries, as equal as can be.
QUERY_CHUNK, MOST_CHUNKS, LONGEST = 128, 8, 256

# The score of a key that may not be seen; beside half of it as the highest score, its weight is exactly 0.
UNSEEN = float(jnp.finfo(jnp.float32).min)


class Piece(NamedTuple):
    """Consecutive queries, as chunks of one size, and how many keys they look at."""

    start: int
    size: int  # of a chunk
    count: int
    keys: int

    @property
    def stop(self) -> int:
        return self.start + self.size * self.count


def pieces(length: int, keys: int, causal: bool) -> list[Piece]:
    """The queries of a row; what is left over by whole chunks is a piece of its own."""
    if causal:
        size = -(-length // (MOST_CHUNKS * QUERY_CHUNK)) * QUERY_CHUNK
        ends = [*range(size, length, size), length]
        chunk = QUERY_CHUNK
    else:
        chunk = -(-length // -(-length // LONGEST))
        ends = [length]
    found, start = [], 0
    for end in ends:
        whole, rest = divmod(end - start, chunk)
        seen = end if causal else keys
        if whole:
            found.append(Piece(start, chunk, whole, seen))
        if rest:
            found.append(Piece(end - rest, rest, 1, seen))
        start = end
    return found


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attend_in_chunks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | PackedMask | None,
    sinks: jax.Array | None,
    scale: float,
    causal: bool,
) -> jax.Array:
    """``attention.attend``, chunk by chunk."""
    return _forward(query, key, value, mask, sinks, scale, causal)[0]


def _forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | PackedMask | None,
    sinks: jax.Array | None,
    scale: float,
    causal: bool,
) -> tuple[jax.Array, tuple]:
    batch, length, heads, _ = query.shape
    # Heads first, so that no chunk has to be transposed.
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    query = query.swapaxes(1, 2).reshape(batch, key.shape[1], -1, length, query.shape[-1])
    sink = None if sinks is None else _by_group(sinks, key.shape[1])

    def one_chunk(piece: Piece, first: jax.Array | int) -> tuple[jax.Array, jax.Array]:
        q, k, v = _rows(query, first, piece), key[..., : piece.keys, :], value[..., : piece.keys, :]
        scores = _scores(q, k, _visible(mask, first, piece), scale)
        highest = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), UNSEEN / 2)
        highest = highest if sink is None else jnp.maximum(highest, sink)
        weights = jnp.exp(scores - highest)
        total = jnp.maximum(jnp.sum(weights, axis=-1, keepdims=True), jnp.finfo(scores.dtype).tiny)
        total = total if sink is None else total + jnp.exp(sink - highest)
        mixed = _mix("BKGTS,BKSV->BKGTV", weights, v) / total
        return mixed.astype(value.dtype), highest + jnp.log(total)

    cut = pieces(length, key.shape[2], causal)
    mixed, normalizers = zip(*(_each(functools.partial(one_chunk, p), p) for p in cut), strict=True)
    out = jnp.concatenate(mixed, axis=3).reshape(batch, heads, length, -1).swapaxes(1, 2)
    return out, (query, key, value, mask, sinks, out, jnp.concatenate(normalizers, axis=3))


def _backward(scale: float, causal: bool, residual: tuple, grad: jax.Array) -> tuple:
    query, key, value, mask, sinks, out, normalizer = residual
    # What every row of the softmax's gradient is reduced by: the sum of weights times their gradients.
    mean = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    mean = mean.swapaxes(1, 2).reshape(normalizer.shape)
    grad = grad.swapaxes(1, 2).reshape(*query.shape[:-1], value.shape[-1])

    def one_chunk(piece: Piece, first: jax.Array | int) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, g = _rows(query, first, piece), _rows(grad, first, piece)
        k, v = key[..., : piece.keys, :], value[..., : piece.keys, :]
        scores = _scores(q, k, _visible(mask, first, piece), scale)
        weights = jnp.exp(scores - _rows(normalizer, first, piece))
        grad_weights = jnp.einsum("BKGTV,BKSV->BKGTS", g, v, preferred_element_type=jnp.float32)
        grad_scores = weights * (grad_weights - _rows(mean, first, piece)) * scale
        # The small operand is the one to transpose: the last two give [H S], not [S H].
        return (
            _mix("BKGTS,BKSH->BKGTH", grad_scores, k),
            _mix("BKGTS,BKGTH->BKHS", grad_scores, q),
            _mix("BKGTS,BKGTV->BKVS", weights, g),
        )

    cut = pieces(query.shape[3], key.shape[2], causal)
    parts = [_each(functools.partial(one_chunk, p), p, summed=2) for p in cut]
    grad_query, grad_key, grad_value = zip(*parts, strict=True)
    grad_query = jnp.concatenate(grad_query, axis=3)
    grad_query = grad_query.reshape(grad_query.shape[0], -1, *grad_query.shape[3:]).swapaxes(1, 2)
    grad_sinks = None
    if sinks is not None:
        lost = -jnp.exp(_by_group(sinks, key.shape[1]) - normalizer) * mean
        grad_sinks = jnp.sum(lost, axis=(0, 3, 4)).reshape(sinks.shape).astype(sinks.dtype)
    return (
        grad_query.astype(query.dtype),
        jnp.moveaxis(_total(grad_key, cut), 3, 1).astype(key.dtype),
        jnp.moveaxis(_total(grad_value, cut), 3, 1).astype(value.dtype),
        None,
        grad_sinks,
    )


attend_in_chunks.defvjp(_forward, _backward)


def _each(of_chunk: Callable[[Any], tuple[jax.Array, ...]], piece: Piece, summed: int = 0) -> tuple:
    """What a function gives for all chunks of a piece, joined; the last ``summed`` are added up."""
    if piece.count == 1:
        return of_chunk(piece.start)
    shapes = jax.eval_shape(of_chunk, piece.start)
    split = len(shapes) - summed

    def step(sums: list[jax.Array], number: jax.Array) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
        found = of_chunk(piece.start + number * piece.size)
        return [a + b for a, b in zip(sums, found[split:], strict=True)], found[:split]

    start = [jnp.zeros(s.shape, s.dtype) for s in shapes[split:]]
    sums, stacked = jax.lax.scan(step, start, jnp.arange(piece.count))
    joined = [jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], -1, x.shape[-1]) for x in stacked]
    return (*joined, *sums)


def _rows(x: jax.Array, first: jax.Array | int, piece: Piece) -> jax.Array:
    """The queries of one chunk, along the last axis but one."""
    if isinstance(first, int):
        return x[..., first : first + piece.size, :]
    return jax.lax.dynamic_slice_in_dim(x, first, piece.size, axis=x.ndim - 2)


def _visible(mask: Any, first: jax.Array | int, piece: Piece) -> jax.Array | None:
    """The part of the mask that a chunk needs, [B 1 1 t s]; None: every key is seen."""
    if mask is None:
        return None
    if isinstance(mask, PackedMask):
        part = mask.part(first, piece.size, piece.keys)
    else:
        part = mask[..., : piece.keys]
        part = part if mask.shape[1] == 1 else _rows(part, first, piece)
    return part[:, None, None]


def _by_group(sinks: jax.Array, groups: int) -> jax.Array:
    """The logits of sinks in float32, beside scores [B K G T S]."""
    return sinks.astype(jnp.float32).reshape(1, groups, -1, 1, 1)


def _total(parts: tuple[jax.Array, ...], cut: list[Piece]) -> jax.Array:
    """The sum of what every piece of the queries gives the keys that it looks at, [... S].

    Key by key: padding the parts to one length costs three times as much.
    """
    ends = sorted({p.keys for p in cut})
    stretches = zip([0, *ends], ends, strict=False)
    sums = [
        sum(x[..., start:stop] for x, p in zip(parts, cut, strict=True) if p.keys >= stop)
        for start, stop in stretches
    ]
    return jnp.concatenate(sums, axis=-1)


def _scores(query: jax.Array, key: jax.Array, visible: jax.Array | None, scale: float) -> jax.Array:
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", query, key, preferred_element_type=jnp.float32) * scale
    return scores if visible is None else jnp.where(visible, scores, UNSEEN)


def _mix(equation: str, weights: jax.Array, values: jax.Array) -> jax.Array:
    """A product whose first operand was computed in float32; the sum stays so."""
    return jnp.einsum(equation, weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
