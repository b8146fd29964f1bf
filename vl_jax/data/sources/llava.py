"""Conversation files with images beside them: a JSON list of records, or one record a line.

{"id": "7", "image": "a.png" | ["a.png", "b.png"] | absent, "lang": "en",
 "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]}

Records of other dialects (``messages`` with roles, plain texts) are read as well: see ``conversation``.
Sounds (``"audio": "a.wav"``) become pictures, their spectrograms, which an image encoder sees: see ``audio``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl_jax.data.files.shards import check_fields, file_and_folder
from vl_jax.data.files.spans import Spans, json_items, lines
from vl_jax.data.images.audio import AudioConfig, sound_in
from vl_jax.data.images.clips import frame_names
from vl_jax.data.picture import Orientation
from vl_jax.data.sample import DEFAULT_MAX_PIXELS, BadSample, Image, Sample, image_in
from vl_jax.data.sources.conversation import Medium, parse


@dataclass(frozen=True)
class LlavaConfig:
    """A conversation file (``.json`` or ``.jsonl``), the folder its paths are relative to, and limits."""

    name: str
    file: str  # relative to the data root
    root: str = ""  # folder of images and sounds, relative to the data root; empty: that of ``file``
    max_pixels: int = DEFAULT_MAX_PIXELS
    max_frames: int = 8  # of a clip
    audio: AudioConfig = AudioConfig()  # how its sounds become pictures
    labels: tuple[str, ...] = ()  # fields of a record that are labels; "answer": what the first turn answers
    caption: bool = False  # the only answer of a record is read as a text, and its question is not

    def __post_init__(self):
        if self.max_frames < 1:
            raise ValueError(f"max_frames={self.max_frames} of source {self.name!r}: must be at least 1")
        check_fields(self.name, self.file, (".json", ".jsonl"), self.max_pixels)

    def open(self, root: str, *, orientation: Orientation = "shown") -> LlavaSource:
        """The source; files are relative to ``root``."""
        return LlavaSource(self, root=root, orientation=orientation)


class LlavaSource:
    """Random access to the records of one conversation file.

    Raises (on opening):
      ValueError: the whole file is unusable; one line with the file and the position.
    """

    def __init__(self, config: LlavaConfig, *, root: str = ".", orientation: Orientation = "shown"):
        self._config = config
        self._orientation: Orientation = orientation
        self._file, self._folder = file_and_folder(root, config.file, config.root, config.name)
        self.files = [self._file]
        self._records, self._hint = json_records(self._file)

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"LlavaSource({str(self._file)!r}, {len(self)} records)"

    def __getitem__(self, index: int) -> Sample:
        """The sample of record ``index``.

        Raises:
          BadSample: this record breaks a rule; the message names the sample, the file and the record.
        """
        where = f"{self._file}, record {index}{self._hint}"
        record = parse_line(self._records[index], where)
        if isinstance(record, dict) and "frames" in record:
            most = self._config.max_frames
            names = frame_names(record["frames"], self._folder, f"sample ? ({where})", most=most)
            record = {**record, "image": names}
        identity = f"{self._config.name}-{index}"
        found = parse(
            record,
            where,
            default_id=identity,
            labels=self._config.labels,
            caption=self._config.caption,
            images=self._open,
        )
        images = self._open(found.media, f"sample {found.id} ({where})")
        return Sample(found.id, found.turns, images, found.system, found.labels, notes=found.notes)

    def _open(self, media: Sequence[Medium], where: str) -> tuple[Image, ...]:
        config = self._config
        return tuple(
            sound_in(self._folder, medium.name, where, config.audio)
            if medium.kind == "audio"
            else image_in(self._folder, medium.name, where, config.max_pixels, self._orientation)
            for medium in media
        )


def json_records(file: Path) -> tuple[Spans, str]:
    """The records of a file, by its name one a line or those of a JSON list.

    With them comes what messages add of a file of lines that looks as if it were a list; mostly nothing.
    """
    if file.suffix != ".jsonl":
        return json_items(file), ""
    records = lines(file)
    is_list = bool(len(records)) and records[0].lstrip()[:1] == b"["
    return records, ", in a file that begins with '[': a JSON list is named .json" if is_list else ""


def read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
      ValueError: it is not JSON in UTF-8; one line with the file and the position.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON: {error}") from None


def parse_line(line: bytes, where: str) -> Any:
    """The JSON of one record.

    Raises:
      BadSample: it is not JSON, or not UTF-8.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        message = f"sample ? ({where}): not UTF-8 at byte {error.start}: save it as UTF-8"
        raise BadSample("not_utf8", message) from None
    return parse_text(text, where)


def parse_text(text: str, where: str) -> Any:
    """The JSON of one record.

    Raises:
      BadSample: it is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadSample("not_json", f"sample ? ({where}): {error}") from None
