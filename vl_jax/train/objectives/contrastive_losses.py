"""Contrastive losses of image-text pairs from their vectors, a few texts at a time, over any mesh.

    logits[i, t] = exp(scale) * <image i, text t> (+ bias)      positive where image_ids[i] == text_ids[t]

                      texts and what they have seen go round -->
    images of shard 0   x   texts 0, 1, 2, 3     every shard keeps its images and meets all texts,
    images of shard 1   x   texts 3, 0, 1, 2     ``chunk`` of them at once

What belongs together is told by ids and not by position: two captions of one image in a batch are positives
of each other's image. A row whose id is negative is padding, and takes part in nothing. A row with an id that
no row of the other side has is a negative of all others; the softmax asks nothing of it.

Neither all logits nor all texts are ever on one device. Forward, a row keeps running sums only. The gradient
is written down: it computes the logits again, so it keeps no more. One device is a ring of length one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from vl_jax.sharding import batch_axes, current_mesh, current_rules

Leaf = Any
Form = Literal["softmax", "sigmoid"]


@struct.dataclass
class PairSums:
    """Sums over rows; divided by the number of rows with an id >= 0, the loss and two accuracies."""

    loss: Leaf  # f32[], has a gradient
    images_right: Leaf  # f32[], images whose nearest text is theirs; a tie with another text is wrong
    texts_right: Leaf  # f32[], texts whose nearest image is theirs; likewise


def softmax_sums(
    images: Float[Array, "B E"],
    texts: Float[Array, "C E"],
    scale: Float[Array, ""],
    *,
    image_ids: Int[Array, " B"],
    text_ids: Int[Array, " C"],
    chunk: int,
) -> PairSums:
    """CLIP's loss (arXiv 2103.00020, figure 3), for rows that may have several positives.

    A row's target is uniform over its positives. Its loss is ``logsumexp(logits) - mean(their logits)``
    (UniCL, arXiv 2204.03610, equations 2 and 3; SupCon, 2004.11362, equation 2). All rows' losses are summed,
    and halved. With ids that are all different this is CLIP's loss, times the number of rows.

    Args:
      images: vectors of length 1.
      texts: vectors of length 1.
      scale: logarithm of what the products are multiplied by.
      image_ids: what each image shows; negative for padding.
      text_ids: what each text tells of; negative for padding.
      chunk: texts that are compared at once, at most.

    Raises:
      ValueError: ``chunk`` is not positive, or rows do not divide by the mesh axes of the batch.
    """
    return _checked("softmax", chunk, images, texts, scale, jnp.zeros(()), image_ids, text_ids)


def sigmoid_sums(
    images: Float[Array, "B E"],
    texts: Float[Array, "C E"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    *,
    image_ids: Int[Array, " B"],
    text_ids: Int[Array, " C"],
    chunk: int,
) -> PairSums:
    """SigLIP's loss (arXiv 2303.15343, equation 1) before it is divided: every pair is a yes or no.

    The sign is +1 for every positive, not for the diagonal only. Arguments are those of ``softmax_sums``;
    ``bias`` is added to every logit.
    """
    return _checked("sigmoid", chunk, images, texts, scale, bias, image_ids, text_ids)


def _checked(
    form: Form,
    chunk: int,
    images: jax.Array,
    texts: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    image_ids: jax.Array,
    text_ids: jax.Array,
) -> PairSums:
    if chunk < 1:
        raise ValueError(f"chunk={chunk} texts at once; expected 1 or more")
    mesh = current_mesh()
    if mesh is not None:
        axes, shards = current_rules().batch, batch_axes(mesh, current_rules())
        for what, rows in (("images", images.shape[0]), ("texts", texts.shape[0])):
            if rows % shards:
                raise ValueError(f"{rows} {what} do not divide by mesh axes {'*'.join(axes)}={shards}")

    def clean(x: jax.Array, ids: jax.Array) -> jax.Array:  # whatever padding holds, even what is no number
        return jnp.where(ids[:, None] >= 0, x.astype(jnp.float32), 0.0)

    scale, bias = scale.astype(jnp.float32), bias.astype(jnp.float32)
    return _sums(
        form, chunk, clean(images, image_ids), clean(texts, text_ids), scale, bias, image_ids, text_ids
    )


def _sums_of(form: Form, chunk: int, *arguments: jax.Array) -> PairSums:
    return _forward(form, chunk, *arguments)[0]


_sums = jax.custom_vjp(_sums_of, nondiff_argnums=(0, 1))


# Forward: what a row has seen.

LOWEST = float(jnp.finfo(jnp.float32).min)


@struct.dataclass
class _Seen:
    """Running sums of rows over the columns they met, f32[R] each."""

    positives: Leaf  # their number
    positive_logits: Leaf  # their sum
    best_positive: Leaf  # the highest logit
    best_negative: Leaf
    total: Leaf  # of exp(logit - highest) for the softmax, of the loss for the sigmoid

    @property
    def highest(self) -> jax.Array:
        return jnp.maximum(self.best_positive, self.best_negative)


def _nothing_seen(rows: int) -> _Seen:
    zero, lowest = jnp.zeros(rows), jnp.full(rows, LOWEST)
    return _Seen(zero, zero, lowest, lowest, zero)


def _see(form: Form, seen: _Seen, z: jax.Array, valid: jax.Array, positive: jax.Array) -> _Seen:
    """Rows meet some more columns: ``z`` [R n], which of them count, and which are positives."""
    negative = valid & ~positive
    after = dataclasses.replace(
        seen,
        positives=seen.positives + jnp.sum(positive, axis=1, dtype=jnp.float32),
        positive_logits=seen.positive_logits + jnp.sum(jnp.where(positive, z, 0.0), axis=1),
        best_positive=jnp.maximum(seen.best_positive, jnp.max(jnp.where(positive, z, LOWEST), axis=1)),
        best_negative=jnp.maximum(seen.best_negative, jnp.max(jnp.where(negative, z, LOWEST), axis=1)),
    )
    if form == "sigmoid":
        kept, terms = seen.total, jax.nn.softplus(jnp.where(positive, -z, z))
    else:
        kept, terms = seen.total * jnp.exp(seen.highest - after.highest), jnp.exp(z - after.highest[:, None])
    return dataclasses.replace(after, total=kept + jnp.sum(jnp.where(valid, terms, 0.0), axis=1))


def _softmax_loss(seen: _Seen) -> jax.Array:
    """Sum over rows that have a positive."""
    asked = seen.positives > 0
    mean = seen.positive_logits / jnp.where(asked, seen.positives, 1.0)
    loss = jnp.log(jnp.where(asked, seen.total, 1.0)) + (seen.highest - mean)
    return jnp.sum(jnp.where(asked, loss, 0.0))


def _right(seen: _Seen) -> jax.Array:
    return jnp.sum(seen.best_positive > seen.best_negative, dtype=jnp.float32)


def _compare(
    images: jax.Array,
    texts: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    image_ids: jax.Array,
    text_ids: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits [R n], which pairs count, and which belong together."""
    z = jnp.exp(scale) * jnp.matmul(images, texts.T, precision=jax.lax.Precision.HIGHEST) + bias
    valid = (image_ids[:, None] >= 0) & (text_ids >= 0)
    return z, valid, valid & (image_ids[:, None] == text_ids)


