"""The ring on which texts of a contrastive batch go round, a few of them at a time.

                      texts and what they have seen go round -->
    images of shard 0   x   texts 0, 1, 2, 3     every shard keeps its images and meets all texts,
    images of shard 1   x   texts 3, 0, 1, 2     ``chunk`` of them at once

One device is a ring of length one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from vl_jax.sharding import current_mesh, current_rules


def batch_rows() -> P:
    """How rows of a batch are spread over the mesh."""
    return current_rules().spec(("batch",))


def _batch_axes() -> tuple[str, ...]:
    """The mesh axes over which rows are spread, inside ``spread``; none where one shard has all."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(axis for axis in current_rules().batch if axis in manual)


def spread(local: Callable[..., Any], in_specs: tuple, out_specs: tuple) -> Callable[..., Any]:
    """A function of what one shard has, as one of whole arrays; without a mesh the one shard has all."""
    mesh = current_mesh()
    if mesh is None:
        # What is constant inside a compiled function comes out of it as an array of numpy.
        return lambda *arguments: local(*jax.tree.map(jnp.asarray, arguments))
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def add_up(tree: Any) -> Any:
    """Sums over all shards."""
    return jax.lax.psum(tree, _batch_axes()) if _batch_axes() else tree


def go_round(
    meet: Callable[[Any, Any, Any], tuple[Any, Any]], mine: Any, visitors: Any, carried: Any, *, chunk: int
) -> tuple[Any, Any]:
    """Every shard's texts visit all shards, ``chunk`` of them meet the images at once.

    Args:
      meet: ``(mine, visitors, carried) -> (mine, carried)`` for one chunk.
      mine: what stays here and is changed by every visit.
      visitors: texts and what is known of them, [C ...] each.
      carried: what is changed of the texts, [C ...] each; it is back where it began at the end.
    """
    axes, size = _batch_axes(), jax.tree.leaves(carried)[0].shape[0]
    pieces = max(1, -(-size // chunk))
    length = -(-size // pieces)

    def cut(x: jax.Array) -> jax.Array:  # ids of -1 fill up the last piece, and zeros the rest
        fill = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
        padding = [(0, pieces * length - size)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding, constant_values=fill).reshape(pieces, length, *x.shape[1:])

    def visit(mine: Any, visitors: Any, carried: Any) -> tuple[Any, Any]:
        return jax.lax.scan(lambda mine, piece: meet(mine, *piece), mine, (visitors, carried))

    def step(state: tuple, _: None) -> tuple[tuple, None]:
        mine, visitors, carried = state
        following = _shift(visitors, axes)  # while these are compared, the next ones arrive
        mine, carried = visit(mine, visitors, carried)
        return (mine, following, _shift(carried, axes)), None

    visitors, carried = jax.tree.map(cut, (visitors, carried))
    if axes:
        state = mine, visitors, carried
        (mine, _, carried), _ = jax.lax.scan(step, state, length=jax.lax.axis_size(axes))
    else:
        mine, carried = visit(mine, visitors, carried)
    return mine, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:size], carried)


def _shift(tree: Any, axes: tuple[str, ...]) -> Any:
    shards = jax.lax.axis_size(axes)
    neighbours = [(i, (i + 1) % shards) for i in range(shards)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, neighbours), tree)
