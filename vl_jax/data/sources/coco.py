"""COCO detection files: every picture becomes a conversation about what is on it, and where.

    {"images": [{"id", "file_name", "width", "height"}], "categories": [{"id", "name"}],
     "annotations": [{"image_id", "category_id", "bbox": [x, y, width, height], "iscrowd"}]}

Turns: one that asks for the kinds of object, and one for each kind that asks where they are. Crowds are left
out, as they have no box of their own. Numbers may be written as texts. An annotation that cannot be read is
noted, and the others of its picture are kept; those of pictures that are not there are counted by ``inspect
data``. Entries stay in the file: where they are is kept for the next time.
"""

from __future__ import annotations

import dataclasses
import functools
import mmap
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vl_jax.data.files.index_cache import Arrays, Done, keep
from vl_jax.data.files.json_reader import JsonReader
from vl_jax.data.files.shards import check_fields, file_and_folder
from vl_jax.data.files.spans import Spans, map_file, read_places, spans_lie_in
from vl_jax.data.images.frames import DeclaredFrame, declared_frame, frames_of
from vl_jax.data.picture import Orientation
from vl_jax.data.sample import (
    DEFAULT_MAX_PIXELS,
    IMAGE_PLACEHOLDER,
    BadSample,
    Box,
    Note,
    Sample,
    Strays,
    Turn,
    image_in,
    in_one_line,
)
from vl_jax.data.sources.keys import meant, number
from vl_jax.data.sources.llava import parse_line
from vl_jax.data.text import grounding

_EXAMPLES = 3  # of annotations that belong to no picture
_LISTS = ("images", "categories", "annotations")


@dataclass(frozen=True)
class CocoConfig:
    """An annotation file, and the folder of its pictures relative to the data root."""

    name: str
    file: str
    root: str = ""  # empty means the folder of ``file``
    max_pixels: int = DEFAULT_MAX_PIXELS

    def __post_init__(self):
        check_fields(self.name, self.file, (".json",), self.max_pixels)

    def open(self, root: str, *, orientation: Orientation = "shown") -> CocoSource:
        """The source; files are relative to ``root``."""
        return CocoSource(self, root=root, orientation=orientation)