def _forward(form: Form, chunk: int, *arguments: jax.Array) -> tuple[PairSums, tuple]:
    def local(images, texts, scale, bias, image_ids, text_ids):
        def meet(rows: _Seen, visitors: tuple, columns: _Seen) -> tuple[_Seen, _Seen]:
            some, ids = visitors
            z, valid, positive = _compare(images, some, scale, bias, image_ids, ids)
            columns = _see(form, columns, z.T, valid.T, positive.T)
            return _see(form, rows, z, valid, positive), columns

        start = _nothing_seen(len(images)), (texts, text_ids), _nothing_seen(len(texts))
        rows, columns = _round(meet, *start, chunk=chunk)
        if form == "softmax":
            loss = (_softmax_loss(rows) + _softmax_loss(columns)) / 2
        else:
            loss = jnp.sum(rows.total)
        return _add_up(PairSums(loss, _right(rows), _right(columns))), rows, columns

    whole, rows = P(), _rows()
    inputs = rows, rows, whole, whole, rows, rows
    sums, images_seen, texts_seen = _spread(local, inputs, (whole, rows, rows))(*arguments)
    return sums, (arguments, images_seen, texts_seen)


# Backward: the logits again, and their gradient.


def _slope(
    form: Form, z: jax.Array, valid: jax.Array, positive: jax.Array, rows: _Seen, columns: _Seen
) -> jax.Array:
    """The gradient of the loss by the logits [R n]."""
    if form == "sigmoid":
        slope = jnp.where(positive, -jax.nn.sigmoid(-z), jax.nn.sigmoid(z))
    else:
        slope = (_softmax_slope(z, positive, rows) + _softmax_slope(z.T, positive.T, columns).T) / 2
    return jnp.where(valid, slope, 0.0)


