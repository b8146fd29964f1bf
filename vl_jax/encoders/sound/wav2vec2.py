"""wav2vec 2.0 (Baevski et al. 2020, arXiv 2006.11477): an encoder of speech that reads the waveform.

    waves [L] -> convolutions -> norm -> project -> + convolutional positions -> blocks -> tokens [T D]

A row may be shorter than the array it stands in: frames that see samples past its end are no tokens, take
part in nothing, and leave all others as they are. Where features are normalised over the row
(``features.norm="first"``) those samples still count there, as in published models; give ``"each"`` to a
model that reads rows of differing lengths.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from vl_jax.encoders.sound.wave_features import WaveFeatures, WaveFeaturesConfig, convolve_in_time
from vl_jax.encoders.transformer import BlockConfig, Encoded, run_blocks
from vl_jax.kernels.activation import FUNCTIONS, Kind
from vl_jax.moe.routing import State
from vl_jax.nn.layers import LayerNorm, Linear, named
from vl_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class Wav2Vec2Config:
    """Defaults are wav2vec 2.0 Base."""

    varies: ClassVar[bool] = True  # rows differ in length

    features: WaveFeaturesConfig = WaveFeaturesConfig()
    embed_dim: int = 768
    mlp_dim: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    activation: Kind = "gelu"
    norm_epsilon: float = 1e-5
    norms_follow: bool = True  # see ``BlockConfig``; False in the large models that were trained robustly
    position_kernel: int = 128  # frames that the convolution sees which tells frames where they stand
    position_groups: int = 16  # groups of its channels
    rate: int = 16_000  # samples a second that it was made for; sources bring sounds to it
    max_samples: int = 160_000  # of the longest sound
    normalize: bool = True  # bring every row to mean 0 and variance 1 first; False: it already is

    def __post_init__(self):
        if min(self.num_layers, self.position_kernel, self.position_groups, self.rate) < 1:
            raise ValueError(
                f"num_layers={self.num_layers}, position_kernel={self.position_kernel}, "
                f"position_groups={self.position_groups}, rate={self.rate}: must be >= 1"
            )
        if self.embed_dim % self.position_groups:
            raise ValueError(
                f"embed_dim={self.embed_dim} is not a multiple of position_groups={self.position_groups}"
            )
        if self.max_samples < self.features.span:
            raise ValueError(
                f"max_samples={self.max_samples} must be at least the {self.features.span} that a frame sees"
            )
        _ = self.block  # checks its own fields

    @property
    def block(self) -> BlockConfig:
        """The blocks."""
        return BlockConfig.of(self)

    @property
    def stack(self) -> None:
        """No layers with experts."""
        return None

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Samples of the longest sound."""
        return (self.max_samples,)

    @property
    def num_tokens(self) -> int:
        """Frames of the longest sound."""
        return self.features.frames(self.max_samples)

    @property
    def output_dim(self) -> int:
        """Width of a token."""
        return self.embed_dim

    @property
    def grid(self) -> int:
        """Raises ValueError: the frames of a sound form no square."""
        raise ValueError("encoder=Wav2Vec2Config: the frames of a sound form no square")

    def build(self, dtype: DTypeLike, *, remat: bool = False) -> Wav2Vec2:
        """The module."""
        return Wav2Vec2(self, jnp.dtype(dtype), remat)


def normalized(waves: Float[Array, "B L"], valid: Bool[Array, "B L"]) -> Float[Array, "B L"]:
    """Every row at mean 0 and variance 1 over the samples that are there; the others are 0."""
    wide, there = waves.astype(jnp.float32), valid.astype(jnp.float32)
    count = jnp.maximum(jnp.sum(there, axis=1, keepdims=True), 1.0)
    centred = (wide - jnp.sum(wide * there, axis=1, keepdims=True) / count) * there
    variance = jnp.sum(centred * centred, axis=1, keepdims=True) / count
    return centred / jnp.sqrt(variance + 1e-7)


class Wav2Vec2(nn.Module):
    """The encoder."""

    config: Wav2Vec2Config
    dtype: jnp.dtype = jnp.dtype(jnp.float32)
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        waves: Float[Array, "B L"],
        valid: Bool[Array, "B L"] | None = None,
        routing_state: State | None = None,
    ) -> Encoded:
        """Encodes rows of samples.

        Args:
          valid: samples that are there, the first ones of each row; None: all of them.
          routing_state: not read, as there are no experts.
        """
        c = self.config
        valid = jnp.ones(waves.shape, bool) if valid is None else valid
        waves = normalized(waves, valid) if c.normalize else waves
        x = WaveFeatures(c.features, name="features")(waves.astype(self.dtype))
        there = _frames_there(valid, x.shape[1], c.features)
        x = LayerNorm(c.norm_epsilon, name="features_norm")(x)
        x = Linear(c.embed_dim, (None, "embed"), use_bias=True, name="project")(x)
        x = jnp.where(there[..., None], x, 0)
        x = x + ConvolvedPositions(c, name="positions")(x)
        if c.norms_follow:
            x = LayerNorm(c.norm_epsilon, name="norm")(x)
        x = constrain(x, "batch", None, None)
        self.sow("intermediates", "embedded", x)
        x, _, _ = run_blocks(x, there[:, None, :], c.block, remat=self.remat, owner=self)
        if not c.norms_follow:
            x = LayerNorm(c.norm_epsilon, name="norm")(x)
        return Encoded(x, None, mask=there)


def _frames_there(valid: Bool[Array, "B L"], frames: int, features: WaveFeaturesConfig) -> Bool[Array, "B T"]:
    """Frames all of whose samples are there."""
    ends = jnp.arange(frames) * features.stride + features.span
    return ends <= jnp.sum(valid, axis=1, keepdims=True)


class ConvolvedPositions(nn.Module):
    """What a frame is told of where it stands: a wide convolution over its neighbours, weight-normalised.

    The kernel is ``magnitude[k] * direction[k] / |direction[k]|`` for each of its steps k.
    """

    config: Wav2Vec2Config

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c, width = self.config, x.shape[-1]
        shape = (c.position_kernel, width // c.position_groups, width)
        std = 2 * (c.position_kernel * width) ** -0.5
        init = named(nn.initializers.normal(std), None, None, "embed")
        direction = self.param("direction", init, shape)
        # At first the kernel is the direction, nearly.
        init = nn.initializers.constant(std * (shape[1] * shape[2]) ** 0.5)
        magnitude = self.param("magnitude", named(init, None), shape[:1])
        length = jnp.sqrt(jnp.sum(direction * direction, axis=(1, 2)))
        kernel = direction * (magnitude / length)[:, None, None]
        y = convolve_in_time(x, kernel.astype(x.dtype), padding=c.position_kernel // 2)
        # An even kernel gives a frame too many.
        bias = self.param("bias", named(nn.initializers.zeros, "embed"), (width,)).astype(x.dtype)
        return FUNCTIONS[c.features.activation](y[:, : x.shape[1]] + bias)
