"""What people draw in Label Studio as upright rectangles: rectangles that may be turned, polygons, brushes.

    {"original_width": 640, "original_height": 480, "value": one of
       {"x": 10, "y": 20, "width": 5, "height": 5, "rotation": 0, "rectanglelabels": ["cat"]}    per cent
       {"points": [[10, 20], [15, 20], [15, 25]], "polygonlabels": ["cat"]}                      per cent
       {"x": 10, "y": 20, "radiusX": 5, "radiusY": 5, "rotation": 0, "ellipselabels": ["cat"]}   per cent
       {"format": "rle", "rle": [0, 0, ...], "brushlabels": ["cat"]}                             see ``_mask``

Of a polygon, an ellipse and a brush, the rectangle is what encloses them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vl_jax.data.images.frames import declared_frame
from vl_jax.data.picture import PictureFrame
from vl_jax.data.sample import BadSample, Note

RECTANGLES = frozenset({"rectanglelabels", "rectangle"})
POLYGONS = frozenset({"polygonlabels", "polygon"})
BRUSHES = frozenset({"brushlabels", "brush"})
ELLIPSES = frozenset({"ellipselabels", "ellipse"})
DRAWN = RECTANGLES | POLYGONS | BRUSHES | ELLIPSES

_MAX_POINTS = 100_000  # of a polygon
_MAX_PIXELS = 64_000_000  # of a picture with a mask


@dataclass(frozen=True)
class DrawnRegion:
    """A rectangle in pixels of a picture of that size."""

    corners: tuple[float, float, float, float]
    width: int
    height: int
    notes: tuple[Note, ...] = ()


def read_region(result: dict[str, Any], where: str, frames: Sequence[PictureFrame] = ()) -> DrawnRegion:
    """The region of a result whose type is among ``DRAWN``.

    Args:
      frames: that of the picture; without it, the result says how large the picture is.

    Raises:
      BadSample: numbers are missing or absurd, nothing of it is in the picture, a mask cannot be decoded, or
        the size that the result declares is not the picture's.
    """
    size = (result.get("original_width"), result.get("original_height"))
    if not all(isinstance(n, int) and 0 < n < 10**6 for n in size):
        raise BadSample("bad_box", f"{where}: a region in a picture of {size[0]!r} x {size[1]!r}")
    if result.get("image_rotation"):
        raise BadSample("bad_box", f"{where}: a picture that is turned by {result['image_rotation']!r}")
    width, height = int(size[0] or 0), int(size[1] or 0)
    value, kind = result["value"], result["type"]
    if kind in BRUSHES:
        points = _brush(value, width, height, where)
    elif kind in POLYGONS:
        points = _polygon(value, width, height, where)
    elif kind in ELLIPSES:
        points = _ellipse(value, width, height, where)
    else:
        points = _rectangle(value, width, height, where)
    left, right = (min(max(f(x for x, _ in points), 0.0), float(width)) for f in (min, max))
    top, bottom = (min(max(f(y for _, y in points), 0.0), float(height)) for f in (min, max))
    if left >= right or top >= bottom:
        raise BadSample("bad_box", f"{where}: a region without an area in the picture")
    declared = declared_frame((width, height), frames, where)
    corners = declared.place((left, top, right, bottom))
    return DrawnRegion(corners, *declared.size, declared.notes(where))


def _numbers(values: Sequence[Any]) -> bool:
    return all(type(n) in (int, float) and abs(n) < 1e6 for n in values)  # NaN is not less


def _rectangle(value: dict[str, Any], width: int, height: int, where: str) -> list[tuple[float, float]]:
    """The corners, which are turned about the first."""
    numbers: list[Any] = [value.get(name) for name in ("x", "y", "width", "height")]
    turned = value.get("rotation") or 0
    if not _numbers([*numbers, turned]):
        raise BadSample("bad_box", f"{where}: a rectangle needs x, y, width and height")
    x, w = (numbers[i] * width / 100 for i in (0, 2))
    y, h = (numbers[i] * height / 100 for i in (1, 3))
    sine, cosine = math.sin(math.radians(turned)), math.cos(math.radians(turned))
    return [(x + a * cosine - b * sine, y + a * sine + b * cosine) for a in (0, w) for b in (0, h)]


def _ellipse(value: dict[str, Any], width: int, height: int, where: str) -> list[tuple[float, float]]:
    """Two corners of what encloses it; it is turned about its middle."""
    numbers: list[Any] = [value.get(name) for name in ("x", "y", "radiusX", "radiusY")]
    turned = value.get("rotation") or 0
    if not _numbers([*numbers, turned]):
        raise BadSample("bad_box", f"{where}: an ellipse needs x, y, radiusX and radiusY")
    x, a = (numbers[i] * width / 100 for i in (0, 2))
    y, b = (numbers[i] * height / 100 for i in (1, 3))
    sine, cosine = math.sin(math.radians(turned)), math.cos(math.radians(turned))
    across, down = math.hypot(a * cosine, b * sine), math.hypot(a * sine, b * cosine)
    return [(x - across, y - down), (x + across, y + down)]


def _polygon(value: dict[str, Any], width: int, height: int, where: str) -> list[tuple[float, float]]:
    points = value.get("points")
    points = points if isinstance(points, list) else []
    if not 3 <= len(points) <= _MAX_POINTS or not all(isinstance(p, list) and len(p) == 2 for p in points):
        raise BadSample("bad_box", f"{where}: a polygon needs points, at least three pairs")
    if not _numbers([n for point in points for n in point]):
        raise BadSample("bad_box", f"{where}: a polygon needs finite numbers")
    return [(x * width / 100, y * height / 100) for x, y in points]


def _brush(value: dict[str, Any], width: int, height: int, where: str) -> list[tuple[float, float]]:
    """The first and the last corner of what encloses the painted pixels."""
    if width * height > _MAX_PIXELS:
        raise BadSample("bad_box", f"{where}: a mask of {width}x{height}, limit {_MAX_PIXELS} pixels")
    try:
        painted = _mask(bytes(value.get("rle") or []), 4 * width * height)[3::4].reshape(height, width)
    except (TypeError, ValueError) as error:
        raise BadSample("bad_mask", f"{where}: a brush that cannot be decoded: {error}") from None
    rows, columns = np.flatnonzero(painted.any(1)), np.flatnonzero(painted.any(0))
    if not len(rows):
        raise BadSample("bad_mask", f"{where}: a brush that painted nothing")
    return [(float(columns[0]), float(rows[0])), (float(columns[-1] + 1), float(rows[-1] + 1))]


def _mask(data: bytes, count: int) -> np.ndarray:
    """Which values of an image of four channels are above 0, of which the fourth is what was painted.

    The format is that of thi.ng/rle-pack, a stream of bits: 32 of the number of values, 5 of their width less
    one, four times 4 of a width of lengths less one; then pieces. A piece is one bit, whether it is a run,
    two that choose a width, the length less one in so many, and the value of the run, or that many values.

    Raises:
      ValueError: the stream ends too early, or is not of so many values.
    """
    place = 0

    def take(bits: int) -> int:
        nonlocal place
        stop = place + bits
        if stop > 8 * len(data):
            raise ValueError(f"cut off after {len(data)} bytes")
        last = -(-stop // 8)
        chunk = int.from_bytes(data[place // 8 : last])
        place = stop
        return chunk >> (8 * last - stop) & ((1 << bits) - 1)

    if (found := take(32)) != count:
        raise ValueError(f"{found} values for {count}")
    width = take(5) + 1
    lengths = [take(4) + 1 for _ in range(4)]
    painted, done = np.zeros(count, np.bool_), 0
    while done < count:
        run, length = take(1), take(lengths[take(2)]) + 1
        if done + length > count:
            raise ValueError(f"more than {count} values")
        if run:
            painted[done : done + length] = take(width) > 0
        else:
            painted[done : done + length] = [take(width) > 0 for _ in range(length)]
        done += length
    return painted
