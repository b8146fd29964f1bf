"""A small U-Net that says a velocity of every pixel, told at every block what is asked for and when.

    cells --blocks--> halved --blocks--> halved --blocks, attention--> doubled + skip --blocks--> ... --> v

A block is twice norm, SiLU and a 3x3 convolution, with a skip (the form of Ho et al. 2020, arXiv
2006.11239); the second norm is scaled and shifted by the condition (FiLM, Perez et al. 2018, arXiv
1709.07871). A cell holds ``patch`` x ``patch`` pixels, which makes a network a quarter as dear at 2.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vl_jax.encoders.transformer import Attention
from vl_jax.heads.decoder import GROUPS, doubled
from vl_jax.nn.conv import Conv, GroupNorm
from vl_jax.nn.layers import LayerNorm, Linear


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The widths decide what it costs."""

    dims: tuple[int, ...] = (48, 64, 96)  # by level, finest first
    blocks: int = 1  # a level, down and up each
    patch: int = 2  # pixels on the side of a cell of the finest level
    num_heads: int = 4  # of attention among the cells of the coarsest level; 0: none

    def __post_init__(self):
        if not self.dims or min(self.dims) < GROUPS or any(dim % GROUPS for dim in self.dims):
            raise ValueError(f"dims={self.dims} of a U-Net: expected multiples of {GROUPS}")
        if self.blocks < 1 or self.patch < 1:
            raise ValueError(f"blocks={self.blocks}, patch={self.patch} of a U-Net must be >= 1")
        if self.num_heads < 0 or (self.num_heads and self.dims[-1] % self.num_heads):
            raise ValueError(f"num_heads={self.num_heads} of a U-Net: must divide {self.dims[-1]}")

    @property
    def multiple(self) -> int:
        """What the side of a picture has to be a multiple of."""
        return self.patch * 2 ** (len(self.dims) - 1)

    def build(self) -> UNet:
        """The module."""
        return UNet(self)


def to_cells(x: Float[Array, "B s s c"], patch: int) -> Float[Array, "B u u C"]:
    """The pixels of every cell side by side."""
    rows, side, _, channels = x.shape
    x = x.reshape(rows, side // patch, patch, side // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(rows, side // patch, side // patch, -1)


def to_pixels(x: Float[Array, "B u u C"], patch: int) -> Float[Array, "B s s c"]:
    """The inverse of ``to_cells``."""
    rows, side = x.shape[:2]
    x = x.reshape(rows, side, side, patch, patch, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(rows, side * patch, side * patch, -1)


class UNet(nn.Module):
    """The network: a picture and a vector a row in, a picture out, 0 at first."""

    config: UNetConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B s s c"], told: Float[Array, "B D"]) -> Float[Array, "B s s c"]:
        c, channels, skips = self.config, x.shape[-1], []
        x = Conv(c.dims[0], size=3, padding=1, use_bias=True, name="first")(to_cells(x, c.patch))
        for level, dim in enumerate(c.dims):
            if level:
                x = Conv(dim, size=2, stride=2, use_bias=True, name=f"halve{level}")(x)
            for i in range(c.blocks):
                x = ToldBlock(dim, name=f"down{level}_{i}")(x, told)
                skips.append(x)
        if c.num_heads:
            cells = LayerNorm(name="attention_norm")(x.reshape(x.shape[0], -1, x.shape[-1]))
            x = x + Attention(c.num_heads, name="attention")(cells).reshape(x.shape)
        for level, dim in reversed(list(enumerate(c.dims))):
            for i in range(c.blocks):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = ToldBlock(dim, name=f"up{level}_{i}")(x, told)
            if level:
                x = doubled(x, (2 * x.shape[1], 2 * x.shape[2]))
        x = nn.silu(GroupNorm(GROUPS, name="norm")(x))
        zeros = nn.initializers.zeros
        x = Conv(c.patch**2 * channels, size=3, padding=1, use_bias=True, kernel_init=zeros, name="last")(x)
        return to_pixels(x, c.patch)


class ToldBlock(nn.Module):
    """Two convolutions with a skip, the second told what is asked for."""

    dim: int

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"], told: Float[Array, "B D"]) -> Float[Array, "B h w d"]:
        y = nn.silu(GroupNorm(GROUPS, name="norm0")(x))
        y = Conv(self.dim, size=3, padding=1, name="conv0")(y)
        film = Linear(2 * self.dim, ("embed", None), use_bias=True, name="film")(nn.silu(told))
        scale, shift = jnp.split(film[:, None, None], 2, axis=-1)
        y = nn.silu(GroupNorm(GROUPS, name="norm1")(y) * (1 + scale) + shift)
        y = Conv(self.dim, size=3, padding=1, use_bias=True, name="conv1")(y)
        if x.shape[-1] != self.dim:
            x = Conv(self.dim, size=1, name="skip")(x)
        return (x + y) * jax.lax.rsqrt(2.0)
