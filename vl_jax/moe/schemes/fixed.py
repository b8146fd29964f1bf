"""Schemes in which what a token *is* fixes its experts, or the part of them it may use."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vl_jax.batch import TEXT, VISION
from vl_jax.moe import losses as losses_lib
from vl_jax.moe.assignment import Losses, RoutingContext, State, TokenChoice
from vl_jax.moe.routing import MoEConfig, Scheme, best, choose, gates_of


def hash_tokens(
    logits: Float[Array, "T E"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[TokenChoice, Losses]:
    """Text goes where its token id says, with gates of 1/K (hash layers, arXiv 2106.04426, section 3).

    The K experts of an id are those with the highest of E hashes of (id, expert), a random hash without a
    table. All positions of a picture hold the same id, so they take the best K by learned score instead.

    Raises:
      ValueError: there are no token ids.
    """
    if context.tokens is None:
        raise ValueError(f"scheme={config.scheme!r} needs the token ids, which this model does not hand on")
    text = (context.modality == TEXT)[:, None]
    scores = jax.nn.softmax(logits, axis=-1)
    experts = best(jnp.where(text, hashes(context.tokens, config.num_experts), scores), config.top_k, context)
    gates = jnp.where(text, 1.0 / config.top_k, gates_of(scores, experts))
    return choose(experts, gates, context, config), losses_lib.z_loss(logits, context, config)


def hashes(tokens: Int[Array, " T"], num_experts: int) -> Float[Array, "T E"]:
    """A hash of every pair of id and expert: whole numbers below 2**24."""
    ids = tokens.astype(jnp.uint32)[:, None] * jnp.uint32(0x9E3779B9)
    mixed = ids ^ (jnp.arange(num_experts, dtype=jnp.uint32) * jnp.uint32(0x85EBCA6B))
    # A mixer of 32 bits in two rounds of shift and multiply: every input bit reaches every output bit.
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x7FEB352D)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x846CA68B)
    mixed = (mixed ^ (mixed >> 16)) >> 8  # exact as float32, which every back-end can sort
    return mixed.astype(jnp.float32)


def modality_top_k(
    logits: Float[Array, "T E"], context: RoutingContext, state: State, config: MoEConfig
) -> tuple[TokenChoice, Losses]:
    """The best K of the experts of the token's modality, by the softmax over these alone.

    The last ``vision_experts`` (0: half) are for pictures. One for each modality and K=1 are the modality
    experts of VLMo (arXiv 2111.02358, section 3), more of them the groups of MoMa (arXiv 2407.21770).
    """
    scores = _own_scores(logits, context, config)
    experts = best(scores, config.top_k, context)
    gates = gates_of(scores, experts)
    losses = losses_lib.token_losses(logits, scores, experts, context, state, config)
    return choose(experts, gates, context, config), losses


def _own_scores(
    logits: Float[Array, "T E"], context: RoutingContext, config: MoEConfig
) -> Float[Array, "T E"]:
    own = context.modality[:, None] == modality_of_experts(config)
    return jax.nn.softmax(jnp.where(own, logits, jnp.finfo(logits.dtype).min), axis=-1)


def _hash_scores(
    logits: Float[Array, "T E"], context: RoutingContext, config: MoEConfig
) -> Float[Array, "T E"]:
    """Even over the experts of a text token, by score for those of pictures."""
    assert context.tokens is not None  # route sees to that
    by_hash = jax.lax.top_k(hashes(context.tokens, config.num_experts), config.top_k)[1]
    even = jnp.sum(jax.nn.one_hot(by_hash, config.num_experts), axis=1) / config.top_k
    return jnp.where((context.modality == TEXT)[:, None], even, jax.nn.softmax(logits, axis=-1))


def modality_of_experts(config: MoEConfig) -> Int[Array, " E"]:
    """The modality each expert serves: the first ones text, the last ones pictures."""
    return jnp.where(jnp.arange(config.num_experts) < num_text(config), TEXT, VISION)


def num_text(config: MoEConfig) -> int:
    """How many experts serve text: the first ones."""
    return config.num_experts - (config.option("vision_experts") or config.num_experts // 2)


def validate_split(config: MoEConfig, *, at_least: int | None = None) -> None:
    """Checks that each modality has ``at_least`` experts (None: top_k)."""
    text, least = num_text(config), config.top_k if at_least is None else at_least
    if min(text, config.num_experts - text) < least:
        raise ValueError(
            f"scheme={config.scheme!r}: vision_experts={config.num_experts - text} leaves {text} of "
            f"{config.num_experts} experts for text; both must be >= {least}"
        )


HASH = Scheme(hash_tokens, scores_of_group=_hash_scores, tokens=True, replays=True)
MODALITY_TOP_K = Scheme(
    modality_top_k,
    defaults={"vision_experts": 0},
    scores_of_group=_own_scores,
    validate=validate_split,
    replays=True,
)
