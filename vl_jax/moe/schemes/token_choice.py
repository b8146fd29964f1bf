"""Schemes in which every token takes its K best experts: they differ in scores, noise, bias and losses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vl_jax.batch import MODALITIES
from vl_jax.moe import losses as losses_lib
from vl_jax.moe.assignment import Losses, RoutingContext, RoutingStats, State, TokenChoice
from vl_jax.moe.routing import MASKED, MoEConfig, Scheme, best, choose, gates_of


def top_k(
    logits: Float[Array, "T E"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[TokenChoice, Losses]:
    """The best experts by score (DeepSeekMoE, arXiv 2401.06066), of the best groups if there are several.

    A group is as good as its best expert (DeepSeek-V2, section 2.2.2). Options weigh the entropy losses of
    LIMoE (arXiv 2206.02770), for each modality.
    """
    scores = scores_of(logits, config, "softmax")
    experts = best(within_groups(scores, config, by=1), config.top_k, context)
    gates = gates_of(scores, experts)
    losses = losses_lib.token_losses(logits, scores, experts, context, state, config)
    losses |= losses_lib.entropy_losses(scores, context, config)
    return choose(experts, gates, context, config), losses


def top_k_softmax(
    logits: Float[Array, "T E"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[TokenChoice, Losses]:
    """The best experts by logit; gates are the softmax over the chosen logits alone (GPT-OSS)."""
    experts = best(within_groups(logits, config, by=1), config.top_k, context)
    gates = jax.nn.softmax(gates_of(logits, experts, unused=MASKED), axis=-1)
    scores = jax.nn.softmax(logits, axis=-1)
    losses = losses_lib.token_losses(logits, scores, experts, context, state, config)
    return choose(experts, gates, context, config), losses


def switch(
    logits: Float[Array, "T E"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[TokenChoice, Losses]:
    """The best expert alone, its output times its probability (arXiv 2101.03961, eq. 1-6).

    ``limit.factor`` gives the slots of its eq. 3. The published code also jitters what the router reads,
    which a function of logits cannot.
    """
    return top_k(logits, context, state, config)


def gshard(
    logits: Float[Array, "T E"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[TokenChoice, Losses]:
    """The two best experts; in training the second one at random (arXiv 2006.16668, algorithm 1).

    It stays with probability ``min(1, 2 g_2)``, of gates that sum to one. The balance loss counts first
    choices only. The paper gives slots to all first choices before any second one, as does
    ``limit.priority="rank"``; by default a token's two choices stand side by side in the queue.
    """
    scores = jax.nn.softmax(logits, axis=-1)
    experts = best(scores, 2, context)
    gates = gates_of(scores, experts)
    gates = gates / jnp.maximum(jnp.sum(gates, axis=-1, keepdims=True), 1e-20)
    losses = losses_lib.token_losses(logits, scores, experts[:, :1], context, state, config)
    if context.rng is not None and context.routes is None:
        kept = 2 * gates[:, 1] > jax.random.uniform(context.rng, gates.shape[:1])
        experts = experts.at[:, 1].set(jnp.where(kept, experts[:, 1], config.num_experts))
        gates = gates.at[:, 1].set(jnp.where(kept, gates[:, 1], 0.0))
    used = context.valid[:, None]
    experts = jnp.where(used, experts, config.num_experts)
    return TokenChoice(experts, jnp.where(used, gates * config.gates.scale, 0.0)), losses


def noisy_top_k(
    logits: Float[Array, "T N"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[TokenChoice, Losses]:
    """Logits with learned noise in training, the softmax over the best K (arXiv 1701.06538, eq. 3-5).

    Half of the router's columns give the noise's standard deviation. Losses: the squared variation of
    importance, and of the load expected over the noise of one expert (appendix A, eq. 8-11).
    """
    clean, raw = jnp.split(logits, 2, axis=-1)
    deviation = jax.nn.softplus(raw) + 1e-2
    noisy = clean
    if context.rng is not None:
        noisy = clean + jax.random.normal(context.rng, clean.shape) * deviation
    experts = best(noisy, config.top_k, context)
    gates = jax.nn.softmax(gates_of(noisy, experts, unused=MASKED), axis=-1)
    dense = jnp.sum(jax.nn.one_hot(experts, config.num_experts) * gates[..., None], axis=1)
    chances = jax.scipy.stats.norm.cdf((clean - _to_beat(noisy, config.top_k)) / deviation)
    losses = losses_lib.z_loss(clean, context, config)
    losses |= _variation_losses(dense, chances, context, config)
    return choose(experts, gates, context, config), losses


def v_moe(
    logits: Float[Array, "T E"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[TokenChoice, Losses]:
    """Probabilities of logits with noise of 1/E, their best K as they are (arXiv 2106.05974, section 2).

    ``limit.priority="rank"`` gives slots out as its vanilla routing, ``"gate"`` much as its batch priority.
    Losses: half importance, half load (appendix A there), where the load is the chance to be among the best K
    with new noise.
    """
    deviation = 1.0 / config.num_experts
    noisy = logits
    if context.rng is not None:
        noisy = logits + jax.random.normal(context.rng, logits.shape) * deviation
    noisy_scores = jax.nn.softmax(noisy, axis=-1)
    experts = best(noisy_scores, config.top_k, context)
    gates, lowest = gates_of(noisy_scores, experts), gates_of(noisy, experts[:, -1:])
    chances = jax.scipy.stats.norm.cdf((logits - lowest) / deviation)
    scores = jax.nn.softmax(logits, axis=-1)
    losses = losses_lib.z_loss(logits, context, config)
    losses |= _variation_losses(scores, chances, context, config)
    losses |= losses_lib.entropy_losses(scores, context, config)
    return choose(experts, gates, context, config), losses


def sinkhorn(
    logits: Float[Array, "T E"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[TokenChoice, Losses]:
    """In training the best experts of a balanced transport plan of the group, else those by score.

    S-BASE (arXiv 2202.01169), the entropic form of BASE (arXiv 2103.16716), whose sigmoid
    gates are ``score="sigmoid"``. The plan only chooses; gates are the scores. There is no balance loss.
    """
    scores = scores_of(logits, config, "softmax")
    choice = logits
    if context.rng is not None:
        choice = sinkhorn_plan(logits, context.valid, iterations=config.option("iterations"))
    experts = best(jax.lax.stop_gradient(choice), config.top_k, context)
    gates = gates_of(scores, experts)
    return choose(experts, gates, context, config), losses_lib.z_loss(logits, context, config)


def sinkhorn_plan(
    logits: Float[Array, "T E"], valid: Bool[Array, " T"], *, iterations: int
) -> Float[Array, "T E"]:
    """The logarithm of the plan ``exp(logits + row + column)``, of even columns and rows that sum to one.

    Every expert is to get (valid tokens) / E of the tokens' mass.
    """
    even = jnp.log(jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 1.0) / logits.shape[1])
    low = jnp.finfo(jnp.float32).min / 4

    def scale(_: jax.Array, plan: jax.Array) -> jax.Array:
        columns = jax.nn.logsumexp(jnp.where(valid[:, None], plan, low), axis=0, keepdims=True)
        plan = plan - jnp.maximum(columns, low / 2) + even
        return plan - jax.nn.logsumexp(plan, axis=1, keepdims=True)

    return jax.lax.fori_loop(0, iterations, scale, logits)


def loss_free(
    logits: Float[Array, "T E"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[TokenChoice, Losses]:
    """Selection by score plus a per-expert bias that is moved towards balance (arXiv 2408.15664).

    The bias chooses, but does not weigh. A group is as good as its two best experts (DeepSeek-V3, 2.1.2).
    """
    return _biased(logits, state["bias"], context, state, config)


def modality_bias(
    logits: Float[Array, "T E"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[TokenChoice, Losses]:
    """As ``loss_free``, with a bias per modality: each is balanced over the experts on its own."""
    return _biased(logits, state["bias"][context.modality], context, state, config)


def _biased(logits: jax.Array, bias: jax.Array, context: RoutingContext, state: State, config: MoEConfig):
    scores = scores_of(logits, config, "sigmoid")
    biased = jnp.where(logits > MASKED, scores + bias, jnp.finfo(scores.dtype).min)
    experts = best(within_groups(biased, config, by=2), config.top_k, context)
    gates = gates_of(scores, experts)
    probabilities = shares(scores)
    losses = losses_lib.token_losses(logits, probabilities, experts, context, state, config)
    return choose(experts, gates, context, config), losses


def init_bias(config: MoEConfig) -> State:
    """Zero selection bias per expert."""
    return {"bias": jnp.zeros((config.num_experts,), jnp.float32)}


def update_bias(state: State, stats: RoutingStats, config: MoEConfig) -> State:
    """``bias += u * sign(mean load - load)``, over everything the optimiser step saw."""
    return {**state, "bias": state["bias"] + config.balance.bias_rate * _lack(jnp.sum(stats.load, axis=0))}


def init_modality_bias(config: MoEConfig) -> State:
    """Zero selection bias per modality and expert."""
    return {"bias": jnp.zeros((len(MODALITIES), config.num_experts), jnp.float32)}


def update_modality_bias(state: State, stats: RoutingStats, config: MoEConfig) -> State:
    """``update_bias`` for every modality by its own load."""
    return {**state, "bias": state["bias"] + config.balance.bias_rate * _lack(stats.load)}


def _lack(load: Int[Array, "*M E"]) -> Float[Array, "*M E"]:
    load = load.astype(jnp.float32)
    return jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)


def scores_of(logits: Float[Array, "*T E"], config: MoEConfig, default: str) -> Float[Array, "*T E"]:
    """The configured score of every expert, else that of the scheme."""
    if (config.gates.score or default) == "softmax":
        return jax.nn.softmax(logits, axis=-1)
    return jax.nn.sigmoid(logits)


def shares(scores: Float[Array, "*T E"]) -> Float[Array, "*T E"]:
    """Scores over their sum."""
    return scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)


def _softmax_shares(logits: Float[Array, "*T E"], config: MoEConfig) -> Float[Array, "*T E"]:
    return shares(scores_of(logits, config, "softmax"))


def _sigmoid_shares(logits: Float[Array, "*T E"], config: MoEConfig) -> Float[Array, "*T E"]:
    return shares(scores_of(logits, config, "sigmoid"))


def within_groups(choice: Float[Array, "T E"], config: MoEConfig, *, by: int) -> Float[Array, "T E"]:
    """Leaves the selection scores of the best groups; a group's score is the sum of its ``by`` highest."""
    if config.groups.top == config.groups.num:
        return choice
    grouped = choice.reshape(-1, config.groups.num, config.group_size)
    highest = jax.lax.top_k(grouped, min(by, config.group_size))[0]
    groups = jax.lax.top_k(jnp.sum(highest, axis=-1), config.groups.top)[1]
    kept = jax.nn.one_hot(groups, config.groups.num, dtype=jnp.bool_).any(axis=1)
    fill = 0.0 if config.groups.excluded == "zero" else jnp.finfo(choice.dtype).min
    return jnp.where(kept[..., None], grouped, fill).reshape(choice.shape)


