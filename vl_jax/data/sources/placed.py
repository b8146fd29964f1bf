"""Pictures with labels that lie in them: boxes, maps of classes, objects with masks, depth.

    [{"id": "7", "image": "a.jpg", "boxes": [{"label": "cat", "bbox": [x0, y0, x1, y1]}],
      "mask": "a.png", "depth": "b.png", "label": "indoors"}, ...]        a JSON list, or a record a line

The config says which field is what; its label has the name of the field. Boxes are in pixels of ``width`` x
``height``, if the record has them (see ``frames``). A mask is a picture whose grey levels are class indices.
In one of objects, level i is the object whose box says ``"instance": i``, or the i-th box where none says so.
The outlines of objects may be in the boxes as well, as COCO writes them (see ``outlines``).
Depth is a picture of whole numbers, ``depth_levels`` to a metre, 0 where nothing was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image as PilImage

from vl_jax.data.files.shards import check_fields, file_and_folder
from vl_jax.data.images.difference import Difference
from vl_jax.data.images.frames import DeclaredFrame, declared_frame, frames_of
from vl_jax.data.images.outlines import Outline, outline
from vl_jax.data.images.spatial import Boxes, Instances, PixelMap, whole
from vl_jax.data.picture import Orientation
from vl_jax.data.sample import (
    DEFAULT_MAX_PIXELS,
    IMAGE_PLACEHOLDER,
    TEXT,
    BadSample,
    Box,
    FileImage,
    Note,
    Sample,
    Turn,
    image_in,
    image_size,
    path_in,
)
from vl_jax.data.sources.conversation import boxes_of, identity_of, labels_of
from vl_jax.data.sources.keys import meant
from vl_jax.data.sources.llava import json_records, parse_line

NO_CLASS, NO_DEPTH = 255, 0.0  # of a pixel that says nothing
# What two pictures of a record become: one of them alone, or one picture whose channels are the last, the
# first and how far they differ, in grey levels.
Pair = Literal["first", "last", "difference"]


@dataclass(frozen=True)
class PlacedConfig:
    """A file of records, and which of their fields are what; an empty name: it is not read."""

    name: str
    file: str  # .json or .jsonl, relative to the data root
    image: str = "image"  # field with the path of a picture, or with a list of two
    pair: Pair = "first"
    boxes: str = ""  # field with boxes; the label has its name, so for those that follow
    classes: str = ""  # field with the path of a mask of classes
    objects: str = ""  # field with the path of a mask of objects, whose boxes are in ``boxes``
    outlines: str = ""  # key of every box with polygons or runs of its object
    depth: str = ""  # field with the path of a picture of depth
    labels: tuple[str, ...] = ()  # fields of other labels
    void: tuple[int, ...] = ()  # levels of a mask of classes that say nothing
    background: int | None = None  # class of all pixels of a record without a mask; None: it has no label
    depth_levels: float = 1000.0  # to a metre
    root: str = ""  # folder of pictures, relative to the data root; empty: that of ``file``
    max_pixels: int = DEFAULT_MAX_PIXELS

    def __post_init__(self):
        check_fields(self.name, self.file, (".json", ".jsonl"), self.max_pixels)
        if not self.image:
            raise ValueError(f"source {self.name!r}: image must name a field")
        for field in ("objects", "outlines"):
            if getattr(self, field) and not self.boxes:
                raise ValueError(f"source {self.name!r}: {field}={getattr(self, field)!r} needs boxes")
        names = [n for n in (self.boxes, self.classes, self.objects, self.outlines, self.depth) if n]
        if len(set(names)) < len(names):
            raise ValueError(f"source {self.name!r}: labels named {names}, all must be different")
        if not self.depth_levels > 0:
            raise ValueError(f"depth_levels={self.depth_levels} of source {self.name!r}: must be above 0")

    def open(self, root: str, *, orientation: Orientation = "shown") -> PlacedSource:
        """The source; files are relative to ``root``."""
        return PlacedSource(self, root=root, orientation=orientation)


class PlacedSource:
    """Random access to the records of one file.

    Raises (on opening):
      ValueError: the whole file is unusable; one line.
    """

    def __init__(self, config: PlacedConfig, *, root: str = ".", orientation: Orientation = "shown"):
        self._config = config
        self._orientation: Orientation = orientation
        self._file, self._folder = file_and_folder(root, config.file, config.root, config.name)
        self.files = [self._file]
        self._records, self._hint = json_records(self._file)

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"PlacedSource({str(self._file)!r}, {len(self)} records)"

    def __getitem__(self, index: int) -> Sample:
        """The sample of record ``index``: a picture without words, and its labels.

        Raises:
          BadSample: this record breaks a rule; the message names the sample, the file and the record.
        """
        config, where = self._config, f"{self._file}, record {index}{self._hint}"
        record = parse_line(self._records[index], where)
        if not isinstance(record, dict):
            raise BadSample("not_an_object", f"sample ? ({where}): expected an object")
        identity = identity_of(record, f"{config.name}-{index}")
        where = f"sample {identity[:80]} ({where})"
        image = self._image(record, where)
        labels, notes = labels_of(record, config.labels, where), []
        if config.boxes:
            placed, notes = self._boxes(record, image, where)
            labels[config.boxes] = placed.boxes
            if config.objects and (masks := self._masks(record, where)) is not None:
                labels[config.objects] = placed.objects(masks)
            if config.outlines:
                labels[config.outlines] = placed.outlined(config.outlines, config.boxes)
        for field in (config.classes, config.depth):
            found = self._map(record, field, image, where) if field else None
            if found is not None:
                labels[field] = found
        turn = Turn(f"{IMAGE_PLACEHOLDER}\n", "", kind=TEXT)
        return Sample(identity, (turn,), (image,), labels=labels, notes=tuple(notes))

    def _image(self, record: Mapping[str, Any], where: str) -> FileImage | Difference:
        given = record.get(self._config.image)
        names = [name for name in (given if isinstance(given, list) else [given]) if isinstance(name, str)]
        if not all(names) or not 1 <= len(names) <= 2 or (isinstance(given, list) and names != given):
            rule = meant(record, [self._config.image])
            message = f"{where}: {self._config.image} must be a path, or a list of two; {rule}"
            raise BadSample("bad_image_field", message)
        most, orientation = self._config.max_pixels, self._orientation
        images = [image_in(self._folder, name, where, most, orientation) for name in names]
        if self._config.pair != "difference":
            return images[0 if self._config.pair == "first" else -1]
        if len(images) != 2:
            message = f"{where}: pair='difference' needs two pictures, {self._config.image} names one"
            raise BadSample("bad_image_field", message)
        return Difference(images[1], images[0], where)

    def _boxes(
        self, record: Mapping[str, Any], image: FileImage | Difference, where: str
    ) -> tuple[_Placed, list[Note]]:
        """The boxes on the picture as it is read, clipped to it, and notes of those that lie outside."""
        field = self._config.boxes
        if field not in record:
            raise BadSample("missing_field", f"{where}: no field {field!r}; {meant(record, [field])}")
        found = boxes_of(record[field], where)
        size = [record.get(name) for name in ("width", "height")]
        whole_numbers = [n for n in size if isinstance(n, int) and 0 < n < 10**6]
        declared = (whole_numbers[0], whole_numbers[1]) if len(whole_numbers) == 2 else None
        frame = declared_frame(declared, frames_of([image]), where)
        placed = [Box(box.label, frame.place(box.corners)) for box in found]
        kept = [whole(Boxes((box,), frame.size)).boxes for box in placed]
        notes = list(frame.notes(where) if placed else ())
        if lost := sum(not boxes for boxes in kept):
            width, height = frame.size
            message = f"{where}: {lost} of {len(placed)} boxes lie outside the {width}x{height} picture"
            notes.append(Note("box_outside", message))
        numbers = tuple(number for number, boxes in enumerate(kept) if boxes)
        inside = Boxes(tuple(box for boxes in kept for box in boxes), frame.size)
        return _Placed(inside, numbers, record[field] or [], frame, where), notes

    def _masks(self, record: Mapping[str, Any], where: str) -> Levels | None:
        """The picture of a mask of objects; None if the record has none."""
        name = record.get(self._config.objects)
        return None if name is None else self._levels(self._config.objects, name, where)

    def _levels(self, field: str, name: Any, where: str) -> Levels:
        if not isinstance(name, str):
            raise BadSample("bad_mask_field", f"{where}: {field} must be a path, not {str(name)[:40]!r}")
        return Levels(path_in(self._folder, name, where, kind="mask"), where, self._config.max_pixels)

    def _map(
        self, record: Mapping[str, Any], field: str, image: FileImage | Difference, where: str
    ) -> PixelMap | None:
        """The label that a field names the picture of; None if the record has none."""
        config, name, size = self._config, record.get(field), image_size(image)
        if name is None:
            if field == config.classes and config.background is not None:
                return PixelMap(_Everywhere(config.background, size), size, NO_CLASS)
            return None
        levels = self._levels(field, name, where)
        if field == config.depth:
            return PixelMap(_Scaled(levels, config.depth_levels), size, NO_DEPTH)
        return PixelMap(_Classes(levels, config.void), size, NO_CLASS)


@dataclass(frozen=True)
class _Placed:
    """The boxes of a record on its picture, and what the record says of each."""

    boxes: Boxes  # those that lie in the picture
    numbers: tuple[int, ...]  # which of all these are
    given: Sequence[Mapping[str, Any]]  # all, as the record has them
    frame: DeclaredFrame
    where: str

    def objects(self, levels: Levels) -> Instances:
        """Objects whose masks are levels of a picture."""
        numbers = [self.given[i].get("instance", i + 1) for i in self.numbers]
        return Instances(self.boxes.boxes, _Objects(levels, tuple(numbers)), self.boxes.size)

    def outlined(self, key: str, field: str) -> Instances:
        """Objects whose masks are outlines.

        Args:
          key: of a box, with its outline.
          field: of the boxes, for messages.

        Raises:
          BadSample: a box has no outline, or one that cannot be read.
        """
        found = []
        for number in self.numbers:
            box, where = self.given[number], f"{self.where}: {field}[{number}]"
            if box.get(key) is None:
                raise BadSample("missing_field", f"{where} has no {key!r}; {meant(box, [key])}")
            found.append(outline(box[key], self.frame, f"{where}.{key}"))
        return Instances(self.boxes.boxes, _Outlined(tuple(found)), self.boxes.size)


@dataclass(frozen=True)
class Levels:
    """The grey levels of a picture file as they are, i[h w]."""

    path: Path
    where: str
    max_pixels: int = DEFAULT_MAX_PIXELS

    def __call__(self) -> np.ndarray:
        """Reads the file.

        Raises:
          BadSample: it is missing, too large, has colours or cannot be decoded.
        """
        return FileImage(self.path, self.where, self.max_pixels).opened(self._levels)

    def _levels(self, picture: PilImage.Image) -> np.ndarray:
        if picture.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "I;16L"):
            message = (
                f"{self.where}: {self.path} has colours ({picture.mode}), expected one number for a pixel"
            )
            raise BadSample("bad_mask", message)
        return np.asarray(picture).astype(np.int32)


@dataclass(frozen=True)
class _Classes:
    levels: Levels
    void: tuple[int, ...]

    def __call__(self) -> np.ndarray:
        found = self.levels()
        if self.void:
            found = np.where(np.isin(found, self.void), NO_CLASS, found)
        return found.astype(np.uint8)


@dataclass(frozen=True)
class _Scaled:
    levels: Levels
    scale: float

    def __call__(self) -> np.ndarray:
        return (self.levels() / self.scale).astype(np.float32)


@dataclass(frozen=True)
class _Objects:
    levels: Levels
    numbers: tuple[Any, ...]

    def __call__(self) -> np.ndarray:
        found = self.levels()
        return np.stack([found == n for n in self.numbers]) if self.numbers else np.zeros((0, 1, 1), bool)


@dataclass(frozen=True)
class _Outlined:
    outlines: tuple[Outline, ...]

    def __call__(self) -> np.ndarray:
        return np.stack([made() for made in self.outlines]) if self.outlines else np.zeros((0, 1, 1), bool)


@dataclass(frozen=True)
class _Everywhere:
    value: int
    size: tuple[int, int]

    def __call__(self) -> np.ndarray:
        return np.full(self.size[::-1], self.value, np.uint8)
