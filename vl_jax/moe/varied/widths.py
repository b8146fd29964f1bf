"""Experts of different hidden widths in one layer: equal parts of them, each with a width of its own.

    widths=(64, 128), 4 experts    0 1 | 2 3    experts 0 and 1 are 64 wide, 2 and 3 are 128

One router knows all of them, and a scheme need not know which are which. Every part has matrices, plan and
exchange of its own, and a token's result is the sum over parts. After Heterogeneous Mixture of Experts (HMoE,
arXiv 2408.10681); ``balance.by_width`` is its parameter penalty: load counts by width.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from math import ceil

import jax.numpy as jnp
from jaxtyping import Array, Float

from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.moe import dispatch, exchange
from vl_jax.moe.assignment import Assignment, Merge
from vl_jax.moe.config import BalanceConfig, ExpertGroupsConfig, GateConfig, SharedExpertsConfig
from vl_jax.moe.routing import MoEConfig


def parts_of(config: MoEConfig) -> tuple[MoEConfig, ...]:
    """The layer as each part of its experts sees it.

    Args:
      config: of experts that all have matrices, see ``simple.of_matrices``.
    """
    if not config.widths:
        return (config,)
    experts = config.num_experts // len(config.widths)
    mean = Fraction(config.top_k * experts, config.num_experts)
    return tuple(
        dataclasses.replace(
            config,
            scheme="top_k",
            options=(),
            num_experts=experts,
            # With slots, at least as many as were given: choices without one are out already.
            top_k=min(config.top_k, experts) if not config.is_dropless else max(ceil(mean), 1),
            expert_dim=width,
            widths=(),
            shared=SharedExpertsConfig(num=0),
            groups=ExpertGroupsConfig(),
            gates=GateConfig(),
            balance=BalanceConfig(),
        )
        for width in config.widths
    )


def names_of(config: MoEConfig) -> tuple[str, ...]:
    """What stands behind the names of the parameters of every part."""
    return tuple(f"_{part}" for part in range(len(config.widths))) or ("",)


def apply_experts(
    x: Float[Array, "G T D"],
    assignment: Assignment,
    weights: ExpertWeights | tuple[ExpertWeights, ...],
    config: MoEConfig,
) -> Float[Array, "G T D"]:
    """The routed experts, over the current mesh.

    Args:
      weights: of every part, where experts differ in width.

    Raises:
      ValueError: weights of experts are to be mixed, and have several widths; or see ``exchange``.
    """
    if not isinstance(weights, tuple):
        return exchange.apply_experts(x, assignment, weights, config)
    if isinstance(assignment, Merge):
        raise ValueError(
            f"scheme={config.scheme!r} mixes the weights of experts; widths={config.widths} cannot be mixed"
        )
    total = jnp.zeros(x.shape, jnp.float32)
    for number, (part, own) in enumerate(zip(parts_of(config), weights, strict=True)):
        mine = dispatch.own_experts(assignment, part.num_experts, jnp.int32(number))
        total = total + exchange.apply_experts(x, mine, own, part).astype(jnp.float32)
    return total.astype(x.dtype)
