"""Schemes in which the number of experts varies with the token. Unused choices cost no expert any work.

``top_k`` is then the mean number that is aimed for, and the K of ``limit.factor``.
"""

from __future__ import annotations

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vl_jax.moe import losses as losses_lib
from vl_jax.moe.assignment import Losses, RoutingContext, RoutingStats, State, TokenChoice
from vl_jax.moe.routing import MoEConfig, Scheme, best, choose, gates_of
from vl_jax.moe.schemes.token_choice import scores_of, shares
from vl_jax.moe.slots import ceil_times


def top_p(
    logits: Float[Array, "T E"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[TokenChoice, Losses]:
    """The fewest experts whose probabilities reach ``threshold`` together (arXiv 2403.07652).

    The entropy of the probabilities is a loss there too, or all of them would grow equal and all experts
    be used.
    """
    scores = jax.nn.softmax(logits, axis=-1)
    experts = best(scores, _limit(config), context)
    gates = gates_of(scores, experts)
    before = jnp.cumsum(gates, axis=-1) - gates
    used = (before < config.option("threshold")) | (context.routes is not None)
    experts = jnp.where(used, experts, config.num_experts)
    losses = losses_lib.token_losses(logits, scores, experts, context, state, config, choices=1.0)
    if weight := config.option("entropy_weight"):
        losses["entropy"] = weight * losses_lib.mean(losses_lib.entropy(scores), context.valid)
    return choose(experts, jnp.where(used, gates, 0.0), context, config), losses


def remoe(
    logits: Float[Array, "T E"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[TokenChoice, Losses]:
    """Gates are ``ReLU(logits)``: experts above zero, with no jump anywhere (arXiv 2412.14711, section 3).

    An L1 loss of adaptive weight holds the mean number of experts at top_k; each gate weighs in it as much as
    its expert is in use. The published weight follows the mean over layers, this one its layer.
    """
    gates = jax.nn.relu(logits)
    active = (gates > 0).astype(jnp.float32)
    share = jax.lax.stop_gradient(losses_lib.mean(active, context.valid)) * config.num_experts / config.top_k
    penalty = losses_lib.mean(jnp.sum(gates * share, axis=-1), context.valid)
    losses = losses_lib.z_loss(logits, context, config)
    return _positive(gates, context, config), {**losses, "l1": state["l1_weight"] * penalty}


def init_l1(config: MoEConfig) -> State:
    """The L1 weight before the first step."""
    return {"l1_weight": jnp.asarray(config.option("initial_l1"), jnp.float32)}


def update_l1(state: State, stats: RoutingStats, config: MoEConfig) -> State:
    """``weight *= rate ** sign(active experts - top_k)``, of means over everything the step saw."""
    tokens = jnp.maximum(jnp.sum(stats.tokens), 1).astype(jnp.float32)
    active = jnp.sum(stats.load).astype(jnp.float32) / tokens
    factor = jnp.asarray(config.option("l1_rate"), jnp.float32) ** jnp.sign(active - config.top_k)
    return {**state, "l1_weight": state["l1_weight"] * factor}


def expert_threshold(
    logits: Float[Array, "T E"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[TokenChoice, Losses]:
    """Every expert takes the tokens that score above its threshold (arXiv 2603.11535): causal expert choice.

    The threshold is a moving average of what the last of the top_k * T / E tokens scores that expert choice
    would take. That average is over groups here, over the whole batch at once in the paper.
    """
    scores = scores_of(logits, config, "softmax")
    gates = jnp.where(scores > state["threshold"], scores, 0.0)
    return _positive(gates, context, config), losses_lib.z_loss(logits, context, config)


def init_threshold(config: MoEConfig) -> State:
    """Every expert takes what scores above the mean."""
    return {"threshold": jnp.full((config.num_experts,), 1 / config.num_experts, jnp.float32)}


def measure_cutoff(
    logits: Float[Array, "T E"], context: RoutingContext, config: MoEConfig
) -> dict[str, jax.Array]:
    """For every expert the lowest score it would take under expert choice; and that this is one group."""
    scores = jnp.where(context.valid[:, None], scores_of(logits, config, "softmax"), -1.0)
    tokens, share = jnp.sum(context.valid, dtype=jnp.int32), Fraction(config.top_k, config.num_experts)
    wanted = ceil_times(tokens, share, most=context.valid.size)
    lowest = jnp.sort(scores, axis=0, descending=True)[jnp.maximum(wanted - 1, 0)]
    some = (tokens > 0).astype(jnp.float32)
    return {"cutoff": some * lowest, "groups": some}


def update_threshold(state: State, stats: RoutingStats, config: MoEConfig) -> State:
    """``threshold = decay * threshold + (1 - decay) * mean cutoff``."""
    cutoff, groups = stats.measured["cutoff"], stats.measured["groups"]
    decay = jnp.where(groups > 0, config.option("decay"), 1.0)
    mean = cutoff / jnp.maximum(groups, 1.0)
    return {**state, "threshold": decay * state["threshold"] + (1 - decay) * mean}


def null_experts(
    logits: Float[Array, "T N"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[TokenChoice, Losses]:
    """The best K of E experts and ``count`` more that do nothing: a token may use fewer than K.

    They are the zero experts of MoE++ (arXiv 2410.07348). In the balance loss they weigh ``null_weight``
    (section 3 there): less than one lets them take more. Copy and constant experts are not here. Given routes
    say of no expert which it was; in the losses it counts as the first of them.
    """
    scores = jax.nn.softmax(logits, axis=-1)
    experts = best(scores, config.top_k, context)
    gates = gates_of(scores, experts)
    losses = losses_lib.z_loss(logits, context, config)
    if config.balance.weight:
        real = jnp.arange(logits.shape[1]) < config.num_experts
        weighted = scores * jnp.where(real, 1.0, config.option("null_weight"))
        loss = losses_lib.balance_loss(weighted, experts, context.valid, scope=config.balance.scope)
        losses["balance"] = config.balance.weight * loss
    return choose(experts, gates, context, config), losses


def dselect_k(
    logits: Float[Array, "T N"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[TokenChoice, Losses]:
    """K selectors, each a binary code of smooth steps, weighed by a softmax (arXiv 2106.03760, section 3).

    Columns: log2(E) bits for each selector, then K weights. Until its bits are sure, a selector is spread
    over several experts, all of which work. The mean entropy of selectors is a loss. A selector whose expert
    is excluded has no second choice: its share is gone.
    """
    bits = _code_bits(config)
    codes = logits[:, : config.top_k * bits].reshape(-1, config.top_k, bits)
    weights = jax.nn.softmax(logits[:, config.top_k * bits :], axis=-1)
    steps = smooth_step(codes, config.option("gamma"))[:, :, None]  # [T K 1 bits]
    wanted = (jnp.arange(config.num_experts)[:, None] >> jnp.arange(bits)) & 1
    selectors = jnp.prod(jnp.where(wanted == 1, steps, 1 - steps), axis=-1)
    losses: Losses = {}
    if weight := config.option("entropy_weight"):
        total = jnp.sum(losses_lib.entropy(selectors), axis=-1)
        losses["entropy"] = weight * losses_lib.mean(total, context.valid)
    return _positive(jnp.einsum("TKE,TK->TE", selectors, weights), context, config), losses


def smooth_step(x: Float[Array, "*T"], gamma: float) -> Float[Array, "*T"]:
    """0 up to -gamma/2, 1 from gamma/2 on, and the cubic with no slope at either end between."""
    x = jnp.clip(x, -gamma / 2, gamma / 2)
    return -2 / gamma**3 * x**3 + 3 / (2 * gamma) * x + 0.5


def _dselect_scores(logits: jax.Array, config: MoEConfig) -> jax.Array:
    """Probabilities of experts if bits were drawn, each by the sigmoid of its logit."""
    bits = _code_bits(config)
    codes = logits[..., : config.top_k * bits].reshape(*logits.shape[:-1], config.top_k, 1, bits)
    wanted = (jnp.arange(config.num_experts)[:, None] >> jnp.arange(bits)) & 1
    chances = jnp.prod(jax.nn.sigmoid(jnp.where(wanted == 1, codes, -codes)), axis=-1)
    weights = jax.nn.softmax(logits[..., config.top_k * bits :], axis=-1)
    return jnp.einsum("...KE,...K->...E", chances, weights)


def _code_bits(config: MoEConfig) -> int:
    return int(math.log2(config.num_experts))


def _limit(config: MoEConfig) -> int:
    """The most experts of a token."""
    return min(config.option("limit") or config.num_experts, config.num_experts)


def _positive(gates: Float[Array, "T E"], context: RoutingContext, config: MoEConfig) -> TokenChoice:
    """The experts with a gate above zero, the highest of them if there is a limit."""
    experts = best(gates, _limit(config), context)
    gates = gates_of(gates, experts)
    used = (gates > 0) | (context.routes is not None)
    return choose(jnp.where(used, experts, config.num_experts), gates, context, config)


def _validate_null(config: MoEConfig) -> None:
    if config.option("count") < 1:
        raise ValueError(f"scheme={config.scheme!r}: count={config.option('count')} must be >= 1")
    if config.balance.scope == "step":
        raise ValueError(f"scheme={config.scheme!r}: balance.scope='step' knows no load of null experts")


def _validate_code(config: MoEConfig) -> None:
    if config.num_experts < 2 or config.num_experts & (config.num_experts - 1):
        raise ValueError(f"scheme={config.scheme!r}: num_experts={config.num_experts} must be a power of two")


TOP_P = Scheme(top_p, defaults={"threshold": 0.4, "entropy_weight": 1e-4, "limit": 0}, replays=True)
REMOE = Scheme(
    remoe,
    init_l1,
    update_l1,
    defaults={"initial_l1": 1e-8, "l1_rate": 1.2, "limit": 0},
    scores=lambda logits, config: shares(jax.nn.relu(logits)),
    replays=True,
)
EXPERT_THRESHOLD = Scheme(
    expert_threshold,
    init_threshold,
    update_threshold,
    defaults={"decay": 0.99, "limit": 0},
    scores=lambda logits, config: shares(scores_of(logits, config, "softmax")),
    measure=measure_cutoff,
    replays=True,
)
NULL_EXPERTS = Scheme(
    null_experts,
    defaults={"count": 4, "null_weight": 0.75},
    columns=lambda config: config.num_experts + config.option("count"),
    scores=lambda logits, config: jax.nn.softmax(logits, axis=-1)[..., : config.num_experts],
    validate=_validate_null,
    replays=True,
)
DSELECT_K = Scheme(
    dselect_k,
    defaults={"gamma": 1.0, "entropy_weight": 1e-3, "limit": 0},
    columns=lambda config: config.top_k * (_code_bits(config) + 1),
    scores=_dselect_scores,
    validate=_validate_code,
    replays=True,
    by_expert=False,
)