def _softmax_slope(z: jax.Array, positive: jax.Array, seen: _Seen) -> jax.Array:
    """Softmax minus target, for rows that have one."""
    asked = seen.positives > 0
    # The logits before the logarithm: their difference is exact near the highest, where the softmax is large.
    softmax = jnp.exp(z - seen.highest[:, None]) / jnp.where(asked, seen.total, 1.0)[:, None]
    target = jnp.where(positive, 1.0 / jnp.where(asked, seen.positives, 1.0)[:, None], 0.0)
    return jnp.where(asked[:, None], softmax - target, 0.0)


def _backward(form: Form, chunk: int, residual: tuple, grads: PairSums) -> tuple:
    arguments, images_seen, texts_seen = residual

    def local(images, texts, scale, bias, image_ids, text_ids, rows, columns, grad):
        def meet(mine: tuple, visitors: tuple, grad_texts: jax.Array) -> tuple[tuple, jax.Array]:
            some, ids, seen = visitors
            z, valid, positive = _compare(images, some, scale, bias, image_ids, ids)
            slope = _slope(form, z, valid, positive, rows, seen)
            highest = jax.lax.Precision.HIGHEST
            grad_texts += jnp.matmul(slope.T, images, precision=highest)
            by_image = jnp.matmul(slope, some, precision=highest), jnp.sum(slope, axis=1)
            return jax.tree.map(jnp.add, mine, by_image), grad_texts

        mine = jnp.zeros_like(images), jnp.zeros(len(images))
        visitors = texts, text_ids, columns
        (grad_images, by_row), grad_texts = _round(meet, mine, visitors, jnp.zeros_like(texts), chunk=chunk)
        factor = grad * jnp.exp(scale)
        grad_images, grad_texts = factor * grad_images, factor * grad_texts
        # A logit less its bias is exp(scale) * <image, text>, and so is its derivative by ``scale``.
        both = _add_up((jnp.sum(grad_images * images), grad * jnp.sum(by_row)))
        return grad_images, grad_texts, both

    whole, rows = P(), _rows()
    inputs = rows, rows, whole, whole, rows, rows, rows, rows, whole
    spread = _spread(local, inputs, (rows, rows, whole))
    grad_images, grad_texts, both = spread(*arguments, images_seen, texts_seen, grads.loss)
    return grad_images, grad_texts, *both, None, None


_sums.defvjp(_forward, _backward)


# The ring.


def _rows() -> P:
    return current_rules().spec(("batch",))


def _axes() -> tuple[str, ...]:
    return () if current_mesh() is None else current_rules().batch


def _spread(local: Callable[..., Any], in_specs: tuple, out_specs: tuple) -> Callable[..., Any]:
    mesh = current_mesh()
    if mesh is None:
        return local
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _add_up(tree: Any) -> Any:
    return jax.lax.psum(tree, _axes()) if _axes() else tree


def _round(
    meet: Callable[[Any, Any, Any], tuple[Any, Any]], mine: Any, visitors: Any, carried: Any, *, chunk: int
) -> tuple[Any, Any]:
    """Every shard's texts visit all shards, ``chunk`` of them meet the images at once.

    Args:
      meet: ``(mine, visitors, carried) -> (mine, carried)`` for one chunk.
      mine: what stays here and is changed by every visit.
      visitors: texts and what is known of them, [C ...] each.
      carried: what is changed of the texts, [C ...] each; it is back where it began at the end.
    """
    axes, size = _axes(), jax.tree.leaves(carried)[0].shape[0]
    pieces = max(1, -(-size // chunk))
    length = -(-size // pieces)

    def cut(x: jax.Array) -> jax.Array:  # ids of -1 fill up the last piece, and zeros the rest
        fill = -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0
        padding = [(0, pieces * length - size)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, padding, constant_values=fill).reshape(pieces, length, *x.shape[1:])

    def visit(mine: Any, visitors: Any, carried: Any) -> tuple[Any, Any]:
        return jax.lax.scan(lambda mine, piece: meet(mine, *piece), mine, (visitors, carried))

    def step(state: tuple, _: None) -> tuple[tuple, None]:
        mine, visitors, carried = state
        following = _shift(visitors, axes)  # while these are compared, the next ones arrive
        mine, carried = visit(mine, visitors, carried)
        return (mine, following, _shift(carried, axes)), None

    visitors, carried = jax.tree.map(cut, (visitors, carried))
    if axes:
        state = mine, visitors, carried
        (mine, _, carried), _ = jax.lax.scan(step, state, length=jax.lax.axis_size(axes))
    else:
        mine, carried = visit(mine, visitors, carried)
    return mine, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:size], carried)


def _shift(tree: Any, axes: tuple[str, ...]) -> Any:
    shards = jax.lax.axis_size(axes)
    neighbours = [(i, (i + 1) % shards) for i in range(shards)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axes, neighbours), tree)
