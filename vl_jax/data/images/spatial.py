"""Labels that lie in a picture: boxes, maps of pixels, objects with masks. They move as the picture does.

    labels, in pixels of the picture --cut: crop, mirror, tile--> labels, in pixels of what is shown

What is shown is always a ``Cut``: a rectangle of the picture, which may reach beyond its edges, drawn at some
size. A crop of augmentation is one, and so is the tile that a head's picture becomes (``tiling.shown``).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Shaped

from vl_jax.data.sample import BadSample, Box

Corners = tuple[float, float, float, float]  # x0, y0, x1, y1


@dataclass(frozen=True)
class Cut:
    """What is shown of a picture: ``corners`` of it, drawn with ``size`` (width, height) pixels."""

    corners: Corners  # in pixels of the picture; beyond its edges where there is a margin
    size: tuple[int, int]
    mirrored: bool = False

    def move(self, corners: Corners) -> Corners:
        """Where a rectangle of the picture is shown; not clipped."""
        (left, top, right, bottom), (width, height) = self.corners, self.size
        x0, x1 = ((x - left) / (right - left) * width for x in corners[::2])
        y0, y1 = ((y - top) / (bottom - top) * height for y in corners[1::2])
        return (width - x1, y0, width - x0, y1) if self.mirrored else (x0, y0, x1, y1)

    def back(self, corners: Corners) -> Corners:
        """Where a rectangle of what is shown lies in the picture: what ``move`` is undone by."""
        (left, top, right, bottom), (width, height) = self.corners, self.size
        x0, y0, x1, y1 = corners
        x0, x1 = (width - x1, width - x0) if self.mirrored else (x0, x1)
        across, down = (right - left) / width, (bottom - top) / height
        return left + x0 * across, top + y0 * down, left + x1 * across, top + y1 * down

    def pixels(self, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Rows and columns of a picture of that size at the middles of what is shown, and whether they exist.

        Returns:
          Rows i[h] and columns i[w], kept within the picture, and for each bool, whether it was within.
        """
        (left, top, right, bottom), (width, height) = self.corners, self.size
        columns = np.floor(left + (np.arange(width) + 0.5) * ((right - left) / width)).astype(np.int64)
        rows = np.floor(top + (np.arange(height) + 0.5) * ((bottom - top) / height)).astype(np.int64)
        columns = columns[::-1] if self.mirrored else columns
        across, down = (columns >= 0) & (columns < size[0]), (rows >= 0) & (rows < size[1])
        return rows.clip(0, size[1] - 1), columns.clip(0, size[0] - 1), down, across


@runtime_checkable
class SpatialLabel(Protocol):
    """A value of ``Sample.labels`` that moves with the first picture of the sample."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture that it belongs to."""
        ...

    def cut(self, cut: Cut, min_visible: float = 0.0) -> SpatialLabel:
        """The label of what is shown.

        Args:
          min_visible: objects of whose box a smaller share of the area is left are left out.
        """
        ...


@dataclass(frozen=True)
class Boxes:
    """The objects of a picture as rectangles; there may be none."""

    boxes: tuple[Box, ...]
    size: tuple[int, int]

    def cut(self, cut: Cut, min_visible: float = 0.0) -> Boxes:
        """Those of what is shown, clipped to it."""
        moved = ((box, clipped(cut, box.corners, min_visible)) for box in self.boxes)
        return Boxes(tuple(Box(box.label, corners) for box, corners in moved if corners), cut.size)


@dataclass(frozen=True)
class PixelMap:
    """A number for every pixel, such as its class or its depth: ``read`` gives [h w].

    A pixel with the value ``missing``, or with one that is not a number, says nothing.
    """

    read: Callable[[], np.ndarray]
    size: tuple[int, int]
    missing: float

    def cut(self, cut: Cut, min_visible: float = 0.0) -> PixelMap:
        """The map of what is shown: every pixel says what the nearest one said."""
        return PixelMap(_CutMap(self, cut), cut.size, self.missing)

    def values(self) -> Shaped[np.ndarray, "h w"]:
        """What ``read`` gives.

        Raises:
          BadSample: it has another size than the picture.
        """
        found = np.asarray(self.read())
        _check_size(found.shape, self.size)
        return found


