"""Pairs: two streams as vectors of one space, where what belongs together is near.

Stream --pool--> (projection) --> unit vector --.
                                                 +--> <a, b> * exp(scale) (+ bias), see ``contrastive_losses``
Stream --pool--> (projection) --> unit vector --'

CLIP (arXiv 2103.00020) and SigLIP (2303.15343) as published have no projection here: their towers end in one.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from vl_jax.data.sample import Sample, image_key
from vl_jax.fusion.streams import Streams, pool
from vl_jax.nn.layers import Linear, named
from vl_jax.params import Leaf

FOREIGN = int(np.iinfo(np.int32).max)  # the number of a text that fits no picture at all


def identity_of(sample: Sample, label: str) -> np.ndarray | None:
    """A number >= 0 that samples of one picture share, and hardly any others; None without a picture.

    Args:
      label: which they share; empty: the file of the picture.
    """
    if label:
        what = sample.labels.get(label)
    else:
        what = (image_key(sample.images[0]) or sample.id) if sample.images else None
    if what is None:
        return None
    return np.asarray(min(zlib.crc32(repr(what).encode()) >> 1, FOREIGN - 1), np.int32)


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Vectors of pictures and of texts."""

    name: str = "pairs"
    image: str = "image"  # the stream of one side
    text: str = "text"  # the stream of the other
    dim: int | None = 256  # of the vectors; None: those of the streams themselves, without a projection
    identity: str = ""  # label that rows of one picture share; empty: its file
    initial_scale: float = math.log(1 / 0.07)  # logarithm of the factor; CLIP's 0.07, SigLIP begins at log 10
    bias: bool = False  # learns a bias of all pairs, as the sigmoid loss needs
    initial_bias: float = -10.0

    reads_empty: ClassVar[bool] = True

    def __post_init__(self):
        if self.dim is not None and self.dim < 1:
            raise ValueError(f"dim={self.dim} of head {self.name!r} must be >= 1, or None for no projection")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Both streams."""
        return self.image, self.text

    @property
    def shape(self) -> tuple[int, ...]:
        """A label is one number."""
        return ()

    @property
    def dtype(self) -> str:
        """The number of what a row shows."""
        return "int32"

    def read(self, sample: Sample) -> np.ndarray | None:
        """See ``identity_of``."""
        return identity_of(sample, self.identity)

    def check_widths(self, widths: Mapping[str, int]) -> None:
        """Makes sure that the vectors of two streams can be compared.

        Args:
          widths: of the pooled vectors, by stream.

        Raises:
          ValueError: there is no projection, and they differ.
        """
        image, text = widths[self.image], widths[self.text]
        if self.dim is None and image != text:
            raise ValueError(
                f"head {self.name!r} with dim=None: vectors of {self.image!r} have {image} features, of "
                f"{self.text!r} {text}; must be equal, or set dim"
            )

    def build(self) -> nn.Module:
        """The module."""
        return PairsHead(self)


@struct.dataclass
class PairVectors:
    """What the head gives."""

    image: Leaf  # f32[B E] of length 1
    text: Leaf  # f32[B E] of length 1
    scale: Leaf  # f32[] logarithm of the factor
    bias: Leaf  # f32[], or None


class PairsHead(nn.Module):
    """Both projections, if there are any, and the scale of the products."""

    config: Pairs

    @nn.compact
    def __call__(self, streams: Streams) -> PairVectors:
        c = self.config
        scale = self.param("scale", named(nn.initializers.constant(c.initial_scale)), ())
        bias = self.param("bias", named(nn.initializers.constant(c.initial_bias)), ()) if c.bias else None
        image, text = pool(streams[c.image]), pool(streams[c.text])
        c.check_widths({c.image: image.shape[-1], c.text: text.shape[-1]})
        return PairVectors(self._vector(image, "image"), self._vector(text, "text"), scale, bias)

    def _vector(self, x: Float[Array, "B D"], name: str) -> Float[Array, "B E"]:
        if self.config.dim is not None:
            x = Linear(self.config.dim, ("embed", None), name=name)(x)
        x = x.astype(jnp.float32)
        # The vector of a row that has nothing is 0, where the gradient of its length would be no number.
        return x / jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))
