"""A mosaic: four samples of a source in one picture, with the labels that lie in their pictures.

    a sample, three others --each fills its part, the rest is cut off-->  +----+------+
                                                                          |  a |   b  |
    labels --cut and moved alike--> one label of each name                +----+------+
                                                                          |  c |   d  |
                                                                          +----+------+

It has the size and the id of the first sample. Labels that do not lie in the picture, such as one class of
the whole, say nothing of four pictures: they are left out. What is drawn follows from the key alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Shaped
from PIL import Image as PilImage

from vl_jax.data.files.memory_cache import MemoryCache, decode
from vl_jax.data.images import spatial
from vl_jax.data.images.audio import SoundImage
from vl_jax.data.images.augment import CUT_OFF
from vl_jax.data.images.augmented import NO_CACHE, LayeredImage
from vl_jax.data.images.spatial import Boxes, Cut, HeldMasks, Instances, PixelMap
from vl_jax.data.sample import IMAGE_PLACEHOLDER, BadSample, Box, Image, Note, Sample, image_size

Size = tuple[int, int]
_PARTS = 4
_TRIES = 12  # records that are looked at for three others
_NEAREST = 0.3  # share of the picture that lies on either side of the place where four parts meet, at least


@dataclass(frozen=True)
class MosaicPart:
    """What is shown of one picture, and where its upper left corner is put."""

    image: Image
    cut: Cut
    corner: Size


@dataclass(frozen=True)
class MosaicImage:
    """Parts of pictures as one picture."""

    parts: tuple[MosaicPart, ...]
    whole: Size
    cache: MemoryCache = NO_CACHE  # of the pictures

    def __call__(self) -> PilImage.Image:
        """Raises as the pictures do."""
        result = PilImage.new("RGB", self.whole)
        for part in self.parts:
            picture = decode(part.image, self.cache)
            drawn = picture.resize(part.cut.size, PilImage.Resampling.BICUBIC, box=part.cut.corners)
            result.paste(drawn, part.corner)
        return result

    def size(self) -> Size:
        """Width and height."""
        return self.whole

    def changed(
        self, picture: PilImage.Image, change: Callable[[PilImage.Image], PilImage.Image]
    ) -> PilImage.Image:
        """See ``LayeredImage``: it has the channels of its parts, which are of one source."""
        first = self.parts[0].image
        return first.changed(picture, change) if isinstance(first, LayeredImage) else change(picture)


def can_join(sample: Sample) -> bool:
    """Whether a sample can be a part of a mosaic: one picture with labels in it, and not a word about it."""
    words = [sample.system, *(text for turn in sample.turns for text in (turn.question, turn.answer))]
    return (
        len(sample.images) == 1
        and not isinstance(sample.images[0], SoundImage)
        and not sample.media
        and spatial.is_spatial(sample.labels)
        and not any(text.replace(IMAGE_PLACEHOLDER, "").strip() for text in words)
    )


def mosaic(
    sample: Sample,
    pick: Callable[[int], Sample],
    count: int,
    rng: np.random.Generator,
    *,
    min_visible: float,
    cache: MemoryCache = NO_CACHE,
) -> Sample:
    """A mosaic of a sample and three others; the sample itself where no three others can be found.

    Args:
      sample: one that can be joined.
      pick: gives the record of a number below ``count``, or raises ``BadSample``.
      min_visible: objects of whose box a smaller share of the area is left are left out.
      cache: of the pictures.

    Raises:
      BadSample: the sample cannot be used.
    """
    others, (width, height) = [], image_size(sample.images[0])
    for record in rng.integers(count, size=_TRIES).tolist():
        try:
            other = pick(record)
            if can_join(other) and min(image_size(other.images[0])) > 0:
                others.append(other)
        except BadSample:  # it is counted where it is drawn by itself
            continue
        if len(others) == _PARTS - 1:
            break
    if len(others) < _PARTS - 1 or min(width, height) < 2:
        return sample
    shares = rng.uniform(_NEAREST, 1 - _NEAREST, 2)
    meeting = round(width * shares[0]), round(height * shares[1])
    order = rng.permutation(_PARTS).tolist()
    shifts = rng.random((_PARTS, 2)).tolist()
    samples = [[sample, *others][i] for i in order]
    joined = join(samples, (width, height), meeting, shifts, min_visible=min_visible, cache=cache)
    return dataclasses.replace(sample, images=joined.images, labels=joined.labels, notes=joined.notes)


def join(
    samples: Sequence[Sample],
    whole: Size,
    meeting: Size,
    shifts: Sequence[Sequence[float]],
    *,
    min_visible: float = 0.0,
    cache: MemoryCache = NO_CACHE,
) -> Sample:
    """Four samples as one, of that size: above on the left, above on the right, below on the left and right.

    Args:
      meeting: where the four parts meet.
      shifts: of each, what share of the columns and rows that are cut off lies on the left and above.

    Raises:
      BadSample: a sample cannot be used.
    """
    (width, height), (x, y) = whole, meeting
    corners = ((0, 0), (x, 0), (0, y), (x, y))
    sizes = ((x, y), (width - x, y), (x, height - y), (width - x, height - y))
    parts, labels = [], []
    for sample, size, corner, shift in zip(samples, sizes, corners, shifts, strict=True):
        of = image_size(sample.images[0])
        cut = filling(of, size, shift)
        parts.append(MosaicPart(sample.images[0], cut, corner))
        labels.append(spatial.cut_labels(sample.labels, cut, of, min_visible=min_visible))
    lost, count = spatial.lost_objects([sample.labels for sample in samples], labels)
    notes = tuple(note for sample in samples for note in sample.notes)
    if lost:
        message = f"sample {samples[0].id}: a mosaic cuts off {lost} of {count} objects"
        notes += (Note(CUT_OFF, message),)
    image = MosaicImage(tuple(parts), whole, cache)
    return Sample(samples[0].id, (), (image,), labels=_joined(labels, corners, whole), notes=notes)


def filling(of: Size, size: Size, shift: Sequence[float]) -> Cut:
    """The largest part of a picture that has the shape of what it is to fill.

    Args:
      of: width and height of the picture.
      size: of what it is to fill.
      shift: see ``join``.
    """
    scale = max(size[0] / of[0], size[1] / of[1])
    across, down = min(size[0] / scale, of[0]), min(size[1] / scale, of[1])
    left, top = (of[0] - across) * shift[0], (of[1] - down) * shift[1]
    return Cut((left, top, min(left + across, of[0]), min(top + down, of[1])), size)


def _joined(labels: Sequence[Mapping[str, Any]], corners: Sequence[Size], whole: Size) -> dict[str, Any]:
    """The labels of the parts as those of the whole.

    A map says nothing where a part has none. A name under which a part has no boxes, or no objects, is left
    out: nobody has looked for them there.
    """
    result = {}
    for name in dict.fromkeys(name for of in labels for name in of):
        found = [of.get(name) for of in labels]
        maps = [label for label in found if isinstance(label, PixelMap)]
        if maps and all(label is None or isinstance(label, PixelMap) for label in found):
            parts = tuple((m, c) for m, c in zip(found, corners, strict=True) if m is not None)
            result[name] = PixelMap(_Patched(parts, whole, maps[0].missing), whole, maps[0].missing)
        elif all(isinstance(label, Boxes) for label in found):
            result[name] = Boxes(_moved(found, corners), whole)
        objects = [label for label in found if isinstance(label, Instances)]
        if len(objects) == len(found):
            masks = [_spread(m.values(), c, whole) for m, c in zip(objects, corners, strict=True)]
            result[name] = Instances(_moved(objects, corners), HeldMasks(np.concatenate(masks)), whole)
    return result


def _moved(labels: Sequence[Any], corners: Sequence[Size]) -> tuple[Box, ...]:
    """All boxes, from where they lie in their part to where they lie in the whole."""
    result = []
    for label, (x, y) in zip(labels, corners, strict=True):
        for box in label.boxes:
            x0, y0, x1, y1 = box.corners
            result.append(Box(box.label, (x0 + x, y0 + y, x1 + x, y1 + y)))
    return tuple(result)


def _spread(masks: Bool[np.ndarray, "n p q"], corner: Size, whole: Size) -> Bool[np.ndarray, "n h w"]:
    """Masks of a part as masks of the whole."""
    (x, y), (width, height) = corner, whole
    result = np.zeros((len(masks), height, width), bool)
    result[:, y : y + masks.shape[1], x : x + masks.shape[2]] = masks
    return result


@dataclass(frozen=True)
class _Patched:
    """Reads the maps of parts; a class, so that it can go from one process to another."""

    parts: tuple[tuple[PixelMap, Size], ...]
    whole: Size
    missing: float

    def __call__(self) -> Shaped[np.ndarray, "h w"]:
        """The map of the whole."""
        result: np.ndarray | None = None
        for label, (x, y) in self.parts:
            values = label.values()
            if result is None:
                result = np.full(self.whole[::-1], self.missing, values.dtype)
            height, width = values.shape
            result[y : y + height, x : x + width] = np.where(values == label.missing, self.missing, values)
        assert result is not None  # There is a part.
        return result
