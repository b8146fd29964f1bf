"""Label Studio's exports as JSON and JSON-MIN: what people drew and wrote becomes turns about the picture.

    [{"id": 7, "data": {"image": "/data/upload/1/a.jpg", "question": "What is it?"},
      "annotations": [{"result": [
        {"type": "rectanglelabels", "id": "r1", "original_width": 640, "original_height": 480,
         "value": {"x": 10, "y": 20, "width": 5, "height": 5, "rectanglelabels": ["cat"]}},   what is where
        {"type": "textarea", "id": "r1", "value": {"text": ["STOP"]}},       what is written in the rectangle
        {"type": "choices", "from_name": "quality", "value": {"choices": ["good"]}}]}]}]   an answer

Places are in per cent of the picture; polygons, ellipses and brushes are taken for the rectangles around them
(see ``regions``). Results that belong together are put together (see ``annotated``); texts and choices about
the whole picture answer the task's ``question``, or are asked for by the name of their control. The first
annotation that is called the truth counts, else the first that was not cancelled. A note says what is not
read: other annotations, regions of another picture of the task, and results of kinds that are not known.

JSON-MIN has the values by their controls:

    [{"id": 7, "image": "/data/upload/1/a.jpg", "label": [{"x": 10, ..., "rectanglelabels": ["cat"]}],
      "quality": "good"}]

There a text may be a label or one of the task's data: it answers if its name is among ``answers``.
"""

from __future__ import annotations

import dataclasses
import os
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vl_jax.data.files.shards import check_fields, file_and_folder
from vl_jax.data.files.spans import json_items
from vl_jax.data.images.frames import frames_of
from vl_jax.data.picture import Orientation
from vl_jax.data.sample import (
    DEFAULT_MAX_PIXELS,
    IMAGE_PLACEHOLDER,
    REMOTE,
    BadSample,
    FileImage,
    Note,
    Sample,
    image_in,
    in_one_line,
)
from vl_jax.data.sources.keys import meant
from vl_jax.data.sources.label_studio.annotated import annotated
from vl_jax.data.sources.label_studio.regions import DRAWN
from vl_jax.data.sources.llava import parse_line
from vl_jax.data.sources.messages import checked_text

_TASK = ("data", "annotations")
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_UPLOADED = "/data/upload/", "upload/"
_OWN_PATHS = "/data/local-files/?d=", "/data/"  # what Label Studio writes before a file's place


@dataclass(frozen=True)
class LabelStudioConfig:
    """An export as JSON or JSON-MIN, and the folder of its pictures relative to the data root."""

    name: str
    file: str
    root: str = ""  # empty means the folder of ``file``
    image: str = "image"  # the picture's name in the data of a task
    answers: tuple[str, ...] = ()  # of JSON-MIN, the controls of choices and texts
    max_pixels: int = DEFAULT_MAX_PIXELS
    to_name: str = ""  # how the labelling setup calls the picture; needed where a task has several

    def __post_init__(self):
        check_fields(self.name, self.file, (".json",), self.max_pixels)

    def open(self, root: str, *, orientation: Orientation = "shown") -> LabelStudioSource:
        """The source; files are relative to ``root``."""
        return LabelStudioSource(self, root=root, orientation=orientation)


class LabelStudioSource:
    """Random access to the tasks of an export.

    Raises (on opening):
      ValueError: the whole file is unusable; one line with the file and the position.
    """

    def __init__(self, config: LabelStudioConfig, *, root: str = ".", orientation: Orientation = "shown"):
        self._config = config
        self._orientation: Orientation = orientation
        self._file, self._folder = file_and_folder(root, config.file, config.root, config.name)
        self.files = [self._file]
        self._tasks = json_items(self._file)

    def __len__(self) -> int:
        return len(self._tasks)

    def __repr__(self) -> str:
        return f"LabelStudioSource({str(self._file)!r}, {len(self)} tasks)"

    def __getitem__(self, index: int) -> Sample:
        """The conversation about the picture of task ``index``.

        Raises:
          BadSample: the task breaks a rule, or nobody has labelled it.
        """
        where = f"{self._file}, task {index}"
        task = parse_line(self._tasks[index], where)
        minimal = isinstance(task, dict) and not {"data", "annotations"} & task.keys()
        data = task if minimal else task.get("data") if isinstance(task, dict) else None
        if not isinstance(data, dict):
            raise BadSample("not_an_object", f"sample ? ({where}): expected a task with data")
        identity = in_one_line(f"{self._config.name}-{str(task.get('id', index))[:80]}")
        where = f"sample {identity} ({where})"
        image = self._image(data, where)
        notes: list[Note] = []
        results = list(self._minimal(task, image)) if minimal else _chosen(task, where, notes)
        results = _of_picture(results, data, self._config, where, notes)
        question = data.get("question")
        question = checked_text(question, where) if question is not None else ""
        if IMAGE_PLACEHOLDER in question:
            raise BadSample("placeholder_mismatch", f"{where}: {IMAGE_PLACEHOLDER} in the question")
        found = annotated(results, question, where, frames_of([image]))
        notes += found.notes
        if not found.turns:
            if notes:  # What was left out is why there is nothing.
                raise BadSample(notes[0].reason, notes[0].message)
            raise BadSample("no_labels", f"{where}: no region, choice or text that could be asked for")
        first, *others = found.turns
        first = dataclasses.replace(first, question=f"{IMAGE_PLACEHOLDER}\n{first.question}")
        return Sample(identity, (first, *others), (image,), notes=tuple(notes))

    def _minimal(self, task: dict[str, Any], image: FileImage) -> Iterator[dict[str, Any]]:
        """The results of a task of JSON-MIN, as they are in JSON."""
        for control, value in task.items():
            plain = [value] if isinstance(value, str) else value
            if control in self._config.answers and isinstance(plain, list) and _are_texts(plain):
                yield {"type": "choices", "from_name": control, "value": {"choices": plain}}
                continue
            for item in value if isinstance(value, list) else [value]:
                if not isinstance(item, dict):
                    continue
                kind = _kind(item)
                result = {"type": kind, "from_name": control, "value": item}
                if kind in DRAWN or kind == "labels":
                    sides = zip(("original_width", "original_height"), image.size(), strict=True)
                    result |= {name: item.get(name, side) for name, side in sides}
                if kind:
                    yield result

    def _image(self, data: dict[str, Any], where: str) -> FileImage:
        name = data.get(self._config.image)
        if isinstance(name, list) and len(name) == 1:  # a list of pages
            name = name[0]
        if not isinstance(name, str) or name.partition(":")[0] in REMOTE:
            message = f"{where}: data.{self._config.image} must be a path, not {str(name)[:40]!r}"
            rule = "nothing is fetched, save it as a file"
            rule = rule if isinstance(name, str) else meant(data, (self._config.image,))
            raise BadSample("bad_image_field", f"{message}; {rule}")
        uploaded = name.startswith(_UPLOADED)
        for start in _OWN_PATHS:
            if name.startswith(start):
                name = urllib.parse.unquote(name.removeprefix(start))
                break
        limit, orientation = self._config.max_pixels, self._orientation
        found = image_in(self._folder, name, where, limit, orientation)
        if not uploaded or os.path.isfile(found.path):
            return found
        # Exports with pictures have what was uploaded side by side.
        return image_in(self._folder, name.rpartition("/")[2], where, limit, orientation)


