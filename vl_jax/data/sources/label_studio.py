"""Label Studio's exports as JSON and JSON-MIN: what people drew and wrote becomes turns about the picture.

    [{"id": 7, "data": {"image": "/data/upload/1/a.jpg", "question": "What is it?"},
      "annotations": [{"result": [
        {"type": "rectanglelabels", "id": "r1", "original_width": 640, "original_height": 480,
         "value": {"x": 10, "y": 20, "width": 5, "height": 5, "rectanglelabels": ["cat"]}},   what is where
        {"type": "textarea", "id": "r1", "value": {"text": ["STOP"]}},       what is written in the rectangle
        {"type": "choices", "from_name": "quality", "value": {"choices": ["good"]}}]}]}]   an answer

Places are in per cent of the picture; polygons and brushes are taken for the rectangles around them (see
``regions``). A transcript belongs to the region whose id it has; other texts and choices answer the task's
``question``, or are asked for by the name of their control. The first annotation that was not cancelled
counts; predictions and other kinds of result are passed over. JSON-MIN has the values by their controls:

    [{"id": 7, "image": "/data/upload/1/a.jpg", "label": [{"x": 10, ..., "rectanglelabels": ["cat"]}],
      "quality": "good"}]

There a text may be a label or one of the task's data: it answers if its name is among ``answers``.
"""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from vl_jax.data.files.shards import check_fields, file_and_folder
from vl_jax.data.files.spans import json_items
from vl_jax.data.images.frames import frames_of
from vl_jax.data.picture import Orientation, PictureFrame
from vl_jax.data.sample import (
    DEFAULT_MAX_PIXELS,
    IMAGE_PLACEHOLDER,
    BadSample,
    Box,
    FileImage,
    Sample,
    Turn,
    image_in,
)
from vl_jax.data.sources.coco import turns_about
from vl_jax.data.sources.conversation import REMOTE, checked_text
from vl_jax.data.sources.llava import parse_line
from vl_jax.data.sources.regions import DRAWN, read_region
from vl_jax.data.text import grounding

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

    def __post_init__(self):
        check_fields(self.name, self.file, (".json",), self.max_pixels)


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
        identity = f"{self._config.name}-{str(task.get('id', index))[:80]}"
        where = f"sample {identity} ({where})"
        image = self._image(data, where)
        results = list(self._minimal(task, image)) if minimal else _results(task, where)
        question = data.get("question")
        question = checked_text(question, where) if question is not None else ""
        drawn = [result for result in results if result.get("type") in DRAWN]
        frames = frames_of([image] if drawn else [])
        turns = [*_boxes_and_texts(results, where, frames), *_answers(results, question, where)]
        if not turns:
            raise BadSample("no_labels", f"{where}: no region, choice or text that could be asked for")
        if any(IMAGE_PLACEHOLDER in text for turn in turns for text in (turn.question, turn.answer)):
            raise BadSample("placeholder_mismatch", f"{where}: {IMAGE_PLACEHOLDER} in a text")
        first = turns[0]
        turns[0] = Turn(
            f"{IMAGE_PLACEHOLDER}\n{first.question}", first.answer, first.kind, first.language, first.boxes
        )
        notes = dict.fromkeys(n for result in drawn for n in read_region(result, where, frames).notes)
        return Sample(identity, tuple(turns), (image,), notes=tuple(notes))

    def _minimal(self, task: dict[str, Any], image: FileImage) -> Iterator[dict[str, Any]]:
        """The results of a task of JSON-MIN, as they are in JSON."""
        for control, value in task.items():
            plain = [value] if isinstance(value, str) else value
            if control in self._config.answers and isinstance(plain, list) and _are_texts(plain):
                yield {"type": "choices", "from_name": control, "value": {"choices": plain}}
                continue
            for number, item in enumerate(value if isinstance(value, list) else [value]):
                if not isinstance(item, dict):
                    continue
                kind = _kind(item)
                result = {"type": kind, "id": f"{control}/{number}", "from_name": control, "value": item}
                if kind in DRAWN:
                    sides = zip(("original_width", "original_height"), image.size(), strict=True)
                    result |= {name: item.get(name, side) for name, side in sides}
                yield result

    def _image(self, data: dict[str, Any], where: str) -> FileImage:
        name = data.get(self._config.image)
        if not isinstance(name, str) or name.partition(":")[0] in REMOTE:
            message = f"{where}: data.{self._config.image} must be a path, not {str(name)[:40]!r}"
            raise BadSample("bad_image_field", message)
        for start in _OWN_PATHS:
            if name.startswith(start):
                name = urllib.parse.unquote(name.removeprefix(start))
                break
        limit, orientation = self._config.max_pixels, self._orientation
        found = image_in(self._folder, name, where, limit, orientation)
        if os.path.isfile(found.path):  # raises nothing, even for a name that is too long
            return found
        # Exports with pictures have them side by side.
        return image_in(self._folder, name.rpartition("/")[2], where, limit, orientation)


