"""Flat records: a picture or a sound, a text, labels and other media, each in a field that the config names.

    [{"id": "7", "image": "a.png", "label": "dress"}, ...]     a JSON list, or one record a line
    text,category                                              a table with a header, in UTF-8
    Where is my card?,card_arrival

A sample has one turn without a question, whose answer is the text; see ``TEXT``. A field of JSON that is
null, and an empty cell of a table, is a picture, a text, a label or a medium that the record lacks.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl_jax.data.files.encoding import check_encoding
from vl_jax.data.files.shards import check_fields, file_and_folder
from vl_jax.data.files.spans import Spans
from vl_jax.data.images.audio import AudioConfig, sound_in
from vl_jax.data.media.build import AnyMedium, check_media, open_media
from vl_jax.data.media.medium import RecordPlace
from vl_jax.data.picture import Orientation
from vl_jax.data.sample import (
    DEFAULT_MAX_PIXELS,
    IMAGE_PLACEHOLDER,
    TEXT,
    BadSample,
    Sample,
    Turn,
    image_in,
    in_one_line,
)
from vl_jax.data.sources.conversation import checked_text, labels_of
from vl_jax.data.sources.keys import meant
from vl_jax.data.sources.llava import json_records, parse_line


@dataclass(frozen=True)
class RecordsConfig:
    """A file of flat records, and which of their fields are what; an empty name: there is no such field."""

    name: str
    file: str  # .json, .jsonl or .csv, relative to the data root
    image: str = ""  # field with the path of a picture
    sound: str = ""  # field with the path of a sound
    text: str = ""
    labels: tuple[str, ...] = ()
    language: str = ""
    identity: str = ""  # empty: the field ``id``, or the record's number where there is none
    root: str = ""  # folder of pictures and sounds, relative to the data root; empty: that of ``file``
    max_pixels: int = DEFAULT_MAX_PIXELS
    audio: AudioConfig = AudioConfig()  # how its sounds become pictures
    media: tuple[AnyMedium, ...] = ()  # waves, series, clips, volumes and maps, for towers of their own

    def __post_init__(self):
        check_fields(self.name, self.file, (".json", ".jsonl", ".csv"), self.max_pixels)
        if not self.image and not self.sound and not self.text and not self.media:
            raise ValueError(f"source {self.name!r}: image, sound, text or media must name a field")
        check_media(self.media, self.name)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that a record must have."""
        single = (self.image, self.sound, self.text, self.language, self.identity)
        media = (field for medium in self.media for field in medium.fields)
        return tuple(dict.fromkeys(name for name in (*single, *self.labels, *media) if name))

    def open(self, root: str, *, orientation: Orientation = "shown") -> RecordsSource:
        """The source; files are relative to ``root``."""
        return RecordsSource(self, root=root, orientation=orientation)


class _Json:
    """Records that are read when they are asked for."""

    def __init__(self, spans: Spans):
        self._spans = spans

    def __len__(self) -> int:
        return len(self._spans)

    def get(self, index: int, where: str) -> Any:
        return parse_line(self._spans[index], where)


class _Table:
    """The rows of a table by the names in its header; a broken one spoils only itself."""

    def __init__(self, file: Path):
        with file.open("rb") as opened:
            check_encoding(file, opened.read(4))
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
            reader = csv.reader(opened)
            try:
                self._names = next(reader, [])
            except csv.Error as error:
                raise ValueError(f"{file}: no header: {error}") from None
            if len(set(self._names)) < len(self._names):
                raise ValueError(f"{file}: names in the header {self._names}: must be different")
            self._rows: list[list[str] | str] = []  # of a broken row, what is wrong
            while True:
                try:
                    row = next(reader, None)
                except csv.Error as error:
                    self._rows.append(str(error))
                    continue
                if row is None:
                    break
                if row:
                    self._rows.append(row)

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, index: int, where: str) -> dict[str, str | None]:
        row = self._rows[index]
        if isinstance(row, str):
            raise BadSample("bad_row", f"sample ? ({where}): {row}")
        if len(row) != len(self._names):
            message = f"sample ? ({where}): {len(row)} cells under {len(self._names)} names"
            raise BadSample("bad_row", message)
        try:
            "".join(row).encode()
        except UnicodeEncodeError:
            raise BadSample("not_utf8", f"sample ? ({where}): not UTF-8") from None
        return {name: cell or None for name, cell in zip(self._names, row, strict=True)}


