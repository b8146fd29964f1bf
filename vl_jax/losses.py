"""Losses: arrays in, scalars out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@jax.custom_vjp
def cross_entropy(
    logits: Float[Array, "B Q V"], targets: Int[Array, "B Q"]
) -> tuple[Float[Array, "B Q"], Float[Array, "B Q"]]:
    """Negative log-likelihood in nats, and 1.0 where the most likely token is the target.

    The gradient, softmax minus one-hot, is written down: autodiff would keep the exponentials and scatter.
    """
    return _cross_entropy_forward(logits, targets)[0]


def _cross_entropy_forward(
    logits: jax.Array, targets: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    hit = (target_logits >= jnp.max(logits, axis=-1)).astype(jnp.float32)
    return (log_normalizer - target_logits, hit), (logits, targets, log_normalizer)


def _cross_entropy_backward(
    residual: tuple[jax.Array, jax.Array, jax.Array], grads: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, None]:
    logits, targets, log_normalizer = residual
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    softmax = jnp.exp(logits - log_normalizer[..., None])
    return (softmax - is_target.astype(logits.dtype)) * grads[0][..., None], None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


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
