"""The vision transformer (SigLIP): one tile of pixels in, P patch tokens out.

    tile [h w 3] -> stem -> patch grid [P D] + learned positions -> pre-norm blocks -> LayerNorm

The ``patch`` stem is the published one, a single strided projection. The ``conv`` stem is five small strided
convolutions (Xiao et al. 2021, arXiv 2106.14881): it learns far faster from few images.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from vl_jax.nn import attention
from vl_jax.nn.layers import LayerNorm, Linear, fan_in, named
from vl_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Defaults are SigLIP-SO400M-patch14-384."""

    image_size: int = 384  # pixels on the side of a tile
    patch_size: int = 14  # pixels on the side of a patch; a rest smaller than a patch is never seen
    embed_dim: int = 1152
    mlp_dim: int = 4304
    num_layers: int = 27
    num_heads: int = 16
    stem: Literal["patch", "conv"] = "patch"
    pixel_mean: float = 0.5  # of pixel values scaled to 0..1
    pixel_std: float = 0.5

    def __post_init__(self):
        if self.image_size < self.patch_size:
            raise ValueError(f"image_size={self.image_size} < patch_size={self.patch_size}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim={self.embed_dim} is not a multiple of num_heads={self.num_heads}")
        if self.stem == "conv" and self.patch_size not in HALVINGS:
            raise ValueError(
                f"patch_size={self.patch_size}: the conv stem allows {', '.join(map(str, HALVINGS))}"
            )

    @property
    def grid(self) -> int:
        """Patches on the side of a tile."""
        return self.image_size // self.patch_size


def normalize(pixels: UInt8[Array, "*batch"], *, mean: float, std: float) -> Float[Array, "*batch"]:
    """Grey levels 0..255 to ``(v / 255 - mean) / std``; SigLIP's 0.5 and 0.5 give [-1, 1]."""
    return (pixels.astype(jnp.float32) / 255.0 - mean) / std


class PatchStem(nn.Module):
    """Splits a tile into non-overlapping patches and projects each."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "M h w 3"]) -> Float[Array, "M P D"]:
        c = self.config
        side = c.grid * c.patch_size
        patches = x[:, :side, :side].reshape(x.shape[0], c.grid, c.patch_size, c.grid, c.patch_size, 3)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], c.grid * c.grid, -1)
        return Linear(c.embed_dim, (None, "embed"), use_bias=True, name="project")(patches)


def convolve(
    x: Float[Array, "M h w c"], kernel: Float[Array, "3 3 c D"], bias: Float[Array, " D"], *, stride: int
) -> Float[Array, "M u v D"]:
    """3x3 convolution, padding 1."""
    y = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + bias


# Of the initial position table: comparable to what a stem gives, so that place counts from the first step.
POSITION_STD = 0.3

# Halvings from pixels to patches; the remaining ones of the five convolutions keep the size.
HALVINGS = {4: 2, 8: 3, 16: 4}


class ConvStem(nn.Module):
    """Five 3x3 convolutions that end with one cell per patch; those that keep the size are residual."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "M h w 3"]) -> Float[Array, "M P D"]:
        c = self.config
        side = c.grid * c.patch_size
        x = x[:, :side, :side]
        halvings = HALVINGS[c.patch_size]
        for i in range(5):
            width = max(c.embed_dim >> max(0, 2 - i), 8)
            y = x if i == 0 else jax.nn.gelu(x, approximate=True)
            # Variance 2 / fan-in: an activation passes about half of it on.
            init = named(fan_in(in_axis=(0, 1, 2), scale=2.0), None, None, None, None)
            kernel = self.param(f"kernel_{i}", init, (3, 3, x.shape[-1], width)).astype(x.dtype)
            bias = self.param(f"bias_{i}", named(nn.initializers.zeros, None), (width,)).astype(x.dtype)
            y = convolve(y, kernel, bias, stride=2 if i < halvings else 1)
            x = x + y if y.shape == x.shape else y
        return x.reshape(x.shape[0], -1, x.shape[-1])


class Block(nn.Module):
    """Pre-norm bidirectional transformer block with biases and tanh GELU."""

    config: ViTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "M P D"], _: None) -> tuple[Float[Array, "M P D"], None]:
        c = self.config
        heads = (*x.shape[:2], 3, c.num_heads, c.embed_dim // c.num_heads)
        qkv = Linear(3 * c.embed_dim, ("embed", "heads"), use_bias=True, name="qkv")(
            LayerNorm(name="norm1")(x)
        )
        query, key, value = jnp.moveaxis(qkv.reshape(heads), 2, 0)
        mixed = attention.attend(query, key, value, mask=None, scale=heads[-1] ** -0.5)
        project = Linear(c.embed_dim, ("heads", "embed"), use_bias=True, name="project")
        x = x + project(mixed.reshape(x.shape))
        hidden = Linear(c.mlp_dim, ("embed", "mlp"), use_bias=True, name="fc1")(LayerNorm(name="norm2")(x))
        hidden = jax.nn.gelu(hidden, approximate=True)
        x = x + Linear(c.embed_dim, ("mlp", "embed"), use_bias=True, name="fc2")(hidden)
        return constrain(x, "batch", None, None), None


class ViT(nn.Module):
    """Vision transformer without class token; every patch token is returned after the final norm."""

    config: ViTConfig
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    remat: bool = False

    @nn.compact
    def __call__(self, tiles: UInt8[Array, "M h w 3"]) -> Float[Array, "M P D"]:
        c = self.config
        stem = ConvStem(c, name="stem") if c.stem == "conv" else PatchStem(c, name="stem")
        pixels = normalize(tiles, mean=c.pixel_mean, std=c.pixel_std)
        x = stem(pixels.astype(self.dtype))
        init = named(nn.initializers.normal(POSITION_STD), None, "embed")
        x = x + self.param("positions", init, (c.grid * c.grid, c.embed_dim)).astype(x.dtype)
        x = constrain(x, "batch", None, None)
        block = nn.remat(Block, prevent_cse=False) if self.remat else Block
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, _ = blocks(c, name="blocks")(x, None)
        return LayerNorm(name="norm")(x)
