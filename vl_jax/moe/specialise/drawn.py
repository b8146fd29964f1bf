"""Losses that draw a router to what is given: to some experts, or to the logits of another router."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def taught_loss(
    logits: Float[Array, "G T N"], taught: Float[Array, "G T M"], valid: Bool[Array, "G T"]
) -> Float[Array, ""]:
    """How far the softmax of the logits is from that of a teacher's: the divergence KL(teacher || router).

    The mean over groups of the weighted mean over their valid tokens, in nats.

    Args:
      taught: the teacher's logits, N of them, and last the weight.
    """
    weight = jnp.where(valid, taught[..., -1], 0.0)
    wanted, own = (jax.nn.log_softmax(z, axis=-1) for z in (taught[..., :-1], logits))
    divergence = jnp.sum(jnp.exp(wanted) * (wanted - own), axis=-1)
    tokens = jnp.maximum(jnp.sum(valid, axis=-1, dtype=jnp.float32), 1.0)
    return jnp.mean(jnp.sum(weight * divergence, axis=-1) / tokens)


def drawn_loss(
    scores: Float[Array, "G T E"], towards: Float[Array, "G T E"], valid: Bool[Array, "G T"]
) -> Float[Array, ""]:
    """``-log`` of the share of probability that the experts have which tokens are drawn to.

    The mean over groups of the weighted mean over their valid tokens.

    Args:
      scores: probabilities of the experts; they need not sum to one.
      towards: the weight of the loss at the experts that a token is drawn to, 0 at others.
    """
    own = jnp.sum(jnp.where(towards > 0, scores, 0.0), axis=-1)
    share = own / jnp.maximum(jnp.sum(scores, axis=-1), 1e-20)
    weight = jnp.where(valid, jnp.max(towards, axis=-1), 0.0)
    loss = -jnp.log(jnp.where(weight > 0, jnp.maximum(share, 1e-20), 1.0))
    tokens = jnp.maximum(jnp.sum(valid, axis=-1, dtype=jnp.float32), 1.0)
    return jnp.mean(jnp.sum(weight * loss, axis=-1) / tokens)


def of_tokens(given: jax.Array, shape: tuple[int, int, int], what: str) -> jax.Array:
    """What is given for all tokens, for each group or for each token, as [G T E].

    Raises:
      ValueError: it has none of these shapes.
    """
    groups, _, experts = shape
    allowed = (1, 1, experts), (groups, 1, experts), shape
    if given.shape not in allowed:
        raise ValueError(f"{what} are {given.shape}, expected {allowed[0]}, {allowed[1]} or {allowed[2]}")
    return jnp.broadcast_to(given, shape)
