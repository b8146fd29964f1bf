"""The Swin transformer (Liu et al. 2021, arXiv 2103.14030): attention in windows, which shift by turns.

    pixels [h w c] --patches, norm--> [u v D] --stage--> --merge 2 x 2--> [u/2 v/2 2D] --stage--> ... --norm
                                                 map 1/4                             map 1/8

The cost of a block is linear in the number of cells, and every stage is half as fine as the one before.
Blocks go in pairs, the second of which has its windows shifted by half a window; pairs are stacked and
scanned.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt8

from vl_jax.encoders.shifted import STEM_EPSILON, SwinStage
from vl_jax.encoders.transformer import BlockConfig, Encoded, from_grid
from vl_jax.encoders.vit import Levels, Sides, as_floats
from vl_jax.kernels.activation import Kind
from vl_jax.moe.routing import State
from vl_jax.moe.stacks import Stack
from vl_jax.nn.conv import Conv
from vl_jax.nn.layers import LayerNorm, named
from vl_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class SwinConfig:
    """Defaults are Swin-T."""

    image_size: Sides = 224  # pixels; without absolute positions the module itself takes images of any size
    patch_size: int = 4  # pixels on the side of a cell of the first stage; a rest is filled with zeros
    num_channels: int = 3
    embed_dim: int = 96  # of the first stage; each further one is twice as wide
    stage_blocks: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)  # by stage
    window: int = 7  # cells on the side of a window; a grid no larger than it is one window, or several
    mlp_ratio: float = 4.0  # hidden width as a multiple of the stage's
    qkv_bias: bool = True
    absolute_positions: bool = False  # a learned vector for every cell of the first stage
    activation: Kind = "gelu"
    norm_epsilon: float = 1e-5  # of the blocks and the last norm
    pixel_mean: Levels = (0.485, 0.456, 0.406)  # of pixel values scaled to 0..1
    pixel_std: Levels = (0.229, 0.224, 0.225)

    def __post_init__(self):
        stages = len(self.stage_blocks)
        if not stages or len(self.num_heads) != stages or min(self.stage_blocks) < 1:
            raise ValueError(
                f"stage_blocks={self.stage_blocks}, num_heads={self.num_heads}: must be of one length >= 1, "
                "with at least one block a stage"
            )
        if min(self.patch_size, self.window, *self.input_shape) < 1:
            raise ValueError(
                f"image_size={self.image_size}, patch_size={self.patch_size}, num_channels="
                f"{self.num_channels}, window={self.window}: must be >= 1"
            )
        for name in ("pixel_mean", "pixel_std"):
            levels = getattr(self, name)
            if isinstance(levels, tuple) and len(levels) != self.num_channels:
                raise ValueError(
                    f"{name}={levels}: expected a number, or one for each of num_channels={self.num_channels}"
                )
        _ = self.stages  # checks its own fields

    @property
    def stages(self) -> tuple[BlockConfig, ...]:
        """The blocks of every stage."""
        return tuple(
            BlockConfig(
                embed_dim=self.embed_dim << i,
                mlp_dim=int(self.mlp_ratio * (self.embed_dim << i)),
                num_layers=blocks,
                num_heads=heads,
                activation=self.activation,
                norm_epsilon=self.norm_epsilon,
                qkv_bias=self.qkv_bias,
            )
            for i, (blocks, heads) in enumerate(zip(self.stage_blocks, self.num_heads, strict=True))
        )

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of cells, by stage."""
        rows, columns = (-(-side // self.patch_size) for side in self.input_shape[:2])
        return tuple((-(-rows // 2**i), -(-columns // 2**i)) for i in range(len(self.stage_blocks)))

    @property
    def grid(self) -> int:
        """Cells of the last stage on the side of an image.

        Raises:
          ValueError: they form no square.
        """
        rows, columns = self.grids[-1]
        if rows != columns:
            raise ValueError(f"image_size={self.image_size} gives {rows} x {columns} cells, not a square")
        return rows

    @property
    def num_tokens(self) -> int:
        """Cells of the last stage."""
        rows, columns = self.grids[-1]
        return rows * columns

    @property
    def output_dim(self) -> int:
        """Width of the last stage."""
        return self.stages[-1].embed_dim

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of an image: height, width, channels."""
        size = self.image_size
        return (*((size, size) if isinstance(size, int) else size), self.num_channels)

    @property
    def stack(self) -> Stack | None:
        """There are no sparse layers."""
        return None

    def build(self, dtype: DTypeLike, *, remat: bool = False) -> Swin:
        """The module."""
        return Swin(self, jnp.dtype(dtype), remat)


class Swin(nn.Module):
    """The encoder."""

    config: SwinConfig
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        pixels: UInt8[Array, "M h w c"] | Float[Array, "M h w c"],
        valid: Bool[Array, " M"] | None = None,
        routing_state: State | None = None,
    ) -> Encoded:
        """The last stage as tokens, row by row, and their mean; as maps the stages before they are merged.

        The last map is the normed one. No layer is sparse.

        Args:
          pixels: grey levels, or floats that are normalised already.

        Raises:
          ValueError: the pixels do not fit the learned positions.
        """
        c = self.config
        x = self._embed(as_floats(pixels, mean=c.pixel_mean, std=c.pixel_std).astype(self.dtype))
        maps = []
        for i, stage in enumerate(c.stages):
            x, cells = SwinStage(stage, c.window, i + 1 < len(c.stages), self.remat, name=f"stage{i}")(x)
            maps.append(cells)
        x = LayerNorm(c.norm_epsilon, name="norm")(x)
        return from_grid(x, (*maps[:-1], x))

    def _embed(self, pixels: Float[Array, "M h w c"]) -> Float[Array, "M u v D"]:
        """Patches as cells, at their positions if there are any."""
        c, size = self.config, self.config.patch_size
        _, height, width, _ = pixels.shape
        pixels = jnp.pad(pixels, ((0, 0), (0, -height % size), (0, -width % size), (0, 0)))
        x = Conv(c.embed_dim, size=size, stride=size, use_bias=True, name="stem")(pixels)
        x = LayerNorm(STEM_EPSILON, name="stem_norm")(x)
        if c.absolute_positions:
            if x.shape[1:3] != c.grids[0]:
                raise ValueError(f"pixels of {height} x {width} must be of image_size={c.image_size}")
            init = named(nn.initializers.normal(0.02), None, None, "embed")
            x = x + self.param("positions", init, (*c.grids[0], c.embed_dim)).astype(x.dtype)
        self.sow("intermediates", "embedded", x)
        return constrain(x, "batch", None, None, None)
