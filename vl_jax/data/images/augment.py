"""Augmentation that respects what is said of a picture: pixels change, and what the text says stays true.

    sample --draw, from a key--> geometry (crop, zoom, mirror) --> pictures, boxes in the text and beside it
                                 look (brightness, hue, ...)   --> pictures

A picture keeps its size, and a conversation its length in tokens, so that lengths once measured stay valid.
What is drawn follows from the key alone. Evaluation is never augmented.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vl_jax.data.files.memory_cache import MemoryCache
from vl_jax.data.images import spatial
from vl_jax.data.images.audio import SoundImage
from vl_jax.data.images.augmented import NO_CACHE, AugmentedImage, Geometry, Look
from vl_jax.data.media.inputs import StartedAt
from vl_jax.data.sample import Box, Note, Sample, Turn, image_size
from vl_jax.data.text import grounding

CUT_OFF = "object_cut_off"  # reason of a note
_ATTEMPTS = 8  # crops tried before a picture stays whole

# Texts that a mirror image makes false, those about writing, which it makes illegible, and those about
# sounds, whose pictures it would play backwards.
_SIDED = re.compile(
    r"\b(left|right|east|west|clockwise|mirror\w*|text|word|words|letter|letters|writ\w*|read|reads|reading|says?"
    r"|spell\w*|hear\w*|sound\w*|audio|spoken|speak\w*|voice|sign|signs|logo|title|caption|label|number|numbers|digit|digits|clock|time|plate)\b"
    r"|[左右东西听声音说]|顺时针|逆时针|镜|文字|文本|写|读|字母|单词|数字|标志|标题|标签|招牌|车牌|时间|几点",
    re.IGNORECASE,
)
# Texts that may become false when a margin is cut off: counts, and places in the picture.
_WHOLE = re.compile(
    r"\b(how many|count|number of|corner|edge|border|top|bottom|middle|cent(er|re)|background)\b"
    r"|几|多少|数量|总共|角落|边缘|顶部|底部|中间|中央|上方|下方|背景",
    re.IGNORECASE,
)
_FIXED = frozenset({"ocr", "word", "count", "position"})  # kinds of turns that say as much without any word


@dataclass(frozen=True)
class AugmentationConfig:
    """How much training pictures and other inputs may change; what is 0 is off."""

    brightness: float = 0.0  # factors are drawn from 1 - this to 1 + this; so for the next two
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0  # the most by which colours move on the circle of hues, either way; 0.5 is any hue
    crop: float = 0.0  # the most that is cut off of width and height, in all; the rest is scaled up again
    # The most by which a picture is made smaller, as a share of its size; grey is around it. With ``crop``,
    # half of the draws zoom out and the others crop.
    zoom_out: float = 0.0
    # Share of the draws that show four samples of a source in one picture, see ``mosaic``. They must have
    # labels that lie in the picture, and no words.
    mosaic: float = 0.0
    flip_rate: float = 0.0  # share of the draws that are mirrored, where no text speaks against it
    # Share of its area that every box in a text keeps. Objects of labels that keep less are left out.
    min_visible: float = 0.7
    # Whether sounds, series and clips that are longer than the model reads begin anywhere.
    random_start: bool = False

    def __post_init__(self):
        for name in ("brightness", "contrast", "saturation", "crop", "zoom_out"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"augmentation.{name}={getattr(self, name)}: must lie in 0..1, below 1")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"augmentation.hue={self.hue}: must lie in 0..0.5")
        for name in ("flip_rate", "mosaic"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augmentation.{name}={getattr(self, name)}: must lie in 0..1")
        if not 0 < self.min_visible <= 1:
            raise ValueError(f"augmentation.min_visible={self.min_visible}: must lie above 0, up to 1")


def augment(
    sample: Sample,
    config: AugmentationConfig,
    rng: np.random.Generator,
    *,
    length: Callable[[str], int],
    cache: MemoryCache = NO_CACHE,
) -> Sample:
    """A draw of the sample with changed pictures and, where they move, changed boxes.

    A geometry is taken only if every box keeps ``min_visible`` of its area, and its text as many tokens. The
    pictures of a sample with several of them stay where they are, for the text may compare them.

    Args:
      length: the number of tokens of a text.
      cache: of the pictures before they are changed.

    Raises:
      BadSample: an image cannot be used.
    """
    if config.random_start and sample.media:
        share = float(rng.random())
        media = {name: StartedAt(found, share) for name, found in sample.media.items()}
        sample = dataclasses.replace(sample, media=media)
    if not sample.images:
        return sample
    # What is off draws nothing, so that the draws of other changes stay as they are.
    brightness, contrast, saturation = rng.uniform(-1, 1, 3).tolist()
    look = Look(
        1 + config.brightness * brightness,
        1 + config.contrast * contrast,
        1 + config.saturation * saturation,
        config.hue * rng.uniform(-1, 1) if config.hue else 0.0,
    )
    for geometry in _geometries(sample, config, rng):
        turns = _moved(sample, geometry, config.min_visible, length)
        if turns is not None:
            images = tuple(AugmentedImage(image, geometry, look, cache) for image in sample.images)
            labels = _moved_labels(sample, geometry, config.min_visible)
            notes = (*sample.notes, *_lost(sample, labels))
            return dataclasses.replace(sample, turns=turns, images=images, labels=labels, notes=notes)
    raise AssertionError("the picture as it is can always be taken")


def _geometries(sample: Sample, config: AugmentationConfig, rng: np.random.Generator) -> Iterator[Geometry]:
    """What may be done to the pictures of a sample, in the order of preference; at last, nothing."""
    texts = [sample.system, *(text for turn in sample.turns for text in (turn.question, turn.answer))]
    kinds = {turn.kind for turn in sample.turns}
    single = len(sample.images) == 1 and not kinds & _FIXED
    sound = isinstance(sample.images[0], SoundImage)
    sided = sound or any(map(_SIDED.search, texts))
    mirrored = bool(rng.random() < config.flip_rate) and single and not sided
    movable = single and not any(map(_WHOLE.search, texts))
    if config.zoom_out and movable and not sound and (not config.crop or rng.random() < 0.5):
        side = 1 / (1 - config.zoom_out * rng.random())
        left, top = ((1 - side) * rng.random() for _ in range(2))
        yield Geometry((left, top, left + side, top + side), mirrored)
    if config.crop and movable:
        for _ in range(_ATTEMPTS):
            share = 1 - config.crop * rng.random()
            left, top = ((1 - share) * rng.random() for _ in range(2))
            yield Geometry((left, top, left + share, top + share), mirrored)
    if mirrored:
        yield Geometry(mirrored=True)
    yield Geometry()


def _moved(
    sample: Sample, geometry: Geometry, min_visible: float, length: Callable[[str], int]
) -> tuple[Turn, ...] | None:
    """The turns with their boxes where the geometry takes them; None if it must not be taken."""
    if geometry == Geometry():
        return sample.turns
    turns = []
    for turn in sample.turns:
        boxes = turn.boxes
        if boxes:
            size = image_size(sample.images[0])
            moved = [spatial.clipped(geometry.cut(*size), box.corners, min_visible) for box in boxes]
            boxes = tuple(Box(b.label, c) for b, c in zip(boxes, moved, strict=True) if c)
        texts = [_rewritten(text, geometry, min_visible, length) for text in (turn.question, turn.answer)]
        if len(boxes) < len(turn.boxes) or None in texts:
            return None
        turns.append(dataclasses.replace(turn, question=texts[0], answer=texts[1], boxes=boxes))
    return tuple(turns)


def _moved_labels(sample: Sample, geometry: Geometry, min_visible: float) -> Mapping[str, Any]:
    """Labels that lie in the picture, moved with it; objects that get lost are left out."""
    if geometry == Geometry() or not spatial.is_spatial(sample.labels):
        return sample.labels
    size = image_size(sample.images[0])
    return spatial.cut_labels(sample.labels, geometry.cut(*size), size, min_visible=min_visible)


def _lost(sample: Sample, labels: Mapping[str, Any]) -> tuple[Note, ...]:
    """A note, if the labels have fewer objects than those of the sample."""
    lost, count = spatial.lost_objects([sample.labels], [labels])
    if not lost:
        return ()
    message = f"sample {sample.id}: augmentation cuts off {lost} of {count} objects"
    return (Note(CUT_OFF, message),)


def _rewritten(text: str, geometry: Geometry, min_visible: float, length: Callable[[str], int]) -> str | None:
    """The text with its boxes moved; None if one gets lost, or the text another length."""
    lost = False

    def move(corners: grounding.Corners) -> grounding.Corners:
        nonlocal lost
        size = (grounding.GRID, grounding.GRID)
        found = spatial.clipped(geometry.cut(*size), corners, min_visible)
        lost |= found is None
        return grounding.to_grid(found or corners, *size)

    result = grounding.rewrite(text, move)
    return None if lost or (result != text and length(result) != length(text)) else result
