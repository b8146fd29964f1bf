"""Grouped feed-forward: rows sorted by expert, each group through its own expert.

    rows [R D], group_sizes [E]  ->  gate * (activation(rows @ w_in_e + b_in_e) @ w_out_e + b_out_e)   [R D]

``pallas`` is for TPUs and ``triton`` for GPUs: the projections, their biases and the activation are one
kernel, the product with ``w_out`` and the gates another. ``blocked`` is for CPUs, where ``lax.ragged_dot``
multiplies every row by every expert. ``reference`` is the plain definition. ``gathered_mlp`` is for rows so
few that they need not be sorted.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vl_jax.kernels import grouped_product, triton_product
from vl_jax.kernels.activation import SWIGLU, Activation
from vl_jax.kernels.blocked import blocked_mlp
from vl_jax.kernels.epilogue import Sides
from vl_jax.kernels.expert_weights import ExpertWeights, flat, project
from vl_jax.kernels.permute import Moves, permute
from vl_jax.kernels.target import GpuTarget, Target, current_gpu, current_target

# Their products take the gates, too; for the others XLA multiplies by them.
FUSED = ("pallas", "triton")


def grouped_mlp(
    rows: Float[Array, "_ D"],
    group_sizes: Int[Array, " E"],
    weights: ExpertWeights,
    *,
    moves: Moves | None = None,
    gates: Float[Array, " R"] | None = None,
    activation: Activation = SWIGLU,
    kernel: str = "blocked",
    target: Target | GpuTarget | None = None,
) -> Float[Array, "R D"]:
    """Applies expert e to the rows of group e; rows past the last group give zeros.

    Args:
      rows: [R D]; or, with ``moves``, the tokens [T D] that it brings into expert order.
      gates: multiply every row's result; None: ones.
      kernel: ``blocked``, ``reference``, ``pallas`` or ``triton``.
      target: what the last two are compiled for; None: the current mesh or backend.

    Raises:
      ValueError: ``pallas`` or ``triton`` for a device or widths they have no kernels for.
    """
    if kernel in FUSED:
        target = target or (current_gpu() if kernel == "triton" else current_target())
        return _fused(activation, target, rows, gates, moves, group_sizes, weights)
    if moves is not None:
        rows = permute(rows, moves)
    if kernel == "reference":
        out: Any = reference(rows, group_sizes, weights, activation=activation)
    else:
        out = blocked_mlp(activation, rows, group_sizes, weights)
    return out if gates is None else (out.astype(jnp.float32) * gates[:, None]).astype(rows.dtype)


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
        out = project(activation(project(rows, flat(w.w_in), w.b_in)), w.w_out, w.b_out)
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
        out = project(activation(project(x, flat(w.w_in), w.b_in)), w.w_out, w.b_out)
        return jnp.where(expert < num_experts, out, 0)

    return jax.lax.map(one_row, (rows, experts))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _fused(
    activation: Activation,
    target: Target | GpuTarget,
    rows: jax.Array,
    gates: jax.Array | None,
    moves: Moves | None,
    group_sizes: jax.Array,
    weights: ExpertWeights,
) -> jax.Array:
    (hidden,) = _project_in(activation, target, rows, moves, group_sizes, weights, keep=False)
    return _project_out(target, hidden, gates, group_sizes, weights)


def _project_in(
    activation: Activation,
    target: Target | GpuTarget,
    rows: jax.Array,
    moves: Moves | None,
    group_sizes: jax.Array,
    weights: ExpertWeights,
    *,
    keep: bool,
) -> list[jax.Array]:
    """The hidden units [1 R F], and with ``keep`` before them the projections they come from [X R F]."""

    def epilogue(sums: list[jax.Array], sides: Sides) -> list[list[jax.Array]]:
        if sides.bias is not None:
            sums = [s + b.astype(jnp.float32) for s, b in zip(sums, sides.bias, strict=True)]
        hidden = [activation.of(*sums)]
        return [sums, hidden] if keep else [hidden]

    return _products(target).product(
        rows[None],
        _matrices(weights.w_in),
        group_sizes,
        source=None if moves is None else moves.source,
        bias=None if weights.b_in is None else weights.b_in[:, :, None],
        epilogue=epilogue,
        widths=[activation.inputs, 1] if keep else [1],
        target=target,
        name="grouped_project_in",
    )


def _project_out(
    target: Target | GpuTarget,
    hidden: jax.Array,
    gates: jax.Array | None,
    group_sizes: jax.Array,
    weights: ExpertWeights,
) -> jax.Array:
    def epilogue(sums: list[jax.Array], sides: Sides) -> list[list[jax.Array]]:
        out = sums[0] if sides.bias is None else sums[0] + sides.bias[0].astype(jnp.float32)
        return [[out if sides.scale is None else out * sides.scale]]

    (out,) = _products(target).product(
        hidden,
        weights.w_out[:, None],
        group_sizes,
        bias=None if weights.b_out is None else weights.b_out[:, None, None],
        scale=None if gates is None else gates[:, None],
        epilogue=epilogue,
        widths=[1],
        target=target,
        name="grouped_project_out",
    )
    return out[0]


def _fused_forward(
    activation: Activation,
    target: Target | GpuTarget,
    rows: jax.Array,
    gates: jax.Array | None,
    moves: Moves | None,
    group_sizes: jax.Array,
    weights: ExpertWeights,
) -> tuple[jax.Array, tuple]:
    projected, hidden = _project_in(activation, target, rows, moves, group_sizes, weights, keep=True)
    out = _project_out(target, hidden, gates, group_sizes, weights)
    return out, (rows, gates, moves, group_sizes, weights, projected)


def _fused_backward(
    activation: Activation, target: Target | GpuTarget, residual: tuple, grad: jax.Array
) -> tuple[jax.Array, jax.Array | None, None, None, ExpertWeights]:
    """Recomputes the hidden units from their projections, and needs no result.

    The gradient of a gate, <grad, result>, is <grad @ w_out^T, hidden> (and <grad, b_out>).
    """
    rows, gates, moves, group_sizes, weights, projected = residual
    products: Any = _products(target)

    def epilogue(sums: list[jax.Array], sides: Sides) -> list[list[jax.Array]]:
        assert sides.extra is not None
        hidden, pullback = jax.vjp(activation.of, *(p.astype(jnp.float32) for p in sides.extra))
        if sides.scale is None:
            return [list(pullback(sums[0])), [hidden]]
        return [list(pullback(sums[0] * sides.scale)), [hidden * sides.scale], [hidden * sums[0]]]

    grad_projected, hidden, *grad_gates = products.product(
        grad[None],
        weights.w_out[:, None],
        group_sizes,
        transposed=True,
        scale=None if gates is None else gates[:, None],
        extra=projected,
        epilogue=epilogue,
        widths=[activation.inputs, 1],
        row_sums=gates is not None,
        target=target,
        name="grouped_grad_hidden",
    )
    (grad_rows,) = products.product(
        grad_projected,
        _matrices(weights.w_in),
        group_sizes,
        transposed=True,
        epilogue=lambda sums, sides: [sums],
        widths=[1],
        target=target,
        name="grouped_grad_rows",
    )
    grad_rows = grad_rows[0]
    if moves is not None:
        grad_rows = products.gather_rows(grad_rows, moves.inverse, target=target, name="unpermute")
    source = None if moves is None else moves.source
    weight_grad = functools.partial(products.transposed_product, target=target, dtype=weights.w_in.dtype)
    grad_in = weight_grad(rows, grad_projected, group_sizes, source=source, name="grouped_grad_in")
    grad_out = weight_grad(hidden[0], grad[None], group_sizes, name="grouped_grad_out")
    members = _members(group_sizes, grad.shape[0])
    total = ExpertWeights(
        w_in=grad_in.reshape(weights.w_in.shape),
        w_out=grad_out,
        b_in=_sum_groups(weights.b_in, members, None, grad_projected),
        b_out=_sum_groups(weights.b_out, members, gates, grad[None]),
    )
    if gates is None:
        return grad_rows, None, None, None, total
    if weights.b_out is not None:
        of_bias = jnp.einsum("RD,ED->RE", grad, weights.b_out, preferred_element_type=jnp.float32)
        grad_gates[0] += jnp.sum(jnp.where(members, of_bias, 0.0), axis=1)
    return grad_rows, grad_gates[0], None, None, total


_fused.defvjp(_fused_forward, _fused_backward)


def _products(target: Target | GpuTarget) -> Any:
    """The module with the products for a target."""
    return triton_product if isinstance(target, GpuTarget) else grouped_product


def _matrices(w_in: jax.Array) -> jax.Array:
    """[E D X F] to [E X D F]: whole matrices, a transpose that XLA fuses with a cast of the weights."""
    return jnp.moveaxis(w_in, 2, 1)


def _members(group_sizes: jax.Array, num_rows: int) -> jax.Array:
    """Whether row r is of group e, bool[R E]."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(num_rows)[:, None]
    return (row >= ends - group_sizes) & (row < ends)


def _sum_groups(
    bias: jax.Array | None, members: jax.Array, gates: jax.Array | None, grad: jax.Array
) -> jax.Array | None:
    """The gradient [E X F] of a bias: a product with the membership, small beside those with the weights."""
    if bias is None:
        return None
    share = jnp.where(members, 1.0 if gates is None else gates[:, None], 0.0).astype(grad.dtype)
    total = jnp.einsum("RE,XRF->EXF", share, grad, preferred_element_type=jnp.float32)
    return total.reshape(bias.shape).astype(bias.dtype)