def _results(task: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """What the first annotation that counts consists of."""
    annotations = task.get("annotations")
    if not isinstance(annotations, list):
        raise BadSample("bad_record", f"{where}: needs annotations beside its data")
    for annotation in annotations:
        results = annotation.get("result") if isinstance(annotation, dict) else None
        if isinstance(results, list) and results and not annotation.get("was_cancelled"):
            return [r for r in results if isinstance(r, dict) and isinstance(r.get("value"), dict)]
    raise BadSample("no_labels", f"{where}: nobody has labelled it")


def _are_texts(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(item, str) for item in value)


def _kind(value: dict[str, Any]) -> str:
    """The type of a result that does not say it; empty for those that are passed over."""
    if "points" in value:
        return "polygonlabels"
    if "rle" in value:
        return "brushlabels"
    if {"x", "y", "width", "height"} <= value.keys():
        return "rectanglelabels"
    return "choices" if "choices" in value else "textarea" if "text" in value else ""


def _boxes_and_texts(
    results: list[dict[str, Any]], where: str, frames: Sequence[PictureFrame] = ()
) -> list[Turn]:
    """What is on the picture and where, and what is written where; for ``frames`` see ``read_region``."""
    regions = {str(r.get("id")): read_region(r, where, frames) for r in results if r.get("type") in DRAWN}
    written: dict[str, Turn] = {}
    for result in results:
        identity = str(result.get("id"))
        if result.get("type") == "textarea" and identity in regions:
            region = regions[identity]
            box = Box("text", region.corners)
            place = grounding.write_boxes([box], width=region.width, height=region.height)
            question = f"What is written at {place[place.index('<|det|>') :]}?"
            written[identity] = Turn(question, _words(result, where), "ocr", "", (box,))
    turns = []
    located = [region for identity, region in regions.items() if identity not in written]
    boxes = [Box(label, region.corners) for region in located for label in region.labels]
    if boxes:
        turns += turns_about(boxes, located[0].width, located[0].height)
    if len(written) > 1:
        whole = "\n".join(turn.answer for turn in written.values())
        turns.append(Turn("What is written in the picture?", whole, "ocr"))
    return [*turns, *written.values()]


def _answers(results: list[dict[str, Any]], question: str, where: str) -> list[Turn]:
    """Choices and texts about the whole picture."""
    places = {str(r.get("id")) for r in results if r.get("type") in DRAWN}
    turns = []
    for result in results:
        kind, name = result.get("type"), str(result.get("from_name", ""))[:80].replace("_", " ").strip()
        if kind not in ("choices", "textarea") or str(result.get("id")) in places:
            continue
        asked = question or f"What is the {name or 'answer'}?"
        turns.append(Turn(checked_text(asked, where), _words(result, where), "open"))
    return turns


def _words(result: dict[str, Any], where: str) -> str:
    """The text of a transcript, or the choices."""
    value = result["value"]
    found = value.get("choices", value.get("text"))
    found = found if isinstance(found, list) else [found]
    text = (", " if "choices" in value else "\n").join(checked_text(item, where) for item in found)
    if not text.strip():
        raise BadSample("bad_conversation", f"{where}: an empty text or choice")
    return text
