"""RefCOCO, RefCOCO+ and RefCOCOg: which object a phrase means, as a box.

The authors distribute pickles, which are not read. Two published forms of the same splits are:

    refcoco_val.jsonl, refcoco+_testA.jsonl, refcocog_test.jsonl ...      of Qwen-VL and InternVL
        {"image": "data/coco/train2014/COCO_train2014_000000000042.jpg", "sent", "bbox": [x0, y0, x1, y1],
         "height", "width"}, one a line
    finetune_refcoco_val.json, finetune_refcoco+_testA.json ...           of MDETR
        {"images": [{"id", "file_name", "caption", "height", "width"}],
         "annotations": [{"image_id", "bbox": [x, y, width, height]}]}, one "image" for each phrase

A picture is looked for at its path in the folder, then by its name in ``train2014/`` and ``images/``. The
split is the end of the file's name, such as ``refcoco_val``. Source: Yu et al., "Modeling Context in
Referring Expressions", 2016; Kamath et al., "MDETR", 2021; Bai et al., "Qwen-VL", 2023.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from vl_jax.data.sources.exams.folder import ExamEntry, ExamFolder, field_of, text_of


def read(folder: ExamFolder, split: str) -> Iterator[ExamEntry]:
    """The phrases of a split, such as ``refcoco_val``; with none named, those of the only file."""
    file = folder.find(split, "{split}.jsonl", "finetune_{split}.json")
    return _lines(folder, file) if file.suffix == ".jsonl" else _captions(folder, file)


def _lines(folder: ExamFolder, file: Path) -> Iterator[ExamEntry]:
    for number, (where, item) in enumerate(folder.json_lines(file)):
        yield _entry(folder, where, str(number), item, ("image", "sent"), _corners(where, item))


def _captions(folder: ExamFolder, file: Path) -> Iterator[ExamEntry]:
    boxes: dict[str, tuple[float, ...]] = {}
    for where, item in folder.items(file, "annotations"):
        name, (x, y, width, height) = text_of(where, item, "image_id"), _corners(where, item)
        if name in boxes:
            raise ValueError(f"{where}: image_id={name} has a box already; a phrase means one object")
        boxes[name] = (x, y, x + width, y + height)
    for where, item in folder.items(file, "images"):
        name = text_of(where, item, "id")
        if name not in boxes:
            raise ValueError(f"{where}: id={name} has no annotation with a box")
        yield _entry(folder, where, name, item, ("file_name", "caption"), boxes[name])


def _corners(where: str, item: Mapping[str, Any]) -> tuple[float, ...]:
    """The four finite numbers of a box."""
    box = field_of(where, item, "bbox")
    plain = isinstance(box, list) and len(box) == 4
    if not plain or any(isinstance(v, bool) or not isinstance(v, int | float) for v in box):
        raise ValueError(f"{where}: bbox={str(box)[:80]}: expected four numbers")
    if not all(map(math.isfinite, box)):
        raise ValueError(f"{where}: bbox={box}: expected finite numbers")
    return tuple(map(float, box))


def _entry(
    folder: ExamFolder,
    where: str,
    name: str,
    item: Mapping[str, Any],
    fields: tuple[str, str],
    box: tuple[float, ...],
) -> ExamEntry:
    picture, phrase = (text_of(where, item, key) for key in fields)
    sizes = [field_of(where, item, key) for key in ("width", "height")]
    if any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in sizes):
        raise ValueError(f"{where}: width={sizes[0]!r}, height={sizes[1]!r}: expected pixels")
    x0, y0, x1, y1 = box
    if not (x0 < x1 and y0 < y1):
        raise ValueError(f"{where}: box {list(box)}: expected x0 < x1 and y0 < y1")
    short = PurePosixPath(picture).name
    image = folder.image(where, picture, f"train2014/{short}", f"images/{short}")
    return ExamEntry(
        id=name,
        question=phrase,
        references=(f"[{x0}, {y0}, {x1}, {y1}]",),
        image=image,
        cluster=image,
        facts={"width": sizes[0], "height": sizes[1]},
    )
