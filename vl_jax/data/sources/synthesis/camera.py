"""What a camera does to a drawn picture: light, blur, noise and compression.

Sums, products and quotients of floats are the same on every machine; sines, and the order in which a
library adds up a product of matrices, are not. So directions come from fractions, and the numbers in the
compression's products of matrices are whole ones.
"""

from __future__ import annotations

import functools
import math
import random
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

_BLOCK = 8  # pixels of a block of the compression, each way
_FIXED = 64  # what one is in the whole numbers of the transform


@dataclass(frozen=True)
class CameraConfig:
    """How strongly pictures are changed after they are drawn; each picture gets from none to all of it."""

    lighting: float = 0.4  # share by which light differs across a picture, in its corners and in its tint
    blur: float = 1.0  # standard deviation in pixels
    noise: float = 8.0  # standard deviation in grey levels of 255
    compression: float = 0.3  # 0..1, how coarsely blocks of 8 x 8 pixels are stored

    def __post_init__(self):
        most = {"lighting": 1.0, "blur": 8.0, "noise": 128.0, "compression": 1.0}
        for field, limit in most.items():
            if not 0 <= getattr(self, field) <= limit:
                raise ValueError(f"{field}={getattr(self, field)} of a camera: must lie in 0..{limit:g}")


@dataclass(frozen=True)
class Shot:
    """What one camera does to one picture, or to two that are taken in a row."""

    light: tuple[float, float]  # by how much it grows from the left to the right, from the top to the bottom
    vignette: float
    tint: tuple[float, float, float]
    passes: int  # of a blur of three pixels
    noise: float
    step: float  # of the stored numbers, 0: as they are


def choose_shot(camera: CameraConfig, rng: random.Random) -> Shot:
    """The strengths for one picture."""
    x, y = direction(rng)
    light = camera.lighting * rng.random()
    vignette = camera.lighting * rng.random()
    red, green, blue = (1 + 0.3 * camera.lighting * rng.uniform(-1, 1) for _ in range(3))
    passes = round(2 * (camera.blur * rng.random()) ** 2)
    noise = camera.noise * rng.random()
    step = 40 * camera.compression * rng.random()
    return Shot((light * x, light * y), vignette, (red, green, blue), passes, noise, step)


def direction(rng: random.Random) -> tuple[float, float]:
    """Cosine and sine of any angle, without either function."""
    slope = rng.uniform(-1, 1)
    cosine, sine = (1 - slope * slope) / (1 + slope * slope), 2 * slope / (1 + slope * slope)
    for _ in range(rng.randrange(4)):
        cosine, sine = -sine, cosine
    return cosine, sine


def photograph(
    picture: Float[np.ndarray, "h w 3"], shot: Shot, rng: random.Random
) -> UInt8[np.ndarray, "h w 3"]:
    """The picture as the camera gives it.

    Args:
      picture: grey levels from 0 to 255, float32.
      rng: for the noise.
    """
    height, width, _ = picture.shape
    if any(shot.light) or shot.vignette or shot.tint != (1, 1, 1):
        y = ((np.arange(height, dtype=np.float32) + 0.5) / height - 0.5)[:, None]
        x = ((np.arange(width, dtype=np.float32) + 0.5) / width - 0.5)[None, :]
        gain = 1 + np.float32(shot.light[0]) * x + np.float32(shot.light[1]) * y
        gain = gain * (1 - np.float32(shot.vignette) * (x * x + y * y))
        picture = picture * gain[:, :, None] * np.array(shot.tint, np.float32)
    for _ in range(shot.passes):
        picture = _blur(_blur(picture).swapaxes(0, 1)).swapaxes(0, 1)
    if shot.noise:
        picture = picture + np.float32(shot.noise / 128) * _bell(picture.shape, rng)
    if shot.step:
        picture = _compress(picture, shot.step)
    return np.rint(picture).clip(0, 255).astype(np.uint8)


def _blur(picture: Float[np.ndarray, "h w 3"]) -> Float[np.ndarray, "h w 3"]:
    """Weights 1, 2, 1 along the first axis, a variance of half a pixel; the outermost pixels stay."""
    blurred = picture.copy()
    if len(picture) > 2:
        blurred[1:-1] = (picture[:-2] + picture[2:]) * np.float32(0.25) + picture[1:-1] * np.float32(0.5)
    return blurred


def _bell(shape: tuple[int, ...], rng: random.Random) -> Float[np.ndarray, "h w 3"]:
    """Numbers about zero with a standard deviation near 128: sums of three random bytes."""
    drawn = np.frombuffer(rng.randbytes(3 * math.prod(shape)), np.uint8).reshape(3, *shape)
    return (drawn[0].astype(np.int16) + drawn[1] + drawn[2] - 383).astype(np.float32)


def _compress(picture: Float[np.ndarray, "h w 3"], step: float) -> Float[np.ndarray, "h w 3"]:
    """Stores the cosine transform of each block in steps that are coarser for fine detail, as JPEG does."""
    height, width, _ = picture.shape
    rows, columns = -(-height // _BLOCK), -(-width // _BLOCK)
    pad = ((0, rows * _BLOCK - height), (0, columns * _BLOCK - width), (0, 0))
    whole = np.pad(np.rint(picture), pad, "edge").transpose(2, 0, 1).astype(np.float64)
    cosines = _cosines()
    order = np.arange(_BLOCK)
    steps = (1 + step * (1 + order[:, None] + order[None, :]) / 4)[:, None, :]
    numbers = _transform(whole, cosines).reshape(-1, _BLOCK, columns, _BLOCK) / _FIXED**2
    stored = np.rint(np.rint(numbers / steps) * steps).reshape(whole.shape)
    whole = _transform(stored, cosines.T) / _FIXED**2
    return whole[:, :height, :width].transpose(1, 2, 0).astype(np.float32)


def _transform(
    whole: Float[np.ndarray, "c h w"], matrix: Float[np.ndarray, "8 8"]
) -> Float[np.ndarray, "c h w"]:
    """Multiplies each column of each block by a matrix, then each row."""
    down = matrix @ whole.reshape(-1, _BLOCK, whole.shape[2])
    return (down.reshape(-1, _BLOCK) @ matrix.T).reshape(whole.shape)


@functools.cache
def _cosines() -> Float[np.ndarray, "8 8"]:
    """The cosine transform of eight numbers in whole numbers, ``_FIXED`` times an orthonormal one."""
    rows = [
        [
            round(
                _FIXED * math.sqrt((1 if k == 0 else 2) / _BLOCK) * math.cos(math.pi * (2 * n + 1) * k / 16)
            )
            for n in range(_BLOCK)
        ]
        for k in range(_BLOCK)
    ]
    return np.array(rows, np.float64)
