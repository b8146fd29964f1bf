"""Depth: how far away every pixel is, from the maps of a stream.

Stream.maps --decoder--> [B u v 1] --bilinear, softplus--> disparity [B s s] --> depth = 1 / disparity

The loss is scale-invariant (Eigen et al. 2014, arXiv 1406.2283), in the form with a root of AdaBins (Bhat et
al. 2021, arXiv 2011.14141): with ``d = log said - log true`` over the valid pixels of a picture,
``sqrt(mean d^2 - lambda * (mean d)^2)``. At ``lambda`` 1 only the proportions of depths count.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from PIL import Image as PilImage

from vl_jax.batch import Given
from vl_jax.data.images import palette
from vl_jax.data.sample import BadSample, Sample
from vl_jax.fusion.streams import Streams
from vl_jax.heads import decoder, pixels
from vl_jax.nn.layers import Linear

_FLOOR = 1e-8  # under the root, whose slope at 0 is infinite
_STEPS = 65535  # of the distance to ``far`` that a said map can tell apart


@dataclasses.dataclass(frozen=True)
class Depth:
    """How far each pixel is, in the unit of the labels."""

    name: str = "depth"
    stream: str = "image"  # whose maps it reads
    field: str = "depth"  # name in ``Sample.labels``, a ``PixelMap``
    size: int = 128  # pixels on the side of the tile
    stride: int = 4  # pixels on the side of a cell that has a disparity of its own
    dim: int = 64  # width of the decoder
    far: float = 10.0  # the largest depth that is said; truths beyond do not count
    variance_focus: float = 0.85  # lambda of the loss, in 0..1

    def __post_init__(self):
        decoder.check_sizes(self.name, size=self.size, stride=self.stride, dim=self.dim)
        if not 0 < self.far < float("inf"):
            raise ValueError(f"far={self.far} of head {self.name!r} must be a number above 0")
        if not 0 <= self.variance_focus <= 1:
            raise ValueError(f"variance_focus={self.variance_focus} of head {self.name!r} must be in 0..1")

    @property
    def inputs(self) -> tuple[str, ...]:
        """The stream it reads."""
        return (self.stream,)

    @property
    def shape(self) -> tuple[int, ...]:
        """A depth for every pixel of the tile."""
        return self.size, self.size

    @property
    def dtype(self) -> str:
        """Depth, or 0."""
        return "float32"

    def check_tile(self, tile_size: int) -> None:
        """Refuses tiles of another size, by ``ValueError``."""
        decoder.check_tile(self.name, self.size, tile_size)

    def read(self, sample: Sample) -> np.ndarray | None:
        """The depths of the tile's pixels, 0 where not known or beyond ``far``; None if none is left.

        Raises:
          BadSample: the label is no map, or a depth is below 0 or infinite.
        """
        found = pixels.map_of(sample, self.field, self.size)
        if found is None:
            return None
        values, missing = found
        odd = values[~missing & ~((values >= 0) & (values < np.inf))]
        if odd.size:
            message = f"sample {sample.id}: {self.field} has {odd.size} pixels of {odd[0]}, no depth"
            raise BadSample("bad_label", message)
        with np.errstate(invalid="ignore"):
            valid = ~missing & (values > 0) & (values <= self.far)
        return np.where(valid, values, 0).astype(np.float32) if valid.any() else None

    def build(self) -> nn.Module:
        """The module."""
        return DepthHead(self)

    def sums(
        self, prediction: Float[Array, "B s s"], label: Given
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The loss of each row, and ``abs_rel``, the mean of |said - true| / true; summed over rows."""
        valid = (label.values > 0) & label.present[:, None, None]
        true = jnp.where(valid, label.values, 1.0)
        apart = jnp.where(valid, -jnp.log(prediction) - jnp.log(true), 0.0)
        counts = jnp.maximum(jnp.sum(valid, axis=(1, 2)), 1).astype(jnp.float32)
        loss = jnp.sum(
            jnp.where(label.present, _scale_invariant(apart, valid, counts, self.variance_focus), 0.0)
        )
        off = jnp.where(valid, jnp.abs(1 / (prediction * true) - 1), 0.0)
        return loss, {"abs_rel": jnp.sum(jnp.sum(off, axis=(1, 2)) / counts)}

    def decode(self, prediction: Float[np.ndarray, "s s"]) -> dict[str, Any]:
        """The nearest, the median and the farthest depth, and ``map``, a PNG picture of 16 bits.

        A depth is the value of its pixel times ``unit``.
        """
        depth = 1 / prediction.astype(np.float64)
        unit = self.far / _STEPS
        said = {
            "nearest": float(depth.min()),
            "median": float(np.median(depth)),
            "farthest": float(depth.max()),
        }
        values = np.round(depth / unit).clip(0, _STEPS).astype(np.uint16)
        said = {name: round(value, 4) for name, value in said.items()}
        return {**said, "unit": unit, "map": pixels.as_text(PilImage.fromarray(values))}

    def draw(self, picture: PilImage.Image, said: dict[str, Any]) -> PilImage.Image:
        """Depth as colours, near ones light, at the size of the picture; a legend says the ends."""
        depth = np.maximum(np.asarray(pixels.from_text(said["map"]), np.float64) * said["unit"], 1e-9)
        disparity = 1 / depth
        low, high = disparity.min(), disparity.max()
        light = (disparity - low) / max(high - low, 1e-12)
        shown = PilImage.fromarray(palette.heat(light)).resize(picture.size, PilImage.Resampling.BILINEAR)
        ends = palette.heat(np.array([[1.0, 0.0]]))[0]
        near, far = (tuple(map(int, colour)) for colour in ends)
        legend = {f"{said['nearest']:.3g} away": near, f"{said['farthest']:.3g} away": far}
        return palette.with_legend(shown, legend)


class DepthHead(nn.Module):
    """Disparity in float32, of the tile's size: above 0, and no depth is beyond ``far``."""

    config: Depth

    @nn.compact
    def __call__(self, streams: Streams) -> Float[Array, "B s s"]:
        c = self.config
        maps = decoder.maps_of(streams[c.stream], head=c.name, name=c.stream)
        x = decoder.MapDecoder(c.dim, c.size, c.stride, name="decoder")(maps)
        x = Linear(1, ("embed", None), use_bias=True, hidden=False, name="disparity")(x)
        return nn.softplus(decoder.enlarged(x.astype(jnp.float32), c.size)[..., 0]) + 1 / c.far


def _scale_invariant(
    apart: Float[Array, "B s s"], valid: Bool[Array, "B s s"], counts: Float[Array, " B"], focus: float
) -> Float[Array, " B"]:
    """The loss of each row; ``mean d^2 - focus * mean(d)^2`` as a sum of squares, so never below 0."""
    mean = jnp.sum(apart, axis=(1, 2)) / counts
    off = jnp.where(valid, apart - mean[:, None, None], 0.0)
    variance = jnp.sum(off * off, axis=(1, 2)) / counts
    return jnp.sqrt(variance + (1 - focus) * mean * mean + _FLOOR)
