"""Boxes as numbers: how far two agree, losses where they do not, and distances from a cell to the sides.

Corners are x0, y0, x1, y1 in pixels. All functions are over the last axis and broadcast over the others.

    IoU  = area of both / area of either
    GIoU = IoU - share of the smallest box around both that neither covers        (Rezatofighi et al. 2019)
    CIoU = IoU - squared distance of centres / squared diagonal of that box - a v       (Zheng et al. 2020)
           v = (4 / pi^2) (atan(w / h) - atan(w' / h'))^2,   a = v / (1 - IoU + v) without gradient
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

_EPSILON = 1e-7
_CLEARANCE = 1.01  # how far a target stays below the number of bins: both its neighbours are bins


def _overlap(
    one: Float[Array, "*a 4"], other: Float[Array, "*b 4"]
) -> tuple[Float[Array, "*c"], Float[Array, "*c"]]:
    """IoU, and the area of either."""
    sides = jnp.minimum(one[..., 2:], other[..., 2:]) - jnp.maximum(one[..., :2], other[..., :2])
    common = jnp.prod(jnp.maximum(sides, 0.0), axis=-1)
    areas = [jnp.prod(box[..., 2:] - box[..., :2], axis=-1) for box in (one, other)]
    union = areas[0] + areas[1] - common
    return common / (union + _EPSILON), union


def iou(one: Float[Array, "*a 4"], other: Float[Array, "*b 4"]) -> Float[Array, "*c"]:
    """Share of the common area; 0 of two boxes without area."""
    return _overlap(one, other)[0]


def giou(one: Float[Array, "*a 4"], other: Float[Array, "*b 4"]) -> Float[Array, "*c"]:
    """IoU, less the share of the smallest box around both that neither covers: in (-1, 1]."""
    share, union = _overlap(one, other)
    around = jnp.prod(_around(one, other), axis=-1)
    return share - (around - union) / (around + _EPSILON)


def ciou(one: Float[Array, "*a 4"], other: Float[Array, "*b 4"]) -> Float[Array, "*c"]:
    """IoU, less what centres and proportions differ by; the weight of proportions has no gradient."""
    share, _ = _overlap(one, other)
    diagonal = jnp.sum(_around(one, other) ** 2, axis=-1)
    apart = one[..., :2] + one[..., 2:] - other[..., :2] - other[..., 2:]
    distance = jnp.sum(apart**2, axis=-1) / 4.0
    proportions = (4 / math.pi**2) * (_angle(one) - _angle(other)) ** 2
    weight = jax.lax.stop_gradient(proportions / (1.0 - share + proportions + _EPSILON))
    return share - distance / (diagonal + _EPSILON) - weight * proportions


def _around(one: Float[Array, "*a 4"], other: Float[Array, "*b 4"]) -> Float[Array, "*c 2"]:
    """Sides of the smallest box around both."""
    return jnp.maximum(one[..., 2:], other[..., 2:]) - jnp.minimum(one[..., :2], other[..., :2])


def _angle(box: Float[Array, "*a 4"]) -> Float[Array, "*a"]:
    """That of the diagonal; a box without area has a gradient too."""
    sides = jnp.maximum(box[..., 2:] - box[..., :2], _EPSILON)
    return jnp.arctan(sides[..., 0] / sides[..., 1])


def sigmoid_focal(
    logits: Float[Array, "*a"], targets: Float[Array, "*a"], *, alpha: float = 0.25, gamma: float = 2.0
) -> Float[Array, "*a"]:
    """Cross-entropy of independent classes, less of what is right already (Lin et al. 2017).

        a_t (1 - p_t)^gamma * cross-entropy,   p_t the probability of what is true

    Args:
      targets: in [0, 1].
      alpha: weight of a target of 1; that of 0 is ``1 - alpha``. Below 0: both 1.
      gamma: 0 is plain cross-entropy.
    """
    share = jax.nn.sigmoid(logits)
    right = share * targets + (1.0 - share) * (1.0 - targets)
    loss = optax.sigmoid_binary_cross_entropy(logits, targets)
    if gamma:
        loss = loss * (1.0 - right) ** gamma
    return loss if alpha < 0 else loss * (alpha * targets + (1.0 - alpha) * (1.0 - targets))


def distribution_focal(logits: Float[Array, "*a R"], target: Float[Array, "*a"]) -> Float[Array, "*a"]:
    """Cross-entropy of a distance as a distribution over 0 ... R - 1 (Li et al. 2020).

    A target between two bins is shared by them; one beyond the last but ``R - 1.01`` counts as that.
    """
    bins = logits.shape[-1]
    target = jnp.clip(target, 0.0, bins - _CLEARANCE)
    low = jnp.floor(target).astype(jnp.int32)
    high = target - low.astype(target.dtype)
    shares = -jax.nn.log_softmax(logits)
    return (1.0 - high) * _pick(shares, low) + high * _pick(shares, low + 1)


def _pick(values: Float[Array, "*a R"], index: Int[Array, "*a"]) -> Float[Array, "*a"]:
    return jnp.take_along_axis(values, index[..., None], axis=-1)[..., 0]


def expected(logits: Float[Array, "*a R"]) -> Float[Array, "*a"]:
    """The mean of such a distribution, in [0, R - 1]. With one bin, a positive number instead of a mean."""
    bins = logits.shape[-1]
    if bins == 1:
        return jax.nn.softplus(logits[..., 0])
    return jnp.sum(jax.nn.softmax(logits) * jnp.arange(bins, dtype=logits.dtype), axis=-1)


def from_distances(cells: Float[Array, "*a 4"], distances: Float[Array, "*b 4"]) -> Float[Array, "*c 4"]:
    """Corners of the boxes whose sides are so far from the centres of cells.

    Args:
      cells: x and y of the centre, width and height of the cell, in pixels.
      distances: to the left, upper, right and lower side, in cells.
    """
    centre, side = cells[..., :2], cells[..., 2:]
    low = centre - distances[..., :2] * side
    return jnp.concatenate([low, centre + distances[..., 2:] * side], axis=-1)


def to_distances(cells: Float[Array, "*a 4"], boxes: Float[Array, "*b 4"]) -> Float[Array, "*c 4"]:
    """The inverse of ``from_distances``; negative where the centre lies outside."""
    centre, side = cells[..., :2], cells[..., 2:]
    low = (centre - boxes[..., :2]) / side
    return jnp.concatenate([low, (boxes[..., 2:] - centre) / side], axis=-1)
