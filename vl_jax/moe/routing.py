"""Routing schemes: pure functions from router logits to an *assignment* of tokens to experts.

    route(logits [T E], context, state, config) -> (assignment, losses)
    init_state(config) -> state                    run once; default: empty
    update_state(state, stats, config) -> state    run once per optimiser step; default: unchanged

A scheme sees one group of T tokens (a row of the batch) and writes nothing else: dispatch, capacity, expert
parallelism, kernels, statistics and the mean of its losses over the batch are derived by the library. Scores,
selection and losses are float32. The layer *returns* its statistics, so rematerialisation, scanning,
accumulation and sharding cannot count a token twice.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from vl_jax.kernels.activation import SWIGLU, Activation

Leaf = Any
# An entry of the state that an intervention adds: bool, [1 1 N] or [G T N], experts that may not be chosen.
# Their logits are ``MASKED``; a scheme that adds something to its scores leaves those at the lowest number.
EXCLUDED, MASKED = "excluded", -1e9
# The name of the axis over routing groups, for schemes and losses that sum over all of them.
GROUPS = "groups"


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """One sparse layer: router, routed experts, shared experts, and how tokens move."""

    scheme: Literal["top_k", "top_k_softmax", "loss_free", "expert_choice"] = "top_k"
    num_experts: int = 64
    top_k: int = 6
    expert_dim: int = 1408  # hidden width of one routed expert
    num_shared: int = 2  # shared experts, fused into one block
    shared_dim: int | None = None  # width of that block; None: num_shared * expert_dim
    shared_gate: bool = False  # multiply its output by a learned sigmoid of the token (Qwen2-MoE)
    score: Literal["softmax", "sigmoid"] | None = None  # None: sigmoid for loss_free, else softmax
    num_groups: int = 1  # experts are cut into groups of equal size ...
    top_groups: int = 1  # ... of which a token may use this many
    excluded: Literal["lowest", "zero"] = "lowest"  # selection score of experts in the other groups
    normalize_gates: bool = False  # divide the chosen gates by their sum
    gate_scale: float = 1.0
    router_bias: bool = False  # a learned bias of the logits
    expert_bias: bool = False  # biases of both projections of every routed expert
    activation: Activation = SWIGLU
    balance_weight: float = 1e-3  # balance loss (0: none)
    balance_scope: Literal["sequence", "batch"] = "sequence"  # tokens over which load is to be even
    z_weight: float = 0.0  # router z-loss (ST-MoE, arXiv 2202.08906)
    bias_rate: float = 1e-3  # step of the loss-free bias (arXiv 2408.15664)
    capacity_factor: float | None = None  # None: dropless; else slots per expert over the mean load
    capacity: int | None = None  # slots per expert and row, as a number
    priority: Literal["position", "gate"] = "position"  # who keeps a slot when capacity runs out
    kernel: Literal["blocked", "reference"] = "blocked"

    def __post_init__(self):
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k={self.top_k} must be from 1 to num_experts={self.num_experts}")
        if self.expert_dim < 1 or self.num_shared < 0:
            raise ValueError(f"expert_dim={self.expert_dim} must be >= 1, num_shared={self.num_shared} >= 0")
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ValueError(
                f"num_groups={self.num_groups} must divide num_experts={self.num_experts} into equal groups"
            )
        if not 1 <= self.top_groups <= self.num_groups:
            raise ValueError(f"top_groups={self.top_groups} must be from 1 to num_groups={self.num_groups}")
        if self.top_k > self.top_groups * self.group_size:
            raise ValueError(
                f"top_k={self.top_k} must be at most the {self.top_groups * self.group_size} experts of "
                f"top_groups={self.top_groups}"
            )
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(f"capacity_factor={self.capacity_factor} must be > 0 (None: dropless)")
        if self.capacity is not None and (self.capacity < 1 or self.capacity_factor is not None):
            raise ValueError(f"capacity={self.capacity} must be >= 1, and excludes capacity_factor")
        if self.scheme == "expert_choice" and self.priority == "gate":
            raise ValueError(
                "priority='gate' has no meaning for scheme='expert_choice': experts never overflow"
            )

    @property
    def group_size(self) -> int:
        return self.num_experts // self.num_groups

    @property
    def shared_width(self) -> int:
        """Hidden width of the fused shared experts; 0 without any."""
        if not self.num_shared:
            return 0
        return self.num_shared * self.expert_dim if self.shared_dim is None else self.shared_dim

    @property
    def is_dropless(self) -> bool:
        return self.capacity_factor is None and self.capacity is None


@struct.dataclass
class TokenChoice:
    """Every token names K experts. Expert id E means "unused": dynamic k, masked token, dropped choice."""

    experts: Leaf  # i32[T K]
    gates: Leaf  # f32[T K]


@struct.dataclass
class ExpertChoice:
    """Every expert names its C tokens; a gate of zero leaves the slot empty."""

    tokens: Leaf  # i32[E C]
    gates: Leaf  # f32[E C]


Assignment = TokenChoice | ExpertChoice


@struct.dataclass
class RoutingContext:
    """What a scheme may look at besides the logits, for one group of T tokens."""

    valid: Leaf  # bool[T] False on padding
    modality: Leaf  # i32[T]


@struct.dataclass
class RoutingStats:
    """Sums over tokens: add them over micro-batches and shards, then divide."""

    load: Leaf  # i32[M E] choices by modality of the token, before any are dropped
    importance: Leaf  # f32[M E] sum of router probabilities
    tokens: Leaf  # i32[M] valid tokens
    dropped: Leaf  # i32[M] choices without a slot


State = dict[str, jax.Array]
Losses = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A routing scheme; ``causal`` says that a token's experts depend on no later token."""

    route: Callable[[Any, RoutingContext, State, MoEConfig], tuple[Assignment, Losses]]
    init_state: Callable[[MoEConfig], State] = lambda config: {}
    update_state: Callable[[State, RoutingStats, MoEConfig], State] = lambda state, stats, config: state
    causal: bool = True


