"""What a tower reads of ``Sample.media``: one array a row, of one shape or of steps that differ in number.

longer than the tower reads    |=========[ cut ]====|     at its beginning, or anywhere in training
shorter, ``varies``            |====|                     as it is; ``Given.steps`` says how long
shorter, otherwise             |====|00000000|            filled with zeros
"""

from __future__ import annotations

import dataclasses

import numpy as np

from vl_jax.data.sample import BadSample, Media, Sample


@dataclasses.dataclass(frozen=True)
class StartedAt:
    """An input of which, where it is longer than a tower reads, another part than its beginning is read.

    All inputs of a sample begin at the same share, so that what happens at one time stays together.
    """

    media: Media
    share: float  # 0 is the first possible beginning, 1 the last

    def __call__(self) -> np.ndarray:
        """The whole input; raises as it does."""
        return self.media()


@dataclasses.dataclass(frozen=True)
class MediaInput:
    """An input that is neither picture nor text, as long as a tower reads it.

    Grey levels of eight bits become 0..1 where the tower reads floats.
    """

    name: str
    shape: tuple[int, ...]  # of what the tower reads; the first number is the most steps where these vary
    dtype: str = "float32"
    varies: bool = False  # the number of steps along the first axis, which then is told beside the array

    def read(self, sample: Sample) -> np.ndarray | None:
        """The array of a sample, if it has one; where it ``varies``, as long as it is.

        Raises:
          BadSample: it is empty, has another shape beyond the first axis, or holds no finite number.
        """
        media = sample.media.get(self.name)
        if media is None:
            return None
        found = np.asarray(media())
        if found.shape[1:] != self.shape[1:] or found.ndim != len(self.shape) or not len(found):
            message = f"sample {sample.id}: {self.name} has shape {found.shape}, expected {self.shape}"
            raise BadSample("bad_media", message)
        surplus = len(found) - self.shape[0]
        if surplus > 0:
            start = round(media.share * surplus) if isinstance(media, StartedAt) else 0
            found = found[start : start + self.shape[0]]
        found = _as_type(found, self.dtype)
        if not np.isfinite(found).all():
            message = f"sample {sample.id}: {self.name} holds what is no finite number"
            raise BadSample("not_finite", message)
        if self.varies or surplus >= 0:
            return found
        result = np.zeros(self.shape, self.dtype)
        result[: len(found)] = found
        return result


def _as_type(values: np.ndarray, dtype: str) -> np.ndarray:
    if values.dtype == np.uint8 and np.issubdtype(np.dtype(dtype), np.floating):
        return values.astype(dtype) / 255
    return values.astype(dtype, copy=False)
