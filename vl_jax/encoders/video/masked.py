"""Masked autoencoding of clips, the pre-training of VideoMAE: most tubes are hidden, and their pixels asked.

    visible tubes --encoder--> tokens --linear, + sines--.
    a learned vector + sines of every hidden tube --------+--decoder--> pixels of the hidden tubes

The encoder computes visible tubes alone. Targets are pixels, by default normed within each tube and channel.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt8

from vl_jax.encoders.transformer import BlockConfig, run_blocks
from vl_jax.encoders.video.videomae import VideoMAE, VideoMAEConfig, sinusoids, tubes
from vl_jax.encoders.vit import as_floats
from vl_jax.nn.layers import LayerNorm, Linear, named
from vl_jax.params import Leaf

TARGET_EPSILON = 1e-6  # beside the deviation that targets are divided by
DECODER_EPSILON = 1e-5  # of the decoder's last norm, whatever that of the blocks is


@dataclasses.dataclass(frozen=True)
class MaskedClipsConfig:
    """Defaults are VideoMAE-B."""

    encoder: VideoMAEConfig = VideoMAEConfig()
    embed_dim: int = 384  # of the decoder
    mlp_dim: int = 1536
    num_layers: int = 4
    num_heads: int = 6
    normed: bool = True  # targets are normed within each tube and channel

    def __post_init__(self):
        _ = self.block  # checks its own fields
        c = self.encoder
        rest = [n % part for n, part in zip(c.input_shape, (c.tubelet, *[c.patch_size] * 2), strict=False)]
        if any(rest):
            raise ValueError(
                f"encoder.num_frames={c.num_frames}, encoder.image_size={c.image_size}: must be multiples of "
                f"tubelet={c.tubelet} and patch_size={c.patch_size}, for all pixels are targets"
            )

    @property
    def block(self) -> BlockConfig:
        """The blocks of the decoder; what it does not say is as in the encoder."""
        return dataclasses.replace(
            self.encoder.block,
            embed_dim=self.embed_dim,
            mlp_dim=self.mlp_dim,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
        )

    def build(self, dtype: DTypeLike, *, remat: bool = False) -> MaskedClips:
        """The module."""
        return MaskedClips(self, jnp.dtype(dtype), remat)


@struct.dataclass
class Reconstruction:
    """What the decoder says of the hidden tubes, in their order."""

    pixels: Leaf  # [B K X], by frame, row, column, channel
    loss: Leaf  # mean squared difference from the targets


def targets(clips: Float[Array, "B f h w c"], config: MaskedClipsConfig) -> Float[Array, "B T X"]:
    """The pixels of every tube, from 0 to 1, or normed.

    Args:
      clips: floats as the encoder takes them.
    """
    c = config.encoder
    pixels = clips.astype(jnp.float32) * jnp.asarray(c.pixel_std) + jnp.asarray(c.pixel_mean)
    pixels = tubes(pixels, frames=c.tubelet, side=c.patch_size)
    if config.normed:
        deviation = jnp.std(pixels, axis=2, keepdims=True, ddof=1)
        pixels = (pixels - jnp.mean(pixels, axis=2, keepdims=True)) / (deviation + TARGET_EPSILON)
    return pixels.reshape(*pixels.shape[:2], -1)


class ClipDecoder(nn.Module):
    """From tokens of visible tubes to pixels of hidden ones."""

    config: MaskedClipsConfig
    remat: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], *, hidden: int) -> Float[Array, "B K X"]:
        """Reads all tokens; the last ``hidden`` ones say their pixels."""
        c = self.config
        x, _, _ = run_blocks(x, None, c.block, remat=self.remat, owner=self)
        x = LayerNorm(DECODER_EPSILON, name="norm")(x[:, x.shape[1] - hidden :])
        size = c.encoder.tubelet * c.encoder.patch_size**2 * c.encoder.num_channels
        return Linear(size, ("embed", None), use_bias=True, hidden=False, name="head")(x)


class MaskedClips(nn.Module):
    """Encoder and decoder."""

    config: MaskedClipsConfig
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        clips: UInt8[Array, "B f h w c"] | Float[Array, "B f h w c"],
        hidden: Bool[Array, "B T"],
        *,
        count: int,
    ) -> Reconstruction:
        """What is said of the hidden tubes.

        Args:
          clips: grey levels, or floats that are normalised already.
          hidden: which tubes are; of every clip as many.
          count: how many those are.
        """
        c, e = self.config, self.config.encoder
        clips = as_floats(clips, mean=e.pixel_mean, std=e.pixel_std)
        order = jnp.argsort(hidden, axis=1, stable=True)  # visible tubes first
        visible = order[:, : order.shape[1] - count]
        seen = VideoMAE(e, self.dtype, self.remat, name="encoder").encode(clips, kept=visible).tokens
        x = Linear(c.embed_dim, ("embed", None), name="project")(seen)
        init = named(nn.initializers.normal(0.02), "embed")
        token = self.param("mask_token", init, (c.embed_dim,)).astype(x.dtype)
        token = jnp.broadcast_to(token, (x.shape[0], count, c.embed_dim))
        positions = jnp.asarray(sinusoids(order.shape[1], c.embed_dim), x.dtype)[order]
        x = jnp.concatenate([x, token], axis=1) + positions
        pixels = ClipDecoder(c, self.remat, name="decoder")(x, hidden=count)
        wanted = jnp.take_along_axis(targets(clips, c), order[:, order.shape[1] - count :, None], axis=1)
        wanted = jax.lax.stop_gradient(wanted)
        return Reconstruction(pixels, jnp.mean((pixels.astype(jnp.float32) - wanted) ** 2))