def _chosen(task: dict[str, Any], where: str, notes: list[Note]) -> list[Any]:
    """What the annotation that counts consists of; the others are noted."""
    annotations = task.get("annotations")
    if not isinstance(annotations, list):
        raise BadSample("bad_record", f"{where}: needs annotations beside its data; {meant(task, _TASK)}")
    usable, cancelled = [], 0
    for annotation in annotations:
        results = annotation.get("result") if isinstance(annotation, dict) else None
        if isinstance(results, list) and results:
            cancelled += bool(annotation.get("was_cancelled"))
            usable += [] if annotation.get("was_cancelled") else [annotation]
    if not usable:
        beside = " that was not cancelled" if cancelled else ""
        raise BadSample("no_labels", f"{where}: nobody has labelled it, there is no annotation{beside}")
    chosen = next((a for a in usable if a.get("ground_truth")), usable[0])
    if len(usable) > 1:
        rule = "the first, or the one marked as ground truth, counts"
        message = f"{where}: {len(usable) - 1} of {len(usable)} annotations are not read: {rule}"
        notes.append(Note("annotation_not_read", message))
    if cancelled:
        message = f"{where}: {cancelled} annotations that were cancelled are not read"
        notes.append(Note("annotation_cancelled", message))
    return chosen["result"]


def _of_picture(
    results: Sequence[Any], data: dict[str, Any], config: LabelStudioConfig, where: str, notes: list[Note]
) -> list[Any]:
    """The results about the config's picture; those about other pictures of the task are noted."""
    drawn = {_name(r) for r in results if isinstance(r, dict) and str(r.get("type")) in DRAWN} - {""}
    others = {key for key, value in data.items() if key != config.image and _is_picture(value)}
    if config.to_name:
        own = {config.to_name}
    elif config.image in drawn or not drawn or not (others or len(drawn) > 1):
        own = {config.image} if config.image in drawn else drawn
    else:  # Pictures whose tags are called as their data tell which they are.
        own = {config.image} if drawn <= others else set()
    foreign = (drawn | others) - own
    rule = f"of another picture than data.{config.image}"
    if drawn and not own:
        tags = ", ".join(sorted(drawn))
        rule = f"one of several ({tags[:80]}): name that of data.{config.image} as to_name of the source"
    kept = []
    for number, result in enumerate(results):
        name, page = (_name(result), result.get("item_index")) if isinstance(result, dict) else ("", None)
        placed = isinstance(result, dict) and isinstance(result.get("type"), str) and result["type"] in DRAWN
        unnamed = placed and not name and (others or config.to_name)
        if name in foreign or unnamed or page not in (None, 0):
            message = f"{where}, result {number}: to_name {name[:40]!r} is {rule}"
            if page not in (None, 0):
                page = str(page)[:40]
                message = f"{where}, result {number}: page {page} of a picture, of which the first is read"
            notes.append(Note("other_picture", message))
        else:
            kept.append(result)
    return kept


def _name(result: dict[str, Any]) -> str:
    """What a result calls the tag it is about."""
    name = result.get("to_name")
    return name if isinstance(name, str) else ""


def _is_picture(value: Any) -> bool:
    """Whether a value of a task's data names a picture."""
    return isinstance(value, str) and value.partition("?")[0].lower().endswith(_PICTURES)


def _are_texts(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(item, str) for item in value)


def _kind(value: dict[str, Any]) -> str:
    """The type of a result that does not say it; empty for those that are passed over."""
    for kind in ("choices", "taxonomy", "labels"):
        if kind in value:
            return kind
    if "text" in value and "start" not in value:
        return "textarea"
    if "points" in value:
        return "polygonlabels"
    if "rle" in value:
        return "brushlabels"
    if {"x", "y", "radiusX", "radiusY"} <= value.keys():
        return "ellipselabels"
    return "rectanglelabels" if {"x", "y", "width", "height"} <= value.keys() else ""
