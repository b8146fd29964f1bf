"""Losses: arrays in, scalars out."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from vl_jax.sharding import current_mesh, cut_along


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

    A few rows are taken at a time, and their gradient is computed with them, so that all the logits never
    exist at once (Hsu et al. 2024, Liger Kernel, arXiv 2410.10989, section 3.2). Across devices each takes
    its own rows and its part of the vocabulary; the kernel's gradient is summed once, to where its part of
    the kernel lives. Weights have no gradient.
    """
    return _over_mesh(_sums, 0, hidden, kernel, targets, weights)


def _head_forward(
    hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    *sums, grad_hidden, grad_kernel = _over_mesh(_sums_and_gradients, 2, hidden, kernel, targets, weights)
    return (sums[0], sums[1]), (grad_hidden, grad_kernel)


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


@dataclasses.dataclass(frozen=True)
class _Axes:
    """The axes of the mesh along which devices have other rows, widths and words; () where they have all."""

    rows: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


def _over_mesh(function: Callable[..., Any], gradients: int, *arrays: jax.Array) -> Any:
    """The function on every device's rows and words, its first two results summed over all devices.

    Args:
      gradients: the number of its further results: 2, those of ``hidden`` and ``kernel``, or 0.
    """
    mesh = current_mesh()
    if mesh is None:
        return function(_Axes(), *arrays)
    (batch, _, width), words = arrays[0].shape, arrays[1].shape[1]
    axes = _Axes(cut_along("batch", batch), cut_along("embed", width), cut_along("vocab", words))
    rows, kernel = P(axes.rows or None), P(axes.width or None, axes.words or None)
    outputs = (P(), P(), rows, kernel)[: 2 + gradients]
    sharded = jax.shard_map(
        functools.partial(function, axes),
        mesh=mesh,
        in_specs=(rows, kernel, rows, rows),
        out_specs=outputs,
        check_vma=False,
    )
    return sharded(*arrays)


def _sums(
    axes: _Axes, hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, ...]:
    """The two sums, forwards alone."""
    kernel = _gathered(kernel, axes)

    def one_chunk(totals: tuple, chunk: tuple) -> tuple[tuple, None]:
        x, targets, weights = chunk
        found = _softmax((x @ kernel).astype(jnp.float32), targets, axes)
        nll_sum = jnp.sum((jnp.log(found.total) + found.highest - found.target) * weights)
        hit_sum = jnp.sum(jnp.where(found.target >= found.highest, weights, 0.0))
        return (totals[0] + nll_sum, totals[1] + hit_sum), None

    totals, _ = jax.lax.scan(one_chunk, (jnp.zeros(()),) * 2, _chunks(kernel, hidden, targets, weights))
    return jax.lax.psum(totals, axes.rows) if axes.rows else totals


def _sums_and_gradients(
    axes: _Axes, hidden: jax.Array, kernel: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, ...]:
    """The two sums, and the gradients of the first."""
    kernel = _gathered(kernel, axes)

    def one_chunk(carry: tuple, chunk: tuple) -> tuple[tuple, jax.Array]:
        x, targets, weights = chunk
        nll_sum, hit_sum, grad_kernel = carry
        found = _softmax((x @ kernel).astype(jnp.float32), targets, axes)
        nll_sum += jnp.sum((jnp.log(found.total) + found.highest - found.target) * weights)
        hit_sum += jnp.sum(jnp.where(found.target >= found.highest, weights, 0.0))
        grad = found.exponentials * (weights / found.total)[..., None]
        grad = (grad - jnp.where(found.is_target, weights[..., None], 0.0)).astype(x.dtype)
        grad_kernel += jnp.einsum("BQD,BQV->DV", x, grad, preferred_element_type=jnp.float32)
        return (nll_sum, hit_sum, grad_kernel), jnp.einsum("BQV,DV->BQD", grad, kernel)

    start = (jnp.zeros(()), jnp.zeros(()), jnp.zeros(kernel.shape, jnp.float32))
    sums, grad_hidden = jax.lax.scan(one_chunk, start, _chunks(kernel, hidden, targets, weights))
    batch, length, width = hidden.shape
    grad_hidden = grad_hidden.swapaxes(0, 1).reshape(batch, -1, width)[:, :length]
    if axes.words:
        grad_hidden = jax.lax.psum(grad_hidden, axes.words)
    nll_sum, hit_sum, grad_kernel = sums
    if axes.rows:
        nll_sum, hit_sum = jax.lax.psum((nll_sum, hit_sum), axes.rows)
    return nll_sum, hit_sum, grad_hidden, _scattered(grad_kernel, axes).astype(kernel.dtype)


def _gathered(kernel: jax.Array, axes: _Axes) -> jax.Array:
    """The kernel at full width, of this device's words."""
    return jax.lax.all_gather(kernel, axes.width, axis=0, tiled=True) if axes.width else kernel


def _scattered(grad: jax.Array, axes: _Axes) -> jax.Array:
    """The kernel's gradient summed over all rows, where the kernel's part lives."""
    if axes.width:
        shared = tuple(axis for axis in axes.width if axis in axes.rows)
        if shared == axes.width:
            grad = jax.lax.psum_scatter(grad, axes.width, scatter_dimension=0, tiled=True)
        else:  # some devices have the same rows
            size = grad.shape[0] // math.prod(jax.lax.axis_size(axis) for axis in axes.width)
            grad = jax.lax.psum(grad, shared) if shared else grad
            grad = jax.lax.dynamic_slice_in_dim(grad, jax.lax.axis_index(axes.width) * size, size)
    rest = tuple(axis for axis in axes.rows if axis not in axes.width)
    return jax.lax.psum(grad, rest) if rest else grad


class _Softmax(NamedTuple):
    """A softmax over all words, of whose terms this device has its own."""

    exponentials: jax.Array  # [B Q V]
    total: jax.Array  # [B Q], over all words
    highest: jax.Array  # [B Q], the highest logit
    target: jax.Array  # [B Q], the logit of the target
    is_target: jax.Array  # bool[B Q V]


def _softmax(logits: jax.Array, targets: jax.Array, axes: _Axes) -> _Softmax:
    if not axes.words:
        highest = jnp.max(logits, axis=-1)
        exponentials = jnp.exp(logits - highest[..., None])
        target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
        return _Softmax(exponentials, jnp.sum(exponentials, axis=-1), highest, target, is_target)
    first = jax.lax.axis_index(axes.words) * logits.shape[-1]
    is_target = first + jnp.arange(logits.shape[-1]) == targets[..., None]
    highest = jax.lax.pmax(jnp.max(logits, axis=-1), axes.words)
    exponentials = jnp.exp(logits - highest[..., None])
    mine = jnp.sum(exponentials, axis=-1), jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    total, target = jax.lax.psum(mine, axes.words)
    return _Softmax(exponentials, total, highest, target, is_target)


def _chunks(kernel: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays [B Q ...] cut along Q, the chunks first; zeros fill up the last, and weigh nothing."""
    batch, length = arrays[0].shape[:2]
    rows = max(CHUNK_ROWS, CHUNK_LOGITS // kernel.shape[1])
    size = min(length, -(-rows // batch))

    def cut(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, -length % size)] + [(0, 0)] * (x.ndim - 2))
        return padded.reshape(batch, -1, size, *x.shape[2:]).swapaxes(0, 1)

    return tuple(cut(x) for x in arrays)
