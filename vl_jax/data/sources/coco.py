"""COCO detection files: every picture becomes a conversation about what is on it, and where.

    {"images": [{"id", "file_name", "width", "height"}], "categories": [{"id", "name"}],
     "annotations": [{"image_id", "category_id", "bbox": [x, y, width, height], "iscrowd"}]}

Turns: one that asks for the kinds of object, and one for each kind that asks where they are. Crowds are left
out, as they have no box of their own. Entries stay in the file: where they are is kept for the next time.
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
from vl_jax.data.sample import DEFAULT_MAX_PIXELS, IMAGE_PLACEHOLDER, BadSample, Box, Sample, Turn, image_in
from vl_jax.data.sources.llava import parse_line
from vl_jax.data.text import grounding

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
        self._index = found = keep("coco-1", self.files, make, sound)
        self._pictures, categories, self._annotations = (
            Spans(data, *found[name].reshape(-1, 2).T) for name in _LISTS
        )
        entries = [_entry(categories[i], f"{self._file}, categories[{i}]") for i in range(len(categories))]
        self._names = {_key(c.get("id")): str(c.get("name")) for c in entries}

    def __len__(self) -> int:
        return len(self._pictures)

    def __repr__(self) -> str:
        return f"CocoSource({str(self._file)!r}, {len(self)} pictures)"

    def __getitem__(self, index: int) -> Sample:
        """The conversation about picture ``index``.

        Raises:
          BadSample: the picture has no box, or an entry breaks a rule.
        """
        where = f"{self._file}, images[{index}]"
        entry = _entry(self._pictures[index], where)
        where = f"sample {str(entry.get('id'))[:80]} ({where})"
        name, size = entry.get("file_name"), (entry.get("width"), entry.get("height"))
        if not isinstance(name, str) or not all(isinstance(n, int) and 0 < n < 10**6 for n in size):
            raise BadSample("bad_image_field", f"{where}: needs file_name, width and height")
        image = image_in(self._folder, name, where, self._config.max_pixels, self._orientation)
        frame = declared_frame((int(size[0] or 0), int(size[1] or 0)), frames_of([image]), where)
        boxes = [self._box(a, frame, where) for a in self._annotations_of(index, entry, where)]
        if not boxes:
            raise BadSample("no_boxes", f"{where}: no annotation of it has a box")
        first, *others = turns_about(boxes, *frame.size)
        first = dataclasses.replace(first, question=f"{IMAGE_PLACEHOLDER}\n{first.question}")
        identity = f"{self._config.name}-{entry.get('id')}"
        return Sample(identity, (first, *others), (image,), notes=frame.notes(where))

    def _annotations_of(self, index: int, entry: dict[str, Any], where: str) -> list[dict[str, Any]]:
        of = self._index
        numbers = of["order"][of["begins"][index] : of["ends"][index]].tolist()
        found = [_entry(self._annotations[number], where) for number in numbers]
        # The index goes by hashes of ids, which may be the same by chance.
        return [a for a in found if _key(a.get("image_id")) == _key(entry.get("id"))]

    def _box(self, annotation: dict[str, Any], frame: DeclaredFrame, where: str) -> Box:
        width, height = frame.declared
        label = self._names.get(_key(annotation.get("category_id")))
        found = annotation.get("bbox")
        numbers = found if isinstance(found, list) and all(type(v) in (int, float) for v in found) else []
        if label is None or len(numbers) != 4 or not all(abs(v) < 1e6 for v in numbers):  # NaN is not less
            raise BadSample("bad_box", f"{where}: an annotation needs a known category and four numbers")
        x, y, w, h = (float(v) for v in numbers)
        corners = (max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height)))
        if corners[0] >= corners[2] or corners[1] >= corners[3]:
            raise BadSample("bad_box", f"{where}: bbox {numbers} has no area in {width}x{height}")
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
            boxes.append(not entry.get("iscrowd"))

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
    return {**places, "order": order, "begins": begins, "ends": ends}


def _is_sound(size: int, arrays: Arrays) -> bool:
    """Whether an index points into a file of that many bytes, and nowhere else."""
    order, begins, ends = (arrays[name] for name in ("order", "begins", "ends"))
    return bool(
        all(spans_lie_in(size, *arrays[name].reshape(-1, 2).T) for name in _LISTS)
        and len(begins) == len(ends) == len(arrays["images"]) // 2
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
    """Numbers and texts name the same thing, and what is neither names nothing."""
    return str(identity)
