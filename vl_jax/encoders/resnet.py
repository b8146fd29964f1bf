"""Residual networks (He et al. 2016, arXiv 1512.03385): pixels in, a grid of features per stage out.

    pixels [h w c] --7x7 / 2, max pool / 2--> stem --stage--> [u v D] --stage / 2--> ... --mean--> [D]

The first block of a stage changes width and resolution; the others are alike, and so are stacked and scanned.
Running statistics of batch normalisation are no parameters but a collection of their own, ``batch_stats``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt8

from vl_jax.encoders.transformer import Encoded, from_grid
from vl_jax.encoders.vit import Levels, as_floats
from vl_jax.kernels.activation import FUNCTIONS
from vl_jax.moe.routing import State
from vl_jax.moe.stacks import Stack
from vl_jax.nn import packed
from vl_jax.nn.conv import Conv
from vl_jax.nn.layers import fan_in, named
from vl_jax.nn.still import STILL
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
    # Of batch normalisation in training. frozen: the running ones, which stay, while scale and bias learn.
    # moving: those of the batch, towards which the running ones move; of a micro-batch where a stage has
    # several, and the running ones then move once, to the mean. Where scale and bias do not train they stay.
    statistics: Literal["frozen", "moving"] = "frozen"
    image_size: int = 224  # pixels on the side; the module itself takes images of any size
    num_channels: int = 3
    pixel_mean: Levels = (0.485, 0.456, 0.406)  # of pixel values scaled to 0..1
    pixel_std: Levels = (0.229, 0.224, 0.225)

    def __post_init__(self):
        if len(self.stage_dims) != len(self.stage_blocks) or not self.stage_dims:
            raise ValueError(
                f"stage_dims={self.stage_dims}, stage_blocks={self.stage_blocks}: must be of one length >= 1"
            )
        if min(self.stage_blocks) < 1:
            raise ValueError(f"stage_blocks={self.stage_blocks} must be >= 1")
        if self.block == "bottleneck" and min(self.stage_dims) < self.bottleneck:
            raise ValueError(f"stage_dims={self.stage_dims} must be >= bottleneck={self.bottleneck}")
        if min(self.image_size, self.num_channels) < 1:
            raise ValueError(f"image_size={self.image_size}, num_channels={self.num_channels}: must be >= 1")

    @property
    def grid(self) -> int:
        """Cells of the last stage on the side of the image."""
        side = self.image_size
        for stride in (2, 2, self.first_stage_stride, *[2] * (len(self.stage_dims) - 1)):
            side = -(-side // stride)
        return side

    @property
    def num_tokens(self) -> int:
        """Cells of the last stage."""
        return self.grid**2

    @property
    def output_dim(self) -> int:
        """Width of the last stage."""
        return self.stage_dims[-1]

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of an image: height, width, channels."""
        return self.image_size, self.image_size, self.num_channels

    @property
    def stack(self) -> Stack | None:
        """There are no sparse layers."""
        return None

    def convolutions(self, width: int, stride: int) -> tuple[tuple[int, int, int], ...]:
        """(width, size, stride) of each convolution of a block with the given width and stride."""
        if self.block == "basic":
            return (width, 3, stride), (width, 3, 1)
        narrow = width // self.bottleneck
        first, second = (stride, 1) if self.bottleneck_stride == "1x1" else (1, stride)
        return (narrow, 1, first), (narrow, 3, second), (width, 1, 1)

    def build(self, dtype: DTypeLike, *, remat: bool = False) -> ResNet:
        """The module."""
        return ResNet(self, jnp.dtype(dtype), remat)


@struct.dataclass
class ResNetOutput:
    """What the network sees."""

    stages: tuple[Leaf, ...]  # [M u v D] of the stem and of every stage, each half as fine as the one before
    pooled: Leaf  # [M D] mean of the last


