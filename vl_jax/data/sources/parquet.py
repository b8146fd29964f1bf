"""Parquet files, as data sets on the Hugging Face hub come: one record a row, images as bytes in a column.

    image: {"bytes", "path"} | images: list of the same | question, answer | conversations | text | ...

The columns besides the images make a record: see ``conversation``. Needs ``pip install 'vl_jax[parquet]'``.

A row cannot be read without all the rows of its group, and training reads in random order. So groups are
decoded once into files that are mapped (``unpacked``), or as often as it takes, with the last few in memory.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl_jax.data.files.shards import Places, check_fields, find_files, temporary_name
from vl_jax.data.picture import Orientation
from vl_jax.data.sample import DEFAULT_MAX_PIXELS, BadSample, EncodedImage, Sample
from vl_jax.data.sources.conversation import parse
from vl_jax.runtime.storage import buckets

_IMAGES = ("image", "images")
_KEPT_GROUPS = 4  # row groups that stay in memory


@dataclass(frozen=True)
class ParquetConfig:
    """Parquet files; ``file`` may be a pattern."""

    name: str
    file: str  # relative to the data root, such as "data/train-*.parquet"
    unpacked: str = ""  # folder relative to the data root for decoded row groups; empty: they are not kept
    max_pixels: int = DEFAULT_MAX_PIXELS
    labels: tuple[str, ...] = ()  # fields of a record that are labels; "answer": what the first turn answers
    caption: bool = False  # the only answer of a record is read as a text, and its question is not

    def __post_init__(self):
        check_fields(self.name, self.file, (".parquet",), self.max_pixels)

    def open(self, root: str, *, orientation: Orientation = "shown") -> ParquetSource:
        """The source; files are relative to ``root``."""
        return ParquetSource(self, root=root, orientation=orientation)


class ParquetSource:
    """Random access to the rows of Parquet files; quick where rows of one group are read together.

    Raises (on opening):
      ValueError: there is no file, one is no Parquet file, or pyarrow is not installed.
    """

    def __init__(self, config: ParquetConfig, *, root: str = ".", orientation: Orientation = "shown"):
        self._config = config
        self._orientation: Orientation = orientation
        self.files = find_files(root, config.file, config.name)
        self._lock = threading.Lock()
        self._opened = [_open(file) for file in self.files]
        groups = [(f, g) for f, file in enumerate(self._opened) for g in range(file.num_row_groups)]
        self._groups = groups
        counts = [self._opened[f].metadata.row_group(g).num_rows for f, g in groups]
        self._places = Places(counts)
        self._unpacked = buckets.root_of(root) / config.unpacked if config.unpacked else None
        kept = None if config.unpacked else _KEPT_GROUPS  # what is mapped takes no memory
        self._rows = functools.lru_cache(kept)(self._read_group)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"ParquetSource({self._config.file!r}, {len(self.files)} files, {len(self)} records)"

    def __getitem__(self, index: int) -> Sample:
        """The sample of row ``index``, counted over all files.

        Raises:
          BadSample: it breaks a rule, or its row group cannot be read.
        """
        group, row = self._places[index]
        where = f"{self.files[self._groups[group][0]]}, record {index}"
        try:
            with self._lock:
                (record,) = self._rows(group).slice(row, 1).to_pylist()
        except Exception as error:  # Broken pages fail in almost any way.
            message = f"sample ? ({where}): {str(error).partition(chr(10))[0] or type(error).__name__}"
            raise BadSample("bad_record", message) from None
        data = _encoded(record, where)
        named = self._config.labels  # Of these, null is a label that the row lacks.
        record = {k: v for k, v in record.items() if k not in _IMAGES and (v is not None or k in named)}
        identity = f"{self._config.name}-{index}"
        found = parse(
            record,
            where,
            default_id=identity,
            num_images=len(data),
            labels=self._config.labels,
            caption=self._config.caption,
            images=lambda _, where: self._images(data, where),
        )
        images = self._images(data, f"sample {found.id} ({where})")
        return Sample(found.id, found.turns, images, found.system, found.labels, notes=found.notes)

    def _images(self, data: Sequence[bytes], where: str) -> tuple[EncodedImage, ...]:
        limit, orientation = self._config.max_pixels, self._orientation
        return tuple(
            EncodedImage(functools.partial(bytes, d), f"image {n}", where, limit, orientation)
            for n, d in enumerate(data)
        )

    def _read_group(self, group: int) -> Any:
        file, number = self._groups[group]
        if self._unpacked is None:
            return self._opened[file].read_row_group(number)
        state = self.files[file].stat()
        name = f"{self.files[file].resolve()} {state.st_size} {state.st_mtime_ns} {number}"
        place = self._unpacked / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.arrow"
        if not place.is_file():
            _write(place, self._opened[file].read_row_group(number))
        return _map(place)


def _open(file: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{file}: Parquet needs pyarrow: pip install 'vl_jax[parquet]'") from None
    try:
        return pyarrow.parquet.ParquetFile(file)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file}: no Parquet file: {reason}") from None


def _write(place: Path, table: Any) -> None:
    """Writes a table to a file that is either whole or not there, whoever else writes it."""
    import pyarrow

    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(place)
    with pyarrow.OSFile(str(temporary), "wb") as out, pyarrow.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    os.replace(temporary, place)


def _map(place: Path) -> Any:
    import pyarrow

    return pyarrow.ipc.open_file(pyarrow.memory_map(str(place))).read_all()


def _encoded(record: dict[str, Any], where: str) -> list[bytes]:
    """The encoded images of a row."""
    found = next((record[key] for key in _IMAGES if record.get(key) is not None), [])
    data = []
    for item in found if isinstance(found, list) else [found]:
        item = item.get("bytes") if isinstance(item, dict) else item
        if not isinstance(item, bytes):
            message = f"sample ? ({where}): an image must be bytes, not {type(item).__name__}"
            raise BadSample("bad_image_field", message)
        data.append(item)
    return data
