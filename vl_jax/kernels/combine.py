"""The whole sparse layer behind the router: rows in expert order, through their experts, summed by gate.

    x [T D] --permute--> [R D] --w_in, activation--> [R F] --w_out, gate--> [R D] --sum of choices--> [T D]

A gate multiplies its row where the product with ``w_out`` ends, so the combine is a plain sum, the transpose
of the permute, and the gradient of a gate needs no row of the result (``grouped_matmul``). Nothing is
scattered.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vl_jax.kernels.activation import SWIGLU, Activation
from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.kernels.grouped_matmul import grouped_mlp
from vl_jax.kernels.permute import Moves, unpermute
from vl_jax.kernels.target import Target


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


def combine(
    rows: Float[Array, "R D"],
    gates: Float[Array, "T K"],
    choice: Int[Array, " R"],
    moves: Moves,
    *,
    kernel: str = "reference",
    target: Target | None = None,
) -> Float[Array, "T D"]:
    """The gate-weighted sum of every token's rows, in float32; arguments as for ``expert_mlp``."""
    row_gates: Any = gates_of_rows(gates, choice, moves)
    weighted = (rows.astype(jnp.float32) * row_gates[:, None]).astype(rows.dtype)
    return unpermute(weighted, moves, kernel=kernel, target=target)


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
    target: Target | None = None,
) -> Float[Array, "T D"]:
    """``sum_k gates[t, k] * expert(t, k)(x[t])``, differentiable in x, gates and weights.

    Args:
      choice: the choice t * K + k of every row; any choice for rows past the last group.
      kernel: ``reference``, ``blocked`` (rows are moved by XLA) or ``pallas``.
      target: what ``pallas`` is compiled for; None: the current mesh or backend.
    """
    row_gates: Any = gates_of_rows(gates, choice, moves)
    rows = grouped_mlp(
        x,
        group_sizes,
        weights,
        moves=moves,
        gates=row_gates,
        activation=activation,
        kernel=kernel,
        target=target,
    )
    return unpermute(rows, moves, kernel="pallas" if kernel == "pallas" else "reference", target=target)
