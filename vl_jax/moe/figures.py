"""What a layer tells of its router beside load: sums over tokens, and what is logged of them.

entropy       of a token's probabilities, in nats
margin        the lowest probability among its experts, less the highest among the others
gate mass     what its gates sum to, of choices that found a slot
experts       how many it has: the mean, and the deviation over tokens
importance    shares of the experts in the probabilities, by modality
co-activation the share of tokens that have both of two experts; for up to ``MOST_PAIRED`` experts
loss_NAME     each loss of the layer, weighted as it counts
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vl_jax.moe.assignment import (
    Assignment,
    ExpertChoice,
    Losses,
    RoutingContext,
    RoutingStats,
    TokenChoice,
    weights_of,
)

MOST_PAIRED = 16  # experts of which all pairs are logged; ``inspect routing`` counts those of any number
LOSS = "loss_"  # begins the names of losses


def count(
    assignment: Assignment,
    dropped: Bool[Array, "G T K"],
    scores: Float[Array, "G T E"],
    context: RoutingContext,
) -> dict[str, jax.Array]:
    """The sums of one layer.

    Args:
      assignment: what the scheme decided, before capacity.
      dropped: choices that found no slot.
      scores: probabilities of the experts.
    """
    valid, num_experts = context.valid, scores.shape[-1]
    share = scores / jnp.maximum(jnp.sum(scores, axis=-1, keepdims=True), 1e-30)
    log = jnp.log(jnp.where(share > 0, share, 1.0))
    found = {"entropy": -jnp.sum(jnp.where(valid[..., None], share * log, 0.0))}
    if isinstance(assignment, TokenChoice):
        found["mass"] = jnp.sum(jnp.where(dropped, 0.0, assignment.gates))
        has = jax.nn.one_hot(assignment.experts, num_experts, dtype=bool).any(axis=2)
        lowest = jnp.min(jnp.where(has, share, jnp.inf), axis=-1)
        others = jnp.max(jnp.where(has, -jnp.inf, share), axis=-1)
        both = jnp.isfinite(lowest) & jnp.isfinite(others)
        found["margin"] = jnp.sum(jnp.where(both, lowest - others, 0.0))
        found["with_margin"] = jnp.sum(both, dtype=jnp.float32)
    else:
        weights = weights_of(assignment, valid, num_experts)
        found["mass"], has = jnp.sum(weights), weights > 0
    if isinstance(assignment, TokenChoice | ExpertChoice):
        number = jnp.sum(has, axis=-1, dtype=jnp.float32)
        found |= {"experts": jnp.sum(number), "experts_squared": jnp.sum(number**2)}
        if num_experts <= MOST_PAIRED:
            has = has.astype(jnp.float32)
            found["together"] = jnp.einsum("GTE,GTF->EF", has, has)
    return found


def of_losses(losses: Losses, valid: Bool[Array, "G T"]) -> dict[str, jax.Array]:
    """Losses, which are means over groups, as sums, and the number of groups with any token."""
    sums = {f"{LOSS}{name}": valid.shape[0] * value for name, value in losses.items()}
    return {**sums, "groups": jnp.sum(jnp.any(valid, axis=1), dtype=jnp.float32)}


def summarize(stats: RoutingStats) -> dict[str, jax.Array]:
    """What is logged of layers, from statistics stacked over them [L ...]."""
    sums, result = stats.figures, {}
    tokens = jnp.maximum(jnp.sum(stats.tokens, axis=-1), 1).astype(jnp.float32)
    importance = stats.importance.astype(jnp.float32)
    result["importance"] = importance / jnp.maximum(jnp.sum(importance, axis=-1, keepdims=True), 1e-30)
    if not sums:
        return result
    result |= {"entropy": sums["entropy"] / tokens, "gate_mass": sums["mass"] / tokens}
    if "margin" in sums:
        result["margin"] = sums["margin"] / jnp.maximum(sums["with_margin"], 1.0)
    if "experts" in sums:
        mean = sums["experts"] / tokens
        spread = jnp.maximum(sums["experts_squared"] / tokens - mean**2, 0.0)
        result |= {"experts": mean, "experts_deviation": jnp.sqrt(spread)}
    if "together" in sums:
        result["co_activation"] = sums["together"] / tokens[:, None, None]
    groups = jnp.maximum(sums.get("groups", jnp.ones_like(tokens)), 1.0)
    return result | {name: value / groups for name, value in sums.items() if name.startswith(LOSS)}
