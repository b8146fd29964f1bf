"""What the grouped products of all machines share: what is done with the sums of a tile."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sides:
    """What an epilogue is given of one tile besides the sums; None where the product was not given it."""

    bias: list[jax.Array] | None  # f[1 columns] per part
    scale: jax.Array | None  # f32[rows 1]
    extra: list[jax.Array] | None  # f[rows columns], X of them


# (sums, sides) -> results, each a list of tiles; all tiles are f[rows columns], as the sums are.
Epilogue = Callable[[list[jax.Array], Sides], Sequence[Sequence[jax.Array]]]


def dot(a: jax.Array, b: jax.Array, a_axis: int, b_axis: int) -> jax.Array:
    """The product of two tiles over the given axes, in float32."""
    # Matrix units multiply float32 in fewer bits unless told otherwise.
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)
