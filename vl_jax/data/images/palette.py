"""Colours to draw maps with, and the legend that says what they stand for."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image as PilImage
from PIL import ImageDraw

Colour = tuple[int, ...]  # red, green, blue
_TURN = 0.618034  # of the wheel of hues, by which colours that follow each other are far apart
_LINE = 14  # pixels of a line of the legend


def colours(count: int) -> UInt8[np.ndarray, "K 3"]:
    """As many colours, far apart from one to the next, the same each time."""
    found = [
        colorsys.hsv_to_rgb(i * _TURN % 1, (0.9, 0.55)[i // 6 % 2], (0.95, 0.75)[i // 3 % 2])
        for i in range(count)
    ]
    return np.round(255 * np.array(found).reshape(count, 3)).astype(np.uint8)


def heat(values: Float[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    """Numbers in 0..1 as colours, from dark blue by green to yellow; lightness rises with the number."""
    stops = np.array([[20, 10, 60], [40, 70, 140], [30, 140, 140], [110, 200, 90], [250, 230, 40]], float)
    at = np.linspace(0, 1, len(stops))
    parts = [np.interp(values, at, stops[:, channel]) for channel in range(3)]
    return np.round(np.stack(parts, axis=-1)).astype(np.uint8)


def with_legend(picture: PilImage.Image, names: Mapping[str, Colour]) -> PilImage.Image:
    """The picture, and below it a line for every name, in its colour."""
    result = PilImage.new("RGB", (picture.width, picture.height + _LINE * len(names)), (255, 255, 255))
    result.paste(picture, (0, 0))
    pen = ImageDraw.Draw(result)
    for line, (name, colour) in enumerate(names.items()):
        top = picture.height + line * _LINE
        pen.rectangle((2, top + 2, 12, top + 12), fill=colour)
        # Of a name, what the font that Pillow brings can write.
        pen.text((16, top + 1), name.encode("latin-1", "replace").decode("latin-1"), fill=(0, 0, 0))
    return result
