"""Outlines of objects as COCO writes them, as masks: polygons, or lengths of runs.

    [[x0, y0, x1, y1, ...], ...]                 polygons; what lies in any of them is the object
    {"size": [height, width], "counts": [...]}   runs down the columns, by turns outside and inside; the
                                                 counts may be packed in a text

A pixel belongs to a polygon if its middle lies inside, by the even-odd rule. Runs are exact. In a packed text
each character holds five bits, the lowest first, and says whether more follow; the last holds the sign, and
from the fourth count on it is the step from the one before the last. Source: the mask API of COCO.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image as PilImage

from vl_jax.data.images.frames import DeclaredFrame
from vl_jax.data.picture import turned
from vl_jax.data.sample import BadSample

Outline = Callable[[], Bool[np.ndarray, "h w"]]
_BITS, _MORE, _SIGN, _FIRST = 31, 32, 16, 48  # of a packed character
_MOST = 10**6  # a coordinate


@dataclass(frozen=True)
class Polygons:
    """Polygons in pixels of a picture."""

    rings: tuple[tuple[tuple[float, float], ...], ...]
    size: tuple[int, int]

    def __call__(self) -> Bool[np.ndarray, "h w"]:
        """The mask of what lies in any of them."""
        result = np.zeros(self.size[::-1], bool)
        for ring in self.rings:
            result |= _filled(ring, self.size)
        return result


@dataclass(frozen=True)
class Runs:
    """Lengths of runs in the frame that a record declares."""

    counts: tuple[int, ...]
    frame: DeclaredFrame

    def __call__(self) -> Bool[np.ndarray, "h w"]:
        """The mask in pixels of the picture."""
        width, height = self.frame.declared
        inside = np.arange(len(self.counts)) % 2 == 1
        mask = np.repeat(inside, self.counts).reshape(width, height).T
        picture = PilImage.fromarray(mask.astype(np.uint8))
        picture = turned(picture.resize(self.frame.fitting, PilImage.Resampling.NEAREST), self.frame.turn)
        return np.asarray(picture) > 0


def outline(given: Any, frame: DeclaredFrame, where: str) -> Outline:
    """What gives the mask of an object, in pixels of the picture as it is read.

    Raises:
      BadSample: it is neither polygons nor runs, or runs of a mask of another size than the record declares.
    """
    if isinstance(given, Mapping):
        return Runs(_runs(given, frame.declared, where), frame)
    if not isinstance(given, list) or not all(isinstance(ring, list) for ring in given):
        rule = 'must be polygons, [[x0, y0, x1, y1, ...]], or {"size": [height, width], "counts": ...}'
        raise BadSample("bad_outline", f"{where} {rule}")
    for number, ring in enumerate(given):
        sound = all(type(x) in (int, float) and math.isfinite(x) and abs(x) < _MOST for x in ring)
        if len(ring) < 6 or len(ring) % 2 or not sound:
            rule = "needs three points or more, each an x and a y that are finite numbers"
            raise BadSample("bad_outline", f"{where}: polygon {number} of {len(ring)} numbers {rule}")
    return Polygons(tuple(tuple(_placed(ring, frame)) for ring in given), frame.size)


def _placed(ring: Sequence[float], frame: DeclaredFrame) -> list[tuple[float, float]]:
    """The points of a polygon on the picture as it is read."""
    points = zip(map(float, ring[::2]), map(float, ring[1::2]), strict=True)
    return [frame.place((x, y, x, y))[:2] for x, y in points]


def _runs(given: Mapping[str, Any], declared: tuple[int, int], where: str) -> tuple[int, ...]:
    size, counts = given.get("size"), given.get("counts")
    if size != [declared[1], declared[0]]:
        rule = f"size must be that of the record, [height, width] = {list(declared[::-1])}"
        raise BadSample("bad_outline", f"{where}: a mask of {str(size)[:40]}, {rule}")
    if isinstance(counts, str):
        counts = unpacked(counts)
    if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        rule = "must be a list of whole numbers, none below 0, or such a list packed in a text"
        raise BadSample("bad_outline", f"{where}: counts {rule}")
    if sum(counts) != declared[0] * declared[1]:
        message = f"{where}: counts add up to {sum(counts)}, the mask has {declared[0] * declared[1]} pixels"
        raise BadSample("bad_outline", message)
    return tuple(counts)


def unpacked(text: str) -> list[int] | None:
    """The counts that a text holds; None if it holds something else."""
    result: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - _FIRST
        if not 0 <= bits < 2 * _MORE or shift > 60:
            return None
        value |= (bits & _BITS) << shift
        shift += 5
        if bits & _MORE:
            continue
        if bits & _SIGN:
            value -= 1 << shift
        result.append(value + result[-2] if len(result) > 2 else value)
        value = shift = 0
    return None if shift else result


def _filled(ring: Sequence[tuple[float, float]], size: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """The pixels whose middle lies inside one polygon."""
    width, height = size
    crossings = np.zeros((height, width + 1), np.int64)  # edges between a pixel and the one to its left
    for (x0, y0), (x1, y1) in zip(ring, [*ring[1:], ring[0]], strict=True):
        low, high = min(y0, y1), max(y0, y1)
        first, last = max(math.ceil(low - 0.5), 0), min(math.ceil(high - 0.5), height)
        if first >= last:
            continue
        rows = np.arange(first, last)
        at = x0 + (rows + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
        columns = np.ceil(at - 0.5).clip(0, width).astype(np.int64)
        np.add.at(crossings, (rows, columns), 1)
    return np.cumsum(crossings, axis=1)[:, :width] % 2 == 1
