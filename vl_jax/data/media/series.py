"""Series: numbers measured at equal distances in time, a column for each channel.

    {"id": "7", "vibration": "7.npy", "hertz": 12000, "label": "ball"}  -->  media["vibration"]() = f32[t c]

A file is NPY or NPZ, [t] or [t c], or a CSV table with or without a header. A record may also hold the
numbers themselves.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from vl_jax.data.files.array_files import MOST_BYTES, read_array
from vl_jax.data.images.audio import resample
from vl_jax.data.media.medium import Opened, RecordPlace, named, number_of
from vl_jax.data.sample import BadSample, Note


@dataclass(frozen=True)
class SeriesConfig:
    """A series of a record."""

    name: str
    field: str = ""  # of the record, with the path of a file, or with the numbers; empty: that of the name
    key: str = ""  # which array of an NPZ file; empty: the only one
    columns: tuple[str, ...] = ()  # of a table, by the names in its header, or by number from 0; empty: all
    rate: float = 0.0  # steps a second that every series is brought to; 0: they stay as they are
    file_rate: float = 0.0  # that of the files, where all have one
    rate_field: str = ""  # of the record, with the steps a second of its file

    def __post_init__(self):
        named(self.name, self.field)
        if min(self.rate, self.file_rate) < 0:
            raise ValueError(
                f"rate={self.rate}, file_rate={self.file_rate} of series {self.name!r}: must not be negative"
            )
        if self.file_rate and self.rate_field:
            raise ValueError(f"file_rate and rate_field of series {self.name!r}: set one of them")
        if self.rate and not self.file_rate and not self.rate_field:
            raise ValueError(f"rate={self.rate} of series {self.name!r} needs file_rate or rate_field")

    @property
    def fields(self) -> tuple[str, ...]:
        """The field with the path, and that with the rate."""
        return (*named(self.name, self.field), *((self.rate_field,) if self.rate_field else ()))

    def open(self, record: Mapping[str, Any], place: RecordPlace) -> Opened:
        """The series of a record, whose rate must be stated if it matters."""
        field, given, notes = self.fields[0], self.file_rate, ()
        if self.rate_field:
            given = number_of(record, self.rate_field, place.where)
        if self.rate and given != self.rate:
            message = f"{place.where}: {field} at {given:g} Hz is brought to {self.rate:g} Hz"
            notes = (Note("resampled", message),)
        value = record[field]
        held = value if isinstance(value, list) else place.path(value, field, "series")
        return Opened({self.name: SeriesFile(held, place.where, self, given)}, notes)


@dataclass(frozen=True)
class SeriesFile:
    """A series that is read when it is asked for."""

    held: Path | list[Any]  # the file, or the numbers
    where: str
    config: SeriesConfig
    rate: float  # steps a second; 0: nobody says

    def __call__(self) -> Float[np.ndarray, "t c"]:
        """The series at the rate of the config.

        Raises:
          BadSample: the file is missing or cannot be read, or it holds what is no finite number.
        """
        found = self._numbers()
        found = found[:, None] if found.ndim == 1 else found
        if found.ndim != 2 or not found.size:
            message = f"{self.where}: {self._label} of shape {found.shape}, expected [steps channels]"
            raise BadSample("corrupt_series", message)
        bad = int(np.count_nonzero(~np.isfinite(found).all(axis=1)))
        if bad:
            message = f"{self.where}: {self._label} has no finite number in {bad} of {len(found)} steps"
            raise BadSample("not_finite", message)
        found = found.astype(np.float32, copy=False)
        return resample(found, self.rate, self.config.rate, ends="line") if self.config.rate else found

    @property
    def _label(self) -> str:
        return str(self.held) if isinstance(self.held, Path) else f"series {self.config.name!r}"

    def _numbers(self) -> np.ndarray:
        if isinstance(self.held, list):
            try:
                rows = [row if isinstance(row, list) else [row] for row in self.held]
                return np.array([[np.nan if x is None else x for x in row] for row in rows], np.float64)
            except (TypeError, ValueError) as error:
                raise BadSample("corrupt_series", f"{self.where}: {self._label}: {error}") from None
        if self.held.suffix in (".npy", ".npz"):
            return read_array(self.held, self.where, kind="series", key=self.config.key)
        return _table(self.held, self.config.columns, self.where)


def _table(file: Path, columns: tuple[str, ...], where: str) -> np.ndarray:
    """The columns of a table of numbers; an empty cell is no number."""
    if not os.path.isfile(file):
        raise BadSample("missing_series", f"{where}: no file {file}")
    try:
        if (size := os.path.getsize(file)) > MOST_BYTES:
            raise ValueError(f"{size:,} bytes, limit {MOST_BYTES:,}")
        with file.open(encoding="utf-8-sig", newline="") as opened:
            rows = [row for row in csv.reader(opened) if row]
        header = [] if rows and all(map(_is_number, rows[0])) else [name.strip() for name in rows[0]]
        chosen = [_column(name, header, len(rows[0])) for name in columns] or range(len(rows[0]))
        return np.array(
            [[float(row[i] or "nan") for i in chosen] for row in rows[1 if header else 0 :]], np.float64
        )
    except Exception as error:  # Hostile files raise almost anything.
        message = f"{where}: cannot read {file}: {error or type(error).__name__}"
        raise BadSample("corrupt_series", message) from None


def _column(name: str, header: list[str], count: int) -> int:
    if name in header:
        return header.index(name)
    if name.isdigit() and int(name) < count:
        return int(name)
    raise ValueError(f"no column {name!r} in it; there are: {', '.join(header) or f'0 to {count - 1}'}")


def _is_number(cell: str) -> bool:
    try:
        float(cell or "nan")
    except ValueError:
        return False
    return True
