"""Gradients of the grouped feed-forward, added to sums: for rows that come in several parts.

    rows [R D], their gates and gradients  ->  gradients of rows and gates, sums + gradients of the weights

It keeps nothing of the forward pass: hidden units are computed anew. On a CPU that is done block by block and
every expert's gradient is added where its sum is, so memory is that of the rows and of one stack of weights.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vl_jax.kernels.activation import Activation
from vl_jax.kernels.blocked import Blocks
from vl_jax.kernels.expert_weights import ExpertWeights, flat, project
from vl_jax.kernels.grouped_matmul import grouped_mlp


def add_gradients(
    rows: Float[Array, "R D"],
    gates: Float[Array, " R"],
    grad: Float[Array, "R D"],
    group_sizes: Int[Array, " E"],
    weights: ExpertWeights,
    sums: ExpertWeights,
    *,
    activation: Activation,
    kernel: str,
) -> tuple[Float[Array, "R D"], Float[Array, " R"], ExpertWeights]:
    """The transpose of ``grouped_mlp`` with gates.

    Args:
      grad: gradient of the result.
      sums: what the gradients of the weights are added to.
      kernel: of ``grouped_mlp``.

    Returns:
      Gradients of the rows and of the gates, zeros for rows past the last group; and the sums.
    """
    if kernel == "blocked":
        return _add_by_block(rows, gates, grad, group_sizes, weights, sums, activation)
    options: Any = {"activation": activation, "kernel": kernel}
    _, pull = jax.vjp(
        lambda rows, gates, weights: grouped_mlp(rows, group_sizes, weights, gates=gates, **options),
        rows,
        gates,
        weights,
    )
    grad_rows, grad_gates, of_weights = pull(grad)
    return grad_rows, grad_gates, jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, of_weights)


def _add_by_block(
    rows: jax.Array,
    gates: jax.Array,
    grad: jax.Array,
    group_sizes: jax.Array,
    weights: ExpertWeights,
    sums: ExpertWeights,
    activation: Activation,
) -> tuple[jax.Array, jax.Array, ExpertWeights]:
    num_rows, blocks = rows.shape[0], Blocks.of(rows.shape[0], group_sizes.shape[0])
    padded, padded_grad = blocks.pad(rows), blocks.pad(grad)
    padded_gates = blocks.pad(gates[:, None])
    ends = jnp.cumsum(group_sizes)

    def one_expert(expert: jax.Array, carry: tuple) -> tuple:
        end = ends[expert]
        w = jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, expert, keepdims=False), weights)
        w_in = flat(w.w_in)

        def block(first: jax.Array, carry: tuple) -> tuple:
            def compute(size: int) -> tuple:
                cut = (
                    jax.lax.dynamic_slice_in_dim(a, first, size) for a in (padded, padded_grad, padded_gates)
                )
                x, upstream, gate = cut
                mine = (first + jnp.arange(size) < end)[:, None]
                upstream, gate = jnp.where(mine, upstream, 0), gate.astype(x.dtype)
                hidden, pull = jax.vjp(activation, jnp.where(mine, project(x, w_in, w.b_in), 0))
                back = upstream @ w.w_out.T
                of_gate = jnp.sum((back * hidden).astype(jnp.float32), axis=1, keepdims=True)
                if w.b_out is not None:
                    of_gate += (upstream @ w.b_out[:, None]).astype(jnp.float32)
                (of_hidden,) = pull(back * gate)
                gated = upstream * gate
                parts = ExpertWeights(
                    w_in=(x.T @ of_hidden).reshape(w.w_in.shape),
                    w_out=hidden.T @ gated,
                    b_in=None if w.b_in is None else jnp.sum(of_hidden, axis=0).reshape(w.b_in.shape),
                    b_out=None if w.b_out is None else jnp.sum(gated, axis=0),
                )
                return blocks.full(of_hidden @ w_in.T), blocks.full(of_gate), parts

            of_rows, of_gates, parts = blocks.cut(compute, end - first)
            # A block may reach into the next group, whose own blocks come later and overwrite it.
            return (
                jax.lax.dynamic_update_slice_in_dim(carry[0], of_rows, first, axis=0),
                jax.lax.dynamic_update_slice_in_dim(carry[1], of_gates, first, axis=0),
                jax.tree.map(lambda a, b: a.at[expert].add(b.astype(a.dtype)), carry[2], parts),
            )

        return blocks.walk(end - group_sizes[expert], end, block, carry)

    begun = (jnp.zeros_like(padded), jnp.zeros(padded_gates.shape, jnp.float32), sums)
    of_rows, of_gates, sums = jax.lax.fori_loop(0, group_sizes.shape[0], one_expert, begun)
    used = jnp.arange(num_rows) < ends[-1]
    return (
        jnp.where(used[:, None], of_rows[:num_rows], 0),
        jnp.where(used, of_gates[:num_rows, 0], 0).astype(gates.dtype),
        sums,
    )
