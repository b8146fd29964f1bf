"""Inputs that are no pictures, drawn so that one can look at them: a small picture, and what it is in a line.

[n] wave: how far it reaches      [t c] series: a line for each channel     [n h w c]: frames, slices
[h w 1] map: dark is little       [h w 2] flow: hue is direction, colour is speed
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Num
from PIL import Image as PilImage
from PIL import ImageDraw

from vl_jax.data.images.clips import evenly
from vl_jax.data.sample import BadSample, Sample, in_one_line
from vl_jax.data.tools.overlay import Overlay

_WIDTH, _HEIGHT = 320, 96
_LINES = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75))
_FRAMES, _SIDE = 8, 96  # of a strip: how many, and the pixels of the longer side of each


def media_pictures(sample: Sample) -> Iterator[Overlay]:
    """Each input of a sample, drawn; one that cannot be read says why."""
    for name, media in sample.media.items():
        try:
            values = np.asarray(media())
            picture = drawn(values)
        except BadSample as error:
            yield Overlay(PilImage.new("RGB", (_WIDTH, 8), (200, 60, 60)), in_one_line(f"{name}: {error}"))
            continue
        if picture is not None:
            yield Overlay(picture, in_one_line(f"{name}: {_described(values)}"))


def drawn(values: Num[np.ndarray, "..."]) -> PilImage.Image | None:
    """A picture of an input; None for what no picture says more of than its numbers."""
    if not values.size or min(values.shape) < 1 or (values.ndim == 1 and len(values) < 64):
        return None
    if values.ndim == 1:
        return _wave(values)
    if values.ndim == 2:
        return _series(values)
    if values.ndim == 3:
        return _map(values)
    return _strip(values) if values.ndim == 4 and values.shape[-1] in (1, 3) else None


def _described(values: Num[np.ndarray, "..."]) -> str:
    shape = " x ".join(map(str, values.shape))
    return f"{values.dtype}, {shape}, from {values.min():.4g} to {values.max():.4g}"


def _levels(values: Num[np.ndarray, "..."]) -> Num[np.ndarray, "..."]:
    """Values as grey levels, from their least to their greatest; those of eight bits as they are."""
    if values.dtype == np.uint8:
        return values
    least, most = float(values.min()), float(values.max())
    return ((values - least) * (255 / max(most - least, 1e-12))).astype(np.uint8)


def _wave(values: Num[np.ndarray, " n"]) -> PilImage.Image:
    """For every column, from the least to the greatest sample that falls on it; the edges are full scale."""
    picture = PilImage.new("RGB", (_WIDTH, _HEIGHT), (255, 255, 255))
    draw, most = ImageDraw.Draw(picture), max(float(np.abs(values).max()), 1.0)
    for x, part in enumerate(np.array_split(values, min(_WIDTH, len(values)))):
        top, bottom = ((1 - float(v) / most) * (_HEIGHT - 1) / 2 for v in (part.max(), part.min()))
        draw.line((x, top, x, bottom), fill=_LINES[0])
    return picture


def _series(values: Num[np.ndarray, "t c"]) -> PilImage.Image:
    """A line for each of the first channels, all on one scale."""
    picture = PilImage.new("RGB", (_WIDTH, _HEIGHT), (255, 255, 255))
    draw, chosen = ImageDraw.Draw(picture), evenly(len(values), 4 * _WIDTH)
    shown = 1 - _levels(values[chosen].astype(np.float64)) / 255
    across = np.linspace(0, _WIDTH - 1, len(chosen))
    for channel, colour in zip(shown.T, _LINES, strict=False):
        points = list(zip(across.tolist(), (channel * (_HEIGHT - 1)).tolist(), strict=True))
        draw.line(points if len(points) > 1 else [*points, (_WIDTH - 1, points[0][1])], fill=colour)
    return picture


def _map(values: Num[np.ndarray, "h w c"]) -> PilImage.Image | None:
    channels = values.shape[-1]
    if channels == 2:
        speed = np.hypot(values[..., 0], values[..., 1])
        hue = np.arctan2(values[..., 1], values[..., 0]) * (128 / np.pi) + 128
        full = np.full(speed.shape, 255.0)
        colours = np.stack([hue % 256, _levels(speed), full], axis=-1).astype(np.uint8)
        return PilImage.fromarray(colours, "HSV").convert("RGB")
    if channels not in (1, 3):
        return None
    return PilImage.fromarray(_levels(values if channels == 3 else values[..., 0])).convert("RGB")


def _strip(values: Num[np.ndarray, "n h w c"]) -> PilImage.Image:
    """Some frames of a clip, or slices of a volume, beside one another."""
    frames = [_map(frame) for frame in _levels(values)[evenly(len(values), _FRAMES)]]
    small = [frame for frame in frames if frame is not None]
    for frame in small:
        frame.thumbnail((_SIDE, _SIDE))
    width, height = small[0].size
    strip = PilImage.new("RGB", ((width + 2) * len(small) - 2, height), (255, 255, 255))
    for number, frame in enumerate(small):
        strip.paste(frame, (number * (width + 2), 0))
    return strip
