"""The products of ``grouped_product`` for GPUs, by Pallas Triton.

    group sizes 5 0 3, tiles of 4 rows:   | a a a a | a - - - | c c c - |     a *visit* each

A program multiplies the rows of one visit with some columns of its group's matrix, over the whole depth, in
registers. Rows are loaded one by one, so that a visit may begin anywhere, and its rows may lie anywhere
(``source``): a group has one tile at most that is not full. Neighbouring programs share rows, then matrices.

jax >= 0.11 deprecates this back end of Pallas in favour of Mosaic GPU, which only jax >= 0.12 can interpret.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from vl_jax.kernels.epilogue import Epilogue, Sides, dot
from vl_jax.kernels.target import GpuTarget


@struct.dataclass
class BlockVisits:
    """Up to ``rows`` rows of one group each; V of them, at the end some that have nothing to do."""

    group: jax.Array  # i32[V]; G is the rows past the last group, more means no rows
    first: jax.Array  # i32[V] the first row
    end: jax.Array  # i32[V] where the group ends


def plan_visits(group_sizes: Int[Array, " G"], num_rows: int, rows: int) -> BlockVisits:
    """The visits to all rows, those of no group too, in their order."""
    ends = jnp.append(jnp.cumsum(group_sizes), num_rows).astype(jnp.int32)
    starts = jnp.pad(ends[:-1], (1, 0))
    visits = -(-(ends - starts) // rows)
    visit_ends = jnp.cumsum(visits)
    visit = jnp.arange(num_rows // rows + ends.shape[0], dtype=jnp.int32)
    group = jnp.sum(visit[:, None] >= visit_ends, axis=1, dtype=jnp.int32)
    known = jnp.minimum(group, ends.shape[0] - 1)
    first = starts[known] + (visit - (visit_ends - visits)[known]) * rows
    return BlockVisits(group, first, ends[known])


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """What one program computes, and how: ``warps`` threads of 32, ``stages`` steps on their way at once."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def compiler_params(self) -> triton.CompilerParams:
        return triton.CompilerParams(num_warps=self.warps, num_stages=self.stages)


# Sums that a program keeps, at most: 128 registers of each of its 256 threads. In float32, which no tensor
# core multiplies exactly, operands are in registers too.
SUMS, FLOAT32_TILE = 2**15, (64, 64, 16)


def choose_tiles(
    target: GpuTarget,
    rows: int,
    columns: int,
    depth: int,
    *,
    dtype: DTypeLike,
    left: int = 1,
    right: int = 1,
    sums: int = 1,
    fetched_by: int = 1,
) -> BlockShape:
    """The largest tiles that registers and shared memory have room for, no larger than the matrices.

    Args:
      left, right: tiles of the operands in one step.
      sums: tiles of float32 in registers.
      fetched_by: loads one after the other that a step waits for: 2 if rows are found by an index.
    """
    most = (target.rows, target.columns, target.depth)
    if jnp.dtype(dtype).itemsize == 4:
        most = tuple(map(min, most, FLOAT32_TILE))
    sizes = zip(most, (rows, columns, depth), strict=True)
    tile = [max(16, min(limit, 1 << (max(size, 1) - 1).bit_length())) for limit, size in sizes]

    def stages() -> int:
        step = (left * tile[0] + right * tile[1]) * tile[2] * jnp.dtype(dtype).itemsize
        return target.shared_memory // step

    while sums * tile[0] * tile[1] > SUMS and tile[1] > 64:
        tile[1] //= 2
    if stages() < 3 and tile[2] > 32:
        tile[2] //= 2
    while stages() < 3 and tile[1] > 64:
        tile[1] //= 2
    warps = 8 if sums * tile[0] * tile[1] >= SUMS // 2 else 4
    return BlockShape(tile[0], tile[1], tile[2], warps, fetched_by * max(1, min(4, stages())))


