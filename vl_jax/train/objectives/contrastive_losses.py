"""Contrastive losses of image-text pairs from their vectors, a few texts at a time, over any mesh.

    logits[i, t] = exp(scale) * <image i, text t> (+ bias)      positive where image_ids[i] == text_ids[t]

What belongs together is told by ids and not by position: two captions of one image in a batch are positives
of each other's image. A row whose id is negative is padding, and takes part in nothing. A row with an id that
no row of the other side has (such as ``heads.pairs.FOREIGN``) is a negative of all others; the softmax asks
nothing of it. So wrong texts are further columns.

Neither all logits nor all texts are ever on one device (see ``pair_ring``). Forward, a row keeps running sums
only (see ``pair_forms``). The gradient is written down: it computes the logits again, so it keeps no more.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from vl_jax.params import Leaf
from vl_jax.sharding import batch_axes, current_mesh, current_rules
from vl_jax.train.objectives.hard_negatives import HardSigmoid, HardSoftmax
from vl_jax.train.objectives.pair_forms import Form, Met, Sigmoid, Softmax, nothing_seen, see
from vl_jax.train.objectives.pair_ring import add_up, batch_rows, go_round, spread


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
    hardness: float = 0.0,
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
      hardness: how much more the harder negatives of a row count, see ``hard_negatives``; 0: all the same.

    Raises:
      ValueError: ``chunk`` is not positive, ``hardness`` is negative, or rows do not divide by the mesh axes
        of the batch.
    """
    form = HardSoftmax(hardness) if hardness else Softmax()
    return _checked(form, chunk, images, texts, scale, jnp.zeros(()), image_ids, text_ids)


def sigmoid_sums(
    images: Float[Array, "B E"],
    texts: Float[Array, "C E"],
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    *,
    image_ids: Int[Array, " B"],
    text_ids: Int[Array, " C"],
    chunk: int,
    hardness: float = 0.0,
) -> PairSums:
    """SigLIP's loss (arXiv 2303.15343, equation 1) before it is divided: every pair is a yes or no.

    The sign is +1 for every positive, not for the diagonal only. Arguments are those of ``softmax_sums``;
    ``bias`` is added to every logit.
    """
    form = HardSigmoid(hardness) if hardness else Sigmoid()
    return _checked(form, chunk, images, texts, scale, bias, image_ids, text_ids)


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


# Forward: what rows have seen.


def _right(seen: Met) -> jax.Array:
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
        def meet(rows: Met, visitors: tuple, columns: Met) -> tuple[Met, Met]:
            some, ids = visitors
            z, valid, positive = _compare(images, some, scale, bias, image_ids, ids)
            columns = see(form, columns, z.T, valid.T, positive.T)
            return see(form, rows, z, valid, positive), columns

        start = nothing_seen(form, len(images)), (texts, text_ids), nothing_seen(form, len(texts))
        rows, columns = go_round(meet, *start, chunk=chunk)
        return add_up(PairSums(form.loss(rows, columns), _right(rows), _right(columns))), rows, columns

    whole, rows = P(), batch_rows()
    inputs = rows, rows, whole, whole, rows, rows
    sums, images_seen, texts_seen = spread(local, inputs, (whole, rows, rows))(*arguments)
    return sums, (arguments, images_seen, texts_seen)


# Backward: the logits again, and their gradient.


def _backward(form: Form, chunk: int, residual: tuple, grads: PairSums) -> tuple:
    arguments, images_seen, texts_seen = residual

    def local(images, texts, scale, bias, image_ids, text_ids, rows, columns, grad):
        def meet(mine: tuple, visitors: tuple, grad_texts: jax.Array) -> tuple[tuple, jax.Array]:
            some, ids, seen = visitors
            z, valid, positive = _compare(images, some, scale, bias, image_ids, ids)
            slope = jnp.where(valid, form.slope(z, valid, positive, rows, seen), 0.0)
            highest = jax.lax.Precision.HIGHEST
            grad_texts += jnp.matmul(slope.T, images, precision=highest)
            by_image = jnp.matmul(slope, some, precision=highest), jnp.sum(slope, axis=1)
            return jax.tree.map(jnp.add, mine, by_image), grad_texts

        mine = jnp.zeros_like(images), jnp.zeros(len(images))
        visitors = texts, text_ids, columns
        (grad_images, by_row), grad_texts = go_round(meet, mine, visitors, jnp.zeros_like(texts), chunk=chunk)
        factor = grad * jnp.exp(scale)
        grad_images, grad_texts = factor * grad_images, factor * grad_texts
        # A logit less its bias is exp(scale) * <image, text>, and so is its derivative by ``scale``.
        both = add_up((jnp.sum(grad_images * images), grad * jnp.sum(by_row)))
        return grad_images, grad_texts, both

    whole, rows = P(), batch_rows()
    inputs = rows, rows, whole, whole, rows, rows, rows, rows, whole
    backward = spread(local, inputs, (rows, rows, whole))
    grad_images, grad_texts, both = backward(*arguments, images_seen, texts_seen, grads.loss)
    return grad_images, grad_texts, *both, None, None


_sums.defvjp(_forward, _backward)
