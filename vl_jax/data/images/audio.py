"""Sounds as pictures: the log-mel spectrogram of a sound file, which an image encoder sees.

    file -> mono -> sample_rate -> power of short windows -> bands equally wide in mel -> decibels -> grey
                                                                         high  | . : #|
                                                                         low   |# # : |  time -->

So hears the audio spectrogram transformer (Gong et al. 2021, arXiv 2104.01778, section 2.1), whose window,
hop and number of bands are the defaults. Mel is 2595 log10(1 + f / 700) (O'Shaughnessy 1987); bands are
triangles of height 1 whose feet are the neighbours' peaks. Levels are absolute: white is 0 dB, a sine of full
scale, and black is ``floor_db`` and below; no file is scaled, so the louder sound is the brighter picture.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image as PilImage

from vl_jax.data.files.sound_files import Header, read_header, read_sound
from vl_jax.data.sample import BadSample, path_in

_MAX_WIDTH = 65_536  # columns of a picture
_FINEST = 1000  # rates are taken in ratios of numbers no larger, which is within a millionth


@dataclass(frozen=True)
class AudioConfig:
    """How a sound becomes a picture, ``num_bands`` high and a column for every ``hop_ms`` wide."""

    sample_rate: int = 16_000  # Hz that every sound is brought to; bands reach up to half of it
    window_ms: float = 25.0
    hop_ms: float = 10.0
    num_bands: int = 128
    floor_db: float = -80.0
    min_seconds: float = 0.0  # shorter sounds are followed by silence, so that columns are equally long
    max_seconds: float = 30.0  # longer sounds are refused

    def __post_init__(self):
        if not 1000 <= self.sample_rate <= 192_000:
            raise ValueError(f"audio.sample_rate={self.sample_rate}: must lie in 1000..192000 Hz")
        if not 1 <= self.num_bands <= 512:
            raise ValueError(f"audio.num_bands={self.num_bands}: must lie in 1..512")
        if self.floor_db >= 0:
            raise ValueError(f"audio.floor_db={self.floor_db}: must be below 0, which is full scale")
        if not 1 <= self.hop_ms <= self.window_ms <= 1000:
            rule = "must be at least 1, and window_ms from there to 1000"
            raise ValueError(f"audio.hop_ms={self.hop_ms}, window_ms={self.window_ms}: {rule}")
        if not 0 <= self.min_seconds <= self.max_seconds:
            rule = f"must lie in 0..max_seconds={self.max_seconds}"
            raise ValueError(f"audio.min_seconds={self.min_seconds}: {rule}")
        if self.columns(self.max_seconds) > _MAX_WIDTH:
            rule = f"gives a picture of {self.columns(self.max_seconds)} columns, limit {_MAX_WIDTH}"
            raise ValueError(f"audio.max_seconds={self.max_seconds}: {rule}")

    @property
    def hop(self) -> int:
        """Samples from one window to the next."""
        return round(self.hop_ms * self.sample_rate / 1000)

    @property
    def window(self) -> int:
        """Samples of a window."""
        return round(self.window_ms * self.sample_rate / 1000)

    def columns(self, seconds: float) -> int:
        """The picture's width for a sound of that length."""
        return self.width(round(seconds * self.sample_rate))

    def width(self, length: int) -> int:
        """The picture's width for so many samples, silence behind them included."""
        return -(-max(length, round(self.min_seconds * self.sample_rate)) // self.hop)


@dataclass(frozen=True)
class SoundImage:
    """A sound file as a picture; its header is checked before any sample is read."""

    path: Path
    where: str  # "sample ID (FILE, record N)", for messages
    config: AudioConfig

    @property
    def key(self) -> tuple[str, AudioConfig]:
        """See ``sample.image_key``."""
        return str(self.path), self.config

    def __call__(self) -> PilImage.Image:
        """Reads the sound and draws it.

        Raises:
          BadSample: the file is missing, empty, too long, cut off, or no sound that can be read here.
        """
        self._header()
        samples, rate = read_sound(self.path, self.where)
        mono = resample(samples.mean(1), rate, self.config.sample_rate)
        return PilImage.fromarray(to_levels(log_mel(mono, self.config), self.config)).convert("RGB")

    def size(self) -> tuple[int, int]:
        """Width and height, from the file's header alone; raises as drawing does."""
        header = self._header()
        ratio = _ratio(header.rate, self.config.sample_rate)
        length = -(-header.length * ratio.numerator // ratio.denominator)
        return self.config.width(length), self.config.num_bands

    def _header(self) -> Header:
        header = read_header(self.path, self.where)
        if not header.length:
            raise BadSample("empty_audio", f"{self.where}: no sound in {self.path}")
        if header.seconds > self.config.max_seconds:
            limit = f"limit {self.config.max_seconds:g}"
            message = f"{self.where}: {self.path} has {header.seconds:,.1f} seconds, {limit}"
            raise BadSample("audio_too_long", message)
        return header


def sound_in(folder: Path, name: str, where: str, config: AudioConfig) -> SoundImage:
    """The sound file of that name, provided it lies inside the (resolved) folder once links are followed.

    Raises:
      BadSample: it does not, or this is no name of a file.
    """
    return SoundImage(path_in(folder, name, where, kind="audio"), where, config)


def resample(
    samples: Float[np.ndarray, "n *channels"],
    rate: float,
    new_rate: float,
    *,
    ends: Literal["constant", "line"] = "constant",
) -> Float[np.ndarray, "m *channels"]:
    """The sound at another rate, by a polyphase filter that removes what the new one cannot hold.

    Args:
      ends: what lies before and behind it: silence, or the line from its first to its last sample.
    """
    ratio = _ratio(rate, new_rate)
    if ratio == 1:
        return samples
    from scipy.signal import resample_poly  # takes half a second to import, and may not be needed

    up, down = ratio.numerator, ratio.denominator
    return resample_poly(samples, up, down, padtype=ends).astype(np.float32)


def log_mel(samples: Float[np.ndarray, "n"], config: AudioConfig) -> Float[np.ndarray, "bands w"]:
    """Levels in decibels of a sine of full scale, lowest band first; column k begins at sample k * hop.

    Behind the sound, and where it is shorter than ``min_seconds``, there is silence.
    """
    width, hop, window = config.width(len(samples)), config.hop, config.window
    padded = np.zeros((width - 1) * hop + window, np.float32)
    padded[: len(samples)] = samples[: len(padded)]
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    hann, bands = hann_window(window), mel_bands(config)
    spectrum = np.fft.rfft(frames * hann, transform_size(config), axis=1)
    power = np.square(np.abs(spectrum) * (2 / hann.sum()))
    # The threads of a matrix product would wait busily for the next one, which costs far more than this.
    found = np.einsum("bf,wf->bw", bands, power)
    return 10 * np.log10(np.maximum(found, 1e-20)).astype(np.float32)


def hann_window(size: int) -> Float[np.ndarray, " size"]:
    """The weights of the samples of a window, none of them 0."""
    return np.hanning(size + 2)[1:-1].astype(np.float32)


def to_levels(levels: Float[np.ndarray, "h w"], config: AudioConfig) -> UInt8[np.ndarray, "h w"]:
    """Decibels to grey, ``floor_db`` black and 0 dB white; the highest band comes to the top."""
    return np.rint((1 - levels[::-1] / config.floor_db).clip(0, 1) * 255).astype(np.uint8)


def mel(hertz: float) -> float:
    """A frequency in mel: 2595 log10(1 + f / 700)."""
    return 2595 * float(np.log10(1 + hertz / 700))


@functools.lru_cache(maxsize=16)
def mel_bands(config: AudioConfig) -> Float[np.ndarray, "bands f"]:
    """The weight of every frequency of the transform in every band."""
    corners = _corners(config)
    hertz = np.arange(transform_size(config) // 2 + 1) * config.sample_rate / transform_size(config)
    low, peak, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (hertz - low) / (peak - low), (high - hertz) / (high - peak)
    return np.minimum(rising, falling).clip(0).astype(np.float32)


def _corners(config: AudioConfig) -> np.ndarray:
    """Feet and peaks of the bands in Hz, from 0 to half the rate, equally far apart in mel."""
    mels = np.linspace(0, mel(config.sample_rate / 2), config.num_bands + 2)
    return 700 * (10 ** (mels / 2595) - 1)


def transform_size(config: AudioConfig) -> int:
    """Samples of the Fourier transform: a power of two, so fine that not even the lowest band is empty."""
    narrowest = _corners(config)[1]
    return 1 << max(config.window - 1, int(config.sample_rate / narrowest)).bit_length()


def _ratio(rate: float, new_rate: float) -> Fraction:
    """New samples for an old one."""
    return (Fraction(new_rate) / Fraction(rate)).limit_denominator(_FINEST)
