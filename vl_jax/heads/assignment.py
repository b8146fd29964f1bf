"""Which cells learn which objects: task-aligned assignment (Feng et al. 2021, TOOD, arXiv 2108.07755).

    metric of a cell and an object = score of its class ^ alpha * IoU of the two boxes ^ beta
    candidates of an object        = the k of the highest metric, among cells whose centre lies inside it
    object of a cell               = of those it is a candidate of, the one with the highest IoU
    target score of a cell         = metric / highest metric of that object's cells * their highest IoU

Shapes are static: objects that are not there are masked. What is assigned has no gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from vl_jax.heads.boxes import iou
from vl_jax.params import Leaf

_EPSILON = 1e-9


@struct.dataclass
class Assignment:
    """What each cell learns."""

    assigned: Leaf  # bool[A] whether it has an object at all
    object: Leaf  # i32[A] its number; 0 where it has none
    score: Leaf  # f32[A] the target score of the object's class; 0 where it has none


def inside(
    centres: Float[Array, "A 2"], boxes: Float[Array, "G 4"], *, smallest: Float[Array, "2"] | None = None
) -> Bool[Array, "A G"]:
    """Whether the centre of a cell lies in a box: its lower sides belong to it, its upper sides do not.

    Args:
      smallest: sides that a box counts as having at least. With those of a cell, every box has a centre of
        some cell in it, however small it is.
    """
    middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2.0, (boxes[:, 2:] - boxes[:, :2]) / 2.0
    if smallest is not None:
        half = jnp.maximum(half, smallest / 2.0)
    low, high = (middle - half)[None], (middle + half)[None]
    return jnp.all((centres[:, None] >= low) & (centres[:, None] < high), axis=-1)


def assign(
    scores: Float[Array, "A K"],
    boxes: Float[Array, "A 4"],
    candidates: Bool[Array, "A G"],
    objects: Float[Array, "G 4"],
    classes: Int[Array, " G"],
    *,
    top_k: int,
    alpha: float = 0.5,
    beta: float = 6.0,
) -> Assignment:
    """The cells of one picture.

    Args:
      scores: what cells say now, in [0, 1].
      boxes: where they say it is.
      candidates: which cells an object may have; none of an object that is not there (see ``inside``).
      objects: corners of the true boxes.
      classes: their classes.
      top_k: cells of an object at most.
    """
    scores, boxes = jax.lax.stop_gradient((scores, boxes))
    overlap = iou(boxes[:, None], objects[None])  # [A G]
    metric = jnp.take(scores, classes, axis=1) ** alpha * overlap**beta
    metric = jnp.where(candidates, metric, -1.0)
    values, best = jax.lax.top_k(metric.T, min(top_k, metric.shape[0]))  # [G k]
    numbers = jnp.arange(objects.shape[0])
    chosen = jnp.zeros(metric.shape, bool).at[best, numbers[:, None]].set(values >= 0.0)
    # One object a cell.
    winner = jnp.argmax(jnp.where(chosen, overlap, -1.0), axis=1)
    chosen = chosen & (numbers[None] == winner[:, None])
    metric, overlap = jnp.where(chosen, metric, 0.0), jnp.where(chosen, overlap, 0.0)
    share = metric / (jnp.max(metric, axis=0) + _EPSILON**2) * jnp.max(overlap, axis=0)
    assigned = jnp.any(chosen, axis=1)
    return Assignment(assigned, jnp.where(assigned, winner, 0), jnp.sum(share, axis=1))
