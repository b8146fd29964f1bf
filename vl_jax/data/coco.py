"""COCO detection files: every picture becomes a conversation about what is on it, and where.

    {"images": [{"id", "file_name", "width", "height"}], "categories": [{"id", "name"}],
     "annotations": [{"image_id", "category_id", "bbox": [x, y, width, height], "iscrowd"}]}

Turns: one that asks for the kinds of object, and one for each kind that asks where they are. Crowds are left
out, as they have no box of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vl_jax.data import grounding
from vl_jax.data.llava import read_json
from vl_jax.data.sample import (
    DEFAULT_MAX_PIXELS,
    IMAGE_PLACEHOLDER,
    BadSample,
    Box,
    Sample,
    Turn,
    image_in,
)
from vl_jax.data.shards import check_fields, file_and_folder


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

    def __init__(self, config: CocoConfig, *, root: str = "."):
        self._config = config
        self._file, self._folder = file_and_folder(root, config.file, config.root, config.name)
        self.files = [self._file]
        whole = read_json(self._file)
        self._pictures = _entries(whole, "images", self._file)
        categories = _entries(whole, "categories", self._file)
        self._names = {_key(c.get("id")): str(c.get("name")) for c in categories}
        self._boxes: dict[str, list[dict[str, Any]]] = {}
        for annotation in _entries(whole, "annotations", self._file):
            if not annotation.get("iscrowd"):
                self._boxes.setdefault(_key(annotation.get("image_id")), []).append(annotation)

    def __len__(self) -> int:
        return len(self._pictures)

    def __repr__(self) -> str:
        return f"CocoSource({str(self._file)!r}, {len(self)} pictures)"

    def __getitem__(self, index: int) -> Sample:
        """The conversation about picture ``index``.

        Raises:
          BadSample: the picture has no box, or an entry breaks a rule.
        """
        entry = self._pictures[index]
        where = f"sample {str(entry.get('id'))[:80]} ({self._file}, images[{index}])"
        name, size = entry.get("file_name"), (entry.get("width"), entry.get("height"))
        if not isinstance(name, str) or not all(isinstance(n, int) and 0 < n < 10**6 for n in size):
            raise BadSample("bad_image_field", f"{where}: needs file_name, width and height")
        width, height = int(size[0] or 0), int(size[1] or 0)
        annotations = self._boxes.get(_key(entry.get("id")), [])
        boxes = [self._box(a, width, height, where) for a in annotations]
        if not boxes:
            raise BadSample("no_boxes", f"{where}: no annotation of it has a box")
        first, *others = turns_about(boxes, width, height)
        first = dataclasses.replace(first, question=f"{IMAGE_PLACEHOLDER}\n{first.question}")
        image = image_in(self._folder, name, where, self._config.max_pixels)
        return Sample(f"{self._config.name}-{entry['id']}", (first, *others), (image,))

    def _box(self, annotation: dict[str, Any], width: int, height: int, where: str) -> Box:
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
        return Box(label, corners)


def turns_about(boxes: Sequence[Box], width: int, height: int) -> list[Turn]:
    """Which kinds of object are on a picture of that size, and where those of each kind are."""
    kinds = list(dict.fromkeys(box.label for box in boxes))
    turns = [Turn("Which kinds of object are visible?", ", ".join(kinds), "open", "en")]
    for kind in kinds:
        own = tuple(box for box in boxes if box.label == kind)
        answer = grounding.write_boxes(own, width=width, height=height)
        turns.append(Turn(f"Locate every {kind}.", answer, "grounding", "en", own))
    return turns


def _entries(whole: Any, key: str, file: Path) -> list[dict[str, Any]]:
    found = whole.get(key) if isinstance(whole, dict) else None
    if not isinstance(found, list):
        raise ValueError(f"{file}: expected a list under {key!r}")
    for index, entry in enumerate(found):
        if not isinstance(entry, dict):
            raise ValueError(f"{file}: {key}[{index}] must be an object")
    return found


def _key(identity: Any) -> str:
    """Numbers and texts name the same thing, and what is neither names nothing."""
    return str(identity)
