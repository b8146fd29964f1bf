"""Tokens of a picture and words of a text as vectors of one space, for late interaction (``word_pairs``)."""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from vl_jax.data.sample import Sample
from vl_jax.fusion.streams import Stream, Streams
from vl_jax.heads.pairs import identity_of
from vl_jax.nn.layers import Linear, named
from vl_jax.params import Leaf


@dataclasses.dataclass(frozen=True)
class TokenPairs:
    """A vector for every token of two streams."""

    name: str = "words"
    image: str = "image"  # the stream of one side
    text: str = "text"  # the stream of the other
    dim: int = 256  # of the vectors
    identity: str = ""  # label that rows of one picture share; empty: its file
    initial_scale: float = math.log(1 / 0.07)  # logarithm of the factor on products

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
        """See ``identity_of``."""
        return identity_of(sample, self.identity)

    def build(self) -> nn.Module:
        """The module."""
        return TokenPairsHead(self)


@struct.dataclass
class TokenVectors:
    """What the head gives."""

    image: Leaf  # f32[B S E] of length 1
    image_mask: Leaf  # bool[B S]
    text: Leaf  # f32[B T E] of length 1
    text_mask: Leaf  # bool[B T]
    scale: Leaf  # f32[] logarithm of the factor


class TokenPairsHead(nn.Module):
    """Both projections, and the scale of the products."""

    config: TokenPairs

    @nn.compact
    def __call__(self, streams: Streams) -> TokenVectors:
        c = self.config
        scale = self.param("scale", named(nn.initializers.constant(c.initial_scale)), ())
        image, text = streams[c.image], streams[c.text]
        vectors = self._vectors(image, "image"), self._vectors(text, "text")
        return TokenVectors(vectors[0], image.mask, vectors[1], text.mask, scale)

    def _vectors(self, stream: Stream, name: str) -> Float[Array, "B S E"]:
        x = Linear(self.config.dim, ("embed", None), name=name)(stream.tokens)
        return unit(x.astype(jnp.float32))


def unit(x: Float[Array, "... E"]) -> Float[Array, "... E"]:
    """Vectors of length 1; one that has none stays as it is."""
    return x / jnp.maximum(jnp.sqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12)), 1e-6)
