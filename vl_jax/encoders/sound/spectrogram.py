"""Sounds: levels of bands, or their cepstra (MFCC), and long short-term memory over the frames.

wave [B L] -> levels [B T bands] (-> cepstra [B T count]) -> norm -> cells -> tokens [B T H], last or mean

The norm is of each frame, or takes from every band (or coefficient) its mean over the sound, and with it much
of the voice and of the microphone (Furui 1981, doi 10.1109/TASSP.1981.1163530).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from vl_jax.data.images.audio import AudioConfig
from vl_jax.encoders.series.recurrent import Carry, Recurrent, RecurrentConfig
from vl_jax.encoders.series.steps import Pooling, pooled
from vl_jax.encoders.sound.features import cepstrum, decibels, num_frames, shares
from vl_jax.encoders.transformer import Encoded
from vl_jax.moe.routing import State
from vl_jax.moe.stacks import Stack
from vl_jax.nn.layers import LayerNorm
from vl_jax.params import Leaf


@dataclasses.dataclass(frozen=True)
class SpectrogramConfig:
    """An encoder of waves; rows differ in length."""

    varies: ClassVar[bool] = True

    # How waves, which must have its rate, become levels; longer ones than ``max_seconds`` are cut.
    audio: AudioConfig = AudioConfig(num_bands=64, max_seconds=5.0)
    coefficients: int = 0  # of the cepstrum of a frame; 0: the levels themselves
    # Of what levels or coefficients are brought to mean 0 and spread 1; that of a whole sound cannot stream.
    norm: Literal["frame", "sound"] = "frame"
    recurrent: RecurrentConfig = RecurrentConfig(bidirectional=True)
    pooling: Pooling = "mean"

    def __post_init__(self):
        if not 0 <= self.coefficients <= self.audio.num_bands:
            raise ValueError(
                f"coefficients={self.coefficients} of SpectrogramConfig: must lie in 0..num_bands="
                f"{self.audio.num_bands}"
            )
        if not self.input_shape[0]:
            raise ValueError(f"audio.max_seconds={self.audio.max_seconds}: no sample is that short")

    @property
    def input_shape(self) -> tuple[int]:
        """Samples of the longest wave."""
        return (round(self.audio.max_seconds * self.audio.sample_rate),)

    @property
    def num_tokens(self) -> int:
        """Frames of the longest wave."""
        return num_frames(self.input_shape[0], self.audio)

    @property
    def output_dim(self) -> int:
        """Width of a token."""
        return self.recurrent.output_dim

    @property
    def grid(self) -> int:
        """Raises ValueError: the tokens of a sound form no square."""
        raise ValueError("encoder=SpectrogramConfig: the tokens of a sound form no square")

    @property
    def stack(self) -> Stack | None:
        """There are no sparse layers."""
        return None

    @property
    def chunk(self) -> int:
        """What the number of samples of a chunk that is streamed must be a multiple of."""
        return self.audio.hop

    @property
    def delay(self) -> int:
        """Samples that are read before the first token is said: what a window reaches beyond its frame."""
        hop = self.audio.hop
        return -(-(self.audio.window - hop) // hop) * hop

    def begin(self, rows: int) -> Listening:
        """The state before the first chunk; raises as ``RecurrentConfig.begin``.

        Raises:
          ValueError: the norm is over whole sounds.
        """
        if self.norm == "sound":
            raise ValueError('norm="sound" reads to the end first, so nothing can be said before it')
        late = (rows, self.delay)
        return Listening(jnp.zeros(late, jnp.float32), jnp.zeros(late, bool), self.recurrent.begin(rows))

    def build(self, dtype: DTypeLike, *, remat: bool = False) -> Spectrogram:
        """The module; it keeps what every step says for the backward pass, whatever ``remat`` asks for."""
        return Spectrogram(self, jnp.dtype(dtype))


@struct.dataclass
class Listening:
    """What is left of the chunks so far."""

    samples: Leaf  # f32[B delay] whose windows are not yet whole
    valid: Leaf  # bool[B delay] of these, which are there
    carries: tuple[tuple[Leaf, Leaf], ...]


class Spectrogram(nn.Module):
    """The encoder."""

    config: SpectrogramConfig
    dtype: jnp.dtype = jnp.dtype(jnp.float32)

    def setup(self):
        if self.config.norm == "frame":
            self.norm = LayerNorm()
        self.recurrent = Recurrent(self.config.recurrent, self.dtype)

    def __call__(
        self,
        wave: Float[Array, "B L"],
        valid: Bool[Array, "B L"],
        routing_state: State | None = None,
    ) -> Encoded:
        """Encodes waves, of which ``valid`` samples are there. No layer is sparse."""
        return self._read(jnp.where(valid, wave, 0), valid[:, :: self.config.audio.hop], None)[0]

    def stream(
        self, chunk: Float[Array, "B l"], state: Listening, valid: Bool[Array, "B l"] | None = None
    ) -> tuple[Encoded, Listening]:
        """Encodes what can be said after the next chunk: frames that began ``delay`` samples before it.

        The first ones, which began before the sound, are not in the mask. The last ones come with ``delay``
        samples that are not valid.

        Args:
          state: of the encoder after the chunk before, or ``SpectrogramConfig.begin``.
          valid: samples that are there; None: all.
        """
        c, length = self.config, chunk.shape[1]
        valid = jnp.ones(chunk.shape, bool) if valid is None else valid
        samples = jnp.concatenate([state.samples, jnp.where(valid, chunk, 0).astype(jnp.float32)], axis=1)
        known = jnp.concatenate([state.valid, valid], axis=1)
        there = known[:, : length : c.audio.hop]
        encoded, carries = self._read(samples, there, state.carries)
        return encoded, Listening(samples[:, length:], known[:, length:], carries)

    def _read(
        self, wave: Float[Array, "B l"], there: Bool[Array, "B T"], carries: tuple[Carry, ...] | None
    ) -> tuple[Encoded, tuple[Carry, ...]]:
        """The frames that are asked for by ``there``, of those that the wave has."""
        c = self.config
        found = shares(decibels(wave, c.audio)[:, : there.shape[1]], c.audio)
        if c.coefficients:
            found = cepstrum(found, c.coefficients)
        found = self.norm(found) if c.norm == "frame" else over_frames(found, there)
        tokens, last, carries = self.recurrent(found.astype(self.dtype), there, carries)
        vector = last if c.pooling == "last" else pooled(tokens, there, "mean")
        return Encoded(tokens, vector, mask=there), carries


def over_frames(levels: Float[Array, "B T C"], there: Bool[Array, "B T"]) -> Float[Array, "B T C"]:
    """Every column with mean 0, all with one spread of 1, over the frames that are there; 0 elsewhere."""
    weights = there[..., None].astype(levels.dtype)
    count = jnp.maximum(jnp.sum(weights, axis=1, keepdims=True), 1.0)
    centered = (levels - jnp.sum(levels * weights, axis=1, keepdims=True) / count) * weights
    spread = jnp.sum(jnp.square(centered), axis=(1, 2), keepdims=True) / (count * levels.shape[-1])
    return centered * jax.lax.rsqrt(spread + 1e-6)
