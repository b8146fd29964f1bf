"""Rotary position embedding. Angles are always float32: a bfloat16 table is wrong past position 256."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def angles(positions: Int[Array, "B T"], *, dim: int, theta: float) -> Float[Array, "B T half"]:
    """``position * theta ** (-2 i / dim)`` for i in 0 .. dim/2 - 1, in radians."""
    frequency = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    return positions[..., None].astype(jnp.float32) * frequency


def rotate_interleaved(
    x: Float[Array, "B T N H"], angle: Float[Array, "B T half"]
) -> Float[Array, "B T N H"]:
    """Rotates the pairs (x0, x1), (x2, x3), ...; the output holds all first halves, then all second halves.

    The order of DeepSeek-V2 (its rotary code de-interleaves, then rotates halves). Queries and keys are
    permuted alike, so scores equal those of the textbook order; only a cache shows the difference.
    """
    cos = jnp.cos(angle)[:, :, None, :]
    sin = jnp.sin(angle)[:, :, None, :]
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    return jnp.concatenate([even * cos - odd * sin, odd * cos + even * sin], axis=-1).astype(x.dtype)
