"""Rotary position embedding. Angles are always float32: a bfloat16 table is wrong past position 256."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class YarnConfig:
    """YaRN (arXiv 2309.00071): slow frequencies are interpolated, fast ones kept, with a ramp between."""

    factor: float
    original_length: int  # positions the model was trained on before
    beta_fast: float = 32.0  # rotations over ``original_length`` from which a frequency is kept
    beta_slow: float = 1.0  # ... and below which it is interpolated
    truncate: bool = True  # the ramp begins and ends at whole indices
    mscale: float = 1.0
    mscale_all_dim: float = 0.0  # 0: softmax keeps its scale
    attention_factor: float | None = None  # of cosine and sine; None: from the two mscales

    def __post_init__(self):
        if self.factor <= 0 or self.original_length < 1:
            raise ValueError(f"factor={self.factor} and original_length={self.original_length}: must be > 0")

    def temperature(self, mscale: float) -> float:
        """``0.1 mscale ln(factor) + 1``, the growth of attention's temperature with the factor."""
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Which pairs are rotated, and how fast."""

    theta: float = 10_000.0
    pairs: Literal["adjacent", "halves"] = "halves"  # (0, 1), (2, 3) ... or (0, d/2), (1, d/2 + 1) ...
    position_scale: float = 1.0  # positions are divided by it (linear interpolation, arXiv 2306.15595)
    yarn: YarnConfig | None = None

    def __post_init__(self):
        if self.theta <= 0 or self.position_scale <= 0:
            raise ValueError(f"theta={self.theta}, position_scale={self.position_scale}: must be > 0")

    @property
    def amplitude(self) -> float:
        """What cosine and sine are multiplied by."""
        if self.yarn is None:
            return 1.0
        if self.yarn.attention_factor is not None:
            return self.yarn.attention_factor
        return self.yarn.temperature(self.yarn.mscale) / self.yarn.temperature(self.yarn.mscale_all_dim)

    @property
    def softmax_scale(self) -> float:
        """What the scale of the attention scores is multiplied by (DeepSeek-V2)."""
        if self.yarn is None or not self.yarn.mscale_all_dim:
            return 1.0
        return self.yarn.temperature(self.yarn.mscale_all_dim) ** 2


def frequencies(config: RopeConfig, dim: int) -> np.ndarray:
    """Radians per position of each pair, f64[dim / 2]: ``theta ** (-2 i / dim)``, or YaRN's mixture."""
    index = np.arange(dim // 2, dtype=np.float64)
    plain = config.theta ** (-2 * index / dim) / config.position_scale
    if config.yarn is None:
        return plain
    yarn = config.yarn

    def pair_of(rotations: float) -> float:
        """The index whose frequency turns so often over the original length."""
        turns = math.log(yarn.original_length / (2 * math.pi * rotations))
        return dim * turns / (2 * math.log(config.theta))

    low, high = pair_of(yarn.beta_fast), pair_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((index - low) / ((high - low) or 0.001), 0, 1)
    return plain / yarn.factor * ramp + plain * (1 - ramp)


def angles(positions: Int[Array, "B T"], *, dim: int, config: RopeConfig) -> Float[Array, "B T half"]:
    """Position times frequency, in radians."""
    return positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies(config, dim), jnp.float32)


def rotate(
    x: Float[Array, "B T N H"], angle: Float[Array, "B T half"], config: RopeConfig
) -> Float[Array, "B T N H"]:
    """Rotates the pairs; the output holds all first members, then all second members.

    For adjacent pairs this is the order of DeepSeek-V2 (its rotary code de-interleaves, then rotates halves).
    Queries and keys are permuted alike, so scores equal those of the textbook order; only a cache shows it.
    """
    cos = (jnp.cos(angle) * config.amplitude)[:, :, None, :]
    sin = (jnp.sin(angle) * config.amplitude)[:, :, None, :]
    x32 = x.astype(jnp.float32)
    if config.pairs == "adjacent":
        first, second = x32[..., 0::2], x32[..., 1::2]
    else:
        first, second = jnp.split(x32, 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
