"""A residual trunk in front of Swin stages: convolutions see edges, windows relate places, at several sizes.

    pixels [h w c] --trunk, stride 8--> cells [g g C] --1x1, norm--> Swin stages --> tokens, one vector
        maps: 1/4                       1/8, 1/16, ... after each stage of windows

As ``hybrid`` puts such a trunk before a vision transformer. The first Swin stage reads the trunk's cells as
it would pixels, one a patch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt8

from vl_jax.encoders.hybrid import RESNET_18, TRUNK, trunk_up_to
from vl_jax.encoders.resnet import ResNet, ResNetConfig
from vl_jax.encoders.swin import Swin, SwinConfig
from vl_jax.encoders.transformer import Encoded
from vl_jax.encoders.vit import Levels
from vl_jax.kernels.activation import Kind
from vl_jax.moe.routing import State
from vl_jax.moe.stacks import Stack

STAGES = "swin"  # name of what stands behind the trunk, in parameters and for ``parts``


@dataclasses.dataclass(frozen=True)
class SwinHybridConfig:
    """Defaults are ResNet-18 up to cells of 8 pixels before the last three stages of Swin-T."""

    # Its ``image_size`` and its levels of pixels are those of the encoder. Stages whose cells are larger than
    # patches may be named, as a published network has them; they are not built.
    trunk: ResNetConfig = dataclasses.replace(RESNET_18, statistics="moving")
    patch_size: int = 8  # pixels on the side of a cell that enters the first stage of windows
    embed_dim: int = 192  # of the first stage; each further one is twice as wide
    stage_blocks: tuple[int, ...] = (2, 6, 2)
    num_heads: tuple[int, ...] = (6, 12, 24)  # by stage
    window: int = 7  # cells on the side of a window
    mlp_ratio: float = 4.0  # hidden width as a multiple of the stage's
    qkv_bias: bool = True
    activation: Kind = "gelu"
    norm_epsilon: float = 1e-5

    def __post_init__(self):
        _ = self.swin  # checks its own fields

    @property
    def built_trunk(self) -> ResNetConfig:
        """The trunk up to the stage whose cells are as large as patches."""
        return trunk_up_to(self.trunk, self.patch_size)

    @property
    def swin(self) -> SwinConfig:
        """The stages behind the trunk, which see the trunk's cells as pixels, one a patch."""
        trunk = self.built_trunk
        return SwinConfig(
            image_size=trunk.grid,
            patch_size=1,
            num_channels=trunk.output_dim,
            embed_dim=self.embed_dim,
            stage_blocks=self.stage_blocks,
            num_heads=self.num_heads,
            window=self.window,
            mlp_ratio=self.mlp_ratio,
            qkv_bias=self.qkv_bias,
            activation=self.activation,
            norm_epsilon=self.norm_epsilon,
            pixel_mean=0.0,
            pixel_std=1.0,
        )

    @property
    def parts(self) -> dict[str, tuple[Any, tuple[str, ...]]]:
        """What published weights can be read into: the config, and what of it no published model has."""
        stem = ("stem/kernel", "stem/bias", "stem_norm/scale", "stem_norm/bias")
        return {TRUNK: (self.built_trunk, ()), STAGES: (self.swin, stem)}

    @property
    def grid(self) -> int:
        """Cells of the last stage on the side of an image."""
        return self.swin.grid

    @property
    def num_tokens(self) -> int:
        """Cells of the last stage."""
        return self.grid**2

    @property
    def output_dim(self) -> int:
        """Width of a token, and of an image as one vector."""
        return self.swin.output_dim

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
        """There are no sparse layers."""
        return None

    def build(self, dtype: DTypeLike, *, remat: bool = False) -> SwinHybrid:
        """The module."""
        return SwinHybrid(self, jnp.dtype(dtype), remat)


class SwinHybrid(nn.Module):
    """The encoder; the running statistics of its trunk are in the collection ``batch_stats``."""

    config: SwinHybridConfig
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        pixels: UInt8[Array, "M h w c"] | Float[Array, "M h w c"],
        valid: Bool[Array, " M"] | None = None,
        routing_state: State | None = None,
    ) -> Encoded:
        """The last stage as tokens, row by row, and their mean; as maps the trunk's stages, then Swin's.

        Args:
          pixels: grey levels, or floats that are normalised already.
          valid: images that are used: only these count in statistics. None: all of them.
        """
        c = self.config
        trunk = ResNet(c.built_trunk, self.dtype, self.remat, name=TRUNK).stages(pixels, valid).stages[1:]
        seen = Swin(c.swin, self.dtype, self.remat, name=STAGES)(trunk[-1])
        return dataclasses.replace(seen, maps=(*trunk[:-1], *seen.maps))
