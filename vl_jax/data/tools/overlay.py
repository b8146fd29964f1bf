"""Labels that lie in a picture, drawn on it: boxes, objects in colours of their own, maps with a legend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Num
from PIL import Image as PilImage

from vl_jax.data.images import palette
from vl_jax.data.images.spatial import Boxes, Instances, PixelMap, SpatialLabel
from vl_jax.data.sample import BadSample, Sample, in_one_line
from vl_jax.data.text import grounding

_MOST = 64  # classes; a map with more numbers is one of measures
_NAMED = 8  # lines of a legend
_SIDE = 640  # pixels of what is drawn, at most
_OVER = 0.55  # how much of a colour lies over the picture


@dataclass(frozen=True)
class Overlay:
    """A picture with one of its labels drawn on it, and what the label says in a line."""

    picture: PilImage.Image
    caption: str


def overlays(sample: Sample, classes: Mapping[str, Sequence[str]]) -> Iterator[Overlay]:
    """The first picture of a sample with each label that lies in it; one that cannot be read says why.

    Args:
      classes: names of the numbers in maps, by label.

    Raises:
      BadSample: the picture cannot be used.
    """
    placed = {name: label for name, label in sample.labels.items() if isinstance(label, SpatialLabel)}
    picture = sample.images[0]() if placed and sample.images else None
    for name, label in placed.items():
        if picture is None:
            return
        try:
            if tuple(label.size) != picture.size:
                message = f"of {label.size} pixels, its picture of {picture.size}"
                raise BadSample("bad_label", message)
            drawn, said = _drawn(picture, label, classes.get(name, ()))
        except BadSample as error:
            drawn, said = _small(picture), str(error)
        yield Overlay(drawn, in_one_line(f"{name}: {said}"))


def _drawn(
    picture: PilImage.Image, label: SpatialLabel, classes: Sequence[str]
) -> tuple[PilImage.Image, str]:
    if isinstance(label, Boxes | Instances):
        if isinstance(label, Instances):
            masks = label.values()
            for mask, colour in zip(masks, palette.colours(len(masks)), strict=True):
                picture = _over(picture, np.where(mask, 0, -1), colour[None])
        counts = Counter(box.label for box in label.boxes)
        said = ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "no object"
        return _small(grounding.draw(picture, label.boxes).picture), said
    if isinstance(label, PixelMap):
        return _map(picture, label, classes)
    return _small(picture), f"a {type(label).__name__}, which is not drawn"


def _map(picture: PilImage.Image, label: PixelMap, classes: Sequence[str]) -> tuple[PilImage.Image, str]:
    """Classes in their colours over the picture; measures as heat, where they are known."""
    values = label.values()
    known = ~(np.isnan(values) | (values == label.missing))
    share = f"{1 - known.mean():.0%} of the pixels say nothing"
    levels, counts = np.unique(values[known], return_counts=True)
    if not len(levels):
        return _small(picture), share
    if np.issubdtype(values.dtype, np.floating) or len(levels) > _MOST:
        low, high = float(levels[0]), float(levels[-1])
        heat = palette.heat((np.where(known, values, low) - low) / max(high - low, 1e-12))
        shown = np.where(known[:, :, None], heat, np.asarray(picture.convert("L"))[:, :, None])
        ends = (tuple(map(int, colour)) for colour in palette.heat(np.array([[0.0, 1.0]]))[0])
        legend = dict(zip((f"{low:.4g}", f"{high:.4g}"), ends, strict=False))
        said = f"{low:.4g} to {high:.4g}; {share}"
        return palette.with_legend(_small(PilImage.fromarray(shown.astype(np.uint8))), legend), said
    colours = palette.colours(max(len(classes), int(levels.max()) + 1))
    drawn = _small(_over(picture, np.where(known, values.astype(np.int64), -1), colours))
    order = levels[np.argsort(-counts, kind="stable")].astype(int).tolist()
    names = {level: str(classes[level]) if 0 <= level < len(classes) else str(level) for level in order}
    legend = {names[level]: tuple(map(int, colours[level])) for level in order[:_NAMED]}
    shares = dict(zip(levels.astype(int).tolist(), (counts / values.size).tolist(), strict=True))
    said = ", ".join(f"{names[level]} {shares[level]:.0%}" for level in order[:_NAMED])
    said += f" and {len(order) - _NAMED} more" if len(order) > _NAMED else ""
    return palette.with_legend(drawn, legend), f"{said}; {share}"


def _over(
    picture: PilImage.Image, which: Num[np.ndarray, "h w"], colours: Num[np.ndarray, "k 3"]
) -> PilImage.Image:
    """The picture with a colour laid over every pixel; -1 is none."""
    pixels = np.asarray(picture.convert("RGB")).astype(np.float64)
    laid = colours[np.maximum(which, 0)].astype(np.float64)
    mixed = np.where((which >= 0)[:, :, None], (1 - _OVER) * pixels + _OVER * laid, pixels)
    return PilImage.fromarray(np.round(mixed).astype(np.uint8))


def _small(picture: PilImage.Image) -> PilImage.Image:
    """A copy that a page can hold."""
    result = picture.convert("RGB").copy()
    result.thumbnail((_SIDE, _SIDE))
    return result