class CocoSource:
    """Random access to the pictures of an annotation file.

    Raises (on opening):
      ValueError: the file is unusable, or an entry is not what it must be; one line with the position.
    """

    def __init__(self, config: CocoConfig, *, root: str = ".", orientation: Orientation = "shown"):
        self._config = config
        self._orientation: Orientation = orientation
        self._file, self._folder = file_and_folder(root, config.file, config.root, config.name)
        self.files = [self._file]
        data = map_file(self._file)
        make, sound = functools.partial(_index, self._file, data), functools.partial(_is_sound, len(data))
        self._index = found = keep("coco-2", self.files, make, sound)
        self._pictures, categories, self._annotations = (
            Spans(data, *found[name].reshape(-1, 2).T) for name in _LISTS
        )
        entries = [_entry(categories[i], f"{self._file}, categories[{i}]") for i in range(len(categories))]
        self._names: dict[str, str | None] = {}  # None where two categories have one id
        for entry in entries:
            key, name = _key(entry.get("id")), entry.get("name")
            name = str(name) if isinstance(name, str | int) and str(name).strip() else None
            self._names[key] = name if self._names.get(key, name) == name else None

    def __len__(self) -> int:
        return len(self._pictures)

    @property
    def strays(self) -> tuple[Strays, ...]:
        """The annotations with a box whose ``image_id`` no picture has."""
        of = self._index
        opened = np.zeros(len(of["order"]) + 1, np.int64)
        np.add.at(opened, of["begins"], 1)
        np.add.at(opened, of["ends"], -1)
        places = np.sort(of["order"][np.cumsum(opened)[:-1] == 0])
        examples = []
        for place in places[:_EXAMPLES].tolist():
            where = f"{self._file}, annotations[{place}]"
            identity = _entry(self._annotations[place], where).get("image_id")
            examples.append(in_one_line(f"{where}: image_id={str(identity)[:40]!r} is of no picture"))
        return (Strays("unknown_image_id", len(places), tuple(examples)),) if len(places) else ()

    def __repr__(self) -> str:
        return f"CocoSource({str(self._file)!r}, {len(self)} pictures)"

    def __getitem__(self, index: int) -> Sample:
        """The conversation about picture ``index``.

        Raises:
          BadSample: the picture has no box, or an entry breaks a rule.
        """
        where = f"{self._file}, images[{index}]"
        entry = _entry(self._pictures[index], where)
        identity = in_one_line(str(entry.get("id"))[:80])
        where = f"sample {identity} ({where})"
        name, size = entry.get("file_name"), (number(entry.get("width")), number(entry.get("height")))
        if not isinstance(name, str) or not all(n and n > 0 and n == int(n) for n in size):
            found = meant(entry, ("file_name", "width", "height"), ("file", "path", "filename"))
            message = f"{where}: needs file_name, and width and height as whole numbers above 0; {found}"
            raise BadSample("bad_image_field", message)
        if self._index["shared"][index]:
            message = f"{where}: another picture has the same id: whose the annotations are cannot be told"
            raise BadSample("id_twice", message)
        image = image_in(self._folder, name, where, self._config.max_pixels, self._orientation)
        frame = declared_frame((int(size[0] or 0), int(size[1] or 0)), frames_of([image]), where)
        boxes, notes = self._boxes(index, entry, frame, where)
        if not boxes and notes:
            raise BadSample(notes[0].reason, notes[0].message)
        if not boxes:
            raise BadSample("no_boxes", f"{where}: no annotation of it has a box")
        first, *others = turns_about(boxes, *frame.size)
        first = dataclasses.replace(first, question=f"{IMAGE_PLACEHOLDER}\n{first.question}")
        notes += frame.notes(where)
        return Sample(f"{self._config.name}-{identity}", (first, *others), (image,), notes=tuple(notes))

    def _boxes(
        self, index: int, entry: dict[str, Any], frame: DeclaredFrame, where: str
    ) -> tuple[list[Box], list[Note]]:
        """The boxes of a picture, and which of its annotations cannot be read."""
        of = self._index
        boxes, notes = [], []
        for place in of["order"][of["begins"][index] : of["ends"][index]].tolist():
            try:
                annotation = _entry(self._annotations[place], where)
                # The index goes by hashes of ids, which may be the same by chance.
                if _key(annotation.get("image_id")) == _key(entry.get("id")):
                    boxes.append(self._box(annotation, frame, f"{where}, annotations[{place}]"))
            except BadSample as error:
                notes.append(Note(error.reason, str(error).removesuffix(f" [{error.reason}]")))
        return boxes, notes

    def _box(self, annotation: dict[str, Any], frame: DeclaredFrame, where: str) -> Box:
        width, height = frame.declared
        category = annotation.get("category_id")
        label, found = self._names.get(_key(category)), annotation.get("bbox")
        numbers = [number(value) for value in found] if isinstance(found, list) and len(found) == 4 else []
        x, y, w, h = numbers or [None] * 4
        if label is None:
            rule = f"category_id={str(category)[:40]!r} is of no category, or of two with different names"
            raise BadSample("unknown_category", f"{where}: {rule}")
        if x is None or y is None or w is None or h is None:
            rule = f"bbox={str(found)[:80]} must be four finite numbers: x, y, width, height"
            raise BadSample("bad_box", f"{where}: {rule}")
        corners = (max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height)))
        if corners[0] >= corners[2] or corners[1] >= corners[3]:
            raise BadSample("bad_box", f"{where}: bbox {numbers} has no area in its {width}x{height} picture")
        if any(mark in label for mark in grounding.SPECIAL):
            raise BadSample("bad_box", f"{where}: category {label[:80]!r} holds a special mark")
        return Box(label, frame.place(corners))


