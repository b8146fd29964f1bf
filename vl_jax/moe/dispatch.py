"""Moving tokens to experts and back: from an assignment to a *plan* of rows sorted by expert.

    assignment --plan--> rows sorted by expert --permute--> [R D] --grouped FFN--> [R D] --combine--> [T D]

Where tokens choose, a plan sorts their choices, and rows move by gathers both ways (``kernels.permute``).
Where experts choose, rows are sorted from the start; a token may have any number of them, and they are
scattered back.
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
from vl_jax.kernels.router import rank_in_expert, sort_by_expert
from vl_jax.moe.assignment import Assignment, Choice, ExpertChoice, Soft, TokenChoice
from vl_jax.moe.bounded import windows
from vl_jax.moe.routing import MoEConfig
from vl_jax.moe.slots import ceil_times
from vl_jax.params import Leaf


@struct.dataclass
class DispatchPlan:
    """Rows in expert order. Rows past ``sum(group_sizes)`` belong to no expert."""

    moves: Moves  # between tokens and rows
    choice: Leaf  # i32[R] index of the row's gate in the flattened gates of the assignment
    group_sizes: Leaf  # i32[E]


def apply_capacity(
    assignment: Assignment, valid: Bool[Array, "G T"], config: MoEConfig
) -> tuple[Assignment, Bool[Array, "G T K"]]:
    """Turns choices that find no slot into unused ones; returns also which were dropped.

    Every expert has ``limit.slots`` per group, or ceil(limit.factor * valid tokens * K / E) slots. They are
    filled in the order of ``limit.priority``, see ``slot_ranks``.
    """
    if not isinstance(assignment, TokenChoice):  # an even load by construction
        return assignment, jnp.zeros((*valid.shape, 1), bool)
    if config.is_dropless:
        return assignment, jnp.zeros(assignment.experts.shape, bool)
    length, top_k = assignment.experts.shape[1:]
    if config.slots_per_token is None:
        slots = jnp.full(valid.shape[:1], min(config.limit.slots or 0, length * top_k), jnp.int32)
    else:  # more than one for every choice is never needed
        share = min(config.slots_per_token, top_k)
        slots = ceil_times(jnp.sum(valid, axis=1, dtype=jnp.int32), share, most=length)

    def kept(experts: jax.Array, gates: jax.Array, slots: jax.Array) -> jax.Array:
        priority, number = config.limit.priority, config.num_experts
        return slot_ranks(experts, gates, priority=priority, num_experts=number) < slots

    keep = jax.vmap(kept)(assignment.experts, assignment.gates, slots)
    dropped = ~keep & (assignment.experts < config.num_experts)
    experts = jnp.where(keep, assignment.experts, config.num_experts)
    return TokenChoice(experts, jnp.where(keep, assignment.gates, 0.0)), dropped


def slot_ranks(
    experts: Int[Array, "T K"], gates: Float[Array, "T K"], *, priority: str, num_experts: int
) -> Int[Array, "T K"]:
    """How many choices of one group come before each in the queue for the slots of its expert.

    position  token after token, the choices of a token side by side: none loses to a later token (causal)
    gate      highest gate first (after V-MoE's batch priority, arXiv 2106.05974, section 4, which orders
              tokens by their highest gate)
    rank      the first choices of all tokens, then their second ones, and so on (GShard, arXiv 2006.16668,
              algorithm 1; V-MoE's vanilla routing, its algorithm 1)

    Args:
      experts: unused choices name ``num_experts``; they stand in a queue of their own.
    """
    if priority == "rank":
        length, top_k = experts.shape
        return rank_by_sorting(experts.T.reshape(-1), num_experts).reshape(top_k, length).T
    flat = experts.reshape(-1)
    if priority == "gate":
        by_gate = jnp.argsort(-gates.reshape(-1), stable=True)
        rank = jnp.zeros_like(flat).at[by_gate].set(rank_by_sorting(flat[by_gate], num_experts))
    else:
        rank = rank_by_sorting(flat, num_experts)
    return rank.reshape(experts.shape)


def rank_by_sorting(experts: Int[Array, " A"], num_experts: int) -> Int[Array, " A"]:
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


def make_plan(assignment: TokenChoice, *, num_experts: int, kernel: str = "blocked") -> DispatchPlan:
    """Sorts the choices of all groups by expert.

    Args:
      assignment: with a leading group axis.
      kernel: with ``pallas`` choices are counted instead of sorted.
    """
    top_k = assignment.experts.shape[-1]
    if kernel == "pallas":
        of_tokens = assignment.experts.reshape(-1, top_k)
        rank, counts = rank_in_expert(of_tokens, num_experts=num_experts, kernel=kernel)
        choice, moves = sort_by_expert(of_tokens, rank, counts)
        return DispatchPlan(moves, choice, counts)
    experts = assignment.experts.reshape(-1)
    order = jnp.argsort(experts, stable=True).astype(jnp.int32)
    rows = jnp.arange(experts.shape[0], dtype=jnp.int32)
    inverse = jnp.zeros_like(experts).at[order].set(rows)
    inverse = jnp.where(experts < num_experts, inverse, experts.shape[0]).reshape(-1, top_k)
    return DispatchPlan(
        moves=Moves(order // top_k, inverse),
        choice=order,
        group_sizes=jnp.bincount(experts, length=num_experts + 1)[:-1].astype(jnp.int32),
    )


def apply_experts(
    x: Float[Array, "G T D"],
    assignment: Choice,
    weights: ExpertWeights,
    *,
    activation: Activation,
    kernel: str,
    room: int | None = None,
) -> Float[Array, "G T D"]:
    """Sends every token through its experts on this device: plan, permute, grouped FFN, combine.

    Choices no more than experts, as when decoding, need no plan: their experts' weights are gathered.

    Args:
      room: rows of experts that memory is kept for; where there may be more choices, see ``windows``.
    """
    num_experts, options = weights.w_in.shape[0], {"activation": activation, "kernel": kernel}
    if isinstance(assignment, ExpertChoice):
        return _apply_chosen(x, assignment, weights, **options)
    if kernel in ("blocked", "triton") and assignment.gates.size <= num_experts:
        return _apply_gathered(x, assignment, weights, activation=activation)
    if room is not None and room < assignment.gates.size:
        return windows.apply_experts(x, assignment, weights, windows.Experts(activation, kernel, room))
    plan = make_plan(assignment, num_experts=num_experts, kernel=kernel)
    tokens = x.reshape(-1, x.shape[-1])
    gates = assignment.gates.reshape(tokens.shape[0], -1)
    out = expert_mlp(tokens, gates, plan.choice, plan.moves, plan.group_sizes, weights, **options)
    return out.reshape(x.shape)


def _apply_chosen(
    x: Float[Array, "G T D"], assignment: ExpertChoice, weights: ExpertWeights, **options: Any
) -> Float[Array, "G T D"]:
    """The tokens that experts chose are sorted from the start; each may have any number of rows."""
    groups, length, width = x.shape
    num_experts, slots = assignment.tokens.shape[1:]
    first = length * jnp.arange(groups, dtype=jnp.int32)[:, None, None]
    source = jnp.moveaxis(assignment.tokens + first, 0, 1).reshape(-1)
    gates = jnp.moveaxis(assignment.gates, 0, 1).reshape(-1)
    sizes = jnp.full((num_experts,), groups * slots, jnp.int32)
    rows = grouped_mlp(x.reshape(-1, width)[source], sizes, weights, gates=gates, **options)
    total = jnp.zeros((groups * length, width), jnp.float32).at[source].add(rows.astype(jnp.float32))
    return total.astype(x.dtype).reshape(x.shape)


def _apply_gathered(
    x: Float[Array, "G T D"], assignment: TokenChoice, weights: ExpertWeights, *, activation: Activation
) -> Float[Array, "G T D"]:
    top_k = assignment.experts.shape[-1]
    rows = jnp.repeat(x.reshape(-1, x.shape[-1]), top_k, axis=0)
    rows = gathered_mlp(rows, assignment.experts.reshape(-1), weights, activation=activation)
    rows = rows.reshape(*assignment.experts.shape, -1).astype(jnp.float32)
    return jnp.einsum("GTKD,GTK->GTD", rows, assignment.gates).astype(x.dtype)
