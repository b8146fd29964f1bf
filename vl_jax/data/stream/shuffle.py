"""Random order without memory: hashes, and shuffles whose every element is computed by itself.

Everything is whole-number arithmetic written out here, so that an order that was begun on one machine goes on
with the same elements on another, whatever version of NumPy it has.
"""

from __future__ import annotations

import numpy as np

_ROUNDS = 6


def mix(*keys: np.ndarray | int) -> np.ndarray:
    """64 well-mixed bits for each combination of whole numbers, which broadcast: ``u64[...]``.

    Each number is stirred in by the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
    """
    result = np.zeros(1, np.uint64)
    for key in keys:
        stirred = result ^ np.asarray(key).astype(np.uint64).reshape(np.shape(key) or (1,))
        stirred = stirred + np.uint64(0x9E3779B97F4A7C15)
        stirred = (stirred ^ (stirred >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        stirred = (stirred ^ (stirred >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        result = stirred ^ (stirred >> np.uint64(31))
    return result


def uniform(*keys: np.ndarray | int) -> np.ndarray:
    """Numbers in [0, 1), one for each combination of keys: ``f64[...]``."""
    return (mix(*keys) >> np.uint64(11)).astype(np.float64) / 2.0**53


def shuffled(places: np.ndarray, size: int, key: np.ndarray | int) -> np.ndarray:
    """What stands at these places of a shuffled ``range(size)``; another key is another shuffle.

    A Feistel network permutes the numbers of an even count of bits; results of ``size`` and more walk on
    along their cycle until they fall below it.

    Args:
      places: i64[n] in 0..size.
      key: one for all places, or one for each.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    result = np.array(places, np.uint64)
    keys = np.broadcast_to(np.asarray(key).astype(np.uint64), result.shape)
    walking = np.arange(len(result))
    while len(walking):
        value, chosen = result[walking], keys[walking]
        left, right = value >> half, value & low
        for turn in range(_ROUNDS):
            left, right = right, left ^ (mix(chosen, turn, right) & low)
        result[walking] = (left << half) | right
        walking = walking[result[walking] >= size]
    return result.astype(np.int64)