@dataclass(frozen=True)
class Instances:
    """Objects with a mask each: ``masks`` gives bool[n h w], in the order of the boxes."""

    boxes: tuple[Box, ...]
    masks: Callable[[], np.ndarray]
    size: tuple[int, int]

    def cut(self, cut: Cut, min_visible: float = 0.0) -> Instances:
        """The objects of what is shown, of which a box is left and a pixel of the mask.

        Raises:
          BadSample: as ``values``, for the masks are read here.
        """
        moved = [clipped(cut, box.corners, min_visible) for box in self.boxes]
        rows, columns, down, across = cut.pixels(self.size)
        masks = self.values()[:, rows[:, None], columns[None, :]] & (down[:, None] & across[None, :])
        seen = np.asarray(masks.any(axis=(1, 2)))
        kept = [i for i, corners in enumerate(moved) if corners and seen[i]]
        boxes = tuple(Box(self.boxes[i].label, corners) for i in kept if (corners := moved[i]))
        return Instances(boxes, HeldMasks(masks[kept]), cut.size)

    def values(self) -> Bool[np.ndarray, "n h w"]:
        """What ``masks`` gives.

        Raises:
          BadSample: there are more or fewer than boxes, or they have another size than the picture.
        """
        found = np.asarray(self.masks(), bool)
        if len(found) != len(self.boxes):
            raise BadSample("bad_label", f"{len(found)} masks of {len(self.boxes)} objects")
        if self.boxes:
            _check_size(found.shape[1:], self.size)
        return found.reshape(len(found), self.size[1], self.size[0])


@dataclass(frozen=True)
class _CutMap:
    """Reads a map and cuts it; a class, so that it can go from one process to another."""

    of: PixelMap
    shown: Cut

    def __call__(self) -> np.ndarray:
        values = self.of.values()
        rows, columns, down, across = self.shown.pixels(self.of.size)
        inside = down[:, None] & across[None, :]
        return np.where(inside, values[rows[:, None], columns[None, :]], values.dtype.type(self.of.missing))


@dataclass(frozen=True)
class HeldMasks:
    """Masks that are in memory."""

    masks: np.ndarray  # bool[n h w]

    def __call__(self) -> np.ndarray:
        """They."""
        return self.masks


def clipped(cut: Cut, corners: Corners, min_visible: float = 0.0) -> Corners | None:
    """Where a rectangle is shown, clipped to what is shown; None if too little of it is left to see."""
    x0, y0, x1, y1 = cut.move(corners)
    width, height = cut.size
    left, right = (min(max(x, 0.0), float(width)) for x in (x0, x1))
    top, bottom = (min(max(y, 0.0), float(height)) for y in (y0, y1))
    area, visible = (x1 - x0) * (y1 - y0), (right - left) * (bottom - top)
    return None if visible <= 0 or visible < min_visible * area else (left, top, right, bottom)


def in_picture(
    cut: Cut, corners: Float[np.ndarray, "n 4"], size: tuple[int, int]
) -> Float[np.ndarray, "n 4"]:
    """Where rectangles of what is shown lie in a picture of that size, clipped to it.

    One that lies in the margin becomes a line at the edge of the picture.
    """
    found = [cut.back((x0, y0, x1, y1)) for x0, y0, x1, y1 in np.asarray(corners, np.float64).tolist()]
    return np.clip(np.array(found, np.float64).reshape(-1, 4), 0.0, np.array([*size, *size], np.float64))


def cut_labels(
    labels: Mapping[str, Any], cut: Cut, size: tuple[int, int], *, min_visible: float = 0.0
) -> dict[str, Any]:
    """Labels with those that lie in the picture cut as it is; all others stay as they are.

    Args:
      size: width and height of the picture.

    Raises:
      BadSample: a label belongs to a picture of another size.
    """
    result = dict(labels)
    for name, label in labels.items():
        if isinstance(label, SpatialLabel):
            if tuple(label.size) != tuple(size):
                message = f"label {name!r} is of {label.size} pixels, its picture of {size}"
                raise BadSample("bad_label", message)
            result[name] = label.cut(cut, min_visible)
    return result


def lost_objects(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """How many objects fewer there are, and of how many: of the label that has lost most.

    Labels of different names often tell of the same objects, so they are not added up.
    """
    had, has = (_num_objects(labels) for labels in (before, after))
    return max(((had[name] - has[name], had[name]) for name in had), default=(0, 0))


def is_spatial(labels: Mapping[str, Any]) -> bool:
    """Whether any of the labels lies in the picture."""
    return any(isinstance(label, SpatialLabel) for label in labels.values())


def whole(boxes: Boxes) -> Boxes:
    """Boxes of a source, clipped to their picture; those outside are left out.

    Raises:
      BadSample: a corner is no number, or a right or lower edge lies before the left or upper one.
    """
    for box in boxes.boxes:
        x0, y0, x1, y1 = box.corners
        if not np.isfinite(box.corners).all() or x1 < x0 or y1 < y0:
            raise BadSample("bad_box", f"box {box.label!r} at {box.corners}: expected x0 <= x1 and y0 <= y1")
    width, height = boxes.size
    return dataclasses.replace(boxes, boxes=boxes.cut(Cut((0, 0, width, height), boxes.size)).boxes)


def _num_objects(labels: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """The objects of some pictures, by the name of the label."""
    result = Counter[str]()
    for of_picture in labels:
        for name, label in of_picture.items():
            if isinstance(label, Boxes | Instances):
                result[name] += len(label.boxes)
    return result


def _check_size(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    if tuple(shape) != (size[1], size[0]):
        raise BadSample("bad_label", f"a map of {list(shape)} pixels, its picture is {size[1]} x {size[0]}")
