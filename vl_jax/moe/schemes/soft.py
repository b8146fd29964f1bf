"""Schemes without choices: tokens are mixed into slots, or experts into one. Neither is causal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vl_jax.moe import losses as losses_lib
from vl_jax.moe.assignment import Losses, Merge, RoutingContext, Soft, State
from vl_jax.moe.routing import MASKED, MoEConfig, Scheme


def soft_moe(
    logits: Float[Array, "T N"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[Soft, Losses]:
    """Slots are softmax means of tokens, tokens those of slots' outputs (arXiv 2308.00951, section 2.1).

    The router has E * ``slots`` columns, one for every slot. The paper normalises tokens and columns to
    length one; here tokens come from an RMSNorm, and columns are as they are.
    """
    slots, valid = config.option("slots"), context.valid[:, None]
    if context.excluded is not None:
        logits = jnp.where(jnp.repeat(context.excluded, slots, axis=-1), MASKED, logits)
    dispatch = jax.nn.softmax(jnp.where(valid, logits, jnp.finfo(logits.dtype).min), axis=0)
    combine = jax.nn.softmax(logits, axis=-1) * config.gates.scale
    by_expert = (logits.shape[0], config.num_experts, slots)
    assignment = Soft(
        jnp.where(valid, dispatch, 0.0).reshape(by_expert), jnp.where(valid, combine, 0.0).reshape(by_expert)
    )
    return assignment, losses_lib.z_loss(logits, context, config)


def smear(
    logits: Float[Array, "T E"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[Merge, Losses]:
    """One expert for the group: the mean by the mean router's softmax (arXiv 2306.03745, section 3)."""
    weights = jax.nn.softmax(losses_lib.mean(logits, context.valid)) * config.gates.scale
    return Merge(weights), losses_lib.z_loss(logits, context, config)


def _slot_scores(logits: jax.Array, config: MoEConfig) -> jax.Array:
    scores = jax.nn.softmax(logits, axis=-1)
    return jnp.sum(scores.reshape(*scores.shape[:-1], config.num_experts, -1), axis=-1)


def _validate(config: MoEConfig) -> None:
    if not config.is_dropless or config.limit.priority != "position":
        raise ValueError(f"limit has no meaning for scheme={config.scheme!r}: nothing is dropped")


def _validate_soft(config: MoEConfig) -> None:
    _validate(config)
    if config.option("slots") < 1:
        raise ValueError(f"scheme={config.scheme!r}: slots={config.option('slots')} must be >= 1")


SOFT_MOE = Scheme(
    soft_moe,
    causal=False,
    defaults={"slots": 1},
    columns=lambda config: config.num_experts * config.option("slots"),
    scores=_slot_scores,
    validate=_validate_soft,
    by_expert=False,
)
SMEAR = Scheme(smear, causal=False, validate=_validate)