def product(
    lhs: Float[Array, "L _ K"],
    rhs: Float[Array, "G P _ _"],
    group_sizes: Int[Array, " G"],
    *,
    epilogue: Epilogue,
    widths: Sequence[int],
    target: GpuTarget,
    name: str,
    transposed: bool = False,
    row_sums: bool = False,
    source: Int[Array, " R"] | None = None,
    bias: Float[Array, "G P 1 N"] | None = None,
    scale: Float[Array, "R 1"] | None = None,
    extra: Float[Array, "X R N"] | None = None,
) -> list[jax.Array]:
    """See ``grouped_product.product``; widths may be any, multiples of 64 are fast."""
    num_rows = lhs.shape[1] if source is None else source.shape[0]
    num_groups, parts, columns = rhs.shape[0], rhs.shape[1], rhs.shape[2 if transposed else 3]
    tiles = choose_tiles(
        target,
        num_rows // num_groups,
        columns,
        lhs.shape[2],
        dtype=lhs.dtype,
        left=lhs.shape[0],
        right=parts,
        sums=(parts if lhs.shape[0] == 1 else 1) + (extra is not None),
    )
    visits = plan_visits(group_sizes, num_rows, tiles.rows)
    column_tiles = pl.cdiv(columns, tiles.columns)
    inputs = {
        "group": visits.group,
        "first": visits.first,
        "end": visits.end,
        "source": source,
        "lhs": lhs,
        "rhs": rhs,
        "bias": bias,
        "scale": scale,
        "extra": extra,
    }
    inputs = {key: array for key, array in inputs.items() if array is not None}
    outputs = [jax.ShapeDtypeStruct((width, num_rows, columns), lhs.dtype) for width in widths]
    if row_sums:
        outputs.append(jax.ShapeDtypeStruct((column_tiles, num_rows), jnp.float32))
    results = pl.pallas_call(
        functools.partial(
            _product_body, names=tuple(inputs), transposed=transposed, epilogue=epilogue, tiles=tiles
        ),
        grid=(column_tiles, visits.group.shape[0]),
        out_shape=outputs,
        compiler_params=tiles.compiler_params,
        interpret=target.interpret,
        name=name,
    )(*inputs.values())
    return [*results[:-1], jnp.sum(results[-1], axis=0)] if row_sums else list(results)


def _product_body(*refs, names: tuple[str, ...], transposed: bool, epilogue: Epilogue, tiles: BlockShape):
    """One program: all of the sums, the epilogue, and the results of the rows of its visit."""
    given: dict[str, Any] = dict(zip(names, refs, strict=False))
    outputs, lhs, rhs = refs[len(names) :], given["lhs"], given["rhs"]
    column, visit = pl.program_id(0), pl.program_id(1)
    group, first, end = (given[key][visit] for key in ("group", "first", "end"))
    num_groups, parts, depth = rhs.shape[0], rhs.shape[1], lhs.shape[2]
    rows = _Span(first, tiles.rows, end)
    columns = _Span(column * tiles.columns, tiles.columns, rhs.shape[2 if transposed else 3])

    def store(results: Sequence[Any]) -> None:
        for out, planes in zip(outputs, results, strict=True):
            if out.ndim == 2:  # sums over columns
                total = jnp.sum(jnp.where(columns.inside[None], planes[0], 0.0), axis=1)
                triton.store(out.at[column, rows.slice], total, mask=rows.inside)
                continue
            for i, plane in enumerate(planes):
                at = out.at[jnp.int32(i), rows.slice, columns.slice]
                triton.store(at, plane.astype(out.dtype), mask=_both(rows, columns))

    @pl.when(group < num_groups)
    def _():
        index = None
        if "source" in given:
            index = triton.load(given["source"].at[rows.slice], mask=rows.inside, other=0)

        def step(k: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
            deep = _Span(k * tiles.depth, tiles.depth, depth)
            left = [_load_rows(lhs, (i,), rows, deep, index) for i in range(lhs.shape[0])]
            sums = list(sums)
            for p in range(parts):
                sides = (columns, deep) if transposed else (deep, columns)
                right = _load(rhs, (group, p), *sides)
                to, of = (p, 0) if len(sums) == parts else (0, p)
                sums[to] += dot(left[of], right, 1, 1 if transposed else 0)
            return sums

        num_sums = parts if lhs.shape[0] == 1 else 1
        zero = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        sums = jax.lax.fori_loop(0, pl.cdiv(depth, tiles.depth), step, [zero] * num_sums)
        store(epilogue(sums, _sides(given, group, rows, columns)))

    @pl.when(group == num_groups)
    def _():
        zero = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        store([[zero] * (1 if out.ndim == 2 else out.shape[0]) for out in outputs])


def _sides(given: dict[str, Any], group: jax.Array, rows: _Span, columns: _Span) -> Sides:
    bias, scale, extra = (given.get(key) for key in ("bias", "scale", "extra"))

    def of_part(p: int) -> jax.Array:
        at = bias.at[group, jnp.int32(p), jnp.int32(0), columns.slice]  # pyright: ignore[reportOptionalMemberAccess]
        return triton.load(at, mask=columns.inside, other=0.0)[None]

    def factors() -> jax.Array:
        at = scale.at[rows.slice, jnp.int32(0)]  # pyright: ignore[reportOptionalMemberAccess]
        return triton.load(at, mask=rows.inside, other=0.0)[:, None]

    return Sides(
        bias=None if bias is None else [of_part(p) for p in range(bias.shape[1])],
        scale=None if scale is None else factors(),
        extra=None if extra is None else [_load(extra, (i,), rows, columns) for i in range(extra.shape[0])],
    )


def transposed_product(
    lhs: Float[Array, "_ K"],
    rhs: Float[Array, "P R N"],
    group_sizes: Int[Array, " G"],
    *,
    dtype: jnp.dtype,
    target: GpuTarget,
    name: str,
    source: Int[Array, " R"] | None = None,
) -> Float[Array, "G K PN"]:
    """See ``grouped_product.transposed_product``."""
    (parts, num_rows, columns), depth = rhs.shape, lhs.shape[1]
    num_groups = group_sizes.shape[0]
    tiles = choose_tiles(
        target,
        depth,
        columns,
        num_rows // num_groups,
        dtype=lhs.dtype,
        fetched_by=1 if source is None else 2,
    )
    column_tiles = pl.cdiv(columns, tiles.columns)
    ends = jnp.cumsum(group_sizes).astype(jnp.int32)
    inputs = [ends - group_sizes, ends, *([] if source is None else [source]), lhs, rhs]
    (out,) = pl.pallas_call(
        functools.partial(_transposed_body, tiles=tiles, column_tiles=column_tiles),
        grid=(parts * column_tiles, pl.cdiv(depth, tiles.rows), num_groups),
        out_shape=[jax.ShapeDtypeStruct((num_groups, depth, parts, columns), dtype)],
        compiler_params=tiles.compiler_params,
        interpret=target.interpret,
        name=name,
    )(*inputs)
    return out.reshape(num_groups, depth, parts * columns)


def _transposed_body(starts, ends, *refs, tiles: BlockShape, column_tiles: int):
    """One program: a tile of the result of one group, from all of its rows."""
    *source, lhs, rhs, out = refs
    tile, group = pl.program_id(0), pl.program_id(2)
    part = jax.lax.div(tile, column_tiles)
    columns = _Span(jax.lax.rem(tile, column_tiles) * tiles.columns, tiles.columns, rhs.shape[2])
    deep = _Span(pl.program_id(1) * tiles.rows, tiles.rows, lhs.shape[1])
    start, end = starts[group], ends[group]

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        rows = _Span(start + i * tiles.depth, tiles.depth, end)
        index = triton.load(source[0].at[rows.slice], mask=rows.inside, other=0) if source else None
        left, right = _load_rows(lhs, (), rows, deep, index), _load(rhs, (part,), rows, columns)
        return total + dot(left, right, 0, 0)

    zero = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(end - start, tiles.depth), step, zero)
    triton.store(
        out.at[group, deep.slice, part, columns.slice], total.astype(out.dtype), mask=_both(deep, columns)
    )


