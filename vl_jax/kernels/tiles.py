"""How large the tiles of a matrix product are: what fits into the vector memory, and costs least."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from vl_jax.kernels.target import LANES, Target

# What the choice of tiles supposes of a TPU: a step costs as much as moving so many bytes; while a byte is
# moved, so many operations are done; filling and draining the matrix unit takes as long as so many rows.
STEP_BYTES, OPERATIONS_PER_BYTE, FILL_ROWS = 2**18, 300, 64


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Extent of one step along rows, contracted dimension (or rows of the result) and columns."""

    rows: int
    depth: int
    columns: int


def choose_tiles(
    num_rows: int,
    depth: int,
    columns: int,
    target: Target,
    *,
    memory: Callable[[Tiles], int],
    traffic: Callable[[Tiles], int],
    steps: Callable[[Tiles], int],
    parallel: Callable[[Tiles], int],
    products: int = 1,
) -> Tiles:
    """Of the tiles that fit into the vector memory, the cheapest in bytes moved, operations and steps.

    Large row tiles waste work on rows of other groups, small ones starve the matrix unit.

    Args:
      parallel: extent of the part of the grid that is divided among the cores, which should be kept busy.
      products: matrix products in one step.

    Raises:
      ValueError: a compiled kernel would have a dimension that is not a multiple of 128 lanes.
    """
    if target.interpret is False and (depth % LANES or columns % LANES):
        raise ValueError(f"kernel='pallas' needs widths that are multiples of {LANES}, not {depth, columns}")
    unit = min(LANES, target.row_tile)
    most = min(target.row_tile, -(-num_rows // unit) * unit)
    rows = sorted({max(unit, most >> shift) for shift in range(3)}, reverse=True)
    tiles = [Tiles(r, k, n) for r in rows for k in _cuts(depth) for n in _cuts(columns)]
    fitting = [t for t in tiles if memory(t) <= target.tile_budget]
    if not fitting:
        return min(tiles, key=memory)
    idle = {t: -parallel(t) % target.cores / parallel(t) for t in fitting}
    busy = [t for t in fitting if idle[t] <= max(0.1, min(idle.values()))]

    def cost(t: Tiles) -> float:
        operations = 2 * products * steps(t) * (t.rows + FILL_ROWS) * t.depth * t.columns
        return max(traffic(t), operations / OPERATIONS_PER_BYTE) + STEP_BYTES * steps(t)

    return min(busy, key=cost)


def _cuts(size: int) -> list[int]:
    """Tile extents of a dimension: all of it, or whole lanes that divide it."""
    return [size, *(c for c in range(LANES, size, LANES) if size % c == 0)]
