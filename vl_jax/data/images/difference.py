"""Two pictures of one thing in the channels of one picture, with how far they differ in the third."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from PIL import Image as PilImage
from PIL import ImageChops

from vl_jax.data.sample import BadSample, Image, image_key, image_size


@dataclass(frozen=True)
class Difference:
    """Two pictures of one thing as one: channels are the first, the second and how far they differ."""

    first: Image
    second: Image
    where: str  # the sample, for messages

    @property
    def key(self) -> Hashable:
        """See ``image_key``."""
        keys = image_key(self.first), image_key(self.second)
        return None if None in keys else ("difference", *keys)

    def size(self) -> tuple[int, int]:
        """That of the first; raises as it does."""
        return image_size(self.first)

    def __call__(self) -> PilImage.Image:
        """Reads both.

        Raises:
          BadSample: one cannot be read, or they differ in size.
        """
        first, second = (image().convert("L") for image in (self.first, self.second))
        if first.size != second.size:
            message = f"{self.where}: pictures of {first.size} and {second.size} have no difference"
            raise BadSample("wrong_size", message)
        return PilImage.merge("RGB", (first, second, ImageChops.difference(first, second)))

    def changed(
        self, picture: PilImage.Image, change: Callable[[PilImage.Image], PilImage.Image]
    ) -> PilImage.Image:
        """See ``LayeredImage``: both pictures change alike, and how far they differ is seen after that."""
        (width, height), (first, second, _) = picture.size, picture.split()
        both = PilImage.new("L", (width, 2 * height))  # as one: contrast is that to a common mean
        both.paste(first, (0, 0))
        both.paste(second, (0, height))
        both = change(both)
        first, second = (both.crop((0, top, width, top + height)) for top in (0, height))
        return PilImage.merge("RGB", (first, second, ImageChops.difference(first, second)))
