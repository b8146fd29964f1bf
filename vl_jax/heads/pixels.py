"""What heads of pixels share on the host: maps of labels, maps as text, colours to draw with."""

from __future__ import annotations

import base64
import binascii
import colorsys
import io
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, Float, Shaped, UInt8
from PIL import Image as PilImage
from PIL import ImageDraw

from vl_jax.data.images.spatial import PixelMap
from vl_jax.data.sample import BadSample, Sample

PNG = "data:image/png;base64,"  # how a map that is said as text begins
Colour = tuple[int, ...]  # red, green, blue
_TURN = 0.618034  # of the wheel of hues, by which colours that follow each other are far apart
_LINE = 14  # pixels of a line of the legend


def map_of(
    sample: Sample, field: str, size: int
) -> tuple[Shaped[np.ndarray, "s s"], Bool[np.ndarray, "s s"]] | None:
    """The map of a label in pixels of the tile, and where it says nothing; None if the sample has none.

    Raises:
      BadSample: the label is something else, or of another size than the tile.
    """
    label = sample.labels.get(field)
    if label is None:
        return None
    if not isinstance(label, PixelMap):
        kind = type(label).__name__
        raise BadSample("bad_label", f"sample {sample.id}: {field} is a {kind}, expected a map of pixels")
    values = np.asarray(label.read())
    if values.shape != (size, size):
        message = f"sample {sample.id}: {field} of {list(values.shape)} pixels, expected {[size, size]}"
        raise BadSample("bad_label", message)
    return values, np.isnan(values) | (values == label.missing)


def as_text(picture: PilImage.Image) -> str:
    """A picture as a PNG file in a data URL, which JSON can hold."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return PNG + base64.b64encode(buffer.getvalue()).decode("ascii")


def from_text(text: str) -> PilImage.Image:
    """The picture that ``as_text`` wrote.

    Raises:
      ValueError: it is something else.
    """
    try:
        return PilImage.open(io.BytesIO(base64.b64decode(text.removeprefix(PNG), validate=True)))
    except (binascii.Error, OSError) as error:
        raise ValueError(f"no picture in a data URL: {text[:40]!r}") from error


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
