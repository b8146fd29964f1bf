"""A deformable convolution in front of any encoder of pictures.

    pixels [h w c] --3x3--> [h w F] --deformable 3x3--> [h w F] --1x1--> + pixels --> encoder

The last convolution begins at zero, so at first the encoder sees the picture as it is: published weights for
it stay good, and the front learns from there.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt8

from vl_jax.encoders.deformable import DeformableConv, Form, Taps
from vl_jax.encoders.hybrid import HybridConfig
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.encoders.sam import SAMConfig
from vl_jax.encoders.swin import SwinConfig
from vl_jax.encoders.swin_hybrid import SwinHybridConfig
from vl_jax.encoders.transformer import Encoded
from vl_jax.encoders.vit import ViTConfig, as_floats
from vl_jax.moe.routing import State
from vl_jax.moe.stacks import Stack
from vl_jax.nn.conv import Conv
from vl_jax.nn.layers import named

ENCODER = "encoder"  # name of what stands behind the front, in parameters and for ``parts``


@dataclasses.dataclass(frozen=True)
class DeformableFrontConfig:
    """The front, and the encoder behind it, whose picture size and levels of pixels are those of both."""

    encoder: ViTConfig | SAMConfig | ResNetConfig | HybridConfig | SwinConfig | SwinHybridConfig
    features: int = 32  # of the front
    groups: int = 1  # of features that are moved by themselves
    # near: offsets up to one cell, without a gather. gather: any offset.
    form: Form = "near"

    def __post_init__(self):
        if self.features < 1 or self.groups < 1 or self.features % self.groups:
            raise ValueError(
                f"features={self.features} must be a multiple of groups={self.groups}, both >= 1"
            )

    @property
    def output_dim(self) -> int:
        """Width of a token."""
        return self.encoder.output_dim

    @property
    def pooled_dim(self) -> int:
        """Width of an image as one vector."""
        return getattr(self.encoder, "pooled_dim", self.encoder.output_dim)

    @property
    def num_tokens(self) -> int:
        """Tokens of an image."""
        return self.encoder.num_tokens

    @property
    def grid(self) -> int:
        """Tokens on the side of an image."""
        return self.encoder.grid

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of an image: height, width, channels."""
        return self.encoder.input_shape

    @property
    def stack(self) -> Stack | None:
        """The sparse layers of the encoder, if there are any."""
        inner = self.encoder.stack
        if inner is None:
            return None
        return dataclasses.replace(inner, runs=tuple((ENCODER, *run) for run in inner.runs))

    def build(self, dtype: DTypeLike, *, remat: bool = False) -> DeformableFront:
        """The module."""
        return DeformableFront(self, jnp.dtype(dtype), remat)


class DeformableFront(nn.Module):
    """The front and the encoder."""

    config: DeformableFrontConfig
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    remat: bool = False

    def setup(self):
        c = self.config
        self.first = Conv(c.features, size=3, padding=1, use_bias=True)
        self.deformable = DeformableConv(c.features, Taps(), c.groups, c.form)
        init = named(nn.initializers.zeros, None, None, inputs=(0,))
        self.last = self.param("last", init, (c.features, c.input_shape[2]))
        self.encoder = c.encoder.build(self.dtype, remat=self.remat)

    def __call__(
        self,
        pixels: UInt8[Array, "M h w c"] | Float[Array, "M h w c"],
        valid: Bool[Array, " M"] | None = None,
        routing_state: State | None = None,
    ) -> Encoded:
        """What the encoder gives.

        Args:
          pixels: grey levels, or floats that are normalised already.
          valid: images that are used; see the encoder.
          routing_state: state of the scheme, stacked over the encoder's sparse layers.
        """
        e = self.config.encoder
        x = as_floats(pixels, mean=e.pixel_mean, std=e.pixel_std).astype(self.dtype)
        y = jax.nn.gelu(self.first(x), approximate=True)
        y = jax.nn.gelu(self.deformable(y), approximate=True)
        return self.encoder(x + y @ self.last.astype(x.dtype), valid, routing_state)
