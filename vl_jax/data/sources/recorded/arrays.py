"""Data sets that are arrays of one NPZ file, a row for each sample, as MedMNIST's are (Yang et al. 2023).

    train_images u8[N h w] (pictures) or u8[N d h w] (volumes), train_labels [N 1]

Pictures are grey. An array is unpacked row by row when its first sample is asked for, and kept in memory:
``pool`` makes volumes smaller on the way, so that 64^3 voxels need not be.
"""

from __future__ import annotations

import functools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image as PilImage

from vl_jax.data.files.array_files import read_array
from vl_jax.data.files.shards import check_fields, file_and_folder
from vl_jax.data.picture import Orientation
from vl_jax.data.sample import IMAGE_PLACEHOLDER, TEXT, Sample, Turn

_MOST_BYTES = 4 << 30


@dataclass(frozen=True)
class RecordedArraysConfig:
    """Rows of arrays as samples."""

    name: str
    file: str  # .npz, relative to the data root
    inputs: str = "train_images"  # array of pictures or volumes
    classes: str = "train_labels"  # array of the numbers of classes
    label: str = "label"  # what it is called in ``Sample.labels``
    medium: str = ""  # name in ``Sample.media`` [... 1]; empty: pictures, of an array [N h w]
    pool: int = 1  # voxels on the side of a cube that become one, their mean
    white: int = 255  # level that becomes 1, or white

    def __post_init__(self):
        check_fields(self.name, self.file, (".npz",))
        if self.pool < 1 or not 1 <= self.white <= 255:
            raise ValueError(
                f"pool={self.pool}, white={self.white} of source {self.name!r}: must be at least 1, and "
                "white at most 255"
            )

    def open(self, root: str, *, orientation: Orientation = "shown") -> RecordedArrays:
        """The source; files are relative to ``root``."""
        return RecordedArrays(self, root)


class RecordedArrays:
    """Random access to the rows.

    Raises (on opening):
      ValueError: the file is unusable, or its arrays do not fit one another; one line.
    """

    def __init__(self, config: RecordedArraysConfig, root: str):
        self._config = config
        self._file, _ = file_and_folder(root, config.file, "", config.name)
        self.files = [self._file]
        where = f"source {config.name!r}"
        shape, dtype = _header(self._file, config.inputs, where)
        self._labels = read_array(self._file, where, kind="array", key=config.classes).reshape(-1)
        axes = (3,) if not config.medium else (3, 4)
        if len(shape) not in axes or dtype != np.uint8 or len(self._labels) != shape[0]:
            raise ValueError(
                f"{where}: {config.inputs} is {dtype}{list(shape)} with {len(self._labels)} labels, expected "
                f"uint8 of {' or '.join(map(str, axes))} axes and a label for each row"
            )
        if any(side % config.pool for side in shape[1:]):
            raise ValueError(f"{where}: pool={config.pool} does not divide the sides {list(shape[1:])}")
        self._shape = shape

    def __len__(self) -> int:
        return self._shape[0]

    def __repr__(self) -> str:
        return f"RecordedArrays({str(self._file)!r}, {self._config.inputs} {list(self._shape)})"

    def __getitem__(self, index: int) -> Sample:
        """The sample of one row."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        config = self._config

        def picture() -> PilImage.Image:
            return PilImage.fromarray(self._rows[index]).convert("RGB")

        def medium() -> np.ndarray:
            return self._rows[index][..., None]

        return Sample(
            f"{config.inputs}/{index}",
            (Turn("" if config.medium else f"{IMAGE_PLACEHOLDER}\n", "", kind=TEXT),),
            () if config.medium else (picture,),
            labels={config.label: int(self._labels[index])},
            media={config.medium: medium} if config.medium else {},
        )

    @functools.cached_property
    def _rows(self) -> UInt8[np.ndarray, "N ..."]:
        """All rows, as small as they are to be."""
        config, sides = self._config, [side // self._config.pool for side in self._shape[1:]]
        found = np.empty((self._shape[0], *sides), np.uint8)
        with zipfile.ZipFile(self._file) as archive, archive.open(f"{config.inputs}.npy") as opened:
            _read_header(opened)
            for row in range(self._shape[0]):
                data = opened.read(int(np.prod(self._shape[1:])))
                values = np.frombuffer(data, np.uint8).reshape(self._shape[1:])
                found[row] = np.rint(pooled(values, config.pool) * (255 / config.white)).clip(0, 255)
        return found


def pooled(values: np.ndarray, pool: int) -> np.ndarray:
    """The mean over cubes of that many cells on the side."""
    if pool == 1:
        return values
    split = values.reshape(*(n for side in values.shape for n in (side // pool, pool)))
    return split.mean(axis=tuple(range(1, 2 * values.ndim, 2)))


def _header(file: Path, name: str, where: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array of an NPZ file."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open(f"{name}.npy") as opened:
            shape, fortran, dtype = _read_header(opened)
    except Exception as error:  # Hostile files raise almost anything.
        raise ValueError(f"{where}: cannot read {name} of {file}: {error}") from None
    if fortran or int(np.prod(shape)) * dtype.itemsize > _MOST_BYTES:
        raise ValueError(f"{where}: {name} of {file} has {shape}, limit {_MOST_BYTES:,} bytes, rows first")
    return shape, dtype


def _read_header(opened: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(opened)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(opened)
