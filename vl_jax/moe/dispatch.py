"""Moving tokens to experts and back: from an assignment to a *plan* of rows sorted by expert.

    assignment --plan--> rows sorted by expert --permute--> [R D] --grouped FFN--> [R D] --combine--> [T D]

One plan serves every scheme. Transposes of permute and combine are gathers through the inverse permutation,
never the scatter that autodiff would derive (a scatter compiles slowly on TPU and runs slowly on CPU).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from vl_jax.kernels.activation import Activation
from vl_jax.kernels.combine import expert_mlp
from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.kernels.grouped_matmul import gathered_mlp, grouped_mlp
from vl_jax.kernels.permute import Moves
from vl_jax.moe.assignment import Assignment, Choice, ExpertChoice, Soft, TokenChoice
from vl_jax.moe.routing import MoEConfig

Leaf = Any


@struct.dataclass
class Plan:
    """Rows in expert order. Rows past ``sum(group_sizes)`` belong to no expert."""

    source: Leaf  # i32[R] the token of every row
    choice: Leaf  # i32[R] index of the row's gate in the flattened gates of the assignment
    group_sizes: Leaf  # i32[E]
    inverse: Leaf | None  # i32[T K] the row of every choice, R where unused; None: any number per token


def apply_capacity(
    assignment: Assignment, valid: Bool[Array, "G T"], config: MoEConfig
) -> tuple[Assignment, Bool[Array, "G T K"]]:
    """Turns choices that find no slot into unused ones; returns also which were dropped.

    Every expert has ``capacity`` slots per group, or ceil(capacity_factor * valid tokens * K / E). They are
    filled in order of position (causal: a token never loses to a later one), or of gate, highest first
    (V-MoE's batch priority, arXiv 2106.05974).
    """
    if not isinstance(assignment, TokenChoice):  # an even load by construction
        return assignment, jnp.zeros((*valid.shape, 1), bool)
    if config.is_dropless:
        return assignment, jnp.zeros(assignment.experts.shape, bool)
    if config.capacity is not None:
        slots = jnp.full(valid.shape[:1], config.capacity, jnp.int32)
    else:
        factor = (config.capacity_factor or 0.0) * config.top_k / config.num_experts
        slots = jnp.ceil(factor * jnp.sum(valid, axis=1, dtype=jnp.float32)).astype(jnp.int32)

    def kept(experts: jax.Array, gates: jax.Array, slots: jax.Array) -> jax.Array:
        flat = experts.reshape(-1)
        if config.priority == "gate":
            by_gate = jnp.argsort(-gates.reshape(-1), stable=True)
            rank = jnp.zeros_like(flat).at[by_gate].set(rank_in_expert(flat[by_gate], config.num_experts))
        else:
            rank = rank_in_expert(flat, config.num_experts)
        return (rank < slots).reshape(experts.shape)

    keep = jax.vmap(kept)(assignment.experts, assignment.gates, slots)
    dropped = ~keep & (assignment.experts < config.num_experts)
    experts = jnp.where(keep, assignment.experts, config.num_experts)
    return TokenChoice(experts, jnp.where(keep, assignment.gates, 0.0)), dropped


def rank_in_expert(experts: Int[Array, " A"], num_experts: int) -> Int[Array, " A"]:
    """How many earlier choices name the same expert."""
    order = jnp.argsort(experts, stable=True)
    starts = jnp.searchsorted(experts[order], jnp.arange(num_experts + 1)).astype(jnp.int32)
    rank_sorted = jnp.arange(experts.shape[0], dtype=jnp.int32) - starts[experts[order]]
    return jnp.zeros_like(experts).at[order].set(rank_sorted)


def own_experts(assignment: Assignment, num_local: int, shard: jax.Array) -> Assignment:
    """The part of an assignment that concerns this shard's experts, renumbered from 0."""
    if not isinstance(assignment, TokenChoice):
        axis = 2 if isinstance(assignment, Soft) else 1
        return jax.tree.map(
            lambda a: jax.lax.dynamic_slice_in_dim(a, shard * num_local, num_local, axis=axis), assignment
        )
    local = assignment.experts - shard * num_local
    mine = (local >= 0) & (local < num_local)
    return TokenChoice(jnp.where(mine, local, num_local), jnp.where(mine, assignment.gates, 0.0))


def make_plan(assignment: Choice, *, num_experts: int, length: int) -> Plan:
    """Sorts the choices of all groups by expert.

    Args:
      assignment: with a leading group axis; token indices of an ``ExpertChoice`` count within their group.
      length: tokens per group.
    """
    if isinstance(assignment, ExpertChoice):
        groups, _, slots = assignment.tokens.shape
        first = length * jnp.arange(groups, dtype=jnp.int32)[:, None, None]
        choice = jnp.arange(assignment.gates.size, dtype=jnp.int32).reshape(assignment.gates.shape)
        return Plan(
            source=jnp.moveaxis(assignment.tokens + first, 0, 1).reshape(-1),
            choice=jnp.moveaxis(choice, 0, 1).reshape(-1),
            group_sizes=jnp.full((num_experts,), groups * slots, jnp.int32),
            inverse=None,
        )
    top_k = assignment.experts.shape[-1]
    experts = assignment.experts.reshape(-1)
    order = jnp.argsort(experts, stable=True).astype(jnp.int32)
    rows = jnp.arange(experts.shape[0], dtype=jnp.int32)
    inverse = jnp.zeros_like(experts).at[order].set(rows)
    return Plan(
        source=order // top_k,
        choice=order,
        group_sizes=jnp.bincount(experts, length=num_experts + 1)[:-1].astype(jnp.int32),
        inverse=jnp.where(experts < num_experts, inverse, experts.shape[0]).reshape(-1, top_k),
    )


@jax.custom_vjp
def permute(x: Float[Array, "T D"], plan: Plan) -> Float[Array, "R D"]:
    """The rows of the plan: token vectors in expert order."""
    return x[plan.source]


def _permute_forward(x: jax.Array, plan: Plan) -> tuple[jax.Array, tuple[Plan, jax.Array]]:
    return x[plan.source], (plan, x[:, :0])


def _permute_backward(residual: tuple[Plan, jax.Array], grad: jax.Array) -> tuple[jax.Array, None]:
    plan, like = residual
    if plan.inverse is None:
        return jnp.zeros((like.shape[0], grad.shape[1]), grad.dtype).at[plan.source].add(grad), None
    return jnp.sum(_rows_of_tokens(grad, plan.inverse), axis=1), None


permute.defvjp(_permute_forward, _permute_backward)


def combine(
    rows: Float[Array, "R D"], gates: Float[Array, " A"], plan: Plan, *, length: int
) -> Float[Array, "T D"]:
    """The gate-weighted sum of every token's rows, accumulated in float32.

    Args:
      gates: the assignment's gates, flattened.
      length: the number of tokens T.
    """
    if plan.inverse is None:
        weighted = rows.astype(jnp.float32) * gates[plan.choice][:, None]
        total = jnp.zeros((length, rows.shape[1]), jnp.float32).at[plan.source].add(weighted)
        return total.astype(rows.dtype)
    return _combine_choices(rows, gates, plan)


@jax.custom_vjp
def _combine_choices(rows: jax.Array, gates: jax.Array, plan: Plan) -> jax.Array:
    assert plan.inverse is not None
    of_token = _rows_of_tokens(rows, plan.inverse).astype(jnp.float32)
    return jnp.einsum("TKD,TK->TD", of_token, gates.reshape(plan.inverse.shape)).astype(rows.dtype)


def _combine_forward(rows: jax.Array, gates: jax.Array, plan: Plan) -> tuple[jax.Array, tuple]:
    return _combine_choices(rows, gates, plan), (rows, gates, plan)


def _combine_backward(residual: tuple, grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    rows, gates, plan = residual
    weighted = grad[plan.source].astype(jnp.float32) * gates[plan.choice][:, None]
    used = jnp.arange(rows.shape[0]) < jnp.sum(plan.group_sizes)
    grad_rows = jnp.where(used[:, None], weighted, 0.0).astype(rows.dtype)
    of_token = _rows_of_tokens(rows, plan.inverse).astype(jnp.float32)
    grad_gates = jnp.einsum("TKD,TD->TK", of_token, grad.astype(jnp.float32))
    return grad_rows, grad_gates.reshape(gates.shape), None


_combine_choices.defvjp(_combine_forward, _combine_backward)


def _rows_of_tokens(rows: Float[Array, "R D"], inverse: Int[Array, "T K"]) -> Float[Array, "T K D"]:
    """The K rows of every token; zeros for unused choices."""
    last = rows.shape[0] - 1
    return jnp.where((inverse <= last)[..., None], rows[jnp.minimum(inverse, last)], 0)


def apply_experts(
    x: Float[Array, "G T D"],
    assignment: Choice,
    weights: ExpertWeights,
    *,
    activation: Activation,
    kernel: str,
) -> Float[Array, "G T D"]:
    """Sends every token through its experts on this device: plan, permute, grouped FFN, combine.

    Choices no more than experts, as when decoding, need no plan: their experts' weights are gathered.
    """
    groups, length, width = x.shape
    if isinstance(assignment, TokenChoice) and assignment.gates.size <= weights.w_in.shape[0]:
        if kernel == "blocked":
            return _apply_gathered(x, assignment, weights, activation=activation)
    plan = make_plan(assignment, num_experts=weights.w_in.shape[0], length=length)
    if kernel == "pallas" and plan.inverse is not None:
        moves, gates = Moves(plan.source, plan.inverse), assignment.gates.reshape(groups * length, -1)
        options = {"activation": activation, "kernel": kernel}
        rows = x.reshape(-1, width)
        out = expert_mlp(rows, gates, plan.choice, moves, plan.group_sizes, weights, **options)
        return out.reshape(x.shape)
    rows = permute(x.reshape(-1, width), plan)
    rows = grouped_mlp(rows, plan.group_sizes, weights, activation=activation, kernel=kernel)
    out = combine(rows, assignment.gates.reshape(-1), plan, length=groups * length)
    return out.reshape(x.shape)


def _apply_gathered(
    x: Float[Array, "G T D"], assignment: TokenChoice, weights: ExpertWeights, *, activation: Activation
) -> Float[Array, "G T D"]:
    top_k = assignment.experts.shape[-1]
    rows = jnp.repeat(x.reshape(-1, x.shape[-1]), top_k, axis=0)
    rows = gathered_mlp(rows, assignment.experts.reshape(-1), weights, activation=activation)
    rows = rows.reshape(*assignment.experts.shape, -1).astype(jnp.float32)
    return jnp.einsum("GTKD,GTK->GTD", rows, assignment.gates).astype(x.dtype)
