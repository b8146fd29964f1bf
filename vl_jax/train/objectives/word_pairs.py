"""Late interaction: a picture and a text are as near as their tokens are to the nearest of the other side.

    image to text:  mean over the picture's tokens of the highest product with a word
    text to image:  mean over the words of the highest product with a token of the picture

(FILIP, Yao et al. 2021, arXiv 2111.07783, equations 3 to 5; padding is no word.) The two are different
numbers: pictures choose among texts by the first, texts among pictures by the second.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vl_jax.train.objectives.contrastive_losses import PairSums
from vl_jax.train.objectives.pair_forms import LOWEST, Met, Softmax, nothing_seen, see


def nearness(
    images: Float[Array, "B S E"],
    image_mask: Bool[Array, "B S"],
    texts: Float[Array, "C T E"],
    text_mask: Bool[Array, "C T"],
    *,
    chunk: int,
) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """How near every picture is to every text, seen from the picture and from the text.

    Args:
      chunk: texts that are compared at once, at most; of no more than that all products exist.
    """
    count = texts.shape[0]
    chunk = next(size for size in range(min(chunk, count), 0, -1) if count % size == 0)

    def compare(some: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        words, there = some
        products = jnp.einsum("bse,cte->bcst", images, words, precision=jax.lax.Precision.HIGHEST)
        seen, read = image_mask[:, None, :], there[None]
        from_image = jnp.max(jnp.where(read[:, :, None, :], products, LOWEST), axis=3)
        from_text = jnp.max(jnp.where(seen[..., None], products, LOWEST), axis=2)
        # Without any word, or any token, there is nothing to be near to.
        both = jnp.any(seen, axis=2) & jnp.any(read, axis=2)
        return tuple(
            jnp.where(both, _mean(jnp.where(both[..., None], best, 0.0), mask), 0.0)
            for best, mask in ((from_image, seen), (from_text, read))
        )

    parts = jax.tree.map(lambda x: x.reshape(count // chunk, chunk, *x.shape[1:]), (texts, text_mask))
    body = jax.checkpoint(compare)  # pyright: ignore[reportPrivateImportUsage]
    found = jax.lax.map(body, parts)
    image, text = (jnp.moveaxis(x, 0, 1).reshape(images.shape[0], count) for x in found)
    return image, text


def _mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    mask = jnp.broadcast_to(mask, values.shape).astype(values.dtype)
    return jnp.sum(values * mask, axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1.0)


def word_sums(
    from_image: Float[Array, "B C"],
    from_text: Float[Array, "B C"],
    scale: Float[Array, ""],
    *,
    image_ids: Int[Array, " B"],
    text_ids: Int[Array, " C"],
) -> PairSums:
    """The softmax loss of both ways, halved; ids are those of ``contrastive_losses.softmax_sums``."""
    form, factor = Softmax(), jnp.exp(scale.astype(jnp.float32))
    valid = (image_ids[:, None] >= 0) & (text_ids >= 0)
    positive = valid & (image_ids[:, None] == text_ids)
    rows = see(form, nothing_seen(form, len(image_ids)), factor * from_image, valid, positive)
    columns = see(form, nothing_seen(form, len(text_ids)), factor * from_text.T, valid.T, positive.T)
    return PairSums(form.loss(rows, columns), _right(rows), _right(columns))


def _right(met: Met) -> jax.Array:
    return jnp.sum(met.best_positive > met.best_negative, dtype=jnp.float32)
