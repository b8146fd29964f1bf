"""Speaking: the sound of a text, as a log-mel spectrogram whose length is told too, and as samples.

    tokens --durations--> frames --convolutions--> levels [S bands] --stretched--> [n bands] --> sound
      '--pool--> length n

The spectrogram is said on an axis of ``steps`` frames, whatever the length: so training needs no teacher's
durations, and every frame of a recording is compared with the place of its share of the whole. A group of
``reduction`` frames is said at once.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import wave
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float
from PIL import Image as PilImage

from vl_jax.batch import Given
from vl_jax.data.images.audio import AudioConfig, log_mel, to_levels
from vl_jax.data.sample import BadSample, Sample
from vl_jax.fusion.streams import Streams, pool
from vl_jax.heads import pixels
from vl_jax.heads.image.flow import time_features
from vl_jax.heads.speech.durations import equal_shares, learnt_shares, looks, stretched
from vl_jax.heads.speech.griffin_lim import speak
from vl_jax.nn.layers import LayerNorm, Linear, named
from vl_jax.params import Leaf

_WAV = "data:audio/wav;base64,"
_BEYOND = -1.0  # levels of a label behind the end of its sound


@struct.dataclass
class Spoken:
    """What is said of the sound of each row."""

    levels: Leaf  # f32[B S bands] 0 is ``floor_db``, 1 is full scale
    log_frames: Leaf  # f32[B] the logarithm of its length


@dataclasses.dataclass(frozen=True)
class Speaking:
    """How a text becomes a sound; the label of a sample is its own recording."""

    name: str = "speech"
    stream: str = "text"  # whose tokens are spoken
    field: str = "sound"  # name in ``Sample.media``: samples of one channel at the rate of ``audio``
    audio: AudioConfig = AudioConfig()  # the spectrogram
    heard: AudioConfig | None = None  # that in which a tower sees what is spoken; None: the same
    max_frames: int = 96  # longer recordings are left out
    steps: int = 48  # frames of the axis on which the spectrogram is said
    reduction: int = 1  # frames that are said at once
    durations: Literal["equal", "learned"] = "learned"  # how the tokens share that axis
    dim: int = 128
    num_layers: int = 6
    rounds: int = 60  # of Griffin-Lim

    def __post_init__(self):
        if self.steps < 1 or self.reduction < 1 or self.steps % self.reduction:
            raise ValueError(
                f"steps={self.steps} of head {self.name!r}: not a multiple of reduction={self.reduction}"
            )
        if self.heard is not None and self.heard.sample_rate != self.audio.sample_rate:
            raise ValueError(
                f"heard.sample_rate={self.heard.sample_rate} of head {self.name!r} differs from "
                f"audio.sample_rate={self.audio.sample_rate}"
            )
        if min(self.max_frames, self.num_layers, self.rounds) < 1 or self.dim < 2 or self.dim % 2:
            raise ValueError(
                f"max_frames={self.max_frames}, num_layers={self.num_layers}, rounds={self.rounds}, "
                f"dim={self.dim} of head {self.name!r}: must be >= 1, and dim even"
            )

    @property
    def inputs(self) -> tuple[str, ...]:
        """The stream it reads."""
        return (self.stream,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Levels by frame and band."""
        return self.max_frames, self.audio.num_bands

    @property
    def dtype(self) -> str:
        """Levels from 0 to 1, below 0 behind the end."""
        return "float32"

    def read(self, sample: Sample) -> np.ndarray | None:
        """The levels of the sample's recording; None if it has none.

        Raises:
          BadSample: it is longer than ``max_frames``, or no sound of one channel.
        """
        if self.field not in sample.media:
            return None
        sound = np.asarray(sample.media[self.field](), np.float32)
        if sound.ndim != 1 or not len(sound):
            shape = list(sound.shape)
            raise BadSample("bad_label", f"sample {sample.id}: {self.field} of {shape}, expected [n] samples")
        levels = 1 - log_mel(sound, self.audio).T / self.audio.floor_db
        if len(levels) > self.max_frames:
            message = f"sample {sample.id}: {self.field} of {len(levels)} frames, limit {self.max_frames}"
            raise BadSample("audio_too_long", message)
        result = np.full(self.shape, _BEYOND, np.float32)
        result[: len(levels)] = np.clip(levels, 0, 1)
        return result

    def build(self) -> nn.Module:
        """The module."""
        return SpeakingHead(self)

    def sums(self, prediction: Spoken, label: Given) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """The mean distance of levels and of the logarithm of the length, summed over rows.

        ``mel`` is that of levels in decibels.
        """
        there = (label.values[:, :, 0] >= 0) & label.present[:, None]
        lengths = jnp.sum(there, axis=1).astype(jnp.float32)
        said = stretched(prediction.levels, lengths, self.max_frames)
        off = jnp.mean(jnp.abs(said - label.values), axis=-1)
        levels = jnp.sum(jnp.where(there, off, 0.0), axis=1) / jnp.maximum(lengths, 1.0)
        length = jnp.abs(prediction.log_frames - jnp.log(jnp.maximum(lengths, 1.0)))
        length = jnp.where(label.present, length, 0.0)
        mel = jnp.sum(levels) * -self.audio.floor_db
        return jnp.sum(levels) + 0.1 * jnp.sum(length), {"mel": mel, "length": jnp.sum(length)}

    def sound(self, prediction: Spoken) -> Float[np.ndarray, " n"]:
        """The samples of one row, at the rate of ``audio``."""
        frames = int(np.clip(np.rint(np.exp(prediction.log_frames)), 1, self.max_frames))
        levels = jnp.asarray(prediction.levels)[None]
        levels = np.asarray(stretched(levels, jnp.float32([frames]), frames))[0]
        decibels = (1 - np.clip(levels, 0, 1)) * self.audio.floor_db
        return speak(decibels, self.audio, rounds=self.rounds)

    def shown(self, prediction: Spoken) -> PilImage.Image:
        """The spectrogram of the sound, as a tower of pictures sees it."""
        heard = self.heard or self.audio
        return PilImage.fromarray(to_levels(log_mel(self.sound(prediction), heard), heard)).convert("RGB")

    def decode(self, prediction: Spoken) -> dict[str, Any]:
        """``seconds``, and ``sound``, a WAV file in a data URL."""
        sound = self.sound(prediction)
        content = base64.b64encode(as_wav(sound, self.audio.sample_rate)).decode("ascii")
        return {"seconds": round(len(sound) / self.audio.sample_rate, 3), "sound": _WAV + content}

    def made(self, said: dict[str, Any]) -> bytes:
        """The WAV file of what ``decode`` gave."""
        return pixels.content(said["sound"])


