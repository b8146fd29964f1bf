"""Copies: how near pictures come to those that a model has learnt from."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8

_BLOCK = 256  # pictures compared at a time


def nearest_distances(
    pictures: UInt8[np.ndarray, "N *d"], known: UInt8[np.ndarray, "M *d"]
) -> Float[np.ndarray, " N"]:
    """The distance of every picture to the nearest known one: the root of the mean square over its numbers.

    0 is the same picture, 1 is black beside white.

    Raises:
      ValueError: nothing is known.
    """
    if not len(known):
        raise ValueError("no known pictures to compare with")
    points, others = (x.reshape(len(x), -1).astype(np.float64) / 255 for x in (pictures, known))
    norms, found = np.sum(others**2, axis=1), []
    for begin in range(0, len(points), _BLOCK):
        block = points[begin : begin + _BLOCK]
        squares = np.sum(block**2, axis=1)[:, None] + norms - 2 * block @ others.T
        found.append(np.sqrt(np.maximum(squares.min(axis=1), 0) / points.shape[1]))
    return np.concatenate(found) if found else np.zeros(0)
