"""3D residual networks (R3D of Tran et al. 2018, arXiv 1711.11248): clips or volumes in, cells out.

    clip [f h w c] --3x7x7 / (1, 2, 2)--> [f u v D] --stage--> --stage / 2--> ... --> [t p q D]

All convolutions of blocks are 3x3x3, and strides are the same along frames, rows and columns. Frames that are
not there count as the zeros outside a clip, so a short clip gives what it would give by itself.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, UInt8

from vl_jax.encoders.resnet import BatchNorm
from vl_jax.encoders.transformer import Encoded
from vl_jax.encoders.video.videomae import masked_mean
from vl_jax.encoders.vit import Levels, Sides, as_floats
from vl_jax.moe.routing import State
from vl_jax.moe.stacks import Stack
from vl_jax.nn import packed
from vl_jax.nn.conv import VolumeConv
from vl_jax.nn.layers import fan_in
from vl_jax.nn.still import STILL
from vl_jax.sharding import constrain

HE = fan_in(in_axis=(0, 1, 2, 3), scale=2.0)  # half of the variance is lost in the activation
Three = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class VideoResNetConfig:
    """Defaults are R3D-18 as torchvision has it."""

    image_size: Sides = 112  # pixels; the module itself takes clips of any size
    num_frames: int = 16  # of a whole clip, or slices of a volume
    num_channels: int = 3  # 1 of a volume
    stem_dim: int = 64
    stage_dims: tuple[int, ...] = (64, 128, 256, 512)
    stage_blocks: tuple[int, ...] = (2, 2, 2, 2)
    # Of batch normalisation in training, as in ``ResNetConfig``.
    statistics: Literal["frozen", "moving"] = "frozen"
    input_dtype: Literal["uint8", "float32"] = "uint8"  # grey levels, or floats that are normalised already
    pixel_mean: Levels = (0.43216, 0.394666, 0.37645)  # of pixel values scaled to 0..1; Kinetics-400
    pixel_std: Levels = (0.22803, 0.22145, 0.216989)

    varies: ClassVar[bool] = True  # a clip may have fewer frames

    def __post_init__(self):
        if len(self.stage_dims) != len(self.stage_blocks) or min(self.stage_blocks, default=0) < 1:
            raise ValueError(
                f"stage_dims={self.stage_dims}, stage_blocks={self.stage_blocks}: must be of one length >= "
                "1, with at least one block a stage"
            )
        if min(self.input_shape) < 1:
            raise ValueError(f"num_frames, image_size, num_channels: {self.input_shape} must be >= 1")
        for name in ("pixel_mean", "pixel_std"):
            levels = getattr(self, name)
            if isinstance(levels, tuple) and len(levels) != self.num_channels:
                raise ValueError(
                    f"{name}={levels}: expected a number, or one for each of num_channels={self.num_channels}"
                )

    @property
    def shape(self) -> Three:
        """Cells of the last stage along frames, rows and columns."""
        frames, height, width, _ = self.input_shape
        halvings = len(self.stage_dims) - 1
        return (
            -(-frames // 2**halvings),
            -(-height // 2 ** (halvings + 1)),
            -(-width // 2 ** (halvings + 1)),
        )

    @property
    def grid(self) -> int:
        """There is none.

        Raises:
          ValueError: always.
        """
        raise ValueError(f"the {self.num_tokens} tokens of a clip form no square")

    @property
    def num_tokens(self) -> int:
        """Cells of the last stage."""
        frames, rows, columns = self.shape
        return frames * rows * columns

    @property
    def output_dim(self) -> int:
        """Width of the last stage."""
        return self.stage_dims[-1]

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """The shape of a clip: frames, height, width, channels."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.num_frames, height, width, self.num_channels

    @property
    def stack(self) -> Stack | None:
        """There are no sparse layers."""
        return None

    def build(self, dtype: DTypeLike, *, remat: bool = False) -> VideoResNet:
        """The module."""
        return VideoResNet(self, jnp.dtype(dtype), remat)


