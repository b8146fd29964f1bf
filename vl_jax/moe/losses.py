"""Auxiliary losses of routers. Those of one group may sum over all groups, by the axis that ``route`` names.

``MoEConfig.balance.scope`` says over which tokens load is to be even. ``sequence``: the group's own.
``batch``: those of the batch or micro-batch at hand. ``step``: those of the whole previous optimiser step,
however it was split into micro-batches, whose shares the routing state keeps: the load carries no gradient,
and is known before the step begins (global-batch balance, arXiv 2501.11873, one step late).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vl_jax.batch import MODALITIES
from vl_jax.moe.assignment import GROUPS, Losses, RoutingContext, State
from vl_jax.moe.routing import MoEConfig

# Options of the entropy losses: a weight per modality, and the experts that each is to use at least.
ENTROPY_OPTIONS = {
    **{f"{modality}_{scope}_entropy": 0.0 for modality in MODALITIES for scope in ("local", "global")},
    "min_experts": 1.0,
}


def token_losses(
    logits: Float[Array, "T N"],
    scores: Float[Array, "T E"],
    experts: Int[Array, "T K"],
    context: RoutingContext,
    state: State,
    config: MoEConfig,
    *,
    choices: float | None = None,
) -> Losses:
    """Balance and z-loss of a token-choice scheme, weighted as configured.

    Args:
      choices: mean choices per token where that is not K, as with dynamic k.
    """
    losses = z_loss(logits, context, config)
    if not config.balance.weight:
        return losses
    if config.balance.scope == "step":
        score = mean(scores, context.valid)
        loss = config.num_experts * jnp.sum(state["share"] * score * costs_of(config))
    else:
        costs, scope = costs_of(config), config.balance.scope
        loss = balance_loss(scores, experts, context.valid, scope=scope, choices=choices, costs=costs)
    return {**losses, "balance": config.balance.weight * loss}


def costs_of(config: MoEConfig) -> Float[Array, " E"] | float:
    """What a choice of every expert counts for load: 1, or with ``by_width`` its width over the mean width.

    Those without matrices count as much as the narrowest: else all tokens would be drawn to them.
    """
    if not config.balance.by_width:
        return 1.0
    each = (config.num_experts - config.simple.num) // len(config.widths)
    widths = [width for width in config.widths for _ in range(each)]
    widths += [min(widths)] * config.simple.num
    return jnp.array(widths, jnp.float32) * (len(widths) / sum(widths))


def balance_loss(
    scores: Float[Array, "T E"],
    experts: Int[Array, "T K"],
    valid: Bool[Array, " T"],
    *,
    scope: str,
    choices: float | None = None,
    costs: Float[Array, " E"] | float = 1.0,
) -> Float[Array, ""]:
    """``sum_e f_e P_e``, f_e = E / (K T) * choices of e, P_e = mean score of e (DeepSeek-V2, eq. 23-25).

    Args:
      scope: whether f and P are those of the ``sequence`` (one group), or of the whole ``batch``.
      choices: what stands for K.
      costs: what a choice counts for, see ``costs_of``.
    """
    num_experts, top_k = scores.shape[-1], experts.shape[-1]
    chosen = jax.nn.one_hot(experts, num_experts, dtype=jnp.float32).sum(axis=1)
    mask = valid[:, None].astype(jnp.float32)
    load, score, tokens = jnp.sum(chosen * mask, axis=0), jnp.sum(scores * mask, axis=0), jnp.sum(mask)
    load, score, tokens = _over(scope, (load, score, tokens))
    tokens = jnp.maximum(tokens, 1.0)
    return jnp.sum(load * score * costs) / tokens**2 * (num_experts / (choices or top_k))


def z_loss(logits: Float[Array, "T N"], context: RoutingContext, config: MoEConfig) -> Losses:
    """The mean square of the logits' logsumexp (ST-MoE, arXiv 2202.08906, eq. 5)."""
    if not config.balance.z_weight:
        return {}
    squared = jax.nn.logsumexp(logits, axis=-1) ** 2
    return {"z": config.balance.z_weight * mean(squared, context.valid)}


def variation_loss(values: Float[Array, "T E"], valid: Bool[Array, " T"], *, scope: str) -> Float[Array, ""]:
    """The squared coefficient of variation over experts of the sum over tokens.

    Of gates it is the importance loss (arXiv 1701.06538, eq. 6-7), of the chances to be chosen the load loss
    (appendix A there).
    """
    total = _over(scope, jnp.sum(jnp.where(valid[:, None], values, 0.0), axis=0))
    return jnp.var(total) / (jnp.mean(total) ** 2 + 1e-10)


def entropy_losses(scores: Float[Array, "T E"], context: RoutingContext, config: MoEConfig) -> Losses:
    """The entropy losses of LIMoE for every modality with a weight (arXiv 2206.02770, section 2).

    ``local`` is the mean entropy of a token's probabilities, so that the router is sure of each; ``global``
    is ``max(0, log(min_experts) - entropy of their mean)``, so that a modality uses that many experts.
    """
    scope = "sequence" if config.balance.scope == "sequence" else "batch"
    losses: Losses = {}
    for index, modality in enumerate(MODALITIES):
        weights = {s: config.option(f"{modality}_{s}_entropy") for s in ("local", "global")}
        if not any(weights.values()):
            continue
        mask = (context.valid & (context.modality == index)).astype(jnp.float32)
        sums = jnp.sum(mask), mask @ entropy(scores), mask @ scores
        tokens, local, score = _over(scope, sums)
        present, tokens = tokens > 0, jnp.maximum(tokens, 1.0)
        missing = jnp.log(config.option("min_experts")) - entropy(score / tokens)
        values = {"local": local / tokens, "global": jnp.where(present, jnp.maximum(missing, 0.0), 0.0)}
        losses |= {f"{modality}_{s}_entropy": w * values[s] for s, w in weights.items() if w}
    return losses


def entropy(probabilities: Float[Array, "*T E"]) -> Float[Array, "*T"]:
    """``-sum p log p``, in nats; a probability of zero adds nothing, also to the gradient."""
    positive = probabilities > 0
    log = jnp.log(jnp.where(positive, probabilities, 1.0))
    return -jnp.sum(jnp.where(positive, probabilities * log, 0.0), axis=-1)


def _over(scope: str, sums):
    """Sums of one group, or of all of them."""
    return sums if scope == "sequence" else jax.lax.psum(sums, GROUPS)


def mean(values: Float[Array, "T *N"], valid: Bool[Array, " T"]) -> Float[Array, "*N"]:
    """The mean over valid tokens; zero without any."""
    mask = valid.reshape(valid.shape + (1,) * (values.ndim - 1))
    total = jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 1.0)
    return jnp.sum(jnp.where(mask, values, 0.0), axis=0) / total
