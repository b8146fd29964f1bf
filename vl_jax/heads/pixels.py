"""What heads of pixels share on the host: maps of labels, and maps as text."""

from __future__ import annotations

import base64
import binascii
import io

import numpy as np
from jaxtyping import Bool, Shaped
from PIL import Image as PilImage

from vl_jax.data.images.spatial import PixelMap
from vl_jax.data.sample import BadSample, Sample

PNG = "data:image/png;base64,"  # how a map that is said as text begins


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
        return PilImage.open(io.BytesIO(content(text)))
    except (binascii.Error, OSError) as error:
        raise ValueError(f"no picture in a data URL: {text[:40]!r}") from error


def content(text: str) -> bytes:
    """The file in a data URL; ``binascii.Error`` where there is none."""
    return base64.b64decode(text.partition(",")[2], validate=True)
