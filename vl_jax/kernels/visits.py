"""The steps of a grouped product: which tile of rows meets which group.

Rows are cut into tiles whatever the groups are, and a tile is *visited* once for each group that has rows in
it. A visit multiplies the whole tile and keeps the rows of its group:

    tiles    |   0   |   1   |   2   |   3  :         groups a b c; the rows past them are the tail
    groups   | aaaaaabbbb bbbbbbbbbbcc ----- :
    visits     0a 0b   1b    2b 2c 2-   3-            a step of the grid each, in this order

Both are scalars that the TPU reads ahead of the step (scalar prefetch): the idea of MegaBlocks (arXiv
2211.15841), in the form of JAX's megablox.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int


@struct.dataclass
class Visits:
    """The steps over row tiles: V = tiles + groups, of which the first ``count`` do work."""

    tile: jax.Array  # i32[V]
    group: jax.Array  # i32[V + 1]; G is the tail
    bounds: jax.Array  # i32[G + 2] rows of group g: bounds[g] to bounds[g + 1]; the tail ends at R
    count: jax.Array  # i32[1]

    @property
    def scalars(self) -> tuple[jax.Array, ...]:
        return self.tile, self.group, self.bounds, self.count


def plan_visits(group_sizes: Int[Array, " G"], num_rows: int, row_tile: int, *, cover: str) -> Visits:
    """Lists the visits in row order.

    Args:
      cover: ``rows`` visits every row, those of the tail too; ``groups`` every group, empty ones too.
    """
    num_groups, num_tiles = group_sizes.shape[0], -(-num_rows // row_tile)
    ends = jnp.cumsum(group_sizes).astype(jnp.int32)
    bounds = jnp.concatenate([jnp.zeros(1, jnp.int32), ends, jnp.full(1, num_rows, jnp.int32)])
    first, last = bounds[:-1] // row_tile, (bounds[1:] - 1) // row_tile
    visits = jnp.where(bounds[1:] == bounds[:-1], int(cover == "groups"), last - first + 1)
    if cover == "groups":
        visits = jnp.pad(visits[:-1], (0, 1))  # none of the tail
    visit_ends = jnp.cumsum(visits)
    step = jnp.arange(num_tiles + num_groups + 1, dtype=jnp.int32)
    # Steps past the last visit stay where it was, so that they fetch nothing new.
    group = jnp.sum(step[:, None] >= visit_ends, axis=1, dtype=jnp.int32)
    group = jnp.minimum(group, num_groups if cover == "rows" else num_groups - 1)
    tile = jnp.minimum(first[group] + step - (visit_ends - visits)[group], num_tiles - 1)
    return Visits(tile[:-1], group, bounds, visit_ends[-1:].astype(jnp.int32))
