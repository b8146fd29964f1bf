"""Pictures made worse, by how much and in which way: does the answer stay the same?

    blur          Gaussian, of a width that is a share of the picture's longer side
    noise         Gaussian grey levels added to every value
    jpeg          saved as JPEG at a low quality and read again
    resolution    made smaller, and as large as before again

Sizes stay, so a picture becomes the same tiles. Each picture's noise follows from the id of its question and
the place of the picture, so it is the same in every run, whatever is asked before it. Five strengths of each
follow Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", 2019, in spirit; blur is relative here, because documents are larger than photographs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from typing import Literal

import numpy as np
from PIL import Image as PilImage
from PIL import ImageFilter

from vl_jax.data.sample import Image, image_size

Kind = Literal["blur", "noise", "jpeg", "resolution"]
KINDS: tuple[Kind, ...] = ("blur", "noise", "jpeg", "resolution")
STRENGTHS = (1, 2, 3, 4, 5)
_BLUR = (0.001, 0.002, 0.004, 0.008, 0.016)  # standard deviation, as a share of the longer side
_NOISE = (8.0, 16.0, 32.0, 64.0, 96.0)  # standard deviation in grey levels of 0..255
_JPEG = (50, 30, 20, 10, 5)  # quality
_RESOLUTION = (0.75, 0.5, 0.35, 0.25, 0.125)  # share of width and height that is left


@dataclasses.dataclass(frozen=True)
class Stress:
    """What is done to every picture, and how much of it."""

    kind: Kind
    strength: int = 3  # from 1 to 5

    def __post_init__(self):
        if self.strength not in STRENGTHS:
            raise ValueError(f"strength={self.strength}: expected 1 to {STRENGTHS[-1]}")
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: expected one of {', '.join(KINDS)}")

    def __call__(self, picture: PilImage.Image, *, seed: str) -> PilImage.Image:
        """The RGB picture made worse.

        Args:
          seed: what the noise follows from.
        """
        level = self.strength - 1
        if self.kind == "blur":
            return picture.filter(ImageFilter.GaussianBlur(_BLUR[level] * max(picture.size)))
        if self.kind == "noise":
            entropy = hashlib.sha256(f"{seed}\0noise".encode()).digest()
            draws = np.random.default_rng(np.frombuffer(entropy, np.uint32))
            pixels = np.asarray(picture, np.float32)
            noisy = pixels + _NOISE[level] * draws.standard_normal(pixels.shape, np.float32)
            return PilImage.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))
        if self.kind == "jpeg":
            saved = io.BytesIO()
            picture.save(saved, "JPEG", quality=_JPEG[level])
            return PilImage.open(io.BytesIO(saved.getvalue())).convert("RGB")
        small = [max(1, round(_RESOLUTION[level] * side)) for side in picture.size]
        reduced = picture.resize((small[0], small[1]), PilImage.Resampling.BOX)
        return reduced.resize(picture.size, PilImage.Resampling.BICUBIC)


@dataclasses.dataclass(frozen=True)
class WorseImage:
    """An image that is made worse when it is called."""

    image: Image
    stress: Stress
    seed: str

    def __call__(self) -> PilImage.Image:
        return self.stress(self.image(), seed=self.seed)

    def size(self) -> tuple[int, int]:
        """Width and height, which stay."""
        return image_size(self.image)
