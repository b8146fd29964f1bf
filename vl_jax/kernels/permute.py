"""Moving rows: into expert order, and back with a sum over the choices of every token. Gathers both ways.

    permute   rows[r] = x[source[r]]                       [T D] -> [R D]
    unpermute y[t]    = sum_k rows[inverse[t, k]]          [R D] -> [T D]      each the transpose of the other

For the kernel a row is one run of memory (*packed*), so that one transfer fetches it, whatever rows its
neighbours in a tile are. A step starts the transfers of the next step's rows, waits for its own, and unpacks:

    bfloat16  word w of chunk c = columns 256 c + w (low half) and 256 c + 128 + w (high half),  w < 128
    float32   word w of chunk c = column  128 c + w
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Shaped

from vl_jax.kernels.target import LANES, Target, current_target
from vl_jax.params import Leaf

SUBLANES = 8
# Rows fetched in one step, at most: enough to hide the latency of a transfer.
STEP_ROWS = 512


@struct.dataclass
class Moves:
    """Between T tokens with K choices each and R rows in expert order."""

    source: Leaf  # i32[R] the token of every row; any token for rows of no expert
    inverse: Leaf  # i32[T K] the row of every choice; R or more where unused


def permute(
    x: Float[Array, "T D"], moves: Moves, *, kernel: str = "reference", target: Target | None = None
) -> Float[Array, "R D"]:
    """Token vectors in expert order.

    Args:
      kernel: ``pallas``, or any other, which leaves it to XLA.
      target: what ``pallas`` is compiled for; None: the current mesh or backend.
    """
    return _permute(x, moves, kernel, target)


def unpermute(
    rows: Float[Array, "R D"], moves: Moves, *, kernel: str = "reference", target: Target | None = None
) -> Float[Array, "T D"]:
    """The sum of every token's rows, in float32; arguments as for ``permute``."""
    return _unpermute(rows, moves, kernel, target)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _permute(x: jax.Array, moves: Moves, kernel: str, target: Target | None) -> jax.Array:
    if kernel == "pallas":
        return gather_rows(x, moves.source[:, None], target=target or current_target(), name="permute")
    return x[moves.source]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _unpermute(rows: jax.Array, moves: Moves, kernel: str, target: Target | None) -> jax.Array:
    if kernel == "pallas":
        return gather_rows(rows, moves.inverse, target=target or current_target(), name="unpermute")
    of_token = rows.at[moves.inverse].get(mode="fill", fill_value=0)
    return jnp.sum(of_token, axis=1, dtype=jnp.float32).astype(rows.dtype)


def _permute_forward(x: jax.Array, moves: Moves, kernel: str, target: Target | None) -> tuple:
    return _permute(x, moves, kernel, target), moves


def _permute_backward(kernel: str, target: Target | None, moves: Moves, grad: jax.Array) -> tuple:
    return _unpermute(grad, moves, kernel, target), None


def _unpermute_forward(rows: jax.Array, moves: Moves, kernel: str, target: Target | None) -> tuple:
    return _unpermute(rows, moves, kernel, target), moves


def _unpermute_backward(kernel: str, target: Target | None, moves: Moves, grad: jax.Array) -> tuple:
    # Rows of no expert get the gradient of whichever token they name, and pass it to nobody.
    return _permute(grad, moves, kernel, target), None


_permute.defvjp(_permute_forward, _permute_backward)
_unpermute.defvjp(_unpermute_forward, _unpermute_backward)


