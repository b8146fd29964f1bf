"""Attention over space, then over time, of a clip or volume, which then meets the other towers.

    clip tokens [F * P] --> [F frames, P cells] -- blocks --> a vector a frame --.
    text tokens, record tokens, ...  --norm, width-- + embedding ----------------+-- class token --> layers

A block is attention within each frame, then of each cell across the frames, then a feed-forward block
(divided attention, TimeSformer, Bertasius et al. 2021, arXiv 2102.05095, where time comes first). It costs
F P (F + P) scores instead of the (F P)^2 of attention over all.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vl_jax.encoders.transformer import Attention, feed_forward
from vl_jax.fusion.layers import EMBEDDING_STD, AtWidth, LayersConfig, Shared, join
from vl_jax.fusion.streams import Streams, filled
from vl_jax.nn.layers import LayerNorm, named
from vl_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class SpatioTemporal:
    """A clip is read by space and time, and its frames then stand beside the tokens of the other towers."""

    clip: str = "clip"  # the tower of the clip, or of the volume
    frames: int = 8  # of its tokens, which come frame by frame; slices of a volume
    layers: LayersConfig = LayersConfig()  # over space and time
    shared: int = 1  # layers that the frames and the other towers share
    name: str = "fused"  # of the stream that comes of it

    reads_empty: ClassVar[bool] = True

    def __post_init__(self):
        if self.frames < 1 or self.shared < 0:
            raise ValueError(
                f"frames={self.frames}, shared={self.shared} of SpatioTemporal: must be >= 1 and >= 0"
            )

    def streams(self, towers: tuple[str, ...]) -> tuple[str, ...]:
        """The towers, and the fused stream.

        Raises:
          ValueError: the clip is no tower.
        """
        if self.clip not in towers:
            raise ValueError(f"fusion.clip={self.clip!r} is no tower; there are: {', '.join(towers)}")
        return *towers, self.name

    def build(self) -> nn.Module:
        """The module."""
        return SpaceThenTime(self)


class DividedBlock(nn.Module):
    """Attention within frames, then across them, then a feed-forward block."""

    config: LayersConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B F P D"], mask: Bool[Array, "B F P"]) -> Float[Array, "B F P D"]:
        x = x + self._attend("space", x, mask)
        across = self._attend("time", x.swapaxes(1, 2), mask.swapaxes(1, 2))
        x = x + across.swapaxes(1, 2)
        x = x + feed_forward(LayerNorm(name="mlp_norm")(x), self.config.block)
        return constrain(x, "batch", None, None, None)

    def _attend(self, name: str, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Attention along the third axis, of every place along the second by itself."""
        normed = LayerNorm(name=f"{name}_norm")(x).reshape(-1, *x.shape[2:])
        found = Attention(self.config.num_heads, name=name)(normed, mask=mask.reshape(-1, 1, mask.shape[2]))
        return found.reshape(x.shape)


class SpaceThenTime(nn.Module):
    """Adds the fused stream: a token a frame and those of the other towers; the class token is its vector."""

    config: SpatioTemporal

    @nn.compact
    def __call__(self, streams: Streams) -> Streams:
        c, parts = self.config, []
        for name, stream in (filled(streams) or dict(list(streams.items())[:1])).items():
            x = AtWidth(c.layers.dim, name=name)(stream.tokens)
            parts.append(self._frames(x, stream.mask) if name == c.clip else (x, stream.mask))
        shared = dataclasses.replace(c.layers, num_layers=c.shared)
        return join(streams, c.name, *Shared(shared, name="shared")(parts))

    def _frames(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the blocks make of a clip: a vector a frame, and which frames are there."""
        c = self.config
        if x.shape[1] % c.frames:
            raise ValueError(
                f"fusion.frames={c.frames}: tower {c.clip!r} gives {x.shape[1]} tokens, not a multiple of it"
            )
        x, mask = x.reshape(len(x), c.frames, -1, c.layers.dim), mask.reshape(len(x), c.frames, -1)
        init = named(nn.initializers.normal(EMBEDDING_STD), None, "embed")
        x = x + self.param("times", init, (c.frames, c.layers.dim)).astype(x.dtype)[:, None]
        for number in range(c.layers.num_layers):
            x = DividedBlock(c.layers, name=f"block_{number}")(x, mask)
        weights = mask[..., None].astype(x.dtype)
        mean = jnp.sum(x * weights, axis=2) / jnp.maximum(jnp.sum(weights, axis=2), 1)
        return mean, jnp.any(mask, axis=2)
