"""Features of a waveform by strided convolutions in time (wav2vec 2.0, arXiv 2006.11477, section 2).

    waves [L] -> conv -> norm -> activation -> ... -> features [T D]

No convolution pads, so a frame sees ``span`` samples, and only frames whose samples are all there count.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from vl_jax.kernels.activation import FUNCTIONS, Kind
from vl_jax.nn.conv import GroupNorm
from vl_jax.nn.layers import LayerNorm, fan_in, named

_EPSILON = 1e-5  # of the norms between convolutions, whatever that of the encoder is


@dataclasses.dataclass(frozen=True)
class WaveFeaturesConfig:
    """Defaults are those of all published wav2vec 2.0: a frame of 25 ms every 20 ms, at 16 kHz."""

    dims: tuple[int, ...] = (512,) * 7  # width after each convolution
    kernels: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)  # steps that it sees
    strides: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)  # steps from one output to the next
    use_bias: bool = False
    # "first": each channel of the first convolution is normalised over the whole row, padding included;
    # "each": every frame is normalised by itself after every convolution.
    norm: Literal["first", "each"] = "first"
    activation: Kind = "gelu"

    def __post_init__(self):
        lengths = {len(self.dims), len(self.kernels), len(self.strides)}
        if len(lengths) > 1 or not self.dims or min(*self.dims, *self.kernels, *self.strides) < 1:
            raise ValueError(
                f"dims={self.dims}, kernels={self.kernels}, strides={self.strides}: expected one number >= 1 "
                "of each for every convolution"
            )

    @property
    def stride(self) -> int:
        """Samples from one frame to the next."""
        return math.prod(self.strides)

    @property
    def span(self) -> int:
        """Samples that a frame sees."""
        seen = 1
        for kernel, stride in zip(reversed(self.kernels), reversed(self.strides), strict=True):
            seen = (seen - 1) * stride + kernel
        return seen

    def frames(self, samples: int) -> int:
        """Frames of so many samples."""
        return max(samples - self.span, -self.stride) // self.stride + 1


def convolve_in_time(
    x: Float[Array, "B T D"],
    kernel: Float[Array, "K I E"],
    *,
    stride: int = 1,
    padding: int = 0,
) -> Float[Array, "B S E"]:
    """1D convolution (in truth correlation) of D / I groups; ``padding`` zeros on both sides."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride,),
        ((padding, padding),),
        dimension_numbers=("NWC", "WIO", "NWC"),
        feature_group_count=x.shape[-1] // kernel.shape[1],
    )


class WaveFeatures(nn.Module):
    """The convolutions, which belong to modules ``conv0``, ``conv1`` and so on."""

    config: WaveFeaturesConfig

    @nn.compact
    def __call__(self, waves: Float[Array, "B L"]) -> Float[Array, "B T D"]:
        """Features of every frame that lies within the row."""
        x = waves[..., None]
        for i in range(len(self.config.dims)):
            x = WaveConv(self.config, i, name=f"conv{i}")(x)
        return x


class WaveConv(nn.Module):
    """One convolution, its norm if it has one, and the activation."""

    config: WaveFeaturesConfig
    number: int

    @nn.compact
    def __call__(self, x: Float[Array, "B T I"]) -> Float[Array, "B S D"]:
        c, i = self.config, self.number
        init = named(fan_in(in_axis=(0, 1)), None, None, "embed", inputs=(0, 1))
        kernel = self.param("kernel", init, (c.kernels[i], x.shape[-1], c.dims[i]))
        x = convolve_in_time(x, kernel.astype(x.dtype), stride=c.strides[i])
        if c.use_bias:
            bias = self.param("bias", named(nn.initializers.zeros, "embed"), (c.dims[i],))
            x = x + bias.astype(x.dtype)
        if c.norm == "each":
            x = LayerNorm(_EPSILON, name="norm")(x)
        elif i == 0:
            x = GroupNorm(c.dims[0], _EPSILON, name="norm")(x[:, :, None])[:, :, 0]
        return FUNCTIONS[c.activation](x)