def pack_rows(x: Float[Array, "R D"], *, target: Target) -> Shaped[Array, "R C 128"]:
    """Rows as runs of 32-bit words, whole registers long; what stands past the last column is anything.

    Raises:
      ValueError: a dtype other than float32 and bfloat16.
    """
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"rows of dtype {x.dtype}: kernel='pallas' moves float32 and bfloat16")
    num_rows, width = x.shape
    words = LANES * SUBLANES * 4 // x.dtype.itemsize
    chunks = -(-width // words) * SUBLANES
    packed_dtype = jnp.float32 if x.dtype == jnp.float32 else jnp.uint32
    step = min(STEP_ROWS // 2, -(-num_rows // (2 * SUBLANES)) * 2 * SUBLANES)
    packed = pl.pallas_call(
        functools.partial(_pack_body, chunks=chunks),
        grid=(pl.cdiv(num_rows, step),),
        in_specs=[pl.BlockSpec((step, width), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((step * chunks, LANES), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((num_rows * chunks, LANES), packed_dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=target.memory_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=0,
            transcendentals=0,
            bytes_accessed=num_rows * (width * x.dtype.itemsize + chunks * LANES * 4),
        ),
        interpret=target.interpret,
        name="pack_rows",
    )(x)
    return packed.reshape(num_rows, chunks, LANES)


def _pack_body(x, packed, *, chunks: int):
    def columns(i: int) -> jax.Array:
        """128 columns as the bits of float32; zeros past the last."""
        part = x[:, i * LANES : (i + 1) * LANES].astype(jnp.float32)
        return jnp.pad(part, ((0, 0), (0, LANES - part.shape[1])))

    num_parts = -(-x.shape[1] // LANES)
    halves = 1 if x.dtype == jnp.float32 else 2
    for chunk in range(-(-num_parts // halves)):
        words = columns(chunk * halves)
        if halves == 2:
            words = jax.lax.bitcast_convert_type(words, jnp.uint32) >> 16
            if chunk * 2 + 1 < num_parts:
                words |= jax.lax.bitcast_convert_type(columns(chunk * 2 + 1), jnp.uint32)
        packed[pl.ds(chunk, x.shape[0], stride=chunks), :] = words


def gather_rows(
    rows: Float[Array, "R D"], index: Int[Array, "N K"], *, target: Target, name: str
) -> Float[Array, "N D"]:
    """``sum_k rows[index[n, k]]`` in float32; an index past the last row counts as a row of zeros."""
    num_rows, width = rows.shape
    length, top_k = index.shape
    packed = pack_rows(rows, target=target)
    fetched = min(STEP_ROWS, target.tile_budget // (4 * packed.shape[1] * LANES * 4))
    step = max(2 * SUBLANES, fetched // top_k // (2 * SUBLANES) * 2 * SUBLANES)
    step = min(step, -(-length // (2 * SUBLANES)) * 2 * SUBLANES)
    num_steps = pl.cdiv(length, step)
    scalars = indices_of_steps(jnp.minimum(index, num_rows - 1), step)
    # The indices of this step, and of the next.
    steps = (lambda i: (i, 0, 0), lambda i: (jnp.minimum(i + 1, num_steps - 1), 0, 0))
    specs = [pl.BlockSpec((None, *scalars.shape[1:]), at, memory_space=pltpu.SMEM) for at in steps]
    arrays = [scalars, scalars]
    if top_k > 1:
        arrays.append((index < num_rows).astype(jnp.float32))
        specs.append(pl.BlockSpec((step, top_k), lambda i: (i, 0)))
    return pl.pallas_call(
        functools.partial(_gather_body, top_k=top_k),
        grid=(num_steps,),
        in_specs=[*specs, pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec((step, width), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((length, width), rows.dtype),
        scratch_shapes=RowFetch.scratch(step, top_k, packed),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=target.memory_limit
        ),
        cost_estimate=pl.CostEstimate(
            flops=length * top_k * width if top_k > 1 else 0,
            transcendentals=0,
            bytes_accessed=length * (top_k + 1) * width * rows.dtype.itemsize,
        ),
        interpret=target.interpret,
        name=name,
    )(*arrays, packed)


def indices_of_steps(index: Int[Array, "N K"], step: int) -> Int[Array, "steps 1 nK"]:
    """The indices in blocks of ``step`` rows; the last block is filled up with zeros."""
    padded = jnp.pad(index.astype(jnp.int32), ((0, -index.shape[0] % step), (0, 0)))
    return padded.reshape(-1, 1, step * index.shape[1])


@dataclasses.dataclass(frozen=True)
class RowFetch:
    """Inside a kernel: rows on their way from packed memory, one step ahead of their use."""

    packed: Any  # ref [N C 128] in device memory
    buffer: Any  # ref [2, K*rows*C, 128]
    arrived: Any  # ref of two semaphores
    rows: int  # of one step, for each of the K choices
    top_k: int

    @staticmethod
    def scratch(rows: int, top_k: int, packed: jax.Array) -> list[Any]:
        """What ``buffer`` and ``arrived`` are allocated as."""
        shape = (2, top_k * rows * packed.shape[1], LANES)
        return [pltpu.VMEM(shape, packed.dtype), pltpu.SemaphoreType.DMA((2,))]

    def start(self, index: Any, slot: jax.Array) -> None:
        """Starts the transfers of ``index[0, row * K + k]`` for all rows and choices of a step."""
        chunks = self.packed.shape[1]

        def of_row(i, carry):
            for k in range(self.top_k):
                first = pl.multiple_of((k * self.rows + i) * chunks, SUBLANES)
                to, row = self.buffer.at[slot, pl.ds(first, chunks)], index[0, i * self.top_k + k]
                pltpu.make_async_copy(self.packed.at[row], to, self.arrived.at[slot]).start()
            return carry

        jax.lax.fori_loop(0, self.rows, of_row, 0)

    def wait(self, slot: jax.Array) -> None:
        """Waits for all transfers of a step at once: a semaphore counts bytes."""
        whole = self.buffer.at[slot]
        pltpu.make_async_copy(whole, whole, self.arrived.at[slot]).wait()

    def columns(self, slot: jax.Array, k: int, dtype: Any) -> Iterator[jax.Array]:
        """Choice k of every row, 128 columns at a time, in float32."""
        chunks = self.packed.shape[1]
        for chunk in range(chunks):
            first = k * self.rows * chunks + chunk
            words = self.buffer[slot, pl.ds(first, self.rows, stride=chunks), :]
            if dtype == jnp.float32:
                yield words
            else:
                for half in (words << 16, words & jnp.uint32(0xFFFF0000)):
                    yield jax.lax.bitcast_convert_type(half, jnp.float32)


def _gather_body(now, ahead, *refs, top_k: int):
    *used, packed, out, buffer, arrived = refs
    fetch = RowFetch(packed, buffer, arrived, out.shape[0], top_k)
    step = pl.program_id(0)
    slot = jax.lax.rem(step, 2)

    @pl.when(step == 0)
    def _():
        fetch.start(now, slot)

    @pl.when(step + 1 < pl.num_programs(0))
    def _():
        fetch.start(ahead, 1 - slot)

    fetch.wait(slot)
    choices = [fetch.columns(slot, k, out.dtype) for k in range(top_k)]
    for first, parts in zip(range(0, out.shape[1], LANES), zip(*choices, strict=True), strict=False):
        if top_k > 1:
            parts = [jnp.where(used[0][:, k : k + 1] > 0, part, 0.0) for k, part in enumerate(parts)]
        width = min(LANES, out.shape[1] - first)
        total = functools.reduce(jnp.add, parts)
        out[:, first : first + width] = total[:, :width].astype(out.dtype)
