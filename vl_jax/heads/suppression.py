"""Suppression of boxes that say the same: greedy, exact, by class, with static shapes, so that it compiles.

The most certain box stays, and takes away every later one of its class that overlaps it by more than a
threshold; then the next that is left. Equal scores go by their order. What is kept is that of
``torchvision.ops.batched_nms``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from vl_jax.heads.boxes import iou
from vl_jax.params import Leaf


@struct.dataclass
class Detections:
    """The boxes of a picture, the most certain first; a score of 0 is no box."""

    boxes: Leaf  # f32[N 4] corners
    scores: Leaf  # f32[N]
    classes: Leaf  # i32[N]
    cells: Leaf = None  # i32[N] which guess each is, where that is known


def suppress(
    boxes: Float[Array, "N 4"],
    scores: Float[Array, " N"],
    classes: Int[Array, " N"],
    *,
    threshold: float | Float[Array, ""],
) -> Bool[Array, " N"]:
    """Which boxes stay.

    Args:
      boxes: corners, in any order.
      scores: those of 0 or less are no boxes.
      threshold: an overlap that is still allowed.
    """
    count = scores.shape[0]
    order = jnp.argsort(-scores, stable=True)
    ordered, kinds = boxes[order], classes[order]
    over = (iou(ordered[:, None], ordered[None]) > threshold) & (kinds[:, None] == kinds[None])
    later = jnp.arange(count)

    def take(index: jax.Array, stays: jax.Array) -> jax.Array:
        return stays & ~(stays[index] & over[index] & (later > index))

    stays = jax.lax.fori_loop(0, count, take, scores[order] > 0.0)
    return jnp.zeros(count, bool).at[order].set(stays)


def strongest(
    boxes: Float[Array, "A 4"],
    scores: Float[Array, "A K"],
    *,
    most: int,
    least_score: float,
) -> Detections:
    """The most certain pairs of a box and a class, without any suppression.

    Args:
      most: N, how many there are at most.
      least_score: pairs below it are none.
    """
    classes = scores.shape[1]
    values, index = jax.lax.top_k(scores.reshape(-1), min(most, scores.size))
    values = jnp.where(values >= least_score, values, 0.0)
    cells = (index // classes).astype(jnp.int32)
    return Detections(boxes[cells], values, (index % classes).astype(jnp.int32), cells)


def without_copies(found: Detections, *, threshold: float | Float[Array, ""], most: int) -> Detections:
    """What suppression leaves, the most certain first; ``most`` of them at most."""
    stays = suppress(found.boxes, found.scores, found.classes, threshold=threshold)
    values, index = jax.lax.top_k(jnp.where(stays, found.scores, 0.0), min(most, stays.shape[0]))
    return jax.tree.map(lambda of: of[index], found).replace(scores=values)
