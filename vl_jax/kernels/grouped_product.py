"""Pallas TPU kernels for products of rows, sorted by group, with the matrix of their own group.

    product             out[r] = epilogue(lhs[r] @ rhs[group of r])                    [R K] -> [R N]
    transposed_product  out[g] = sum over the rows r of g of lhs[r]^T rhs[r]           -> [G K N]

Which rows and which matrix belong to a step of the grid is said in ``visits``. The next step's tiles are
fetched while this one's are multiplied, and a matrix that stays is fetched once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from vl_jax.kernels.epilogue import Epilogue, Sides, dot
from vl_jax.kernels.permute import RowFetch, gather_rows, indices_of_steps, pack_rows
from vl_jax.kernels.target import LANES, Target
from vl_jax.kernels.tiles import Tiles, choose_tiles
from vl_jax.kernels.visits import plan_visits

# A row sum is written along the lanes, once per sublane of a register.
SUBLANES = 8


def _row_sum(x: Float[Array, "R N"]) -> Float[Array, "8 R"]:
    """Sums over columns, laid along the lanes: a product with ones, for the MXU transposes as it sums."""
    return dot(jnp.ones((SUBLANES, x.shape[1]), jnp.float32), x, 1, 1)


def product(
    lhs: Float[Array, "L _ K"],
    rhs: Float[Array, "G P _ _"],
    group_sizes: Int[Array, " G"],
    *,
    epilogue: Epilogue,
    widths: Sequence[int],
    target: Target,
    name: str,
    transposed: bool = False,
    row_sums: bool = False,
    source: Int[Array, " R"] | None = None,
    bias: Float[Array, "G P 1 N"] | None = None,
    scale: Float[Array, "R 1"] | None = None,
    extra: Float[Array, "X R N"] | None = None,
) -> list[jax.Array]:
    """Every row times the P matrices of its group, then ``epilogue``; rows past the last group give zeros.

    Args:
      lhs: one array for all matrices (each then has its own sum), or one for each (then summed up).
      rhs: [G P K N]; if ``transposed``, [G P N K].
      widths: how many tiles each result of the epilogue has.
      row_sums: whether the epilogue gives one more result, of one tile, to be summed over all columns.
      source: if given, ``lhs`` is [1 T K], and row r of the product is row ``source[r]`` of it. The rows are
        gathered in the kernel where a core can hold whole rows and matrices, elsewhere before it.

    Returns:
      Arrays [width R N] of the dtype of ``lhs``; and, with ``row_sums``, f32[R].
    """
    num_lhs, _, depth = lhs.shape
    num_rows = lhs.shape[1] if source is None else source.shape[0]
    num_groups, parts, columns = rhs.shape[0], rhs.shape[1], rhs.shape[2 if transposed else 3]
    cost = _Cost(
        (num_rows, depth, columns),
        num_groups,
        num_lhs,
        parts,
        wide=sum(widths) + (0 if extra is None else extra.shape[0]),
        gathers=source is not None,
        size=lhs.dtype.itemsize,
    )
    tiles = cost.best_tiles(target)
    specs = _Specs(tiles, num_groups - 1, depth // tiles.depth, columns // tiles.columns, transposed)
    inside = source is not None and specs.depth_steps == specs.column_steps == 1
    inputs, scratch = _left_side(lhs, source, specs, inside=inside, target=target)
    inputs += _right_side(rhs, bias, scale, extra, specs)
    outputs = [(jax.ShapeDtypeStruct((w, num_rows, columns), lhs.dtype), specs.wide(w)) for w in widths]
    if row_sums:
        shape = jax.ShapeDtypeStruct((specs.column_steps, SUBLANES, num_rows), jnp.float32)
        outputs.append((shape, specs.row_sums()))
    visits = plan_visits(group_sizes, num_rows, tiles.rows, cover="rows")
    results = pl.pallas_call(
        functools.partial(
            _product_body,
            parts=parts,
            transposed=transposed,
            has=(inside, bias is not None, scale is not None, extra is not None),
            epilogue=epilogue,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits.scalars),
            grid=(specs.column_steps, cost.visits(tiles), specs.depth_steps),
            in_specs=[spec for _, spec in inputs],
            out_specs=[spec for _, spec in outputs],
            scratch_shapes=[pltpu.VMEM((cost.num_sums, tiles.rows, tiles.columns), jnp.float32), *scratch],
        ),
        out_shape=[shape for shape, _ in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=target.memory_limit
        ),
        cost_estimate=cost.estimate(tiles, transcendentals=len(widths) > 1),
        interpret=target.interpret,
        name=name,
    )(*visits.scalars, *(array for array, _ in inputs))
    if row_sums:
        return [*results[:-1], jnp.sum(results[-1][:, 0], axis=0)]
    return list(results)


def _left_side(
    lhs: Float[Array, "L _ K"],
    source: Int[Array, " R"] | None,
    specs: _Specs,
    *,
    inside: bool,
    target: Target,
) -> tuple[list[tuple[jax.Array, pl.BlockSpec]], list[Any]]:
    """The operands on the left of ``product``, and the scratch they need; ``inside``: the kernel gathers."""
    if source is None:
        return [(lhs, specs.lhs(lhs.shape[0]))], []
    if not inside:
        rows = gather_rows(lhs[0], source[:, None], target=target, name="permute")[None]
        return [(rows, specs.lhs(1))], []
    packed, rows = pack_rows(lhs[0], target=target), specs.tiles.rows
    scalars = indices_of_steps(source[:, None], rows)
    inputs = [(scalars, specs.indices(ahead, scalars.shape[0] - 1)) for ahead in (0, 1)]
    scratch = [pltpu.VMEM((1, rows, lhs.shape[2]), lhs.dtype), *RowFetch.scratch(rows, 1, packed)]
    return [*inputs, (packed, pl.BlockSpec(memory_space=pl.ANY))], scratch


def _right_side(
    rhs: Float[Array, "G P _ _"],
    bias: Float[Array, "G P 1 N"] | None,
    scale: Float[Array, "R 1"] | None,
    extra: Float[Array, "X R N"] | None,
    specs: _Specs,
) -> list[tuple[jax.Array, pl.BlockSpec]]:
    """The matrices of ``product``, and the operands of its epilogue that are given."""
    inputs = [(rhs, specs.rhs(p)) for p in range(rhs.shape[1])]
    inputs += [] if bias is None else [(bias, specs.bias(p)) for p in range(rhs.shape[1])]
    inputs += [] if scale is None else [(scale, specs.scale())]
    inputs += [] if extra is None else [(extra, specs.wide(extra.shape[0]))]
    return inputs


@dataclasses.dataclass(frozen=True)
class _Cost:
    """What ``product`` costs with tiles of one size or another."""

    shape: tuple[int, int, int]  # R, K, N
    num_groups: int
    num_lhs: int
    parts: int
    wide: int  # arrays [R N] that it reads or writes
    gathers: bool  # whether it gathers its rows
    size: int  # bytes of an element

    @property
    def num_sums(self) -> int:
        """Sums kept at a time: one for each matrix, or one of all."""
        return self.parts if self.num_lhs == 1 else 1

    def memory(self, t: Tiles) -> int:
        """Bytes a core holds."""
        moved = self.num_lhs * t.rows * t.depth + self.parts * t.depth * t.columns
        moved += self.wide * t.rows * t.columns + (t.rows * t.depth if self.gathers else 0)
        return 2 * self.size * moved + 4 * (2 * self.num_sums + 1) * t.rows * t.columns

    def visits(self, t: Tiles) -> int:
        """The most pairs of a row tile and a group."""
        return -(-self.shape[0] // t.rows) + self.num_groups

    def traffic(self, t: Tiles) -> int:
        """Bytes moved to and from the core."""
        num_rows, depth, columns = self.shape
        # A group's matrix stays from visit to visit, if all its depth is there at once.
        fetched = self.num_groups if t.depth == depth else self.visits(t)
        rows = num_rows * (self.num_lhs * depth * (columns // t.columns) + self.wide * columns)
        return self.size * (rows + fetched * self.parts * depth * columns)

    def steps(self, t: Tiles) -> int:
        """Steps of the grid."""
        _, depth, columns = self.shape
        return self.visits(t) * (depth // t.depth) * (columns // t.columns)

    def parallel(self, t: Tiles) -> int:
        """Parts of the grid that are independent."""
        return self.shape[2] // t.columns

    def best_tiles(self, target: Target) -> Tiles:
        """The tiles that move least, among those a core can hold."""
        return choose_tiles(
            *self.shape,
            target,
            memory=self.memory,
            traffic=self.traffic,
            steps=self.steps,
            parallel=self.parallel,
            products=self.parts,
        )

    def estimate(self, t: Tiles, *, transcendentals: bool) -> pl.CostEstimate:
        """The cost as the compiler takes it."""
        num_rows, depth, columns = self.shape
        return pl.CostEstimate(
            flops=2 * num_rows * depth * columns * self.parts,
            transcendentals=num_rows * columns if transcendentals else 0,
            bytes_accessed=self.traffic(t),
        )


@dataclasses.dataclass(frozen=True)
class _Specs:
    """Which block of each operand belongs to a step (n, v, k) of ``product``."""

    tiles: Tiles
    last_group: int
    depth_steps: int
    column_steps: int
    transposed: bool

    def lhs(self, width: int) -> pl.BlockSpec:
        block = (width, self.tiles.rows, self.tiles.depth)
        return pl.BlockSpec(block, lambda n, v, k, tile, *_: (0, tile[v], k))

    def indices(self, ahead: int, last: int) -> pl.BlockSpec:
        def index(n, v, k, tile, *_):
            return jnp.minimum(tile[v] + ahead, last), 0, 0

        return pl.BlockSpec((None, 1, self.tiles.rows), index, memory_space=pltpu.SMEM)

    def rhs(self, part: int) -> pl.BlockSpec:
        def index(n, v, k, tile, group, *_):
            g = jnp.minimum(group[v], self.last_group)
            return (g, part, n, k) if self.transposed else (g, part, k, n)

        block = (self.tiles.depth, self.tiles.columns)
        return pl.BlockSpec((None, None, *(block[::-1] if self.transposed else block)), index)

    def bias(self, part: int) -> pl.BlockSpec:
        def index(n, v, k, tile, group, *_):
            return jnp.minimum(group[v], self.last_group), part, 0, n

        return pl.BlockSpec((None, None, 1, self.tiles.columns), index)

    def scale(self) -> pl.BlockSpec:
        return pl.BlockSpec((self.tiles.rows, 1), lambda n, v, k, tile, *_: (tile[v], 0))

    def wide(self, width: int) -> pl.BlockSpec:
        block = (width, self.tiles.rows, self.tiles.columns)
        return pl.BlockSpec(block, lambda n, v, k, tile, *_: (0, tile[v], n))

    def row_sums(self) -> pl.BlockSpec:
        block = (None, SUBLANES, self.tiles.rows)
        return pl.BlockSpec(block, lambda n, v, k, tile, *_: (n, 0, tile[v]))


def _product_body(
    tile, group, bounds, count, *refs, parts: int, transposed: bool, has: tuple, epilogue: Epilogue
):
    """One step: a partial product; at the last depth the epilogue, of which the group's rows are kept."""
    visit, k = pl.program_id(1), pl.program_id(2)
    g, num_groups = group[visit], bounds.shape[0] - 2
    refs = list(refs)
    if has[0]:
        now, ahead, packed = (refs.pop(0) for _ in range(3))
        *refs, lhs, buffer, arrived = refs
        _gather_lhs(tile, now, ahead, RowFetch(packed, buffer, arrived, lhs.shape[1], 1), lhs)
    else:
        lhs = refs.pop(0)
    rhs = [refs.pop(0) for _ in range(parts)]
    bias = [refs.pop(0) for _ in range(parts)] if has[1] else None
    scale = refs.pop(0) if has[2] else None
    extra = refs.pop(0) if has[3] else None
    *outputs, sums = refs
    in_group, last = (visit < count[0]) & (g < num_groups), k == pl.num_programs(2) - 1
    first_row = tile[visit] * lhs.shape[1]

    @pl.when(in_group & (k == 0))
    def _():
        sums[...] = jnp.zeros_like(sums)

    @pl.when(in_group)
    def _():
        for p in range(parts):
            to, of = (p, 0) if sums.shape[0] == parts else (0, p)
            sums[to] += dot(lhs[of], rhs[p][...], 1, 1 if transposed else 0)

    def keep(results: Sequence[Any]) -> None:
        for out, result in zip(outputs, results, strict=True):
            # Rows lie along the lanes in a row sum, along the sublanes elsewhere.
            axis = out.ndim - (1 if out.ndim == 2 else 2)
            row = first_row + jax.lax.broadcasted_iota(jnp.int32, out.shape, axis)
            mine = (row >= bounds[g]) & (row < bounds[g + 1])
            kept = jnp.where(mine, result, out[...].astype(jnp.float32))
            out[...] = kept.astype(out.dtype)

    def of_tile(out: Any, planes: Sequence[jax.Array]) -> jax.Array:
        return _row_sum(planes[0]) if out.ndim == 2 else jnp.stack(planes)

    @pl.when(in_group & last)
    def _():
        sides = Sides(
            bias=None if bias is None else [b[...] for b in bias],
            scale=None if scale is None else scale[...],
            extra=None if extra is None else [extra[i] for i in range(extra.shape[0])],
        )
        results = epilogue([sums[i] for i in range(sums.shape[0])], sides)
        keep([of_tile(out, planes) for out, planes in zip(outputs, results, strict=True)])

    @pl.when((visit < count[0]) & (g == num_groups) & last)
    def _():
        keep([0.0] * len(outputs))


