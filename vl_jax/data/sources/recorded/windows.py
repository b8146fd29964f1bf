"""Windows of long recordings that are arrays of one NPZ file, with what is said of each in a JSON list.

    [{"key": "1797_ball_07", "fault": "ball", "rate_hz": 12000, "scale": 2e-5}, ...]     and  recordings.npz

Windows of one recording are near copies of one another. So a split is by recording (``only``), or, where
there is one recording of a kind, by its parts (``part``), which no window crosses.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vl_jax.data.files.array_files import arrays_in, read_array
from vl_jax.data.files.shards import Places, check_fields, file_and_folder
from vl_jax.data.images.audio import resample
from vl_jax.data.picture import Orientation
from vl_jax.data.sample import TEXT, BadSample, Sample, Turn, path_in
from vl_jax.data.sources.conversation import labels_of
from vl_jax.data.sources.llava import json_records, parse_line


@dataclass(frozen=True)
class OnlyWith:
    """Those records alone of which a field has one of some values."""

    field: str
    values: tuple[str, ...]  # numbers as they are written

    def __call__(self, record: dict[str, Any]) -> bool:
        """Whether a record is one of them."""
        return str(record.get(self.field)) in self.values


@dataclass(frozen=True)
class RecordedWindowsConfig:
    """Windows of recordings."""

    name: str
    file: str  # .json or .jsonl, relative to the data root
    arrays: str  # NPZ file, relative to the folder of ``file``
    medium: str = "series"  # name in ``Sample.media``
    window: int = 2048  # steps
    hop: int = 2048  # steps from one window to the next
    rate: float = 12_000.0  # steps a second that every recording is brought to
    part: tuple[float, float] = (0.0, 1.0)  # shares of each recording between which windows lie
    only: tuple[OnlyWith, ...] = ()  # all must hold; empty: all recordings
    labels: tuple[str, ...] = ()  # fields of a record
    rate_field: str = "rate_hz"
    scale_field: str = "scale"  # what numbers are multiplied by

    def __post_init__(self):
        check_fields(self.name, self.file, (".json", ".jsonl"))
        if min(self.window, self.hop) < 1 or not self.rate > 0:
            raise ValueError(
                f"window={self.window}, hop={self.hop}, rate={self.rate} of source {self.name!r}: must be "
                "above 0"
            )
        if not 0 <= self.part[0] < self.part[1] <= 1:
            raise ValueError(f"part={self.part} of source {self.name!r}: must be two rising shares in 0..1")

    def open(self, root: str, *, orientation: Orientation = "shown") -> RecordedWindows:
        """The source; files are relative to ``root``."""
        return RecordedWindows(self, root)


class RecordedWindows:
    """Random access to windows; a recording is read when a window of it is first asked for, and kept.

    Raises (on opening):
      ValueError: a file is unusable, a recording is not there, or no window is left; one line.
    """

    def __init__(self, config: RecordedWindowsConfig, root: str):
        self._config = config
        self._file, folder = file_and_folder(root, config.file, "", config.name)
        spans, hint = json_records(self._file)
        try:
            self._arrays = path_in(folder, config.arrays, f"source {config.name!r}", kind="array")
            known = arrays_in(self._arrays)
            records = [parse_line(spans[i], f"{self._file}, record {i}{hint}") for i in range(len(spans))]
            self._records = [self._checked(record, i, known) for i, record in enumerate(records)]
        except (BadSample, OSError, ValueError) as error:
            raise ValueError(f"source {config.name!r}: {error}") from None
        self._records = [r for r in self._records if all(only(r) for only in config.only)]
        self.files = [self._file, self._arrays]
        self._kept: dict[int, np.ndarray] = {}
        self._places = Places([len(self._starts(record)) for record in self._records])
        if not len(self):
            raise ValueError(f"source {config.name!r}: no window of {config.window} steps is left")

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"RecordedWindows({str(self._file)!r}, {len(self._records)} recordings, {len(self)} windows)"

    def __getitem__(self, index: int) -> Sample:
        """The sample of one window, an empty text beside it.

        Raises:
          BadSample: its recording cannot be read.
        """
        number, place = self._places[index]
        record, config = self._records[number], self._config
        start = self._starts(record)[place]
        where = f"{record['key']} ({self._file})"

        def window() -> np.ndarray:
            return self._recording(number)[start : start + config.window, None]

        return Sample(
            f"{record['key']}@{start}",
            (Turn("", "", kind=TEXT),),
            labels=labels_of(record, config.labels, where),
            media={config.medium: window},
        )

    def _checked(self, record: Any, index: int, known: tuple[str, ...]) -> dict[str, Any]:
        config = self._config
        where = f"{self._file}, record {index}"
        if not isinstance(record, dict) or str(record.get("key")) not in known:
            raise ValueError(f"{where}: key must name an array of {self._arrays}")
        for field in (config.rate_field, config.scale_field, "samples"):
            value = record.get(field)
            if value is None or type(value) not in (int, float) or not 0 < value < 1e12:
                raise ValueError(f"{where}: {field}={value!r} must be a number above 0")
        return record

    def _length(self, record: dict[str, Any]) -> int:
        """Steps of a recording at the rate of the config."""
        return int(record["samples"] * self._config.rate / record[self._config.rate_field])

    def _starts(self, record: dict[str, Any]) -> range:
        first, last = (int(share * self._length(record)) for share in self._config.part)
        return range(first, max(last - self._config.window + 1, first), self._config.hop)

    def _recording(self, number: int) -> np.ndarray:
        if number not in self._kept:
            self._kept[number] = self._load(self._records[number])
        return self._kept[number]

    def _load(self, record: dict[str, Any]) -> np.ndarray:
        config = self._config
        key, where = str(record["key"]), f"recording {record['key']} ({self._file})"
        found = read_array(Path(self._arrays), where, kind="series", key=key)
        if found.ndim != 1 or len(found) != record["samples"] or not np.isfinite(found).all():
            message = f"{where}: {found.shape} numbers, expected {record['samples']:,} finite ones"
            raise BadSample("corrupt_series", message)
        values = found.astype(np.float32) * np.float32(record[config.scale_field])
        return resample(values, record[config.rate_field], config.rate, ends="line")