def batch_norm(
    x: Float[Array, "M *grid D"],
    mean: Float[Array, " D"],
    variance: Float[Array, " D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
) -> Float[Array, "M *grid D"]:
    """``(x - mean) / sqrt(variance + epsilon) * scale + bias`` in float32, cast back."""
    gain = scale * jax.lax.rsqrt(variance + EPSILON)
    return ((x.astype(jnp.float32) - mean) * gain + bias).astype(x.dtype)


def batch_statistics(
    x: Float[Array, "M *grid D"], valid: Bool[Array, "M *first"] | None
) -> tuple[Float[Array, " D"], Float[Array, " D"], Float[Array, ""]]:
    """Mean and variance of the channels over what is valid (None: all), and how many cells that has.

    Args:
      valid: of images, or of their rows; of clips, or of their frames.
    """
    wide, axes = x.astype(jnp.float32), tuple(range(x.ndim - 1))
    valid = jnp.ones(x.shape[:1], bool) if valid is None else valid
    mask = valid.reshape(valid.shape + (1,) * (x.ndim - valid.ndim))
    count = jnp.sum(valid, dtype=jnp.float32) * math.prod(x.shape[valid.ndim : -1])
    mean = jnp.sum(wide, axis=axes, where=mask) / jnp.maximum(count, 1.0)
    square = jnp.sum((wide - mean) ** 2, axis=axes, where=mask)
    return mean, square / jnp.maximum(count, 1.0), count


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe and Szegedy 2015, arXiv 1502.03167), by running statistics if ``frozen``.

    Otherwise by those of the batch if ``batch_stats`` is mutable, towards which the running ones then move.
    Where it is not, as in evaluation, the running ones are all there is; and so where they are marked as ones
    that stay (``nn.still``), as in a stage that does not train scale and bias.
    """

    frozen: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "M *grid D"], valid: Bool[Array, "M *first"] | None = None
    ) -> Float[Array, "M *grid D"]:
        """Normalises channels; only what is ``valid`` (None: all) counts in the statistics of the batch."""
        shape = x.shape[-1:]
        scale = self.param("scale", named(nn.initializers.ones, None), shape)
        bias = self.param("bias", named(nn.initializers.zeros, None), shape)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        variance = self.variable("batch_stats", "variance", jnp.ones, shape)
        still = self.has_variable(STILL, "mean") or not self.is_mutable_collection("batch_stats")
        if self.frozen or still:
            return batch_norm(x, mean.value, variance.value, scale, bias)
        now_mean, now_variance, count = batch_statistics(x, valid)
        if not self.is_initializing():
            unbiased = now_variance * (count / jnp.maximum(count - 1.0, 1.0))
            for running, now in ((mean, now_mean), (variance, unbiased)):
                moved = MOMENTUM * running.value + (1 - MOMENTUM) * now
                running.value = jnp.where(count > 0, moved, running.value)
        return batch_norm(x, now_mean, now_variance, scale, bias)


class NormedConv(nn.Module):
    """A centred convolution without bias, and batch normalisation."""

    features: int
    size: int
    stride: int
    frozen: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "M h w c"], valid: Bool[Array, " M"] | None = None
    ) -> Float[Array, "M u v D"]:
        conv = Conv(
            self.features,
            size=self.size,
            stride=self.stride,
            padding=self.size // 2,
            kernel_init=HE,
            name="conv",
        )
        return BatchNorm(self.frozen, name="norm")(conv(x), valid)


class ResidualBlock(nn.Module):
    """A residual block; where width or resolution change, the shortcut is a 1x1 convolution."""

    config: ResNetConfig
    width: int
    stride: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "M h w c"], valid: Bool[Array, " M"] | None
    ) -> tuple[Float[Array, "M u v D"], None]:
        activation, frozen = ACTIVATIONS[self.config.activation], self.config.statistics == "frozen"
        y = x
        for i, (width, size, stride) in enumerate(self.config.convolutions(self.width, self.stride)):
            y = nn.relu(y) if i else y
            y = NormedConv(width, size, stride, frozen, name=f"conv{i}")(y, valid)
        if x.shape[-1] != self.width or self.stride != 1:
            x = NormedConv(self.width, 1, self.stride, frozen, name="shortcut")(x, valid)
        return constrain(activation(x + y), "batch", None, None, None), None


class ResNet(nn.Module):
    """The network, for images of any size; its statistics are in the collection ``batch_stats``."""

    config: ResNetConfig
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    remat: bool = False

    def __call__(
        self,
        pixels: UInt8[Array, "M h w c"] | Float[Array, "M h w c"],
        valid: Bool[Array, " M"] | None = None,
        routing_state: State | None = None,
    ) -> Encoded:
        """The last stage as tokens, row by row, and their mean; every stage as a map. No layer is sparse."""
        stages = self.stages(pixels, valid).stages
        return from_grid(stages[-1], stages[1:])

    @nn.compact
    def stages(
        self,
        pixels: UInt8[Array, "M h w c"] | Float[Array, "M h w c"],
        valid: Bool[Array, " M"] | None = None,
    ) -> ResNetOutput:
        """The features of every stage as grids.

        Args:
          pixels: grey levels, or floats that are normalised already.
          valid: images that count in the statistics of the batch. None: all of them.
        """
        c, frozen = self.config, self.config.statistics == "frozen"
        pixels = as_floats(pixels, mean=c.pixel_mean, std=c.pixel_std)
        x = NormedConv(c.stem_dim, 7, 2, frozen, name="stem")(pixels.astype(self.dtype), valid)
        x = ACTIVATIONS[c.activation](x)
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        stages = [x]
        block = nn.remat(ResidualBlock, prevent_cse=False) if self.remat else ResidualBlock
        for i, (width, blocks) in enumerate(zip(c.stage_dims, c.stage_blocks, strict=True)):
            stride = 2 if i else c.first_stage_stride
            x, _ = block(c, width, stride, name=f"stage{i}_first")(x, valid)
            if blocks > 1:
                others = nn.scan(
                    packed.layer_of(ResidualBlock, self, f"stage{i}_others", remat=self.remat),
                    variable_axes={"params": 0, "batch_stats": 0, STILL: 0, "intermediates": 0},
                    split_rngs={"params": True},
                    in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
                    length=blocks - 1,
                    metadata_params={nn.PARTITION_NAME: "layers"},
                )
                x, _ = others(c, width, 1, name=f"stage{i}_others")(x, valid)
            stages.append(x)
        return ResNetOutput(tuple(stages), from_grid(x).pooled)
