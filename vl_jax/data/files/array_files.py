"""Files of numbers: NPY and NPZ, of which no object is ever loaded, looked at by their headers first."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np

from vl_jax.data.sample import BadSample

MOST_BYTES = 1 << 30


def read_array(
    file: Path, where: str, *, kind: str, key: str = "", most_bytes: int = MOST_BYTES
) -> np.ndarray:
    """The array in a file.

    Args:
      kind: what the file is, for messages and reasons.
      key: which array of an NPZ file; empty: the only one.

    Raises:
      BadSample: there is no such file or array, it is larger than that, or it holds no numbers.
    """
    if not os.path.isfile(file):
        raise BadSample(f"missing_{kind}", f"{where}: no file {file}")
    try:
        if file.suffix == ".npz":
            found = _of_archive(file, key, most_bytes)
        else:
            mapped = np.load(file, mmap_mode="r", allow_pickle=False)
            _check_size(mapped.nbytes, most_bytes)
            found = np.array(mapped)
    except Exception as error:  # Hostile files raise almost anything.
        message = f"{where}: cannot read {file}: {error or type(error).__name__}"
        raise BadSample(f"corrupt_{kind}", message) from None
    if found.dtype.kind not in "buif":
        raise BadSample(f"corrupt_{kind}", f"{where}: {file} holds {found.dtype}, expected numbers")
    return found


def arrays_in(file: Path) -> tuple[str, ...]:
    """The names of the arrays of an NPZ file.

    Raises:
      OSError, zipfile.BadZipFile: it is none.
    """
    with zipfile.ZipFile(file) as archive:
        return tuple(name.removesuffix(".npy") for name in archive.namelist())


def _of_archive(file: Path, key: str, most_bytes: int) -> np.ndarray:
    names = arrays_in(file)
    if not key and len(names) != 1:
        raise ValueError(f"it holds {', '.join(names)}: name one by key")
    name = key or names[0]
    if name not in names:
        raise ValueError(f"no array {name!r} in it; there are: {', '.join(names)}")
    with zipfile.ZipFile(file) as archive:
        _check_size(archive.getinfo(f"{name}.npy").file_size, most_bytes)
    with np.load(file, allow_pickle=False) as opened:
        return opened[name]


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise ValueError(f"{size:,} bytes, limit {most:,}")
