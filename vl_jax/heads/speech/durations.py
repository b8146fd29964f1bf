"""Durations: how the tokens of a text spread over the frames of its sound.

    tokens           a    b         c
    shares          .25  .25       .5
    frames        0  1  2  3  4  5  6  7      each looks at the token whose middle is near

Frames look at tokens through bells that are as wide as the tokens are long, so that shares can be learnt by
gradients (Donahue et al. 2020, arXiv 2006.03575, section 2.3); equal shares need no learning (FastSpeech,
Ren et al. 2019, arXiv 1905.09263, expands by durations that a teacher gives).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_NARROWEST = 1e-3


def equal_shares(mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """Each token that is there lasts as long as the others."""
    there = mask.astype(jnp.float32)
    return there / jnp.maximum(jnp.sum(there, axis=1, keepdims=True), 1)


def learnt_shares(scores: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T"]:
    """Shares by a softmax over the tokens that are there."""
    low = jnp.finfo(jnp.float32).min
    shares = jax.nn.softmax(jnp.where(mask, scores.astype(jnp.float32), low), axis=1)
    return jnp.where(mask, shares, 0.0)


def looks(shares: Float[Array, "B T"], mask: Bool[Array, "B T"], frames: int) -> Float[Array, "B F T"]:
    """How much each of so many frames takes of each token; 1 in all, 0 where a row has no token."""
    middle = jnp.cumsum(shares, axis=1) - shares / 2
    width = jnp.maximum(shares / 2, _NARROWEST)
    place = (jnp.arange(frames, dtype=jnp.float32) + 0.5) / frames
    off = (place[None, :, None] - middle[:, None]) / width[:, None]
    low = jnp.finfo(jnp.float32).min
    weights = jax.nn.softmax(jnp.where(mask[:, None], -0.5 * off * off, low), axis=-1)
    return jnp.where(mask[:, None], weights, 0.0)


def stretched(said: Float[Array, "B S D"], lengths: Float[Array, " B"], frames: int) -> Float[Array, "B F D"]:
    """What is said on an axis of its own length, at the frames of a sound of another one; linear between.

    Args:
      lengths: frames of each row's sound; later frames repeat the last one.
    """
    steps = said.shape[1]
    at = (jnp.arange(frames, dtype=jnp.float32) + 0.5) / jnp.maximum(lengths, 1.0)[:, None] * steps - 0.5
    at = jnp.clip(at, 0, steps - 1)
    before = jnp.minimum(jnp.floor(at).astype(jnp.int32), max(steps - 2, 0))
    after, part = jnp.minimum(before + 1, steps - 1), (at - before.astype(at.dtype))[..., None]
    low, high = (jnp.take_along_axis(said, i[..., None], axis=1) for i in (before, after))
    return (1 - part) * low + part * high
