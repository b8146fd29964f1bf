"""Losses: arrays in, scalars out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    logits: Float[Array, "B Q V"], targets: Int[Array, "B Q"]
) -> tuple[Float[Array, "B Q"], Float[Array, "B Q"]]:
    """Negative log-likelihood in nats, and 1.0 where the most likely token is the target."""
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    hit = (target_logits >= jnp.max(logits, axis=-1)).astype(jnp.float32)
    return log_normalizer - target_logits, hit
