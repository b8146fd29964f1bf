"""Grouped feed-forward: rows sorted by expert, each group through its own expert.

    rows [R D], group_sizes [E]  ->  activation(rows @ w_in_e + b_in_e) @ w_out_e + b_out_e   [R D]

``blocked`` walks the groups in blocks of rows, so that the work is that of the rows actually present: the
form for CPUs, where ``lax.ragged_dot`` multiplies every row by every expert. ``reference`` is the plain
definition. ``gathered_mlp`` is for rows so few that they need not be sorted.
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


def gathered_mlp(
    rows: Float[Array, "R D"],
    experts: Int[Array, " R"],
    weights: ExpertWeights,
    *,
    activation: Activation = SWIGLU,
) -> Float[Array, "R D"]:
    """Every row through expert ``experts[r]``, one after the other; ids past the last expert give zeros.

    For a few rows, as when decoding, that reads the weights that are used, once, and no others.
    """
    num_experts = weights.w_in.shape[0]

    def one_row(row: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, expert = row
        w = jax.tree.map(lambda w: w[jnp.minimum(expert, num_experts - 1)], weights)
        out = _project(activation(_project(x, _flat(w.w_in), w.b_in)), w.w_out, w.b_out)
        return jnp.where(expert < num_experts, out, 0)

    return jax.lax.map(one_row, (rows, experts))


def _flat(w_in: jax.Array) -> jax.Array:
    """[... D X F] to [... D X*F], so that one product gives every projection."""
    return w_in.reshape(*w_in.shape[:-2], -1)


def _project(x: jax.Array, w: jax.Array, b: jax.Array | None) -> jax.Array:
    y = x @ w
    return y if b is None else y + b.reshape(-1)


def _groups(group_sizes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(first row, end, number of blocks) of every group."""
    ends = jnp.cumsum(group_sizes)
    return ends - group_sizes, ends, -(-group_sizes // BLOCK_ROWS)


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
    start, _, blocks = _groups(group_sizes)
    padded, flat = _pad(rows), dataclasses.replace(weights, w_in=_flat(weights.w_in))

    def one_expert(carry: tuple[jax.Array, jax.Array], expert: tuple) -> tuple[tuple, None]:
        start, blocks, w = expert

        def body(b: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            # A block may reach into the next group; the blocks of that group come later and overwrite it.
            out, projected = carry
            first = start + b * BLOCK_ROWS
            hidden = _project(_slice(padded, first), w.w_in, w.b_in)
            block = _project(activation(hidden), w.w_out, w.b_out)
            return _update(out, block, first), _update(projected, hidden, first)

        return jax.lax.fori_loop(0, blocks, body, carry), None

    projected = jnp.zeros((padded.shape[0], flat.w_in.shape[-1]), rows.dtype)
    (out, projected), _ = jax.lax.scan(one_expert, (jnp.zeros_like(padded), projected), (start, blocks, flat))
    return _mask_tail(out, group_sizes, num_rows), (rows, group_sizes, weights, projected)


def _blocked_backward(
    activation: Activation, residual: tuple, grad: jax.Array
) -> tuple[jax.Array, None, ExpertWeights]:
    rows, group_sizes, weights, projected = residual
    padded, padded_grad = _pad(rows), _pad(grad)
    flat = dataclasses.replace(weights, w_in=_flat(weights.w_in))

    def one_expert(grad_rows: jax.Array, expert: tuple) -> tuple[jax.Array, ExpertWeights]:
        start, end, blocks, w = expert

        def body(b: jax.Array, carry: tuple[jax.Array, ExpertWeights]) -> tuple[jax.Array, ExpertWeights]:
            grad_rows, total = carry
            first = start + b * BLOCK_ROWS
            mine = (first + jnp.arange(BLOCK_ROWS) < end)[:, None]
            upstream = jnp.where(mine, _slice(padded_grad, first), 0)
            activated, pullback = jax.vjp(activation, jnp.where(mine, _slice(projected, first), 0))
            (grad_hidden,) = pullback(upstream @ w.w_out.T)
            total = ExpertWeights(
                w_in=total.w_in + _slice(padded, first).T @ grad_hidden,
                w_out=total.w_out + activated.T @ upstream,
                b_in=_add_bias(total.b_in, grad_hidden),
                b_out=_add_bias(total.b_out, upstream),
            )
            return _update(grad_rows, grad_hidden @ w.w_in.T, first), total

        return jax.lax.fori_loop(0, blocks, body, (grad_rows, jax.tree.map(jnp.zeros_like, w)))

    grad_rows, total = jax.lax.scan(one_expert, jnp.zeros_like(padded), (*_groups(group_sizes), flat))
    grad_rows = _mask_tail(grad_rows, group_sizes, rows.shape[0])
    return grad_rows, None, dataclasses.replace(total, w_in=total.w_in.reshape(weights.w_in.shape))


def _add_bias(total: jax.Array | None, grad: jax.Array) -> jax.Array | None:
    return None if total is None else total + jnp.sum(grad, axis=0).reshape(total.shape)


_blocked.defvjp(_blocked_forward, _blocked_backward)
