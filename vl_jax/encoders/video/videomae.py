"""VideoMAE (Tong et al. 2022, arXiv 2203.12602): a vision transformer over tubes of a clip.

    clip [f h w c] --tubes of 2 x 16 x 16--> tokens [T D] + fixed sines --blocks--> tokens, and their mean

A tube is a token, frame pairs first, then rows. In pre-training most tubes are hidden (``masked``).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from vl_jax.encoders.transformer import BlockConfig, Encoded, run_blocks
from vl_jax.encoders.vit import Levels, Sides, as_floats
from vl_jax.kernels.activation import Kind
from vl_jax.moe.routing import State
from vl_jax.moe.stacks import Stack
from vl_jax.nn.layers import LayerNorm, fan_in, named
from vl_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class VideoMAEConfig:
    """Defaults are VideoMAE-B."""

    image_size: Sides = 224  # pixels
    num_frames: int = 16  # of a whole clip; the module itself takes any number
    patch_size: int = 16  # pixels on the side of a tube; a rest is never seen
    tubelet: int = 2  # frames of a tube; a rest is never seen
    num_channels: int = 3
    embed_dim: int = 768
    mlp_dim: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    activation: Kind = "gelu"
    norm_epsilon: float = 1e-12
    qkv_bias: bool = True  # of queries and values; keys have none
    final_norm: bool = False  # of the tokens; without it their mean is for the head to norm
    pixel_mean: Levels = (0.485, 0.456, 0.406)  # of pixel values scaled to 0..1
    pixel_std: Levels = (0.229, 0.224, 0.225)

    varies: ClassVar[bool] = True  # a clip may have fewer frames
    input_dtype: ClassVar[str] = "uint8"  # of clips that come as data

    def __post_init__(self):
        if min(self.patch_size, self.tubelet) < 1 or min(self.shape) < 1:
            raise ValueError(
                f"num_frames={self.num_frames}, image_size={self.image_size} must hold a tube of tubelet="
                f"{self.tubelet} frames and patch_size={self.patch_size} pixels"
            )
        _ = self.block  # checks its own fields

    @property
    def block(self) -> BlockConfig:
        return BlockConfig.of(self, key_bias=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Tubes of a whole clip along frames, rows and columns."""
        frames, height, width, _ = self.input_shape
        return frames // self.tubelet, height // self.patch_size, width // self.patch_size

    @property
    def grid(self) -> int:
        """There is none.

        Raises:
          ValueError: always.
        """
        raise ValueError(f"the {self.num_tokens} tokens of a clip form no square")

    @property
    def num_tokens(self) -> int:
        """Tubes of a whole clip."""
        frames, rows, columns = self.shape
        return frames * rows * columns

    @property
    def output_dim(self) -> int:
        """Width of a token, and of a clip as one vector."""
        return self.embed_dim

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """The shape of a clip: frames, height, width, channels."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.num_frames, height, width, self.num_channels

    @property
    def stack(self) -> Stack | None:
        """There are no sparse layers."""
        return None

    def build(self, dtype: DTypeLike, *, remat: bool = False) -> VideoMAE:
        """The module."""
        return VideoMAE(self, jnp.dtype(dtype), remat)


def sinusoids(length: int, width: int) -> Float[np.ndarray, "T D"]:
    """Fixed positions: sines in even features, cosines in odd ones, of falling frequency."""
    feature = np.arange(width)
    angles = np.arange(length)[:, None] / 10_000 ** (2 * (feature // 2) / width)
    return np.where(feature % 2, np.cos(angles), np.sin(angles)).astype(np.float32)


def tubes(clip: Float[Array, "B f h w c"], *, frames: int, side: int) -> Float[Array, "B T X c"]:
    """The pixels of every tube, by channel; what is left over at the ends is cut off."""
    counts = clip.shape[1] // frames, clip.shape[2] // side, clip.shape[3] // side
    clip = clip[:, : counts[0] * frames, : counts[1] * side, : counts[2] * side]
    x = clip.reshape(-1, counts[0], frames, counts[1], side, counts[2], side, clip.shape[4])
    x = x.transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(x.shape[0], counts[0] * counts[1] * counts[2], -1, x.shape[-1])


class VideoMAE(nn.Module):
    """The encoder."""

    config: VideoMAEConfig
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    remat: bool = False

    def __call__(
        self,
        clips: UInt8[Array, "B f h w c"] | Float[Array, "B f h w c"],
        valid: Bool[Array, "B f"] | Bool[Array, " B"] | None = None,
        routing_state: State | None = None,
    ) -> Encoded:
        """Tokens by tube, and the mean of those that are there. No layer is sparse.

        Args:
          clips: grey levels, or floats that are normalised already.
          valid: frames that are there, or clips; None: all of them. A tube is there if a frame of it is.
        """
        mask = None
        if valid is not None and valid.ndim == 2:
            c = self.config
            count = valid.shape[1] // c.tubelet
            there = jnp.any(valid[:, : count * c.tubelet].reshape(-1, count, c.tubelet), axis=2)
            mask = jnp.repeat(there, c.shape[1] * c.shape[2], axis=1)
        return self.encode(clips, mask=mask)

    @nn.compact
    def encode(
        self,
        clips: UInt8[Array, "B f h w c"] | Float[Array, "B f h w c"],
        *,
        mask: Bool[Array, "B T"] | None = None,
        kept: Int[Array, "B K"] | None = None,
    ) -> Encoded:
        """Tokens of all tubes, or of those that are kept, in their order.

        Args:
          mask: tubes that may be attended to; None: all of them.
          kept: numbers of the tubes that are seen at all; None: all of them.
        """
        c = self.config
        floats = as_floats(clips, mean=c.pixel_mean, std=c.pixel_std).astype(self.dtype)
        pixels = tubes(floats, frames=c.tubelet, side=c.patch_size)
        shape = (c.tubelet, c.patch_size, c.patch_size, c.num_channels, c.embed_dim)
        init = named(fan_in(in_axis=(0, 1, 2, 3)), None, None, None, None, "embed", inputs=(0, 1, 2, 3))
        kernel = self.param("kernel", init, shape).astype(self.dtype)
        bias = self.param("bias", named(nn.initializers.zeros, "embed"), (c.embed_dim,))
        x = pixels.reshape(*pixels.shape[:2], -1) @ kernel.reshape(-1, c.embed_dim) + bias.astype(self.dtype)
        x = x + jnp.asarray(sinusoids(x.shape[1], c.embed_dim), x.dtype)
        if kept is not None:
            x = jnp.take_along_axis(x, kept[..., None], axis=1)
        self.sow("intermediates", "embedded", x)
        x = constrain(x, "batch", None, None)
        seen = None if mask is None else mask[:, None]
        x, _, _ = run_blocks(x, seen, c.block, remat=self.remat, owner=self)
        if c.final_norm:
            x = LayerNorm(c.norm_epsilon, name="norm")(x)
        return Encoded(x, masked_mean(x, mask), mask=mask)


def masked_mean(x: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None) -> Float[Array, "B D"]:
    """The mean of the tokens that are there (None: all), in float32, cast back; zeros where none is."""
    wide = x.astype(jnp.float32)
    if mask is None:
        return jnp.mean(wide, axis=1).astype(x.dtype)
    count = jnp.maximum(jnp.sum(mask, axis=1, dtype=jnp.float32), 1.0)
    return (jnp.sum(wide, axis=1, where=mask[..., None]) / count[:, None]).astype(x.dtype)