def as_wav(sound: Float[np.ndarray, " n"], rate: int) -> bytes:
    """A WAV file of one channel and 16 bits."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.rint(np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


class SpeakingHead(nn.Module):
    """Levels and lengths in float32."""

    config: Speaking

    @nn.compact
    def __call__(self, streams: Streams) -> Spoken:
        c = self.config
        stream, groups = streams[c.stream], c.steps // c.reduction
        whole = LayerNorm(name="whole_norm")(pool(stream).astype(jnp.float32))
        tokens = LayerNorm(name="norm")(stream.tokens.astype(jnp.float32))
        shares = equal_shares(stream.mask)
        if c.durations == "learned":
            scores = Linear(1, ("embed", None), hidden=False, name="durations")(tokens)[..., 0]
            shares = learnt_shares(scores, stream.mask)
        x = jnp.einsum("BFT,BTD->BFD", looks(shares, stream.mask, groups), tokens)
        place = time_features((jnp.arange(groups, dtype=jnp.float32) + 0.5) / groups, c.dim)
        x = Linear(c.dim, ("embed", None), name="token")(x) + place
        x = x + Linear(c.dim, ("embed", None), use_bias=True, name="whole")(whole)[:, None]
        for layer in range(c.num_layers):
            x = x + _Neighbours(c.dim, 2 ** (layer % 3), name=f"layer{layer}")(x)
        x = LayerNorm(name="last_norm")(x)
        bands = c.audio.num_bands
        levels = Linear(c.reduction * bands, ("embed", None), use_bias=True, hidden=False, name="levels")(x)
        start = nn.initializers.constant(np.log(c.steps))
        length = Linear(1, ("embed", None), hidden=False, name="length")(whole)[:, 0]
        length = length + self.param("length_start", named(start), ())
        return Spoken(levels.reshape(x.shape[0], c.steps, bands), length)


class _Neighbours(nn.Module):
    """A convolution over a frame and its two neighbours at a distance, and a feed-forward layer."""

    dim: int
    distance: int

    @nn.compact
    def __call__(self, x: Float[Array, "B F D"]) -> Float[Array, "B F D"]:
        y, d, frames = LayerNorm(name="norm")(x), self.distance, x.shape[1]
        padded = jnp.pad(y, ((0, 0), (d, d), (0, 0)))
        near = jnp.concatenate([padded[:, i * d : i * d + frames] for i in range(3)], axis=-1)
        y = jax.nn.gelu(Linear(2 * self.dim, ("embed", "mlp"), use_bias=True, name="fc1")(near))
        return Linear(self.dim, ("mlp", "embed"), use_bias=True, name="fc2")(y)