class RecordsSource:
    """Random access to the records of one file; a table is in memory, JSON is not.

    Raises (on opening):
      ValueError: the whole file is unusable, or a field is in no record; one line.
    """

    def __init__(self, config: RecordsConfig, *, root: str = ".", orientation: Orientation = "shown"):
        self._config = config
        self._orientation: Orientation = orientation
        self._file, self._folder = file_and_folder(root, config.file, config.root, config.name)
        self.files = [self._file]
        self._hint = ""
        self._records: _Json | _Table
        if self._file.suffix == ".csv":
            self._records = _Table(self._file)
        else:
            spans, self._hint = json_records(self._file)
            self._records = _Json(spans)
        absent = _absent(self._records, config.fields)
        if absent:
            found = meant(_first(self._records), absent[:1])
            message = f"source {config.name!r}: field {absent[0]!r} is in no record of {self._file}"
            raise ValueError(f"{message}{self._hint}; in the first one {found}")

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"RecordsSource({str(self._file)!r}, {len(self)} records)"

    def __getitem__(self, index: int) -> Sample:
        """The sample of record ``index``.

        Raises:
          BadSample: this record breaks a rule; the message names the sample, the file and the record.
        """
        config, where = self._config, f"{self._file}, record {index}{self._hint}"
        record = self._records.get(index, where)
        if not isinstance(record, dict):
            raise BadSample("not_an_object", f"sample ? ({where}): expected an object")
        given = record.get(config.identity or "id")
        identity = in_one_line(f"{config.name}-{index}" if given in (None, "") else str(given))
        where = f"sample {identity[:80]} ({where})"
        labels_of(record, config.fields, where)  # None is missing.
        images = []
        if name := self._path(record, config.image, "image", where):
            images.append(image_in(self._folder, name, where, config.max_pixels, self._orientation))
        if name := self._path(record, config.sound, "audio", where):
            images.append(sound_in(self._folder, name, where, config.audio))
        media = open_media(config.media, record, RecordPlace(self._folder, where, self._orientation))
        turn = Turn(
            f"{IMAGE_PLACEHOLDER}\n" * len(images),
            _text(record, config.text, where),
            kind=TEXT,
            language=_text(record, config.language, where),
        )
        return Sample(
            identity,
            (turn,),
            tuple(images),
            labels=labels_of(record, config.labels, where),
            media=media.media,
            notes=media.notes,
        )

    def _path(self, record: dict[str, Any], field: str, kind: str, where: str) -> str:
        """The path in a field; empty if there is none."""
        path = record.get(field) or ""
        if not isinstance(path, str):
            raise BadSample(f"bad_{kind}_field", f"{where}: {field} must be a path, not {str(path)[:40]!r}")
        return path


def _text(record: dict[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    return "" if value is None else checked_text(value, f"{where}: {field}", reason="bad_text")


def _first(records: _Json | _Table) -> dict[str, Any]:
    """The first record, empty if it is none."""
    try:
        record = records.get(0, "")
    except BadSample:
        return {}
    return record if isinstance(record, dict) else {}


def _absent(records: _Json | _Table, fields: Sequence[str]) -> list[str]:
    """The fields that no record has; as a rule the first record has them all, and no other is looked at."""
    absent = list(fields)
    for index in range(len(records)):
        try:
            record = records.get(index, "")
        except BadSample:
            continue
        absent = [name for name in absent if not isinstance(record, dict) or name not in record]
        if not absent:
            break
    return absent if len(records) else []
