"""Expert parallelism by all-to-all: every token travels to the shards of its experts, and back.

    x [G T D] --to slots--> [E S D] --all-to-all--> [E/N  N S  D] --experts--> --all-to-all--> [E S D]
      --gates--> [G T D]

Every expert has a fixed number of slots for each row of the batch: those of a layer with a capacity, which
alone can be exchanged so. What one device would drop is dropped here, and nothing else. Over N shards a
device sends 2 (N - 1) / N times its slots; ``exchange`` says when an all-gather moves less.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from vl_jax.kernels.activation import Activation
from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.kernels.grouped_matmul import grouped_mlp
from vl_jax.moe.dispatch import rank_by_sorting
from vl_jax.moe.routing import TokenChoice
from vl_jax.params import Leaf

PLAIN = "plain"  # what ``kernel="auto"`` stands for here


@struct.dataclass
class SlotPlan:
    """Which choice stands in which slot: slots are ordered by expert, then group, then rank."""

    choice: Leaf  # i32[R] index into the flattened choices; A where the slot is empty
    inverse: Leaf  # i32[T K] the slot of every choice, R where it has none; tokens of all groups


def make_slots(experts: Int[Array, "G T K"], *, num_experts: int, slots: int) -> SlotPlan:
    """Gives every choice the slot of its rank among its group's choices of that expert, or none."""
    groups, _, top_k = experts.shape
    rank = jax.vmap(lambda e: rank_by_sorting(e.reshape(-1), num_experts))(experts).reshape(experts.shape)
    group = jnp.arange(groups, dtype=jnp.int32)[:, None, None]
    size = num_experts * groups * slots
    used = (experts < num_experts) & (rank < slots)
    inverse = jnp.where(used, (experts * groups + group) * slots + rank, size)
    number = jnp.arange(experts.size, dtype=jnp.int32)
    choice = jnp.full((size,), experts.size, jnp.int32).at[inverse.reshape(-1)].set(number, mode="drop")
    return SlotPlan(choice, inverse.reshape(-1, top_k))


def _take(x: Float[Array, "T D"], index: Int[Array, " R"]) -> Float[Array, "R D"]:
    """Rows by index; zeros for the index past the last."""
    return x.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def to_slots(x: Float[Array, "T D"], plan: SlotPlan) -> Float[Array, "R D"]:
    """Copies every token to its slots. The transpose gathers, as the one of ``from_slots`` does."""
    return _take(x, plan.choice // plan.inverse.shape[1])


def _to_slots_forward(x: jax.Array, plan: SlotPlan) -> tuple[jax.Array, SlotPlan]:
    return to_slots(x, plan), plan


def _to_slots_backward(plan: SlotPlan, grad: jax.Array) -> tuple[jax.Array, None]:
    # One choice at a time: [T K D] would be K times the tokens.
    total = sum(_take(grad, index).astype(jnp.float32) for index in plan.inverse.T)
    return jnp.asarray(total, grad.dtype), None


to_slots.defvjp(_to_slots_forward, _to_slots_backward)


@jax.custom_vjp
def from_slots(rows: Float[Array, "R D"], gates: Float[Array, "T K"], plan: SlotPlan) -> Float[Array, "T D"]:
    """The gate-weighted sum of every token's slots, accumulated in float32."""
    pairs = zip(plan.inverse.T, gates.T, strict=True)
    total = sum(_take(rows, index).astype(jnp.float32) * gate[:, None] for index, gate in pairs)
    return jnp.asarray(total, rows.dtype)


def _from_slots_forward(rows: jax.Array, gates: jax.Array, plan: SlotPlan) -> tuple[jax.Array, tuple]:
    return from_slots(rows, gates, plan), (rows, gates, plan)


def _from_slots_backward(residual: tuple, grad: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    rows, gates, plan = residual
    weight = gates.reshape(-1).at[plan.choice].get(mode="fill", fill_value=0)
    wide = grad.astype(jnp.float32)
    grad_rows = _take(wide, plan.choice // gates.shape[1]) * weight[:, None]
    grad_gates = [jnp.sum(_take(rows, index).astype(jnp.float32) * wide, axis=-1) for index in plan.inverse.T]
    return grad_rows.astype(rows.dtype), jnp.stack(grad_gates, axis=-1).astype(gates.dtype), None


from_slots.defvjp(_from_slots_forward, _from_slots_backward)


def apply_experts(
    x: Float[Array, "G T D"],
    assignment: TokenChoice,
    weights: ExpertWeights,
    *,
    slots: int,
    activation: Activation,
    kernel: str = PLAIN,
    axis: str = "expert",
) -> Float[Array, "G T D"]:
    """The experts on all shards of a mesh axis, to be called inside ``shard_map``.

    Args:
      x: this shard's tokens.
      assignment: their choices, by the numbers of all experts.
      weights: this shard's experts.
      slots: per expert and group.
      kernel: of ``grouped_mlp``; or ``PLAIN``, products of XLA, for all experts have as many rows.
    """
    width, num_experts = x.shape[-1], weights.w_in.shape[0] * jax.lax.axis_size(axis)
    plan = make_slots(assignment.experts, num_experts=num_experts, slots=slots)
    rows = to_slots(x.reshape(-1, width), plan).reshape(num_experts, -1, width)
    rows = jax.lax.all_to_all(rows, axis, split_axis=0, concat_axis=1, tiled=True)
    if kernel == PLAIN:
        rows = _each_expert(rows, weights, activation)
    else:
        sizes = jnp.full(rows.shape[:1], rows.shape[1], jnp.int32)
        options: Any = {"activation": activation, "kernel": kernel}
        rows = grouped_mlp(rows.reshape(-1, width), sizes, weights, **options).reshape(rows.shape)
    rows = jax.lax.all_to_all(rows, axis, split_axis=1, concat_axis=0, tiled=True)
    gates = assignment.gates.reshape(-1, assignment.gates.shape[-1])
    return from_slots(rows.reshape(-1, width), gates, plan).reshape(x.shape)


def _each_expert(
    rows: Float[Array, "E R D"], weights: ExpertWeights, activation: Activation
) -> Float[Array, "E R D"]:
    """One expert after the other, hidden units recomputed in the backward pass: memory of one expert only."""

    @jax.checkpoint
    def one(rows: jax.Array, w: ExpertWeights) -> jax.Array:
        hidden = rows @ w.w_in.reshape(rows.shape[-1], -1)
        hidden = hidden if w.b_in is None else hidden + w.b_in.reshape(-1)
        out = activation(hidden) @ w.w_out
        return out if w.b_out is None else out + w.b_out

    return jax.lax.map(lambda pair: one(*pair), (rows, weights))
