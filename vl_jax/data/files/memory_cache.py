"""Pictures and records that stay in memory, within a budget: what is there is not read and decoded again.

A cache is filled until its budget is spent, and then keeps what it has. In a shuffled epoch everything
comes once, so that making room for something new would throw out what comes as soon. What stays is what is
there before anything random: records, and of pictures the tiles, or with augmentation the whole picture.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any

from PIL import Image as PilImage

from vl_jax.data.sample import Image, Sample, Source, image_key

_OVERHEAD = 600  # bytes of a key and of the objects around a value, about
_TURN, _CHARACTER = (
    400,
    3,
)  # bytes of a turn or label and of a character of its texts, the most there usually are


class MemoryCache:
    """Values by key while there is room; safe to use from many threads.

    A value follows from its key alone, so that no result depends on what is in the cache.
    """

    def __init__(self, budget: int):
        """Takes the bytes that all values together may have; 0 keeps nothing."""
        self._room = budget
        self._values: dict[Hashable, Any] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable) -> Any:
        """The value of that key, or None."""
        return self._values.get(key)

    def put(self, key: Hashable, value: Any, *, size: int) -> None:
        """Keeps a value of so many bytes, if there is room for it."""
        size += _OVERHEAD
        with self._lock:
            if size <= self._room and key not in self._values:
                self._room -= size
                self._values[key] = value


def decode(image: Image, cache: MemoryCache) -> PilImage.Image:
    """The picture of an image, in RGB and not to be changed.

    Raises:
      BadSample: the image cannot be used.
    """
    key = image_key(image)
    picture = None if key is None else cache.get((key, "picture"))
    if picture is None:
        picture = image()
        if key is not None:
            cache.put((key, "picture"), picture, size=4 * picture.width * picture.height)  # as Pillow has it
    return picture


def read(source: Source, record: int, cache: MemoryCache, *, name: str) -> Sample:
    """The sample of a record, which is kept if its pictures are files: others may hold what they come from.

    Args:
      name: of the source.

    Raises:
      BadSample: the record cannot be used.
    """
    key = (name, record)
    sample = cache.get(key)
    if sample is None:
        sample = source[record]
        if all(image_key(image) is not None for image in sample.images):
            characters = len(sample.system) + sum(len(t.question) + len(t.answer) for t in sample.turns)
            cache.put(
                key, sample, size=_TURN * (len(sample.turns) + len(sample.labels)) + _CHARACTER * characters
            )
    return sample
