"""Residual networks (He et al. 2016, arXiv 1512.03385): pixels in, a grid of features per stage out.

    pixels [h w c] --7x7 / 2, max pool / 2--> stem --stage--> [u v D] --stage / 2--> ... --mean--> [D]

The first block of a stage changes width and resolution; the others are alike, and so are stacked and scanned.
Running statistics of batch normalisation are no parameters but a collection of their own, ``batch_stats``.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from vl_jax.kernels.activation import FUNCTIONS
from vl_jax.nn.conv import Conv
from vl_jax.nn.layers import fan_in, named
from vl_jax.params import Leaf
from vl_jax.sharding import constrain

ACTIVATIONS = {**FUNCTIONS, "selu": jax.nn.selu}
HE = fan_in(in_axis=(0, 1, 2), scale=2.0)  # half of the variance is lost in the activation
EPSILON = 1e-5
MOMENTUM = 0.9  # how much of the running statistics an update keeps


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Defaults are ResNet-50, with the stride on the 3x3 convolution (v1.5)."""

    stem_dim: int = 64
    stage_dims: tuple[int, ...] = (256, 512, 1024, 2048)
    stage_blocks: tuple[int, ...] = (3, 4, 6, 3)
    block: Literal["basic", "bottleneck"] = "bottleneck"
    bottleneck: int = 4  # how much narrower the 3x3 convolution of a bottleneck is
    bottleneck_stride: Literal["1x1", "3x3"] = "3x3"  # the convolution of a bottleneck that has the stride
    first_stage_stride: int = 1
    # Of the stem and behind each sum; between the convolutions of a block published models have ReLU always.
    activation: Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "selu"] = "relu"

    def __post_init__(self):
        if len(self.stage_dims) != len(self.stage_blocks) or not self.stage_dims:
            raise ValueError(
                f"stage_dims={self.stage_dims}, stage_blocks={self.stage_blocks}: must be of one length >= 1"
            )
        if min(self.stage_blocks) < 1:
            raise ValueError(f"stage_blocks={self.stage_blocks} must be >= 1")
        if self.block == "bottleneck" and min(self.stage_dims) < self.bottleneck:
            raise ValueError(f"stage_dims={self.stage_dims} must be >= bottleneck={self.bottleneck}")

    def convolutions(self, width: int, stride: int) -> tuple[tuple[int, int, int], ...]:
        """(width, size, stride) of each convolution of a block with the given width and stride."""
        if self.block == "basic":
            return (width, 3, stride), (width, 3, 1)
        narrow = width // self.bottleneck
        first, second = (stride, 1) if self.bottleneck_stride == "1x1" else (1, stride)
        return (narrow, 1, first), (narrow, 3, second), (width, 1, 1)


@struct.dataclass
class ResNetOutput:
    """What the network sees."""

    stages: tuple[Leaf, ...]  # [M u v D] of the stem and of every stage, each half as fine as the one before
    pooled: Leaf  # [M D] mean of the last


def batch_norm(
    x: Float[Array, "M h w D"],
    mean: Float[Array, " D"],
    variance: Float[Array, " D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
) -> Float[Array, "M h w D"]:
    """``(x - mean) / sqrt(variance + epsilon) * scale + bias`` in float32, cast back."""
    gain = scale * jax.lax.rsqrt(variance + EPSILON)
    return ((x.astype(jnp.float32) - mean) * gain + bias).astype(x.dtype)


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy 2015, arXiv 1502.03167), by running statistics if ``frozen``.

    Otherwise by those of the batch, towards which the running ones move if ``batch_stats`` is mutable.
    """

    frozen: bool

    @nn.compact
    def __call__(self, x: Float[Array, "M h w D"]) -> Float[Array, "M h w D"]:
        shape = x.shape[-1:]
        scale = self.param("scale", named(nn.initializers.ones, None), shape)
        bias = self.param("bias", named(nn.initializers.zeros, None), shape)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        variance = self.variable("batch_stats", "variance", jnp.ones, shape)
        if self.frozen:
            return batch_norm(x, mean.value, variance.value, scale, bias)
        wide = x.astype(jnp.float32)
        now = jnp.mean(wide, axis=(0, 1, 2)), jnp.var(wide, axis=(0, 1, 2))
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            count = x.size // x.shape[-1]
            unbiased = now[1] * (count / max(count - 1, 1))
            mean.value = MOMENTUM * mean.value + (1 - MOMENTUM) * now[0]
            variance.value = MOMENTUM * variance.value + (1 - MOMENTUM) * unbiased
        return batch_norm(x, *now, scale, bias)


class NormedConv(nn.Module):
    """A centred convolution without bias, and batch normalisation."""

    features: int
    size: int
    stride: int
    frozen: bool

    @nn.compact
    def __call__(self, x: Float[Array, "M h w c"]) -> Float[Array, "M u v D"]:
        conv = Conv(
            self.features,
            size=self.size,
            stride=self.stride,
            padding=self.size // 2,
            kernel_init=HE,
            name="conv",
        )
        return BatchNorm(self.frozen, name="norm")(conv(x))


class ResidualBlock(nn.Module):
    """A residual block; where width or resolution change, the shortcut is a 1x1 convolution."""

    config: ResNetConfig
    width: int
    stride: int
    frozen: bool

    @nn.compact
    def __call__(self, x: Float[Array, "M h w c"], _: None) -> tuple[Float[Array, "M u v D"], None]:
        activation = ACTIVATIONS[self.config.activation]
        y = x
        for i, (width, size, stride) in enumerate(self.config.convolutions(self.width, self.stride)):
            y = nn.relu(y) if i else y
            y = NormedConv(width, size, stride, self.frozen, name=f"conv{i}")(y)
        if x.shape[-1] != self.width or self.stride != 1:
            x = NormedConv(self.width, 1, self.stride, self.frozen, name="shortcut")(x)
        return constrain(activation(x + y), "batch", None, None, None), None


class ResNet(nn.Module):
    """The network; pixels are already normalised, and of any size.

    Args:
      frozen: normalise by the running statistics, in training too: scale and bias learn, the statistics stay.
    """

    config: ResNetConfig
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    remat: bool = False
    frozen: bool = True

    @nn.compact
    def __call__(self, pixels: Float[Array, "M h w c"]) -> ResNetOutput:
        c = self.config
        x = NormedConv(c.stem_dim, 7, 2, self.frozen, name="stem")(pixels.astype(self.dtype))
        x = ACTIVATIONS[c.activation](x)
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        stages = [x]
        block = nn.remat(ResidualBlock, prevent_cse=False) if self.remat else ResidualBlock
        for i, (width, blocks) in enumerate(zip(c.stage_dims, c.stage_blocks, strict=True)):
            stride = 2 if i else c.first_stage_stride
            x, _ = block(c, width, stride, self.frozen, name=f"stage{i}_first")(x, None)
            if blocks > 1:
                others = nn.scan(
                    block,
                    variable_axes={"params": 0, "batch_stats": 0, "intermediates": 0},
                    split_rngs={"params": True},
                    length=blocks - 1,
                    metadata_params={nn.PARTITION_NAME: "layers"},
                )
                x, _ = others(c, width, 1, self.frozen, name=f"stage{i}_others")(x, None)
            stages.append(x)
        pooled = jnp.mean(x.astype(jnp.float32), axis=(1, 2)).astype(x.dtype)
        return ResNetOutput(tuple(stages), pooled)