def top_k(
    logits: Float[Array, "T E"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[TokenChoice, Losses]:
    """The best experts by score (DeepSeekMoE, arXiv 2401.06066), of the best groups if there are several.

    A group is as good as its best expert (DeepSeek-V2, section 2.2.2).
    """
    scores = _scores(logits, config.score or "softmax")
    experts = jax.lax.top_k(_within_groups(scores, config, best=1), config.top_k)[1]
    gates = jnp.take_along_axis(scores, experts, axis=-1)
    return _choose(experts, gates, context, config), _losses(logits, scores, experts, context, config)


def top_k_softmax(
    logits: Float[Array, "T E"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[TokenChoice, Losses]:
    """The best experts by logit; gates are the softmax over the chosen logits alone (GPT-OSS)."""
    chosen, experts = jax.lax.top_k(_within_groups(logits, config, best=1), config.top_k)
    gates, scores = jax.nn.softmax(chosen, axis=-1), jax.nn.softmax(logits, axis=-1)
    return _choose(experts, gates, context, config), _losses(logits, scores, experts, context, config)


def loss_free(
    logits: Float[Array, "T E"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[TokenChoice, Losses]:
    """Selection by score plus a per-expert bias that is moved towards balance (arXiv 2408.15664).

    The bias chooses, but does not weigh. A group is as good as its two best experts (DeepSeek-V3, 2.1.2).
    """
    scores = _scores(logits, config.score or "sigmoid")
    biased = jnp.where(logits > MASKED, scores + state["bias"], jnp.finfo(jnp.float32).min)
    choice = _within_groups(biased, config, best=2)
    experts = jax.lax.top_k(choice, config.top_k)[1]
    gates = jnp.take_along_axis(scores, experts, axis=-1)
    probabilities = scores / jnp.sum(scores, axis=-1, keepdims=True)
    return _choose(experts, gates, context, config), _losses(logits, probabilities, experts, context, config)


def _scores(logits: Float[Array, "T E"], score: str) -> Float[Array, "T E"]:
    return jax.nn.softmax(logits, axis=-1) if score == "softmax" else jax.nn.sigmoid(logits)


def _within_groups(choice: Float[Array, "T E"], config: MoEConfig, *, best: int) -> Float[Array, "T E"]:
    """Leaves the selection scores of the best groups; a group's score is the sum of its ``best`` highest."""
    if config.top_groups == config.num_groups:
        return choice
    grouped = choice.reshape(-1, config.num_groups, config.group_size)
    highest = jax.lax.top_k(grouped, min(best, config.group_size))[0]
    groups = jax.lax.top_k(jnp.sum(highest, axis=-1), config.top_groups)[1]
    kept = jax.nn.one_hot(groups, config.num_groups, dtype=jnp.bool_).any(axis=1)
    fill = 0.0 if config.excluded == "zero" else jnp.finfo(choice.dtype).min
    return jnp.where(kept[..., None], grouped, fill).reshape(choice.shape)


def init_bias(config: MoEConfig) -> State:
    """Zero selection bias per expert."""
    return {"bias": jnp.zeros((config.num_experts,), jnp.float32)}


def update_bias(state: State, stats: RoutingStats, config: MoEConfig) -> State:
    """``bias += u * sign(mean load - load)``, over everything the optimiser step saw."""
    load = jnp.sum(stats.load, axis=0).astype(jnp.float32)
    return {"bias": state["bias"] + config.bias_rate * jnp.sign(jnp.mean(load) - load)}


def expert_choice(
    logits: Float[Array, "T E"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[ExpertChoice, Losses]:
    """Every expert takes its top C tokens by softmax score, C = top_k * T / E (arXiv 2202.09368).

    C counts the valid tokens of the group; a token may end with any number of experts. Not causal.
    """
    length, num_experts = logits.shape
    factor = config.top_k * (config.capacity_factor or 1.0) / num_experts
    slots = min(length, max(1, math.ceil(factor * length)))
    wanted = jnp.ceil(factor * jnp.sum(context.valid, dtype=jnp.float32)).astype(jnp.int32)
    scores = jnp.where(context.valid[:, None], jax.nn.softmax(logits, axis=-1), 0.0)
    gates, tokens = jax.lax.top_k(scores.T, slots)
    gates = jnp.where(jnp.arange(slots) < wanted, gates, 0.0) * config.gate_scale
    return ExpertChoice(tokens, gates), _z_loss(logits, context, config)


SCHEMES: dict[str, Scheme] = {
    "top_k": Scheme(top_k),
    "top_k_softmax": Scheme(top_k_softmax),
    "loss_free": Scheme(loss_free, init_bias, update_bias),
    "expert_choice": Scheme(expert_choice, causal=False),
}


def is_causal(config: MoEConfig) -> bool:
    """Whether a token's experts depend on no later token; without that, decoding differs from training."""
    by_gate = not config.is_dropless and config.priority == "gate"
    return SCHEMES[config.scheme].causal and not by_gate


def route(
    logits: Float[Array, "G T E"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[Assignment, Losses]:
    """Routes every group on its own; losses are the means over groups."""
    scheme = SCHEMES[config.scheme]

    excluded = state.get(EXCLUDED)
    state = {name: value for name, value in state.items() if name != EXCLUDED}
    logits = logits.astype(jnp.float32)
    if excluded is not None:
        logits = jnp.where(excluded, MASKED, logits)

    def one_group(logits: jax.Array, context: RoutingContext) -> tuple[Assignment, Losses]:
        return scheme.route(logits, context, state, config)

    assignment, losses = jax.vmap(one_group, axis_name=GROUPS)(logits, context)
    return assignment, {name: jnp.mean(value) for name, value in losses.items()}


def _choose(
    experts: Int[Array, "T K"], gates: Float[Array, "T K"], context: RoutingContext, config: MoEConfig
) -> TokenChoice:
    """Normalises and scales the gates as configured; padding chooses nothing."""
    if config.normalize_gates and config.top_k > 1:
        gates = gates / (jnp.sum(gates, axis=-1, keepdims=True) + 1e-20)
    valid = context.valid[:, None]
    return TokenChoice(
        jnp.where(valid, experts, config.num_experts), jnp.where(valid, gates * config.gate_scale, 0.0)
    )


def _losses(
    logits: Float[Array, "T E"],
    scores: Float[Array, "T E"],
    experts: Int[Array, "T K"],
    context: RoutingContext,
    config: MoEConfig,
) -> Losses:
    losses = _z_loss(logits, context, config)
    if config.balance_weight:
        loss = balance_loss(scores, experts, context.valid, scope=config.balance_scope)
        losses["balance"] = config.balance_weight * loss
    return losses


def _z_loss(logits: Float[Array, "T E"], context: RoutingContext, config: MoEConfig) -> Losses:
    if not config.z_weight:
        return {}
    squared = jax.nn.logsumexp(logits, axis=-1) ** 2
    return {"z": config.z_weight * _masked_mean(squared, context.valid)}


def balance_loss(
    scores: Float[Array, "T E"], experts: Int[Array, "T K"], valid: Bool[Array, " T"], *, scope: str
) -> Float[Array, ""]:
    """``sum_e f_e P_e``, f_e = E / (K T) * choices of e, P_e = mean score of e (DeepSeek-V2, eq. 23-25).

    Args:
      scope: whether f and P are those of the ``sequence`` (one group), or of the whole ``batch``; the latter
        needs the axis over groups that ``route`` names.
    """
    num_experts, top_k = scores.shape[-1], experts.shape[-1]
    chosen = jax.nn.one_hot(experts, num_experts, dtype=jnp.float32).sum(axis=1)
    mask = valid[:, None].astype(jnp.float32)
    load, score, tokens = jnp.sum(chosen * mask, axis=0), jnp.sum(scores * mask, axis=0), jnp.sum(mask)
    if scope == "batch":
        load, score, tokens = jax.lax.psum((load, score, tokens), GROUPS)
    tokens = jnp.maximum(tokens, 1.0)
    return jnp.sum(load * score) / tokens**2 * (num_experts / top_k)


def _masked_mean(values: Float[Array, " T"], valid: Bool[Array, " T"]) -> Float[Array, ""]:
    total = jnp.sum(valid, dtype=jnp.float32)
    return jnp.sum(jnp.where(valid, values, 0.0)) / jnp.maximum(total, 1.0)