class _Span:
    """``size`` neighbouring indices from ``first`` on, of which those before ``end`` are meant."""

    def __init__(self, first: Any, size: int, end: Any):
        self.slice = pl.ds(first, size)
        self.index = first + jnp.arange(size, dtype=jnp.int32)
        # A whole number of tiles needs no mask.
        self.always = isinstance(end, int) and end % size == 0
        self.inside = self.index < end


def _both(a: _Span, b: _Span) -> jax.Array | None:
    """Where both are meant, bool[a b]; None for everywhere."""
    shape = (a.index.shape[0], b.index.shape[0])
    masks = [m for m, span in ((a.inside[:, None], a), (b.inside[None], b)) if not span.always]
    return functools.reduce(jnp.logical_and, [jnp.broadcast_to(m, shape) for m in masks]) if masks else None


def _load(ref: Any, at: tuple[Any, ...], a: _Span, b: _Span) -> jax.Array:
    """The tile [a b] of the matrix ``at`` a place, zeros where it is not meant."""
    mask = _both(a, b)
    tile = ref.at[(*map(jnp.int32, at), a.slice, b.slice)]
    return triton.load(tile, mask=mask, other=None if mask is None else 0.0)


def _load_rows(
    ref: Any, at: tuple[Any, ...], rows: _Span, columns: _Span, index: jax.Array | None
) -> jax.Array:
    """The tile [rows columns]; with an index, of the rows that it names."""
    if index is None:
        return _load(ref, at, rows, columns)
    shape = (index.shape[0], columns.index.shape[0])
    places = jnp.broadcast_to(index[:, None], shape), jnp.broadcast_to(columns.index[None], shape)
    return triton.load(ref.at[(*map(jnp.int32, at), *places)], mask=_both(rows, columns), other=0.0)


def gather_rows(
    rows: Float[Array, "R D"], index: Int[Array, "N K"], *, target: GpuTarget, name: str
) -> Float[Array, "N D"]:
    """See ``permute.gather_rows``: on a GPU XLA fuses the gather with the sum."""
    del target, name
    return jnp.sum(rows.at[index].get(mode="fill", fill_value=0), axis=1, dtype=jnp.float32).astype(
        rows.dtype
    )