class NormedVolumeConv(nn.Module):
    """A centred convolution of frames that are there, and batch normalisation of what it gives."""

    features: int
    size: Three
    stride: Three
    frozen: bool

    @nn.compact
    def __call__(self, x: Float[Array, "M f h w c"], there: Bool[Array, "M f"]) -> Float[Array, "M t u v D"]:
        conv = VolumeConv(
            self.features,
            self.size,
            self.stride,
            tuple(n // 2 for n in self.size),  # pyright: ignore[reportArgumentType]
            HE,
            name="conv",
        )
        x = conv(jnp.where(there[:, :, None, None, None], x, 0))
        return BatchNorm(self.frozen, name="norm")(x, there[:, :: self.stride[0]])


class VolumeBlock(nn.Module):
    """Two convolutions; where width or resolution change, the shortcut is a 1x1x1 convolution."""

    width: int
    stride: int
    frozen: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "M f h w c"], there: Bool[Array, "M f"]
    ) -> tuple[Float[Array, "M t u v D"], None]:
        strides: Three = (self.stride, self.stride, self.stride)
        y = NormedVolumeConv(self.width, (3, 3, 3), strides, self.frozen, name="conv0")(x, there)
        later = there[:, :: self.stride]
        y = NormedVolumeConv(self.width, (3, 3, 3), (1, 1, 1), self.frozen, name="conv1")(nn.relu(y), later)
        if x.shape[-1] != self.width or self.stride != 1:
            shortcut = NormedVolumeConv(self.width, (1, 1, 1), strides, self.frozen, name="shortcut")
            x = shortcut(x, there)
        return constrain(nn.relu(x + y), "batch", None, None, None, None), None


class VideoResNet(nn.Module):
    """The network; its running statistics are in the collection ``batch_stats``."""

    config: VideoResNetConfig
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        clips: UInt8[Array, "M f h w c"] | Float[Array, "M f h w c"],
        valid: Bool[Array, "M f"] | Bool[Array, " M"] | None = None,
        routing_state: State | None = None,
    ) -> Encoded:
        """Cells of the last stage, frame by frame and row by row, and the mean of those that are there.

        Args:
          clips: grey levels, or floats that are normalised already.
          valid: frames that are there, or clips; only these count in the statistics of a batch. None: all.
        """
        c, frozen = self.config, self.config.statistics == "frozen"
        there = jnp.ones(clips.shape[:2], bool)
        if valid is not None:
            there = valid if valid.ndim == 2 else there & valid[:, None]
        x = as_floats(clips, mean=c.pixel_mean, std=c.pixel_std).astype(self.dtype)
        x = nn.relu(NormedVolumeConv(c.stem_dim, (3, 7, 7), (1, 2, 2), frozen, name="stem")(x, there))
        block = nn.remat(VolumeBlock, prevent_cse=False) if self.remat else VolumeBlock
        for i, (width, blocks) in enumerate(zip(c.stage_dims, c.stage_blocks, strict=True)):
            stride = 2 if i else 1
            x, _ = block(width, stride, frozen, name=f"stage{i}_first")(x, there)
            there = there[:, ::stride]
            if blocks > 1:
                others = nn.scan(
                    packed.layer_of(VolumeBlock, self, f"stage{i}_others", remat=self.remat),
                    variable_axes={"params": 0, "batch_stats": 0, STILL: 0, "intermediates": 0},
                    split_rngs={"params": True},
                    in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
                    length=blocks - 1,
                    metadata_params={nn.PARTITION_NAME: "layers"},
                )
                x, _ = others(width, 1, frozen, name=f"stage{i}_others")(x, there)
        _, _, rows, columns, width = x.shape
        tokens, mask = x.reshape(x.shape[0], -1, width), jnp.repeat(there, rows * columns, axis=1)
        return Encoded(tokens, masked_mean(tokens, mask), mask=mask if valid is not None else None)
