"""A picture that is changed when it is asked for: what part of it is shown, and how it looks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image as PilImage
from PIL import ImageEnhance

from vl_jax.data.files.memory_cache import MemoryCache, decode
from vl_jax.data.images.spatial import Corners, Cut
from vl_jax.data.sample import Image, ReducibleImage, image_size

NO_CACHE = MemoryCache(0)
MARGIN = (127, 127, 127)  # around a picture that is made smaller


@runtime_checkable
class LayeredImage(Protocol):
    """An image whose channels are no colours, such as two pictures and their difference."""

    def changed(
        self, picture: PilImage.Image, change: Callable[[PilImage.Image], PilImage.Image], /
    ) -> PilImage.Image:
        """The picture that the image gave, once a change of look is done to what its channels show.

        Args:
          picture: in RGB; parts of it may have been cut off, or be a margin.
          change: takes and gives a picture in grey or in RGB.
        """
        ...


@dataclass(frozen=True)
class Geometry:
    """The part of a picture that is shown, in shares of its width and height, and whether it is mirrored."""

    shown: Corners = (0.0, 0.0, 1.0, 1.0)  # beyond these, there is a margin
    mirrored: bool = False

    def cut(self, width: int, height: int) -> Cut:
        """What it shows of a picture of that size, which keeps its size."""
        left, top, right, bottom = self.shown
        corners = (left * width, top * height, right * width, bottom * height)
        return Cut(corners, (width, height), self.mirrored)

    def __call__(self, picture: PilImage.Image) -> PilImage.Image:
        """The picture as it is shown, in its size."""
        (width, height), shown = picture.size, Geometry(self.shown).cut(*picture.size)
        if self.shown != Geometry.shown:
            left, top, right, bottom = shown.corners
            seen = max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height))
            if seen == shown.corners:
                picture = picture.resize(picture.size, PilImage.Resampling.BICUBIC, box=seen)
            else:
                x0, y0, x1, y1 = map(round, shown.move(seen))
                size = max(x1 - x0, 1), max(y1 - y0, 1)
                drawn = picture.resize(size, PilImage.Resampling.BICUBIC, box=seen)
                picture = PilImage.new("RGB", picture.size, MARGIN)
                picture.paste(drawn, (x0, y0))
        return picture.transpose(PilImage.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else picture


@dataclass(frozen=True)
class Look:
    """Factors of a picture's brightness, contrast and saturation, and how far its hues turn."""

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0  # a share of the circle

    def __call__(self, picture: PilImage.Image) -> PilImage.Image:
        """The picture as it looks then; one in grey has neither saturation nor hue."""
        for enhance, factor in (
            (ImageEnhance.Brightness, self.brightness),
            (ImageEnhance.Contrast, self.contrast),
            (ImageEnhance.Color, self.saturation),
        ):
            if factor != 1:
                picture = enhance(picture).enhance(factor)
        if self.hue and picture.mode == "RGB":
            hue, saturation, value = picture.convert("HSV").split()
            turned = np.asarray(hue).astype(np.int32) + round(256 * self.hue)
            hue = PilImage.fromarray((turned % 256).astype(np.uint8))
            picture = PilImage.merge("HSV", (hue, saturation, value)).convert("RGB")
        return picture


@dataclass(frozen=True)
class AugmentedImage:
    """A picture that is changed when it is asked for; it has the size of the original."""

    image: Image
    geometry: Geometry
    look: Look
    cache: MemoryCache = NO_CACHE  # of originals

    def __call__(self) -> PilImage.Image:
        """Raises as the original does."""
        return self._change(decode(self.image, self.cache))

    def size(self) -> tuple[int, int]:
        """Width and height of the original."""
        return image_size(self.image)

    def at_least(self, width: int, height: int) -> PilImage.Image:
        """No smaller than that, if the original is not; see ``ReducibleImage``. Reads it anew every time."""
        if not isinstance(self.image, ReducibleImage):
            return self()
        left, top, right, bottom = self.geometry.shown
        enlarged = int(width / (right - left)) + 1, int(height / (bottom - top)) + 1
        return self._change(self.image.at_least(*enlarged))

    def _change(self, picture: PilImage.Image) -> PilImage.Image:
        picture = self.geometry(picture)
        if isinstance(self.image, LayeredImage):
            return self.image.changed(picture, self.look)
        return self.look(picture)
