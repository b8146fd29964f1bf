"""Griffin-Lim: a sound whose spectrogram is a given one, found by going to and fro.

    levels --bands to frequencies--> magnitudes --any phases--> spectra --> sound --> its spectra --.
                                         '------- with the phases of those, again and again <------'

(Griffin and Lim 1984; the quicker form with momentum is that of Perraudin et al. 2013, whose 0.99 is kept.)
The spectrogram is that of ``data.images.audio``: window, hop, bands and decibels are its own.
"""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Complex, Float

from vl_jax.data.images.audio import AudioConfig, mel_bands

_MOMENTUM = 0.99
_ROUNDS = 60  # of the search for magnitudes behind the bands
_LEAST = 0.05  # of the windows' sum of squares, below which the sound fades


@functools.lru_cache(maxsize=8)
def _hann(window: int) -> Float[np.ndarray, " w"]:
    return np.hanning(window + 2)[1:-1]


def spectra(sound: Float[np.ndarray, " n"], config: AudioConfig) -> Complex[np.ndarray, "frames f"]:
    """The transforms of the windows, scaled so that a sine of full scale has magnitude 1."""
    window, hop = config.window, config.hop
    frames = np.lib.stride_tricks.sliding_window_view(sound, window)[::hop]
    hann = _hann(window)
    return np.fft.rfft(frames * hann, _transform(config), axis=1) * (2 / hann.sum())


def to_sound(found: Complex[np.ndarray, "frames f"], config: AudioConfig) -> Float[np.ndarray, " n"]:
    """The sound whose spectra come nearest, by least squares: overlapping windows are averaged."""
    window, hop, hann = config.window, config.hop, _hann(config.window)
    frames = np.fft.irfft(found * (hann.sum() / 2), _transform(config), axis=1)[:, :window]
    sound, weight = np.zeros((len(found) - 1) * hop + window), np.zeros((len(found) - 1) * hop + window)
    for k, frame in enumerate(frames):
        sound[k * hop : k * hop + window] += frame * hann
        weight[k * hop : k * hop + window] += hann**2
    return sound / np.maximum(weight, _LEAST * weight.max())


def magnitudes(levels: Float[np.ndarray, "frames bands"], config: AudioConfig) -> np.ndarray:
    """Magnitudes of the frequencies [frames f], whose bands come near to given levels in decibels.

    Multiplicative updates (Lee and Seung 2001) keep powers from falling below 0.
    """
    power, bands = 10 ** (levels.astype(np.float64) / 10), mel_bands(config).astype(np.float64)
    # Sums of products by einsum, as in ``log_mel``.
    found = np.einsum("wb,bf->wf", power, bands / np.maximum(bands.sum(axis=1, keepdims=True), 1e-12))
    given = np.einsum("wb,bf->wf", power, bands)
    for _ in range(_ROUNDS):
        said = np.einsum("wf,bf->wb", found, bands)
        found *= given / np.maximum(np.einsum("wb,bf->wf", said, bands), 1e-30)
    return np.sqrt(found)


def griffin_lim(
    wanted: Float[np.ndarray, "frames f"], config: AudioConfig, *, rounds: int = 60, seed: int = 0
) -> Float[np.ndarray, " n"]:
    """The sound of magnitudes; the same one for the same seed, from which the first phases follow."""
    phases = np.exp(2j * np.pi * np.random.default_rng(seed).random(wanted.shape))
    before = np.zeros_like(phases)
    for _ in range(rounds):
        now = spectra(to_sound(wanted * phases, config), config)
        ahead = now + _MOMENTUM * (now - before)
        phases, before = ahead / np.maximum(np.abs(ahead), 1e-16), now
    return to_sound(wanted * phases, config)


def off_by(
    sound: Float[np.ndarray, " n"], wanted: Float[np.ndarray, "frames f"], config: AudioConfig
) -> float:
    """How far the magnitudes of a sound are from those wanted, as a share of these."""
    return float(np.linalg.norm(np.abs(spectra(sound, config)) - wanted) / np.linalg.norm(wanted))


def speak(
    levels: Float[np.ndarray, "frames bands"], config: AudioConfig, *, rounds: int = 60, seed: int = 0
) -> Float[np.ndarray, " n"]:
    """The sound of a spectrogram in decibels, within full scale."""
    sound = griffin_lim(magnitudes(levels, config), config, rounds=rounds, seed=seed)
    return (sound / max(1.0, float(np.abs(sound).max(initial=0.0)))).astype(np.float32)


def _transform(config: AudioConfig) -> int:
    """Samples of the transform."""
    return 2 * (mel_bands(config).shape[1] - 1)
