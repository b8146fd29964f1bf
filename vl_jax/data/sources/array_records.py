"""Samples in ArrayRecord files, the format that ``convert-data`` writes: random access, images and all.

record    length of the head (u32, little-endian) | head (JSON) | image 0 | image 1 | ...
head      {"id", "system", "turns": [[question, answer, kind, language, boxes, weight if not 1], ...],
           "images": [bytes of each], "labels": {...}}         boxes: [[label, x0, y0, x1, y1], ...]

With boxes, ``orientation`` says which way up the pictures have to be read for them: "shown" or "stored" (see
``picture``). Earlier versions did not write it, and read pictures as they are stored.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl_jax.data.files.shards import Places, check_fields, find_files
from vl_jax.data.picture import Orientation
from vl_jax.data.sample import (
    DEFAULT_MAX_PIXELS,
    IMAGE_PLACEHOLDER,
    BadSample,
    Box,
    EncodedImage,
    Image,
    Sample,
    Turn,
)

ENDING = ".arrayrecord"
_LENGTH = struct.Struct("<I")
# How reading bytes that are no record may end.
_HOSTILE = (
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    OverflowError,
    struct.error,
)


@dataclass(frozen=True)
class ArrayRecordConfig:
    """Files that ``convert-data`` wrote; ``file`` may be a pattern."""

    name: str
    file: str  # relative to the data root, such as "scenes/*.arrayrecord"
    max_pixels: int = DEFAULT_MAX_PIXELS

    def __post_init__(self):
        check_fields(self.name, self.file, (ENDING,), self.max_pixels)

    def open(self, root: str, *, orientation: Orientation = "shown") -> ArrayRecordSource:
        """The source; files are relative to ``root``."""
        return ArrayRecordSource(self, root=root, orientation=orientation)


class ArrayRecordSource:
    """Random access to converted samples.

    Raises (on opening):
      ValueError: there is no file, or one is no ArrayRecord file.
    """

    def __init__(self, config: ArrayRecordConfig, *, root: str = ".", orientation: Orientation = "shown"):
        self._config = config
        self._orientation: Orientation = orientation
        self.files = find_files(root, config.file, config.name)
        self._readers = [_Reader(file) for file in self.files]
        self._places = Places([reader.count for reader in self._readers])

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"ArrayRecordSource({self._config.file!r}, {len(self.files)} files, {len(self)} records)"

    def __getitem__(self, index: int) -> Sample:
        """The sample of record ``index``.

        Raises:
          BadSample: the record is not what ``convert-data`` writes.
        """
        file, place = self._places[index]
        where = f"{self.files[file]}, record {index}"
        try:
            data, limit = self._readers[file].read(place), self._config.max_pixels
            return decode(data, where, max_pixels=limit, orientation=self._orientation)
        except BadSample:
            raise
        except _HOSTILE as error:
            message = f"sample ? ({where}): {error or type(error).__name__}"
            raise BadSample("bad_record", message) from None


class _Reader:
    """One file, whose reader is shared by threads."""

    def __init__(self, file: Path):
        self._lock = threading.Lock()
        options = "readahead_buffer_size:0,max_parallelism:0"
        try:
            self._reader = _module().ArrayRecordReader(str(file), options)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{file}: no ArrayRecord file: {reason}") from None
        if not self._reader.ok():
            raise ValueError(f"{file}: no ArrayRecord file, or not a whole one")
        self.count = self._reader.num_records()

    def read(self, index: int) -> bytes:
        with self._lock:
            return self._reader.read([index])[0]


def _module() -> Any:
    try:
        return importlib.import_module("array_record.python.array_record_module")
    except ImportError:
        raise ValueError("ArrayRecord files need the package array_record, which this system lacks") from None


def encode(sample: Sample) -> bytes:
    """A sample as one record; images that are files keep their bytes, others become PNG.

    Raises:
      BadSample: an image cannot be used, or a label is not of JSON.
    """
    images = [_encoded(image) for image in sample.images]
    turns = [
        [t.question, t.answer, t.kind, t.language, [[b.label, *b.corners] for b in t.boxes]]
        + ([t.weight] if t.weight != 1 else [])
        for t in sample.turns
    ]
    head: dict[str, Any] = {"id": sample.id, "system": sample.system, "turns": turns}
    head["images"] = [len(data) for data in images]
    if images and _has_boxes(sample.turns):
        head["orientation"] = getattr(sample.images[0], "orientation", "shown")
    if sample.labels:
        head["labels"] = dict(sample.labels)
    try:
        text = json.dumps(head, ensure_ascii=False, separators=(",", ":")).encode()
    except TypeError as error:
        raise BadSample("bad_label", f"sample {sample.id}: labels are no JSON: {error}") from None
    return b"".join([_LENGTH.pack(len(text)), text, *images])


def decode(
    record: bytes,
    where: str,
    *,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    orientation: Orientation = "shown",
) -> Sample:
    """The sample of a record; its images stay encoded until they are called.

    Args:
      orientation: of the pictures of a record without boxes.

    Raises:
      BadSample: these are not the bytes of a sample.
    """
    (length,) = _LENGTH.unpack_from(record)
    start = _LENGTH.size + length
    head = json.loads(record[_LENGTH.size : start])
    where = f"sample {str(head['id'])[:80]} ({where})"
    turns = tuple(_turn(*turn) for turn in head["turns"])
    if _has_boxes(turns):
        orientation = head.get("orientation", "stored")
        if orientation not in ("shown", "stored"):
            raise BadSample("bad_record", f"{where}: orientation is {str(orientation)[:20]!r}")
    images = []
    for number, size in enumerate(head["images"]):
        data = record[start : start + size]
        if not isinstance(size, int) or size < 0 or len(data) != size:
            raise BadSample("cut_off", f"{where}: image {number} is not whole")
        images.append(EncodedImage(_Bytes(data), f"image {number}", where, max_pixels, orientation))
        start += size
    if not turns or not isinstance(head["id"], str) or not isinstance(head["system"], str):
        raise BadSample("bad_record", f"{where}: needs an id, a system text and turns")
    placeholders = sum(turn.question.count(IMAGE_PLACEHOLDER) for turn in turns)
    if placeholders != len(images):
        message = f"{where}: {placeholders} {IMAGE_PLACEHOLDER} placeholders for {len(images)} images"
        raise BadSample("placeholder_mismatch", message)
    return Sample(head["id"], turns, tuple(images), head["system"], dict(head.get("labels", {})))


def _has_boxes(turns: Iterable[Turn]) -> bool:
    """Whether turns have boxes, beside their texts or in them."""
    return any(turn.boxes or "<|det|>" in turn.question + turn.answer for turn in turns)


def _turn(
    question: str, answer: str, kind: str, language: str, boxes: list[list[Any]], weight: float = 1.0
) -> Turn:
    if type(weight) not in (int, float) or not 0 <= weight < 1e6:
        raise ValueError("a weight must be a number that is not negative")
    if not all(isinstance(text, str) for text in (question, answer, kind, language)):
        raise ValueError("a turn needs texts")
    f"{question}{answer}".encode()  # Half a surrogate pair is no text.
    found = tuple(_box(*box) for box in boxes)
    return Turn(question, answer, kind, language, found, float(weight))


def _box(label: str, x0: float, y0: float, x1: float, y1: float) -> Box:
    corners = (float(x0), float(y0), float(x1), float(y1))
    if not all(map(math.isfinite, corners)):
        raise ValueError("a box needs finite numbers")
    return Box(str(label), corners)


@dataclass(frozen=True)
class _Bytes:
    """Bytes that are at hand already."""

    data: bytes

    def __call__(self) -> bytes:
        return self.data


def _encoded(image: Image) -> bytes:
    picture = image()  # Also of a file: a broken one is found here, and not in training.
    encoded = getattr(image, "encoded", None)
    if encoded is not None:
        return encoded()
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def write_file(file: Path, records: Iterable[bytes]) -> int:
    """Writes one file of records, and says how many there were."""
    writer, count = _module().ArrayRecordWriter(str(file), "group_size:1"), 0
    for record in records:
        writer.write(record)
        count += 1
    writer.close()
    return count
