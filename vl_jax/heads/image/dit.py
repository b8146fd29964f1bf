"""A small transformer that says a velocity of every pixel: patches attend, and the condition scales them.

Every half of a block is scaled, shifted and gated by what is asked for; the gates begin at 0, so that a block
begins as the identity (Peebles and Xie 2023, arXiv 2212.09748, adaLN-Zero).
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vl_jax.encoders.transformer import Attention
from vl_jax.heads.image.unet import to_cells, to_pixels
from vl_jax.nn.layers import LayerNorm, Linear, named


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """A token for every patch."""

    patch: int = 4  # pixels on the side of a token
    dim: int = 128
    mlp_dim: int = 384
    num_layers: int = 4
    num_heads: int = 4

    def __post_init__(self):
        if min(self.patch, self.mlp_dim, self.num_layers) < 1:
            raise ValueError(
                f"patch={self.patch}, mlp_dim={self.mlp_dim}, num_layers={self.num_layers} of a DiT: "
                "must be >= 1"
            )
        if self.num_heads < 1 or self.dim % self.num_heads:
            raise ValueError(f"dim={self.dim} of a DiT is not a multiple of num_heads={self.num_heads}")

    @property
    def multiple(self) -> int:
        """What the side of a picture has to be a multiple of."""
        return self.patch

    def build(self) -> DiT:
        """The module."""
        return DiT(self)


class DiT(nn.Module):
    """The network: a picture and a vector a row in, a picture out, 0 at first."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B s s c"], told: Float[Array, "B D"]) -> Float[Array, "B s s c"]:
        c, channels = self.config, x.shape[-1]
        cells = to_cells(x, c.patch)
        tokens = cells.reshape(cells.shape[0], -1, cells.shape[-1])
        y = Linear(c.dim, (None, "embed"), use_bias=True, name="first")(tokens)
        init = named(nn.initializers.normal(0.02), None, "embed")
        y = y + self.param("positions", init, (y.shape[1], c.dim))
        told = nn.silu(told)
        for i in range(c.num_layers):
            y = DiTBlock(c, name=f"block{i}")(y, told)
        y = _modulated(LayerNorm(name="norm")(y), *_signals(told, c.dim, 2, "told"))
        zeros = nn.initializers.zeros
        width = c.patch**2 * channels
        y = Linear(width, ("embed", None), use_bias=True, hidden=False, kernel_init=zeros, name="last")(y)
        return to_pixels(y.reshape(*cells.shape[:3], width), c.patch)


class DiTBlock(nn.Module):
    """Attention and a feed-forward layer, each scaled, shifted and gated."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], told: Float[Array, "B E"]) -> Float[Array, "B T D"]:
        c = self.config
        scale0, shift0, gate0, scale1, shift1, gate1 = _signals(told, c.dim, 6, "told")
        y = _modulated(LayerNorm(name="norm0")(x), scale0, shift0)
        x = x + gate0 * Attention(c.num_heads, name="attention")(y)
        y = _modulated(LayerNorm(name="norm1")(x), scale1, shift1)
        y = Linear(c.mlp_dim, ("embed", "mlp"), use_bias=True, name="fc1")(y)
        return x + gate1 * Linear(c.dim, ("mlp", "embed"), use_bias=True, name="fc2")(nn.gelu(y))


def _signals(told: Float[Array, "B E"], dim: int, count: int, name: str) -> list[jax.Array]:
    """Vectors [B 1 D] of a row that follow from the condition; 0 at first."""
    zeros = nn.initializers.zeros
    made = Linear(count * dim, ("embed", None), use_bias=True, kernel_init=zeros, name=name)(told)
    return jnp.split(made[:, None], count, axis=-1)


def _modulated(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    return x * (1 + scale) + shift
