"""Long files in pieces of one length, as an encoder that streams reads them; the file is never read whole.

file |=======|=======|=======|===|  -->  (f32[size ...], how many of its steps are there), ...
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from vl_jax.data.files.sound_files import read_blocks, read_header
from vl_jax.data.sample import BadSample

_PAGE = 1 << 16  # steps of a series that are read at a time


def chunks_of(file: Path, size: int, *, rate: int | None) -> Iterator[tuple[np.ndarray, int]]:
    """The pieces of a sound, whose channels are averaged, or of an NPY file [t c].

    Args:
      rate: samples a second that a sound must have; None for series.

    Raises:
      BadSample: the file cannot be read, or its sound has another rate.
    """
    where = "--file"
    if file.suffix == ".npy":
        yield from _padded(_rows(file, where), size)
        return
    found = read_header(file, where).rate
    if rate is not None and found != rate:
        rule = "a sound that is read in chunks is not brought to another: resample the file"
        raise BadSample("wrong_rate", f"{where}: {file} at {found} Hz, the model hears {rate} Hz; {rule}")
    yield from _padded((block.mean(1) for block in read_blocks(file, where, size)), size)


def _rows(file: Path, where: str) -> Iterator[np.ndarray]:
    try:
        mapped = np.load(file, mmap_mode="r", allow_pickle=False)
        mapped = mapped[:, None] if mapped.ndim == 1 else mapped
        if mapped.ndim != 2 or mapped.dtype.kind not in "uif":
            raise ValueError(f"{mapped.dtype}{list(mapped.shape)}, expected numbers [t c]")
    except Exception as error:  # Hostile files raise almost anything.
        message = f"{where}: cannot read {file}: {error or type(error).__name__}"
        raise BadSample("corrupt_series", message) from None
    for start in range(0, len(mapped), _PAGE):
        block = np.array(mapped[start : start + _PAGE], np.float32)
        if not np.isfinite(block).all():
            raise BadSample("not_finite", f"{where}: {file} holds what is no finite number")
        yield block


def _padded(blocks: Iterator[np.ndarray], size: int) -> Iterator[tuple[np.ndarray, int]]:
    """The same steps in pieces of one size, the last filled with zeros."""
    rest: np.ndarray | None = None
    for block in blocks:
        rest = block if rest is None else np.concatenate([rest, block])
        while len(rest) >= size:
            yield rest[:size].astype(np.float32), size
            rest = rest[size:]
    if rest is not None and len(rest):
        last = np.zeros((size, *rest.shape[1:]), np.float32)
        last[: len(rest)] = rest
        yield last, len(rest)
