"""The mixture: which records the stream draws, each source by its weight and each record once an epoch.

The stream is an endless sequence of places. Where weights are constant or move along a line, a source's share
of the places before any point is known in closed form, and whole windows of places need no history::

    places      0 ............ W ............ 2W          W places make a window
    source a    |--- 3 draws ---|--- 3 draws ---|          floor of its share so far
    source b    |----- 5 -------|----- 4 -------|          (a window is within a few draws of W)
    draw k of a source of n records: record ``shuffle of epoch k // n`` [k % n]
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from vl_jax.data.config import MixtureWarmup
from vl_jax.data.stream import shuffle


@dataclass(frozen=True)
class Draws:
    """Draws from one source, in order: which record, and the number of the draw."""

    source: str
    numbers: np.ndarray  # i64[n] 0, 1, ... since the source was first read
    records: np.ndarray  # i64[n]


class Mixture:
    """Sources of known sizes and their weights.

    Raises:
      ValueError: there is no source, or a size or a weight is out of range.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        weights: Mapping[str, float],
        *,
        seed: int,
        warmup: MixtureWarmup | None = None,
    ):
        if not sizes or set(weights) != set(sizes) or any(not w > 0 for w in weights.values()):
            raise ValueError(f"sources={dict(weights)}: needs at least one source, and weights above 0")
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"source {name!r}: has no records")
        self.sizes = dict(sizes)
        self._seed, self._warmup = seed, 0 if warmup is None else warmup.samples
        first = {} if warmup is None else {w.name: w.weight for w in warmup.weights}
        if not first.keys() <= sizes.keys():
            unknown = sorted(first.keys() - sizes.keys())
            raise ValueError(f"source {unknown[0]!r} of the mixture's warm-up: known are {', '.join(sizes)}")
        self._last = _normalized({name: weights[name] for name in sizes})
        self._first = _normalized({name: first.get(name, 0.0) for name in sizes}) if first else self._last

    def share(self, name: str, places: int) -> float:
        """Draws from a source that are due in the first so many places."""
        ramp = min(places, self._warmup)
        moved = ramp * ramp / (2 * self._warmup) if self._warmup else 0.0
        return self._first[name] * (ramp - moved) + self._last[name] * (places - ramp + moved)

    def quota(self, start: int, stop: int) -> dict[str, int]:
        """How many draws from each source stand at these places of the stream."""
        # A hair is added lest a share of 2.9999999996 draws counts as 2.
        return {
            name: int(self.share(name, stop) + 1e-6) - int(self.share(name, start) + 1e-6)
            for name in self.sizes
        }

    def draws(self, name: str, first: int, count: int) -> Draws:
        """So many draws of a source from number ``first`` on; every record comes once in each epoch."""
        numbers, size = np.arange(first, first + count, dtype=np.int64), self.sizes[name]
        keys = shuffle.mix(self._seed, stream_key(name), numbers // size)
        return Draws(name, numbers, shuffle.shuffled(numbers % size, size, keys))


def stream_key(name: str) -> int:
    """A number for a source's name, the same on every machine."""
    return zlib.crc32(name.encode())


def _normalized(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}
