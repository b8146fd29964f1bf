"""Arrays that host memory need not hold as a whole: they are read one piece after the other.

published tensors --rules.lazily-----------> LazyArray --Checkpointer.save--> checkpoint
checkpoint        --Checkpointer.restore---> LazyArray --rules.export-------> published tensors
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np

Index = tuple[slice, ...]

PIECE = 4 << 20  # bytes that a piece has at most


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """Shape and dtype of an array, and how a part of it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Index], np.ndarray]  # what an index of one slice an axis selects

    @classmethod
    def of(cls, array: np.ndarray) -> LazyArray:
        """An array that is in memory already."""
        return cls(array.shape, array.dtype, lambda index: np.asarray(array[index]))

    def __getitem__(self, index: Index) -> np.ndarray:
        return self.read(index)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def piece(self) -> tuple[int, ...]:
        """The shape of a piece; a piece at an end may have less along one axis."""
        left, sizes = PIECE // self.dtype.itemsize, []
        for size in reversed(self.shape):
            sizes.append(max(min(size, left), 1))
            left //= max(size, 1)
        return tuple(reversed(sizes))

    def pieces(self) -> Iterator[Index]:
        """Consecutive runs of the items in C order, which together are the array."""
        starts = (range(0, size, step) for size, step in zip(self.shape, self.piece, strict=True))
        for corner in itertools.product(*starts):
            ends = zip(corner, self.piece, self.shape, strict=True)
            yield tuple(slice(start, min(start + step, size)) for start, step, size in ends)
