"""Log-mel levels and cepstra of waves, in the program: what ``data/images/audio.py`` computes on the host.

wave [B n] -> windows -> power -> bands equally wide in mel -> decibels [B F bands] --cosines--> cepstrum
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vl_jax.data.images.audio import AudioConfig, hann_window, mel_bands, transform_size

_QUIETEST = 1e-20  # power of silence


def num_frames(length: int, config: AudioConfig) -> int:
    """Frames of a wave: one for every ``hop`` samples begun."""
    return -(-length // config.hop)


def decibels(wave: Float[Array, "B n"], config: AudioConfig) -> Float[Array, "B F bands"]:
    """Levels of a sine of full scale, lowest band first; frame k begins at sample k * hop, silence behind."""
    frames, hop, window = num_frames(wave.shape[1], config), config.hop, config.window
    missing = (frames - 1) * hop + window - wave.shape[1]
    padded = jnp.pad(wave.astype(jnp.float32), ((0, 0), (0, max(missing, 0))))
    places = np.arange(frames)[:, None] * hop + np.arange(window)
    hann = hann_window(window)
    spectrum = jnp.fft.rfft(padded[:, places] * hann, transform_size(config), axis=-1)
    power = (jnp.square(spectrum.real) + jnp.square(spectrum.imag)) * (2 / float(hann.sum())) ** 2
    bands = jnp.einsum("bfk,mk->bfm", power, mel_bands(config), precision="highest")
    return 10 / np.log(10) * jnp.log(jnp.maximum(bands, _QUIETEST))


def shares(levels: Float[Array, "B F bands"], config: AudioConfig) -> Float[Array, "B F bands"]:
    """Levels from 0, ``floor_db`` and below, to 1, full scale."""
    return jnp.clip(1 - levels / config.floor_db, 0, 1)


def cepstrum(levels: Float[Array, "B F bands"], count: int) -> Float[Array, "B F count"]:
    """The first so many coefficients of the orthonormal cosine transform (DCT-II) over the bands."""
    bands = levels.shape[-1]
    angles = np.pi / bands * (np.arange(bands)[:, None] + 0.5) * np.arange(count)
    cosines = np.cos(angles) * np.sqrt(np.where(np.arange(count) == 0, 1, 2) / bands)
    return jnp.einsum("bfm,mc->bfc", levels, cosines.astype(np.float32), precision="highest")
