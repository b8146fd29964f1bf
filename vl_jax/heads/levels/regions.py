"""Regions of a picture and phrases of its text as vectors of one space.

    Stream --projection--> map of vectors [B h w E] --mean over a box------> region --.
                                                                                       +--> near, where
    Stream --projection--> vectors of tokens [B T E] --mean over a phrase--> phrase --'    they belong

Labels say which box belongs to which phrase (``data.images.phrases``); so the objective takes the means.
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

from vl_jax.data.images.phrases import Phrases
from vl_jax.data.sample import BadSample, Sample
from vl_jax.fusion.streams import Stream, Streams
from vl_jax.heads import decoder
from vl_jax.nn.layers import Linear, named
from vl_jax.params import Leaf

_IDENTITIES = 1 << 24  # of phrases: those that float32 can tell apart


@dataclasses.dataclass(frozen=True)
class PhraseRegions:
    """Where the phrases of a text are in its picture."""

    name: str = "regions"
    image: str = "image"  # the stream of one side
    text: str = "text"  # the stream of the other
    field: str = "phrases"  # name in ``Sample.labels``, of ``Phrases``
    dim: int = 256  # of the vectors
    size: int = 224  # pixels on the side of the tile
    most: int = 8  # phrases of a text; further ones are left out
    initial_scale: float = math.log(1 / 0.07)  # logarithm of the factor on products

    def __post_init__(self):
        if self.dim < 1 or self.size < 1 or self.most < 1:
            raise ValueError(
                f"dim={self.dim}, size={self.size}, most={self.most} of head {self.name!r}: must be >= 1"
            )

    @property
    def inputs(self) -> tuple[str, ...]:
        """Both streams."""
        return self.image, self.text

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a phrase: x0, y0, x1, y1 as shares of the tile, its first token, that behind it, its number."""
        return self.most, 7

    @property
    def dtype(self) -> str:
        """Places that are not used have the number -1."""
        return "float32"

    def check_tile(self, tile_size: int) -> None:
        """Refuses tiles of another size, by ``ValueError``."""
        decoder.check_tile(self.name, self.size, tile_size)

    def read(self, sample: Sample) -> np.ndarray | None:
        """The phrases of a sample; those of one wording have one number.

        Raises:
          BadSample: the label is something else, or of a picture of another size.
        """
        label = sample.labels.get(self.field)
        if label is None:
            return None
        where = f"sample {sample.id}: {self.field}"
        if not isinstance(label, Phrases):
            raise BadSample("bad_label", f"{where} is a {type(label).__name__}, expected phrases")
        if tuple(label.size) != (self.size, self.size):
            message = f"{where} of a picture of {label.size} pixels, expected {(self.size, self.size)}"
            raise BadSample("bad_label", message)
        found = np.zeros(self.shape, np.float32)
        found[:, 6] = -1
        for row, phrase in zip(found, label.phrases, strict=False):
            number = zlib.crc32(phrase.text.lower().encode()) % _IDENTITIES
            row[:] = *(x / self.size for x in phrase.corners), *phrase.span, number
        return found

    def build(self) -> nn.Module:
        """The module."""
        return PhraseRegionsHead(self)


@struct.dataclass
class RegionVectors:
    """What the head gives; not yet of length 1."""

    image: Leaf  # f32[B h w E]
    text: Leaf  # f32[B T E]
    scale: Leaf  # f32[] logarithm of the factor


class PhraseRegionsHead(nn.Module):
    """Both projections, and the scale of the products."""

    config: PhraseRegions

    @nn.compact
    def __call__(self, streams: Streams) -> RegionVectors:
        c = self.config
        scale = self.param("scale", named(nn.initializers.constant(c.initial_scale)), ())
        grid = _map_of(streams[c.image], c)
        image, text = (
            Linear(c.dim, ("embed", None), name=name)(x).astype(jnp.float32)
            for name, x in (("image", grid), ("text", streams[c.text].tokens))
        )
        return RegionVectors(image, text, scale)


def _map_of(stream: Stream, config: PhraseRegions) -> Float[Array, "B h w D"]:
    """The finest map of a stream, or its tokens as one where they form a square."""
    if stream.maps:
        return stream.maps[0]
    rows, count, width = stream.tokens.shape
    side = math.isqrt(count)
    if side * side != count:
        raise ValueError(f"head {config.name!r}: {count} tokens of stream {config.image!r} form no square")
    return stream.tokens.reshape(rows, side, side, width)


def box_means(grid: Float[Array, "B h w E"], boxes: Float[Array, "B N 4"]) -> Float[Array, "B N E"]:
    """The mean of a map over each box, cells counted by the area that they share with it.

    A box thinner than a cell is the mean of the cells it touches; one without an area gives zeros.

    Args:
      boxes: x0, y0, x1, y1 as shares of the map's sides.
    """
    height, width = grid.shape[1:3]
    across = _shared(boxes[..., 0], boxes[..., 2], width)
    down = _shared(boxes[..., 1], boxes[..., 3], height)
    total = jnp.einsum("bnh,bnw,bhwe->bne", down, across, grid)
    area = jnp.sum(down, axis=-1) * jnp.sum(across, axis=-1)
    return total / jnp.maximum(area, 1e-9)[..., None]


def _shared(low: Float[Array, "B N"], high: Float[Array, "B N"], cells: int) -> Float[Array, "B N n"]:
    """How much of each cell lies between two places, in cells."""
    edges = jnp.arange(cells, dtype=jnp.float32)
    low, high = low[..., None] * cells, high[..., None] * cells
    return jnp.clip(jnp.minimum(high, edges + 1) - jnp.maximum(low, edges), 0.0, 1.0)


def span_means(
    tokens: Float[Array, "B T E"], starts: Float[Array, "B N"], stops: Float[Array, "B N"]
) -> Float[Array, "B N E"]:
    """The mean of the tokens from each start up to each stop; zeros where there is none between."""
    places = jnp.arange(tokens.shape[1], dtype=jnp.float32)
    inside = (places >= starts[..., None]) & (places < stops[..., None])
    share = inside.astype(jnp.float32)
    share = share / jnp.maximum(jnp.sum(share, axis=-1, keepdims=True), 1.0)
    return jnp.einsum("bnt,bte->bne", share, tokens)
