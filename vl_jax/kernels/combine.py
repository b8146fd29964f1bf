"""The whole sparse layer behind the router: rows in expert order, through their experts, summed by gate.

    x [T D] --permute--> [R D] --w_in, activation--> [R F] --w_out, gate--> [R D] --sum of choices--> [T D]

In the kernels a gate multiplies its row where the product with ``w_out`` ends, so the combine is a plain sum,
the transpose of the permute, and the gradient of a gate needs no row of the result (``grouped_matmul``). XLA
multiplies where it sums instead, and reads the rows once. Nothing is scattered.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vl_jax.kernels.activation import SWIGLU, Activation
from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.kernels.grouped_matmul import FUSED, grouped_mlp
from vl_jax.kernels.permute import Moves, unpermute
from vl_jax.kernels.target import GpuTarget, Target


@jax.custom_vjp
def gates_of_rows(gates: Float[Array, "T K"], choice: Int[Array, " R"], moves: Moves) -> Float[Array, " R"]:
    """The gate of every row; its transpose is a gather, too.

    Args:
      choice: the choice t * K + k of every row.
    """
    return gates.reshape(-1)[choice]


def _gates_forward(gates: jax.Array, choice: jax.Array, moves: Moves) -> tuple[jax.Array, Moves]:
    return gates.reshape(-1)[choice], moves


def _gates_backward(moves: Moves, grad: jax.Array) -> tuple[jax.Array, None, None]:
    return grad.at[moves.inverse].get(mode="fill", fill_value=0), None, None


gates_of_rows.defvjp(_gates_forward, _gates_backward)


@jax.custom_vjp
def combine(
    rows: Float[Array, "R D"], gates: Float[Array, "T K"], choice: Int[Array, " R"], moves: Moves
) -> Float[Array, "T D"]:
    """The gate-weighted sum of every token's rows, in float32, by XLA; arguments as for ``expert_mlp``.

    Rows of no expert get a gradient that whoever made them must ignore.
    """
    return jnp.einsum("TKD,TK->TD", _rows_of_tokens(rows, moves), gates).astype(rows.dtype)


def _combine_forward(
    rows: jax.Array, gates: jax.Array, choice: jax.Array, moves: Moves
) -> tuple[jax.Array, tuple]:
    return combine(rows, gates, choice, moves), (rows, gates, choice, moves)


def _combine_backward(residual: tuple, grad: jax.Array) -> tuple[jax.Array, jax.Array, None, None]:
    rows, gates, choice, moves = residual
    grad = grad.astype(jnp.float32)
    grad_rows = grad[moves.source] * gates.reshape(-1)[choice][:, None]
    grad_gates = jnp.einsum("TKD,TD->TK", _rows_of_tokens(rows, moves), grad)
    return grad_rows.astype(rows.dtype), grad_gates.astype(gates.dtype), None, None


combine.defvjp(_combine_forward, _combine_backward)


def _rows_of_tokens(rows: jax.Array, moves: Moves) -> jax.Array:
    """The K rows of every token, f32[T K D]; zeros for unused choices."""
    return rows.at[moves.inverse].get(mode="fill", fill_value=0).astype(jnp.float32)


def expert_mlp(
    x: Float[Array, "T D"],
    gates: Float[Array, "T K"],
    choice: Int[Array, " R"],
    moves: Moves,
    group_sizes: Int[Array, " E"],
    weights: ExpertWeights,
    *,
    activation: Activation = SWIGLU,
    kernel: str = "reference",
    target: Target | GpuTarget | None = None,
) -> Float[Array, "T D"]:
    """``sum_k gates[t, k] * expert(t, k)(x[t])``, differentiable in x, gates and weights.

    Args:
      choice: the choice t * K + k of every row; any choice for rows past the last group.
      kernel: ``reference``, ``blocked`` (rows are moved by XLA), ``pallas`` or ``triton``.
      target: what the last two are compiled for; None: the current mesh or backend.
    """
    options = {"moves": moves, "activation": activation, "kernel": kernel, "target": target}
    if kernel not in FUSED:
        return combine(grouped_mlp(x, group_sizes, weights, **options), gates, choice, moves)  # pyright: ignore
    row_gates: Any = gates_of_rows(gates, choice, moves)
    rows = grouped_mlp(x, group_sizes, weights, gates=row_gates, **options)
    if isinstance(target, GpuTarget):
        target = None  # On a GPU XLA moves rows: it fuses the gathers with the sum.
    return unpermute(rows, moves, kernel=kernel, target=target)
