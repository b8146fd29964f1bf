"""Pictures of more than 8 bits a channel in levels from 0 to 255: scaled by a stated range, never cut off.

    unsigned integers, 9 to 16 bits     the range of their type: 0..65535, or 0..4095 of 12 bits
    a TIFF that states a range          from its lowest to its highest sample value (tags 280, 281, 340, 341)
    floating point numbers              0..1
    signed, or 32 bits, and no range    refused: nothing says what is black and what is white

Of colour pictures with 16 bits a channel, Pillow keeps the high byte, which is the same scaling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image as PilImage

_PHOTOMETRIC, _BITS, _FORMAT = 262, 258, 339  # tags of TIFF
_RANGES = ((340, 341), (280, 281))  # tags of the lowest and the highest sample value
_REMEDY = "save it as 16-bit PNG, or scale it to 0..1"

Range = tuple[float, float]  # what is black, what is white


class LevelsError(ValueError):
    """A picture whose black and white nobody states."""


def is_deep(picture: PilImage.Image) -> bool:
    """Whether the picture has more than 8 bits a channel once it is opened."""
    return picture.mode in ("I", "F") or picture.mode.startswith("I;16")


def to_grey(picture: PilImage.Image) -> PilImage.Image:
    """A picture for which ``is_deep`` holds, in 8 bits; white shows through where it is transparent.

    Raises:
      LevelsError: nothing states the range, or values lie outside.
    """
    tags: Mapping[int, Any] = getattr(picture, "tag_v2", {})
    inverted = tags.get(_PHOTOMETRIC) == 0  # Pillow minds it with 8 bits only
    stated, type_range = _stated(tags), _range_of_type(picture)
    values = np.asarray(picture)
    if picture.mode == "I" and (_first(tags.get(_BITS)), _first(tags.get(_FORMAT, 1))) == (32, 1):
        values = values.view(np.uint32)  # Pillow has no such mode
    if stated is None and type_range is None:
        found = f"values {values.min().item():g}..{values.max().item():g}"
        raise LevelsError(f"{found} of mode {picture.mode}, and no range is stated; {_REMEDY}")
    grey = scale(values, stated or type_range or (0, 1))
    if inverted:
        grey = 255 - grey
    hidden = picture.info.get("transparency")
    if isinstance(hidden, int):
        grey = np.where(values == hidden, np.uint8(255), grey)
    return PilImage.fromarray(grey)


def scale(values: Shaped[np.ndarray, "h w"], limits: Range) -> UInt8[np.ndarray, "h w"]:
    """Grey levels, 0 for the lower limit and 255 for the upper.

    Raises:
      LevelsError: a value lies outside, or is no number.
    """
    low, high = limits
    least, most = values.min().item(), values.max().item()
    if not (low <= least and most <= high):  # NaN is neither
        found = f"values {least:g}..{most:g}"
        raise LevelsError(f"{found} where {low:g}..{high:g} are black and white; {_REMEDY}")
    bits = int(high + 1).bit_length() - 1
    if values.dtype.kind in "iu" and low == 0 and high + 1 == 2**bits and 8 <= bits <= 16:
        return (values >> (bits - 8)).astype(np.uint8)  # the high byte, as of colours
    # In double precision, and divided first: 255 by a range as narrow as floats allow is no float any more.
    return ((values.astype(np.float64) - low) / (high - low) * 255 + 0.5).astype(np.uint8)


def _stated(tags: Mapping[int, Any]) -> Range | None:
    """The range that a TIFF file states."""
    for lowest, highest in _RANGES:
        low, high = _first(tags.get(lowest, 0)), _first(tags.get(highest))
        if isinstance(low, int | float) and isinstance(high, int | float) and low < high:
            return low, high
    return None


def _first(value: Any) -> Any:
    """Of a tag that has a value for each channel, that of the first."""
    return value[0] if isinstance(value, tuple) and value else value


def _range_of_type(picture: PilImage.Image) -> Range | None:
    """The range of the numbers that the file has."""
    if picture.mode == "F":
        return 0, 1
    if picture.format == "FITS":  # its integers are signed, which Pillow does not mind
        return None
    if picture.mode.startswith("I;16"):
        return 0, 2 ** _first(getattr(picture, "tag_v2", {}).get(_BITS, 16)) - 1
    # Of PGM files Pillow makes numbers up to 65535, whatever their own limit is.
    return (0, 2**16 - 1) if picture.format == "PPM" else None
