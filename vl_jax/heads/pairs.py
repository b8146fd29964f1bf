"""Pairs: two streams as vectors of one space, where what belongs together is near.

Stream --pool--> projection --> unit vector --.
                                               +--> <a, b> * exp(scale) (+ bias), see ``contrastive_losses``
Stream --pool--> projection --> unit vector --'
"""

from __future__ import annotations

import dataclasses
import math
import zlib

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from vl_jax.data.sample import Sample, image_key
from vl_jax.fusion.streams import Stream, Streams, pool
from vl_jax.nn.layers import Linear, named
from vl_jax.params import Leaf


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Vectors of pictures and of texts."""

    name: str = "pairs"
    image: str = "image"  # the stream of one side
    text: str = "text"  # the stream of the other
    dim: int = 256  # of the vectors
    identity: str = ""  # label that rows of one picture share; empty: its file
    initial_scale: float = math.log(1 / 0.07)  # logarithm of the factor; CLIP's 0.07, SigLIP begins at log 10
    bias: bool = False  # learns a bias of all pairs, as the sigmoid loss needs
    initial_bias: float = -10.0

    def __post_init__(self):
        if self.dim < 1:
            raise ValueError(f"dim={self.dim} of head {self.name!r} must be >= 1")

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
        """A number >= 0 that samples of one picture share, and hardly any others; None without a picture."""
        if self.identity:
            what = sample.labels.get(self.identity)
        else:
            what = (image_key(sample.images[0]) or sample.id) if sample.images else None
        return None if what is None else np.asarray(zlib.crc32(repr(what).encode()) >> 1, np.int32)

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
    """Both projections, and the scale of their products."""

    config: Pairs

    @nn.compact
    def __call__(self, streams: Streams) -> PairVectors:
        c = self.config
        scale = self.param("scale", named(nn.initializers.constant(c.initial_scale)), ())
        bias = self.param("bias", named(nn.initializers.constant(c.initial_bias)), ()) if c.bias else None
        image = self._vector(streams[c.image], "image")
        return PairVectors(image, self._vector(streams[c.text], "text"), scale, bias)

    def _vector(self, stream: Stream, name: str) -> Float[Array, "B E"]:
        x = Linear(self.config.dim, ("embed", None), name=name)(pool(stream)).astype(jnp.float32)
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
