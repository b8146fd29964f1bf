"""Looking tokens up in a table that is cut over the mesh."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from vl_jax.sharding import current_mesh, cut_along


def look_up(table: Float[Array, "V D"], tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The rows of a table that tokens name.

    Across devices each gathers the table along its width and looks its own rows of the batch up, so that the
    gradient is summed to where the table lives. The partitioner would sum it whole on every device, and for a
    table that is cut both ways replicate it.
    """
    mesh = current_mesh()
    if mesh is None:
        return table[tokens]
    rows, words = cut_along("batch", tokens.shape[0]), cut_along("vocab", table.shape[0])
    width = cut_along("embed", table.shape[1])

    def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
        if width:
            table = _whole(table, width)
        if not words:
            return table[tokens]
        own = tokens - jax.lax.axis_index(words) * table.shape[0]
        mine = (own >= 0) & (own < table.shape[0])
        found = table[jnp.where(mine, own, 0)]
        return jax.lax.psum(jnp.where(mine[..., None], found, 0), words)

    specs = P(words or None, width or None), P(rows or None)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(rows or None), check_vma=False)(
        table, tokens
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _whole(table: jax.Array, width: tuple[str, ...]) -> jax.Array:
    return jax.lax.all_gather(table, width, axis=1, tiled=True)


def _scattered(width: tuple[str, ...], _: None, grad: jax.Array) -> tuple[jax.Array]:
    # Cut before the sum: the compiler for TPUs sums whole what it would have to cut along the last axis.
    parts = math.prod(jax.lax.axis_size(axis) for axis in width)
    by_part = grad.reshape(grad.shape[0], parts, -1).swapaxes(0, 1)
    return (jax.lax.psum_scatter(by_part, width, scatter_dimension=0),)


_whole.defvjp(lambda table, width: (_whole(table, width), None), _scattered)