def _to_beat(noisy: Float[Array, "T E"], top_k: int) -> Float[Array, "T E"]:
    """The K-th highest of the *other* experts' noisy logits; with K = E there is none, and all are chosen."""
    if top_k == noisy.shape[1]:
        return jnp.full_like(noisy, jnp.finfo(noisy.dtype).min)
    best = jax.lax.top_k(noisy, top_k + 1)[0]
    chosen = noisy >= best[:, top_k - 1 : top_k]
    return jnp.where(chosen, best[:, top_k:], best[:, top_k - 1 : top_k])


def _variation_losses(importance: jax.Array, load: jax.Array, context: RoutingContext, config: MoEConfig):
    scope = "sequence" if config.balance.scope == "sequence" else "batch"
    return {
        name: config.option(f"{name}_weight") * losses_lib.variation_loss(values, context.valid, scope=scope)
        for name, values in (("importance", importance), ("load", load))
        if config.option(f"{name}_weight")
    }


def _exactly(count: int):
    def validate(config: MoEConfig) -> None:
        if config.top_k != count:
            raise ValueError(f"scheme={config.scheme!r}: top_k={config.top_k} must be {count}")

    return validate


TOP_K = Scheme(top_k, defaults=losses_lib.ENTROPY_OPTIONS, scores=_softmax_shares, replays=True)
TOP_K_SOFTMAX = Scheme(top_k_softmax, replays=True)
SWITCH = Scheme(
    switch,
    defaults=losses_lib.ENTROPY_OPTIONS,
    scores=_softmax_shares,
    validate=_exactly(1),
    replays=True,
)
GSHARD = Scheme(gshard, validate=_exactly(2), rng=True, replays=True)
NOISY_TOP_K = Scheme(
    noisy_top_k,
    defaults={"importance_weight": 0.1, "load_weight": 0.1},
    columns=lambda config: 2 * config.num_experts,
    rng=True,
    replays=True,
)
V_MOE = Scheme(
    v_moe,
    defaults={"importance_weight": 0.005, "load_weight": 0.005, **losses_lib.ENTROPY_OPTIONS},
    rng=True,
    replays=True,
)
SINKHORN = Scheme(
    sinkhorn,
    causal=False,
    defaults={"iterations": 16},
    scores=_softmax_shares,
    rng=True,
    replays=True,
)
LOSS_FREE = Scheme(loss_free, init_bias, update_bias, scores=_sigmoid_shares, replays=True)
MODALITY_BIAS = Scheme(
    modality_bias, init_modality_bias, update_modality_bias, scores=_sigmoid_shares, replays=True
)
