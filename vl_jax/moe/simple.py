"""Routed experts that multiply by no matrix: they give nothing, the token itself, or a learned vector.

    experts of a layer    0 ... M-1 with matrices | zero | copy | constant      the router knows all E of them

    copy       x
    constant   a x + (1 - a) v,  a the softmax of two products with x

They are those of MoE++ (arXiv 2410.07348, section 3.1). A scheme sees E experts and need not know which are
which. They stay where the token is: only those with matrices have slots, exchanges and kernels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vl_jax.moe.assignment import Assignment, ExpertChoice, TokenChoice
from vl_jax.moe.config import GateConfig, SharedExpertsConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.nn.layers import named


def of_matrices(config: MoEConfig) -> MoEConfig:
    """The layer as those experts see it that have matrices."""
    if not config.simple.num:
        return config
    matrices = config.num_experts - config.simple.num
    return MoEConfig(
        num_experts=matrices,
        top_k=min(config.top_k, matrices),
        expert_dim=config.expert_dim,
        widths=config.widths,
        shared=SharedExpertsConfig(num=0),
        gates=GateConfig(),
        expert_bias=config.expert_bias,
        activation=config.activation,
        limit=config.limit,
        execution=config.execution,
    )


def chosen_matrices(assignment: Assignment, config: MoEConfig) -> Assignment:
    """What an assignment says of the experts with matrices: the others count as unused.

    Raises:
      ValueError: there are others, and slots or experts are mixed.
    """
    matrices = config.num_experts - config.simple.num
    if not config.simple.num:
        return assignment
    if isinstance(assignment, TokenChoice):
        own = assignment.experts < matrices
        return TokenChoice(
            jnp.where(own, assignment.experts, matrices), jnp.where(own, assignment.gates, 0.0)
        )
    if isinstance(assignment, ExpertChoice):
        return jax.tree.map(lambda a: a[:, :matrices], assignment)
    raise ValueError(
        f"scheme={config.scheme!r}: simple={dataclasses.astuple(config.simple)} experts cannot be mixed; "
        "they need a scheme whose tokens or experts choose"
    )


class SimpleExperts(nn.Module):
    """What tokens get of the experts without matrices."""

    config: MoEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "G T D"], assignment: Any) -> Float[Array, "G T D"]:
        simple, wide = self.config.simple, x.astype(jnp.float32)
        gates = _gates(assignment, x.shape[1], self.config)[..., simple.zero :]
        y = jnp.sum(gates[..., : simple.copy], axis=-1, keepdims=True) * wide
        if simple.constant:
            shape = (simple.constant, x.shape[-1])
            vectors = self.param("vectors", named(nn.initializers.normal(0.02), None, "embed"), shape)
            shares = self.param("shares", named(nn.initializers.zeros, None, "embed", None), (*shape, 2))
            both = jax.nn.softmax(jnp.einsum("GTD,CDS->GTCS", wide, shares.astype(jnp.float32)), axis=-1)
            both = both * gates[..., simple.copy :, None]
            y += jnp.sum(both[..., 0], axis=-1, keepdims=True) * wide
            y += jnp.einsum("GTC,CD->GTD", both[..., 1], vectors.astype(jnp.float32))
        return y.astype(x.dtype)


def _gates(assignment: Any, length: int, config: MoEConfig) -> Float[Array, "G T S"]:
    """The gate of every expert without matrices, 0 where it is not chosen."""
    matrices = config.num_experts - config.simple.num
    if isinstance(assignment, TokenChoice):
        which = jax.nn.one_hot(assignment.experts - matrices, config.simple.num)
        return jnp.einsum("GTKS,GTK->GTS", which, assignment.gates)
    tokens = jax.nn.one_hot(assignment.tokens[:, matrices:], length)
    return jnp.einsum("GSCT,GSC->GTS", tokens, assignment.gates[:, matrices:])
