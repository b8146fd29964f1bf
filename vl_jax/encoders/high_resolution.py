"""The two resolutions of DeepSeek-VL (Lu et al. 2024, arXiv 2403.05525, section 2.1), joined.

    high-res pixels --SAM--> neck ----------------------.
                      '--> first global layer --> neck --+--resize, 2 convolutions--> [P W]
    low-res pixels --SigLIP-----------------------------------------------------> [P D]

Both towers give P tokens, those of the low-resolution one; ``ResolutionAligner`` makes one sequence of them.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt8

from vl_jax.encoders.sam import SAM, Neck, SAMConfig
from vl_jax.encoders.transformer import Encoded, from_grid
from vl_jax.moe.routing import State
from vl_jax.moe.stacks import Stack
from vl_jax.nn.conv import Conv
from vl_jax.nn.layers import Linear, named


@dataclasses.dataclass(frozen=True)
class HighResolutionConfig:
    """Defaults are DeepSeek-VL 7B."""

    encoder: SAMConfig = SAMConfig()
    grid: int = 24  # cells on the side of the low-resolution tower

    def __post_init__(self):
        if not self.encoder.global_layers:
            raise ValueError(
                "encoder.global_layers=() must name a layer, whose output is one of two features"
            )
        if self.grid < 1:
            raise ValueError(f"grid={self.grid} must be >= 1")

    @property
    def output_dim(self) -> int:
        """Width of a token."""
        return 4 * self.encoder.output_dim

    @property
    def num_tokens(self) -> int:
        """Cells of the grid."""
        return self.grid**2

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of an image: height, width, channels."""
        return self.encoder.input_shape

    @property
    def stack(self) -> Stack | None:
        """There are no sparse layers."""
        return None

    def build(self, dtype: DTypeLike, *, remat: bool = False) -> HighResolution:
        """The module."""
        return HighResolution(self, jnp.dtype(dtype), remat)


class Reduce(nn.Module):
    """Resizes to four times the wanted grid, and reaches it by two strided convolutions."""

    config: HighResolutionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "M u v D"]) -> Float[Array, "M g g W"]:
        side, width = 4 * self.config.grid, x.shape[-1]
        x = jax.image.resize(x, (x.shape[0], side, side, width), "bilinear", antialias=False)
        x = Conv(2 * width, size=3, stride=2, padding=1, name="conv1")(x)
        return Conv(4 * width, size=3, stride=2, padding=1, name="conv2")(x)


class HighResolution(nn.Module):
    """Tokens of the high-resolution tower: fine features, plus a learned share of early ones."""

    config: HighResolutionConfig
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        pixels: UInt8[Array, "M h w c"] | Float[Array, "M h w c"],
        valid: Bool[Array, " M"] | None = None,
        routing_state: State | None = None,
    ) -> Encoded:
        """Tokens, row by row, and their mean. No layer is sparse."""
        c = self.config
        seen = SAM(c.encoder, self.dtype, self.remat, name="encoder").stages(pixels)
        reduce = Reduce(c, name="reduce")
        assert seen.first_global is not None
        early = Neck(c.encoder.output_dim, name="neck")(seen.first_global)
        share = self.param("share", named(nn.initializers.zeros), ()).astype(self.dtype)
        return from_grid(reduce(seen.features) + reduce(early) * share)


class ResolutionAligner(nn.Module):
    """Tokens of both towers to the width of the language model: half of the channels from each."""

    embed_dim: int

    @nn.compact
    def __call__(self, low: Float[Array, "M P D"], high: Float[Array, "M P W"]) -> Float[Array, "M P E"]:
        half = self.embed_dim // 2
        low = Linear(half, ("embed", "mlp"), use_bias=True, name="low")(low)
        high = Linear(half, ("embed", "mlp"), use_bias=True, name="high")(high)
        hidden = jax.nn.gelu(jnp.concatenate([high, low], axis=-1), approximate=False)
        self.sow("intermediates", "hidden", hidden)
        return Linear(self.embed_dim, ("mlp", "embed"), use_bias=True, name="project")(hidden)
