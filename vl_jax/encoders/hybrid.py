"""The hybrid encoder: convolutions see edges and texture, attention relates places, experts specialise.

    pixels [h w c] --trunk, stride 16--> cells [g g C] --1x1, + positions--> blocks, some with experts
        maps: 1/4, 1/8, 1/16 ...              '--> tokens [g*g D], the last map [g g D], one vector [D]

The trunk is a residual network that ends where its cells are as large as the patches; what it would have
behind them is not built. The rest is the vision transformer of ``vit``, which reads cells as it would pixels:
a token is a place of the picture all the way. Dosovitskiy et al. 2021 (arXiv 2010.11929, section 3.1) put a
residual network before a transformer; Riquelme et al. 2021 (arXiv 2106.05974) put experts into its blocks.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt8

from vl_jax.encoders.resnet import ResNet, ResNetConfig
from vl_jax.encoders.transformer import Encoded, from_grid
from vl_jax.encoders.vit import Levels, ViT, ViTConfig
from vl_jax.kernels.activation import Kind
from vl_jax.moe.noise import content_of
from vl_jax.moe.routing import MoEConfig, State
from vl_jax.moe.stacks import Stack

TRUNK, BLOCKS = "trunk", "vit"  # names of the two parts, in parameters and for ``parts``

# ResNet-18. What nothing has trained yet needs the statistics of its batches.
RESNET_18 = ResNetConfig(stage_dims=(64, 128, 256, 512), stage_blocks=(2, 2, 2, 2), block="basic")


@dataclasses.dataclass(frozen=True)
class HybridConfig:
    """Defaults are ResNet-18 before ViT-L/16, without experts."""

    # Its ``image_size`` and its levels of pixels are those of the encoder. Stages whose cells are larger than
    # patches may be named, as a published network has them; they are not built.
    trunk: ResNetConfig = dataclasses.replace(RESNET_18, statistics="moving")
    patch_size: int = 16  # pixels on the side of a cell that becomes a token
    embed_dim: int = 1024
    mlp_dim: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    activation: Kind = "gelu"
    norm_epsilon: float = 1e-6
    qkv_bias: bool = True
    class_token: bool = False  # a learned token before the cells, as the first ViT has it
    pooling: Literal["mean", "class", "attention"] = "mean"  # of the tokens to one vector
    moe: MoEConfig | None = None  # experts of the sparse blocks; every image is a routing group
    sparse_layers: tuple[int, ...] = ()  # numbers of the blocks with experts, ascending

    def __post_init__(self):
        _ = self.built_trunk  # says which cells there are
        if self.class_token and self.pooling == "attention":
            raise ValueError("pooling='attention' reads cells alone: class_token must be False")
        _ = self.vit  # checks its own fields

    @property
    def built_trunk(self) -> ResNetConfig:
        """The trunk up to the stage whose cells are as large as patches."""
        return trunk_up_to(self.trunk, self.patch_size)

    @property
    def vit(self) -> ViTConfig:
        """The transformer behind the trunk, which sees the trunk's cells as pixels, one a patch."""
        trunk = self.built_trunk
        return ViTConfig(
            image_size=trunk.grid,
            patch_size=1,
            num_channels=trunk.output_dim,
            embed_dim=self.embed_dim,
            mlp_dim=self.mlp_dim,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            activation=self.activation,
            norm_epsilon=self.norm_epsilon,
            qkv_bias=self.qkv_bias,
            class_token=self.class_token,
            pooling="none" if self.pooling == "mean" else self.pooling,
            moe=self.moe,
            sparse_layers=self.sparse_layers,
        )

    @property
    def parts(self) -> dict[str, tuple[Any, tuple[str, ...]]]:
        """What published weights can be read into: the config, and what of it no published model has."""
        return {TRUNK: (self.built_trunk, ()), BLOCKS: (self.vit, ("stem/kernel", "stem/bias"))}

    @property
    def grid(self) -> int:
        """Tokens on the side of an image."""
        return self.built_trunk.grid

    @property
    def num_tokens(self) -> int:
        """Cells of the grid."""
        return self.grid**2

    @property
    def output_dim(self) -> int:
        """Width of a token, and of an image as one vector."""
        return self.embed_dim

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of an image: height, width, channels."""
        return self.trunk.input_shape

    @property
    def pixel_mean(self) -> Levels:
        """Of pixel values scaled to 0..1."""
        return self.trunk.pixel_mean

    @property
    def pixel_std(self) -> Levels:
        """Of pixel values scaled to 0..1."""
        return self.trunk.pixel_std

    @property
    def stack(self) -> Stack | None:
        """The sparse blocks, if there are any."""
        inner = self.vit.stack
        if inner is None:
            return None
        return dataclasses.replace(inner, runs=tuple((BLOCKS, *run) for run in inner.runs))

    def build(self, dtype: DTypeLike, *, remat: bool = False) -> Hybrid:
        """The module."""
        return Hybrid(self, jnp.dtype(dtype), remat)


def trunk_up_to(trunk: ResNetConfig, side: int) -> ResNetConfig:
    """A trunk without the stages behind the one whose cells are ``side`` pixels on the side.

    Raises:
      ValueError: no stage has such cells.
    """
    sides = [4 * trunk.first_stage_stride << i for i in range(len(trunk.stage_dims))]
    if side not in sides:
        known = ", ".join(map(str, dict.fromkeys(sides)))
        raise ValueError(
            f"patch_size={side}: no stage of the trunk has cells of that size; they have {known} pixels "
            f"(trunk.stage_dims={trunk.stage_dims}, trunk.first_stage_stride={trunk.first_stage_stride})"
        )
    stages = sides.index(side) + 1
    return dataclasses.replace(
        trunk, stage_dims=trunk.stage_dims[:stages], stage_blocks=trunk.stage_blocks[:stages]
    )


class Hybrid(nn.Module):
    """The encoder; the running statistics of its trunk are in the collection ``batch_stats``."""

    config: HybridConfig
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        pixels: UInt8[Array, "M h w c"] | Float[Array, "M h w c"],
        valid: Bool[Array, " M"] | None = None,
        routing_state: State | None = None,
    ) -> Encoded:
        """Tokens row by row, one vector, and as maps the stages of the trunk and the grid of tokens.

        Args:
          pixels: grey levels, or floats that are normalised already.
          valid: images that are used: only these count in statistics and take experts. None: all of them.
          routing_state: state of the scheme, stacked over the sparse blocks.

        Raises:
          ValueError: the images have another size than the config says.
        """
        c = self.config
        if pixels.shape[1:3] != c.input_shape[:2]:
            height, width = pixels.shape[1:3]
            raise ValueError(
                f"images of {height} x {width} pixels: positions are for trunk.image_size="
                f"{c.trunk.image_size}; set it to the size of the images (published positions are then "
                "resized to it as they are read)"
            )
        stages = ResNet(c.built_trunk, self.dtype, self.remat, name=TRUNK).stages(pixels, valid).stages[1:]
        # Rounding differs between meshes, so noise follows the pixels and not what the trunk makes of them.
        content = content_of(pixels) if self.has_rng("routing") else None
        seen = ViT(c.vit, self.dtype, self.remat, name=BLOCKS)(stages[-1], valid, routing_state, content)
        grid = seen.tokens.reshape(*stages[-1].shape[:3], -1)
        if c.pooling == "mean":
            seen = dataclasses.replace(seen, pooled=from_grid(grid).pooled)
        return dataclasses.replace(seen, maps=(*stages, grid))
