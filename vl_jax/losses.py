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


def softmax_contrastive(logits: Float[Array, "B B"]) -> Float[Array, ""]:
    """CLIP's loss (arXiv 2103.00020, figure 3): image i is classified among all texts as text i, and back.

    ``logits`` are of images by texts; all negatives of the batch count, wherever its rows live.
    """
    pairs = jnp.diagonal(logits)
    texts = jax.nn.logsumexp(logits, axis=1) - pairs
    images = jax.nn.logsumexp(logits, axis=0) - pairs
    return (jnp.mean(texts) + jnp.mean(images)) / 2


def sigmoid_contrastive(logits: Float[Array, "B B"]) -> Float[Array, ""]:
    """SigLIP's loss (arXiv 2303.15343, equation 1): every pair is a yes or no, summed, by the batch size."""
    signs = 2 * jnp.eye(logits.shape[0], dtype=logits.dtype) - 1
    return -jnp.sum(jax.nn.log_sigmoid(signs * logits)) / logits.shape[0]
