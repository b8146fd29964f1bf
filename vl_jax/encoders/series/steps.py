"""What encoders of series share: steps read together, and a vector for all that is there."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Pooling = Literal["last", "mean"]


def grouped(
    x: Float[Array, "B L C"], valid: Bool[Array, "B L"], size: int
) -> tuple[Float[Array, "B T D"], Bool[Array, "B T"]]:
    """So many steps as one, their channels side by side; it is there if one of them is.

    Steps that are not there become zeros, whatever stands in their place.
    """
    x = jnp.where(valid[..., None], x, 0)
    rows, length, channels = x.shape
    count = length // size
    return x.reshape(rows, count, size * channels), jnp.any(valid.reshape(rows, count, size), axis=-1)


def pooled(tokens: Float[Array, "B T D"], valid: Bool[Array, "B T"], how: Pooling) -> Float[Array, "B D"]:
    """The last token that is there, or the mean of those; zeros where there is none."""
    if how == "mean":
        mask = valid[..., None].astype(jnp.float32)
        total = jnp.sum(tokens.astype(jnp.float32) * mask, axis=1)
        return (total / jnp.maximum(jnp.sum(mask, axis=1), 1.0)).astype(tokens.dtype)
    count = tokens.shape[1]
    last = count - 1 - jnp.argmax(valid[:, ::-1], axis=1)
    found = jnp.take_along_axis(tokens, last[:, None, None], axis=1)[:, 0]
    return jnp.where(jnp.any(valid, axis=1)[:, None], found, 0)


def check_steps(encoder: str, **sizes: int) -> None:
    """The rules that configs of such encoders share.

    Raises:
      ValueError: a size is below 1, or ``max_length`` is no multiple of ``patch``.
    """
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}={size} of {encoder}: must be at least 1")
    if sizes["max_length"] % sizes["patch"]:
        raise ValueError(
            f"max_length={sizes['max_length']} of {encoder}: must be a multiple of patch={sizes['patch']}"
        )