def _gather_lhs(tile, now, ahead, fetch: RowFetch, lhs) -> None:
    """At the first visit of a row tile: starts fetching the rows of the next, and unpacks its own."""
    visit, num_visits = pl.program_id(1), pl.num_programs(1)
    slot = jax.lax.rem(tile[visit], 2)

    @pl.when(visit == 0)
    def _():
        fetch.start(now, slot)

    @pl.when((visit == 0) | (tile[jnp.maximum(visit - 1, 0)] != tile[visit]))
    def _():
        @pl.when(tile[visit] < tile[num_visits - 1])
        def _():
            fetch.start(ahead, 1 - slot)

        fetch.wait(slot)
        columns = fetch.columns(slot, 0, lhs.dtype)
        for first, part in zip(range(0, lhs.shape[2], LANES), columns, strict=False):
            width = min(LANES, lhs.shape[2] - first)
            lhs[0, :, first : first + width] = part[:, :width].astype(lhs.dtype)


def transposed_product(
    lhs: Float[Array, "_ K"],
    rhs: Float[Array, "P R N"],
    group_sizes: Int[Array, " G"],
    *,
    dtype: jnp.dtype,
    target: Target,
    name: str,
    source: Int[Array, " R"] | None = None,
) -> Float[Array, "G K PN"]:
    """The sum over each group's rows of ``lhs[r]^T rhs[p, r]``, the parts side by side; zeros if none.

    Args:
      source: if given, row r of the left side is ``lhs[source[r]]``.
    """
    if source is not None:
        lhs = gather_rows(lhs, source[:, None], target=target, name="permute")
    num_rows, depth = lhs.shape
    parts, _, columns = rhs.shape
    num_groups, size = group_sizes.shape[0], lhs.dtype.itemsize

    def memory(t: Tiles) -> int:
        moved = 2 * size * t.rows * (t.depth + t.columns)
        return moved + t.depth * t.columns * (2 * 4 + 2 * jnp.dtype(dtype).itemsize)

    def traffic(t: Tiles) -> int:
        rows = depth * parts * (columns // t.columns) + parts * columns * (depth // t.depth)
        return size * num_rows * rows + num_groups * depth * parts * columns * jnp.dtype(dtype).itemsize

    def steps(t: Tiles) -> int:
        visits = -(-num_rows // t.rows) + num_groups
        return visits * parallel(t)

    def parallel(t: Tiles) -> int:
        return parts * (columns // t.columns) * (depth // t.depth)

    tiles = choose_tiles(
        num_rows, depth, columns, target, memory=memory, traffic=traffic, steps=steps, parallel=parallel
    )
    visits = plan_visits(group_sizes, num_rows, tiles.rows, cover="groups")
    per_part = columns // tiles.columns
    return pl.pallas_call(
        _transposed_body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits.scalars),
            grid=(depth // tiles.depth, parts * per_part, visits.tile.shape[0]),
            in_specs=[
                pl.BlockSpec((tiles.rows, tiles.depth), lambda k, n, v, tile, *_: (tile[v], k)),
                pl.BlockSpec(
                    (None, tiles.rows, tiles.columns),
                    lambda k, n, v, tile, *_: (jax.lax.div(n, per_part), tile[v], jax.lax.rem(n, per_part)),
                ),
            ],
            out_specs=pl.BlockSpec(
                (None, tiles.depth, tiles.columns), lambda k, n, v, tile, group, *_: (group[v], k, n)
            ),
            scratch_shapes=[pltpu.VMEM((tiles.depth, tiles.columns), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((num_groups, depth, parts * columns), dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=target.memory_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * depth * columns * parts, transcendentals=0, bytes_accessed=traffic(tiles)
        ),
        interpret=target.interpret,
        name=name,
    )(*visits.scalars, lhs, rhs)


def _transposed_body(tile, group, bounds, count, lhs, rhs, out, total):
    """One step: adds the tile's rows of this group; the last visit of a group writes its sum."""
    visit = pl.program_id(2)
    g = group[visit]
    first_visit = (visit == 0) | (group[jnp.maximum(visit - 1, 0)] != g)
    last_visit = (visit == count[0] - 1) | (group[visit + 1] != g)

    @pl.when((visit < count[0]) & first_visit)
    def _():
        total[...] = jnp.zeros_like(total)

    def of_group(ref) -> jax.Array:
        # Rows of other groups, and what stands past the end of the array, must not count, not even as NaN.
        row = tile[visit] * ref.shape[0] + jax.lax.broadcasted_iota(jnp.int32, ref.shape, 0)
        mine = (row >= bounds[g]) & (row < bounds[g + 1])
        return jnp.where(mine, ref[...].astype(jnp.float32), 0.0)

    @pl.when((visit < count[0]) & (bounds[g] < bounds[g + 1]))
    def _():
        total[...] += dot(of_group(lhs).astype(lhs.dtype), of_group(rhs).astype(rhs.dtype), 0, 0)

    @pl.when((visit < count[0]) & last_visit)
    def _():
        out[...] = total[...].astype(out.dtype)
