"""Schemes in which every expert takes its best tokens: even load by construction, and no causality."""

from __future__ import annotations

from fractions import Fraction

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vl_jax.moe import losses as losses_lib
from vl_jax.moe.assignment import ExpertChoice, Losses, RoutingContext, State
from vl_jax.moe.routing import MoEConfig, Scheme
from vl_jax.moe.schemes.fixed import modality_of_experts, num_text, validate_split
from vl_jax.moe.schemes.token_choice import shares
from vl_jax.moe.slots import as_fraction, ceil_times


def expert_choice(
    logits: Float[Array, "T E"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[ExpertChoice, Losses]:
    """Every expert takes its top C tokens by softmax score, C = top_k * T / E (arXiv 2202.09368).

    C counts the valid tokens of the group; a token may end with any number of experts.
    """
    open_to = jnp.broadcast_to(context.valid[:, None], logits.shape)
    scores = jax.nn.softmax(logits, axis=-1)
    slots = ceil_times(logits.shape[0], _choices(config) / config.num_experts, most=logits.shape[0])
    assignment = _best_tokens(scores, open_to, (config.num_experts,) * config.num_experts, slots, config)
    return assignment, losses_lib.z_loss(logits, context, config)


def modality_expert_choice(
    logits: Float[Array, "T E"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[ExpertChoice, Losses]:
    """Expert choice within each modality, by sigmoid score (MoMa, arXiv 2407.21770).

    The last ``vision_experts`` (0: half) take picture tokens, the others text; C is top_k times the tokens of
    the modality over its experts. The paper's auxiliary routers, which make inference causal, are not here.
    """
    owner = modality_of_experts(config)
    open_to = context.valid[:, None] & (context.modality[:, None] == owner)
    text = num_text(config)
    peers = (text,) * text + (config.num_experts - text,) * (config.num_experts - text)
    # All tokens may be of one modality, and its experts as few as one.
    slots = ceil_times(logits.shape[0], _choices(config), most=logits.shape[0])
    assignment = _best_tokens(jax.nn.sigmoid(logits), open_to, peers, slots, config)
    return assignment, losses_lib.z_loss(logits, context, config)


def _best_tokens(
    scores: Float[Array, "T E"],
    open_to: Bool[Array, "T E"],
    peers: tuple[int, ...],
    slots: int,
    config: MoEConfig,
) -> ExpertChoice:
    """The best of the tokens open to each expert, as many as its share among its peers.

    Args:
      peers: how many experts share the tokens with each, itself counted.
      slots: for each expert, at most the tokens there are.
    """
    length, count = scores.shape[0], jnp.sum(open_to, axis=0, dtype=jnp.int32)
    slots, wanted = min(length, max(1, slots)), count
    for number in set(peers):  # no expert takes more than all
        share = ceil_times(count, min(_choices(config) / number, 1), most=length)
        wanted = jnp.where(jnp.array(peers) == number, share, wanted)
    gates, tokens = jax.lax.top_k(jnp.where(open_to, scores, 0.0).T, slots)
    taken = jnp.arange(slots) < wanted[:, None]
    return ExpertChoice(tokens, jnp.where(taken, gates, 0.0) * config.gates.scale)


def _own_scores(
    logits: Float[Array, "T E"], context: RoutingContext, config: MoEConfig
) -> Float[Array, "T E"]:
    own = context.modality[:, None] == modality_of_experts(config)
    return shares(jnp.where(own, jax.nn.sigmoid(logits), 0.0))


def _choices(config: MoEConfig) -> Fraction:
    """How many experts a token has in the mean."""
    return config.top_k * as_fraction(config.limit.factor or 1.0)


def _validate(config: MoEConfig) -> None:
    limit = config.limit
    order = f"priority={limit.priority!r}"
    for what, given in ((order, limit.priority != "position"), ("slots", limit.slots)):
        if given:
            raise ValueError(
                f"limit.{what} has no meaning for scheme={config.scheme!r}: experts never overflow"
            )


def _validate_split(config: MoEConfig) -> None:
    _validate(config)
    validate_split(config, at_least=1)


EXPERT_CHOICE = Scheme(expert_choice, causal=False, validate=_validate)
MODALITY_EXPERT_CHOICE = Scheme(
    modality_expert_choice,
    causal=False,
    defaults={"vision_experts": 0},
    scores_of_group=_own_scores,
    validate=_validate_split,
)
