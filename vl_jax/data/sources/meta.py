"""InternVL's meta files: a mixture of conversation files in one JSON, each with its factor of repetition.

{"talks": {"root": "images/", "annotation": "talks.jsonl", "repeat_time": 2, "length": 1000}, ...}

A file whose ``repeat_time`` is 2 is read twice in an epoch, one of 0.5 up to its middle. ``length`` is not
relied on: the file itself says how many records there are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vl_jax.data.files.shards import Places, check_fields
from vl_jax.data.images.audio import AudioConfig
from vl_jax.data.picture import Orientation
from vl_jax.data.sample import DEFAULT_MAX_PIXELS, Sample
from vl_jax.data.sources.llava import LlavaConfig, LlavaSource, read_json
from vl_jax.runtime.storage import buckets


@dataclass(frozen=True)
class MetaConfig:
    """A meta file; its paths are relative to the data root, and may not leave it."""

    name: str
    file: str
    max_pixels: int = DEFAULT_MAX_PIXELS
    audio: AudioConfig = AudioConfig()  # how its sounds become pictures
    labels: tuple[str, ...] = ()  # fields of a record that are labels; "answer": what the first turn answers
    caption: bool = False  # the only answer of a record is read as a text, and its question is not

    def __post_init__(self):
        check_fields(self.name, self.file, (".json",), self.max_pixels)

    def open(self, root: str, *, orientation: Orientation = "shown") -> MetaSource:
        """The source; files are relative to ``root``."""
        return MetaSource(self, root=root, orientation=orientation)


class MetaSource:
    """Random access to the records of all files of a meta file, repetitions behind one another.

    Raises (on opening):
      ValueError: the file, an entry of it or a file it names is unusable; one line.
    """

    def __init__(self, config: MetaConfig, *, root: str = ".", orientation: Orientation = "shown"):
        self._file = buckets.file_in(root, config.file)
        if not self._file.is_file():
            raise ValueError(f"source {config.name!r}: no such file {self._file}")
        entries = read_json(self._file)
        if not isinstance(entries, dict) or not entries:
            raise ValueError(f"{self._file}: expected an object with an entry for each data set")
        opened = [self._open(name, entry, config, root, orientation) for name, entry in entries.items()]
        self._sources = [source for source, _ in opened]
        self.files = [self._file, *(file for source in self._sources for file in source.files)]
        self._places = Places([math.ceil(len(source) * factor) for source, factor in opened])

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"MetaSource({str(self._file)!r}, {len(self._sources)} files, {len(self)} records)"

    def __getitem__(self, index: int) -> Sample:
        """The sample of record ``index``; raises as ``LlavaSource``."""
        number, place = self._places[index]
        source = self._sources[number]
        return source[place % len(source)]

    def _open(
        self, name: str, entry: Any, config: MetaConfig, root: str, orientation: Orientation
    ) -> tuple[LlavaSource, float]:
        where = f"{self._file}, entry {name[:80]!r}"
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: expected an object")
        factor = entry.get("repeat_time", 1)
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1e6:
            raise ValueError(f"{where}: repeat_time={factor!r} must be a number above 0")
        for key in ("annotation", "root"):
            if not _is_inside(root, entry.get(key, "")):
                found = str(entry.get(key))[:80]
                raise ValueError(f"{where}: {key}={found!r} must be a path inside the data root {root}")
        try:
            file, folder = entry.get("annotation", ""), entry.get("root", "") or "."
            inner = LlavaConfig(
                name or "?",
                file,
                folder,
                config.max_pixels,
                audio=config.audio,
                labels=config.labels,
                caption=config.caption,
            )
            return LlavaSource(inner, root=root, orientation=orientation), factor
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}: {error}") from None


def _is_inside(root: str, path: Any) -> bool:
    try:
        return (buckets.root_of(root) / path).resolve().is_relative_to(buckets.root_of(root).resolve())
    except (TypeError, ValueError, OSError, RuntimeError):  # no path, or none that the system knows
        return False
