"""Assignments that move no token: means of tokens go to experts, or means of experts to tokens.

Soft    x [T D] --dispatch--> slots [E S D] --expert e on its S slots--> [E S D] --combine--> [T D]
Merge   weights [E D X F] --mean--> one expert per group [D X F] --on all tokens of the group--> [T D]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vl_jax.kernels.activation import Activation
from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.kernels.grouped_matmul import grouped_mlp
from vl_jax.moe.assignment import Merge, Soft


def apply_soft(
    x: Float[Array, "G T D"],
    assignment: Soft,
    weights: ExpertWeights,
    *,
    activation: Activation,
    kernel: str,
) -> Float[Array, "G T D"]:
    """Every expert on its slots, which are rows sorted by expert from the start."""
    groups, _, num_experts, slots = assignment.dispatch.shape
    rows = jnp.einsum("GTES,GTD->EGSD", assignment.dispatch, x.astype(jnp.float32)).astype(x.dtype)
    sizes = jnp.full((num_experts,), groups * slots, jnp.int32)
    rows = grouped_mlp(
        rows.reshape(-1, x.shape[-1]), sizes, weights, activation=activation, kernel=kernel
    ).reshape(rows.shape)
    return jnp.einsum("GTES,EGSD->GTD", assignment.combine, rows.astype(jnp.float32)).astype(x.dtype)


def merge_weights(assignment: Merge, weights: ExpertWeights) -> ExpertWeights:
    """One expert per group: its parameters are the group's mean over experts, in float32."""

    def mean(w: jax.Array) -> jax.Array:
        return jnp.tensordot(assignment.weights, w.astype(jnp.float32), axes=1)

    return jax.tree.map(mean, weights)


def apply_merged(
    x: Float[Array, "G T D"], merged: ExpertWeights, *, activation: Activation
) -> Float[Array, "G T D"]:
    """Every group's tokens through the group's own expert."""
    hidden = jnp.einsum("GTD,GDXF->GTXF", x, merged.w_in)
    if merged.b_in is not None:
        hidden = hidden + merged.b_in[:, None]
    out = jnp.einsum("GTF,GFD->GTD", activation(hidden.reshape(*x.shape[:2], -1)), merged.w_out)
    return out if merged.b_out is None else out + merged.b_out[:, None]
