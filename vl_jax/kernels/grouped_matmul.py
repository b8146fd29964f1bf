"""Grouped feed-forward: rows sorted by expert, each group through its own expert.

    rows [R D], group_sizes [E]  ->  activation(rows @ w_in_e + b_in_e) @ w_out_e + b_out_e   [R D]

``blocked`` walks the groups in blocks of rows, so that the work is that of the rows actually present: the
form for CPUs, where ``lax.ragged_dot`` multiplies every row by every expert. ``reference`` is the plain
definition.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from vl_jax.kernels.activation import SWIGLU, Activation

BLOCK_ROWS = 128
Leaf = Any


@struct.dataclass
class ExpertWeights:
    """The parameters of E feed-forward blocks; X is 2 when the activation is gated, else 1."""

    w_in: Leaf  # [E D X F]
    w_out: Leaf  # [E F D]
    b_in: Leaf | None = None  # [E X F]
    b_out: Leaf | None = None  # [E D]


def grouped_mlp(
    rows: Float[Array, "R D"],
    group_sizes: Int[Array, " E"],
    weights: ExpertWeights,
    *,
    activation: Activation = SWIGLU,
    kernel: str = "blocked",
) -> Float[Array, "R D"]:
    """Applies expert e to the rows of group e; rows past the last group give zeros.

    Args:
      kernel: ``blocked`` or ``reference``.
    """
    if kernel == "reference":
        return reference(rows, group_sizes, weights, activation=activation)
    return _blocked(activation, rows, group_sizes, weights)


def reference(
    rows: Float[Array, "R D"],
    group_sizes: Int[Array, " E"],
    weights: ExpertWeights,
    *,
    activation: Activation,
) -> Float[Array, "R D"]:
    """Every expert on every row, one at a time, masked to its group."""
    ends = jnp.cumsum(group_sizes)
    index = jnp.arange(rows.shape[0])

    def one_expert(total: jax.Array, expert: tuple) -> tuple[jax.Array, None]:
        start, end, w = expert
        out = _project(activation(_project(rows, _flat(w.w_in), w.b_in)), w.w_out, w.b_out)
        mine = (index >= start) & (index < end)
        return total + jnp.where(mine[:, None], out, 0), None

    return jax.lax.scan(one_expert, jnp.zeros_like(rows), (ends - group_sizes, ends, weights))[0]


def _flat(w_in: jax.Array) -> jax.Array:
    """[... D X F] to [... D X*F], so that one product gives every projection."""
    return w_in.reshape(*w_in.shape[:-2], -1)


def _project(x: jax.Array, w: jax.Array, b: jax.Array | None) -> jax.Array:
    y = x @ w
    return y if b is None else y + b.reshape(-1)


def _block_table(group_sizes: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(number of blocks, expert of each block, its first row, end of its group); static upper bound."""
    num_experts = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes)
    blocks = -(-group_sizes // BLOCK_ROWS)
    block_ends = jnp.cumsum(blocks)
    index = jnp.arange(-(-num_rows // BLOCK_ROWS) + num_experts, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(block_ends, index, side="right"), num_experts - 1)
    within = index - (block_ends - blocks)[expert]
    first = (ends - group_sizes)[expert] + within * BLOCK_ROWS
    return block_ends[-1], expert.astype(jnp.int32), first.astype(jnp.int32), ends[expert]


def _slice(x: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, BLOCK_ROWS)


def _update(x: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x, block, start, axis=0)


def _pad(rows: jax.Array) -> jax.Array:
    """Room for the last block of the last group, which may reach past the rows."""
    return jnp.pad(rows, ((0, BLOCK_ROWS), (0, 0)))


def _mask_tail(rows: jax.Array, group_sizes: jax.Array, num_rows: int) -> jax.Array:
    used = jnp.arange(num_rows) < jnp.sum(group_sizes)
    return jnp.where(used[:, None], rows[:num_rows], 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocked(
    activation: Activation, rows: jax.Array, group_sizes: jax.Array, weights: ExpertWeights
) -> jax.Array:
    return _blocked_forward(activation, rows, group_sizes, weights)[0]


def _blocked_forward(
    activation: Activation, rows: jax.Array, group_sizes: jax.Array, weights: ExpertWeights
) -> tuple[jax.Array, tuple]:
    num_rows = rows.shape[0]
    count, expert, first, _ = _block_table(group_sizes, num_rows)
    padded, flat = _pad(rows), dataclasses.replace(weights, w_in=_flat(weights.w_in))

    def body(b: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # A block may reach into the next group; the blocks of that group come later and overwrite it.
        out, projected = carry
        start = first[b]
        w = jax.tree.map(lambda a: a[expert[b]], flat)
        hidden = _project(_slice(padded, start), w.w_in, w.b_in)
        block = _project(activation(hidden), w.w_out, w.b_out)
        return _update(out, block, start), _update(projected, hidden, start)

    projected = jnp.zeros((padded.shape[0], flat.w_in.shape[-1]), rows.dtype)
    out, projected = jax.lax.fori_loop(0, count, body, (jnp.zeros_like(padded), projected))
    return _mask_tail(out, group_sizes, num_rows), (rows, group_sizes, weights, projected)


def _blocked_backward(
    activation: Activation, residual: tuple, grad: jax.Array
) -> tuple[jax.Array, None, ExpertWeights]:
    rows, group_sizes, weights, projected = residual
    count, expert, first, end = _block_table(group_sizes, rows.shape[0])
    padded, padded_grad = _pad(rows), _pad(grad)
    flat = dataclasses.replace(weights, w_in=_flat(weights.w_in))

    def body(b: jax.Array, carry: tuple[jax.Array, ExpertWeights]) -> tuple[jax.Array, ExpertWeights]:
        grad_rows, total = carry
        e, start = expert[b], first[b]
        mine = (start + jnp.arange(BLOCK_ROWS) < end[b])[:, None]
        upstream = jnp.where(mine, _slice(padded_grad, start), 0)
        activated, pullback = jax.vjp(activation, jnp.where(mine, _slice(projected, start), 0))
        (grad_hidden,) = pullback(upstream @ flat.w_out[e].T)
        total = dataclasses.replace(
            total,
            w_in=total.w_in.at[e].add(_slice(padded, start).T @ grad_hidden),
            w_out=total.w_out.at[e].add(activated.T @ upstream),
            b_in=_add_bias(total.b_in, e, grad_hidden),
            b_out=_add_bias(total.b_out, e, upstream),
        )
        return _update(grad_rows, grad_hidden @ flat.w_in[e].T, start), total

    zeros = (jnp.zeros_like(padded), jax.tree.map(jnp.zeros_like, flat))
    grad_rows, total = jax.lax.fori_loop(0, count, body, zeros)
    grad_rows = _mask_tail(grad_rows, group_sizes, rows.shape[0])
    return grad_rows, None, dataclasses.replace(total, w_in=total.w_in.reshape(weights.w_in.shape))


def _add_bias(total: jax.Array | None, expert: jax.Array, grad: jax.Array) -> jax.Array | None:
    if total is None:
        return None
    return total.at[expert].add(jnp.sum(grad, axis=0).reshape(total.shape[1:]))


_blocked.defvjp(_blocked_forward, _blocked_backward)
