"""Losses: arrays in, scalars out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vl_jax.sharding import constrain, current_mesh


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


# ``head_cross_entropy`` takes so many logits at a time, of so many rows at least.
CHUNK_LOGITS, CHUNK_ROWS = 1 << 22, 256


@jax.custom_vjp
def head_cross_entropy(
    hidden: Float[Array, "B Q D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B Q"],
    weights: Float[Array, "B Q"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The weighted sums of what ``cross_entropy`` gives for the logits ``hidden @ kernel``.

    On one device a few rows are taken at a time, and their gradient is computed with them, so that all the
    logits never exist at once (Hsu et al. 2024, Liger Kernel, arXiv 2410.10989, section 3.2). Across devices
    that would be a sum over them for every few rows: there it is one piece. Weights have no gradient.
    """

    def one_chunk(totals: Any, chunk: tuple) -> tuple[Any, None]:
        x, targets, weights = chunk
        nll, hit = cross_entropy(_head_logits(x, kernel), targets)
        return (totals[0] + jnp.sum(nll * weights), totals[1] + jnp.sum(hit * weights)), None

    return jax.lax.scan(one_chunk, (jnp.zeros(()),) * 2, _chunks(kernel, hidden, targets, weights))[0]


def _head_forward(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    def one_chunk(carry: tuple, chunk: tuple) -> tuple[tuple, jax.Array]:
        x, targets, weights = chunk
        nll_sum, hit_sum, grad_kernel = carry
        logits = _head_logits(x, kernel)
        highest = jnp.max(logits, axis=-1)
        exponentials = jnp.exp(logits - highest[..., None])
        total = jnp.sum(exponentials, axis=-1)
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        nll_sum += jnp.sum((jnp.log(total) + highest - target_logits) * weights)
        hit_sum += jnp.sum(jnp.where(target_logits >= highest, weights, 0.0))
        is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
        grad = exponentials * (weights / total)[..., None] - jnp.where(is_target, weights[..., None], 0.0)
        grad = grad.astype(x.dtype)
        grad_kernel += jnp.einsum("BQD,BQV->DV", x, grad, preferred_element_type=jnp.float32)
        return (nll_sum, hit_sum, grad_kernel), jnp.einsum("BQV,DV->BQD", grad, kernel)

    chunks = _chunks(kernel, hidden, targets, weights)
    start = (jnp.zeros(()), jnp.zeros(()), jnp.zeros(kernel.shape, jnp.float32))
    (nll_sum, hit_sum, grad_kernel), grad_hidden = jax.lax.scan(one_chunk, start, chunks)
    batch, length, width = hidden.shape
    grad_hidden = grad_hidden.swapaxes(0, 1).reshape(batch, -1, width)[:, :length]
    return (nll_sum, hit_sum), (grad_hidden, grad_kernel.astype(kernel.dtype))


def _head_backward(
    residual: tuple[jax.Array, jax.Array], grads: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None]:
    grad_hidden, grad_kernel = residual
    scale = grads[0]
    return (
        grad_hidden * scale.astype(grad_hidden.dtype),
        grad_kernel * scale.astype(grad_kernel.dtype),
        None,
        None,
    )


head_cross_entropy.defvjp(_head_forward, _head_backward)


def _head_logits(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return constrain((x @ kernel).astype(jnp.float32), "batch", None, "vocab")


def _chunks(kernel: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays [B Q ...] cut along Q, the chunks first; zeros fill up the last, and weigh nothing."""
    batch, length = arrays[0].shape[:2]
    rows = max(CHUNK_ROWS, CHUNK_LOGITS // kernel.shape[1])
    size = length if current_mesh() is not None else min(length, -(-rows // batch))

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, -length % size)] + [(0, 0)] * (x.ndim - 2))
        return padded.reshape(batch, -1, size, *x.shape[2:]).swapaxes(0, 1)

    return tuple(cut(x) for x in arrays)