def turns_about(boxes: Sequence[Box], width: int, height: int) -> list[Turn]:
    """Which kinds of object are on a picture of that size, and where those of each kind are."""
    kinds = list(dict.fromkeys(box.label for box in boxes))
    turns = [Turn("Which kinds of object are visible?", ", ".join(kinds), "open", "en")]
    for kind in kinds:
        own = tuple(box for box in boxes if box.label == kind)
        answer = grounding.write_boxes(own, width=width, height=height)
        turns.append(Turn(f"Locate every {kind}.", answer, "grounding", "en", own))
    return turns


def _index(file: Path, data: mmap.mmap | bytes, done: Done) -> Arrays:
    """Where all entries are, and which annotations belong to which picture.

    Returns:
      images, categories, annotations: i64[2n] where each entry begins and stops, by turns.
      order: i64[m] annotations with a box; those of picture i are order[begins[i] : ends[i]].
      begins, ends: i64[n].
      shared: u8[n] whether another picture has the same id.

    Raises:
      ValueError: the file is no JSON object with these lists of objects.
    """
    reader = JsonReader(file, data)
    places: Arrays = {}
    pictures, owners = array("q"), array("q")  # hashes of the ids of pictures, and of those of annotations
    boxes = array("b")  # whether an annotation has one

    def look(entry: Any) -> None:
        if not isinstance(entry, dict):
            raise ValueError(f"{file}: the entry of {key!r} up to byte {reader.position} must be an object")
        if key == "images":
            pictures.append(hash(_key(entry.get("id"))))
        elif key == "annotations":
            owners.append(hash(_key(entry.get("image_id"))))
            boxes.append(not _is_true(entry.get("iscrowd")))

    if reader.peek() != "{":
        reader.value()
    else:
        for key in reader.fields():
            if key in places:
                raise ValueError(f"{file}: a second {key!r} at byte {reader.position}")
            if key in _LISTS and reader.peek() == "[":
                places[key] = read_places(reader, done, look)
            else:
                reader.value()
    reader.end()
    if missing := [name for name in _LISTS if name not in places]:
        raise ValueError(f"{file}: expected a list under {missing[0]!r}")
    owner, wanted = np.array(owners, np.int64), np.array(pictures, np.int64)
    order = np.flatnonzero(np.array(boxes, np.bool_))
    order = order[np.argsort(owner[order], kind="stable")]
    begins, ends = (np.searchsorted(owner[order], wanted, side) for side in ("left", "right"))
    _, which, times = np.unique(wanted, return_inverse=True, return_counts=True)
    shared = (times[which] > 1).astype(np.uint8)
    return {**places, "order": order, "begins": begins, "ends": ends, "shared": shared}


def _is_sound(size: int, arrays: Arrays) -> bool:
    """Whether an index points into a file of that many bytes, and nowhere else."""
    order, begins, ends = (arrays[name] for name in ("order", "begins", "ends"))
    return bool(
        all(spans_lie_in(size, *arrays[name].reshape(-1, 2).T) for name in _LISTS)
        and len(begins) == len(ends) == len(arrays["shared"]) == len(arrays["images"]) // 2
        and ((0 <= begins) & (begins <= ends) & (ends <= len(order))).all()
        and ((0 <= order) & (order < len(arrays["annotations"]) // 2)).all()
    )


def _entry(text: bytes, where: str) -> dict[str, Any]:
    """An entry, which was an object when the index was made.

    Raises:
      BadSample: it is none now, as the file was changed meanwhile.
    """
    found = parse_line(text, where)
    if not isinstance(found, dict):
        raise BadSample("not_an_object", f"sample ? ({where}): expected an object")
    return found


def _key(identity: Any) -> str:
    """Numbers and texts name the same thing, 7.0 and "7" too, and what is neither names nothing."""
    if isinstance(identity, float) and identity.is_integer():
        return str(int(identity))
    text = str(identity)
    return text.removesuffix(".0") if text.removesuffix(".0").isdecimal() else text


def _is_true(value: Any) -> bool:
    """Whether a flag is set; as a text it may be a number or a word."""
    if isinstance(value, str):
        return value.strip().lower() not in ("", "0", "0.0", "false", "no", "none", "null")
    return bool(value)
