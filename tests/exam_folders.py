"""Folders of exams in their published layouts, made of small drawn pictures, or of pictures that are given.

A writer takes a folder and items: ``(picture, question, answers)``, where a picture is a PIL picture. It
leaves the files that the exam's site distributes.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

Item = tuple[Image.Image, str, Sequence[str]]


def drawn(colours: str = "red green blue", size: tuple[int, int] = (48, 32)) -> list[Image.Image]:
    """Pictures of one colour each."""
    return [Image.new("RGB", size, colour) for colour in colours.split()]


def items() -> list[Item]:
    """Two questions about the first picture, one about each other."""
    red, green, blue = drawn()
    asked = ((red, "red"), (red, "red"), (green, "green"), (blue, "blue"))
    return [(picture, f"Which colour is number {i}?", [colour]) for i, (picture, colour) in enumerate(asked)]


def saved(folder: Path, name: str, picture: Image.Image) -> str:
    """The name, where the picture then is."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return name


def dumped(path: Path, value: Any) -> None:
    """A JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def lines(path: Path, values: Sequence[Any]) -> None:
    """A file with one object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def picture_number(pictures: list[Image.Image], picture: Image.Image) -> int:
    """Which of the different pictures it is; it is added if it is new."""
    for number, known in enumerate(pictures):
        if known is picture:
            return number
    pictures.append(picture)
    return len(pictures) - 1


def docvqa(folder: Path, found: Sequence[Item]) -> None:
    seen: list[Image.Image] = []
    data = [
        {
            "questionId": 100 + i,
            "question": question,
            "image": saved(folder, f"documents/p{picture_number(seen, picture)}.png", picture),
            "docId": 1,
            "answers": list(answers),
            "data_split": "val",
            "question_types": ["layout"],
        }
        for i, (picture, question, answers) in enumerate(found)
    ]
    dumped(folder / "val_v1.0.json", {"dataset_name": "docvqa", "dataset_split": "val", "data": data})


def chartqa(folder: Path, found: Sequence[Item]) -> None:
    seen: list[Image.Image] = []
    rows = []
    for picture, question, answers in found:
        name = f"{picture_number(seen, picture)}.png"
        saved(folder, f"test/png/{name}", picture)
        rows.append({"imgname": name, "query": question, "label": answers[0]})
    half = -(-len(rows) // 2)
    dumped(folder / "test" / "test_human.json", rows[:half])
    dumped(folder / "test" / "test_augmented.json", rows[half:])


def textvqa(folder: Path, found: Sequence[Item]) -> None:
    seen: list[Image.Image] = []
    data = []
    for i, (picture, question, answers) in enumerate(found):
        name = f"abc{picture_number(seen, picture)}"
        saved(folder, f"train_images/{name}.jpg", picture)
        ten = [answers[j % len(answers)] for j in range(10)]
        data.append({"question_id": 34602 + i, "question": question, "image_id": name, "answers": ten})
    dumped(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": data})


def vqav2(folder: Path, found: Sequence[Item]) -> None:
    seen: list[Image.Image] = []
    questions, annotations = [], []
    for i, (picture, question, answers) in enumerate(found):
        image = 42 + picture_number(seen, picture)
        saved(folder, f"val2014/COCO_val2014_{image:012}.jpg", picture)
        name = image * 1000 + i
        questions.append({"image_id": image, "question": question, "question_id": name})
        ten = [
            {"answer": answers[j % len(answers)], "answer_confidence": "yes", "answer_id": j + 1}
            for j in range(10)
        ]
        annotations.append(
            {
                "question_type": "what",
                "multiple_choice_answer": answers[0],
                "answers": ten,
                "image_id": image,
                "answer_type": "yes/no" if answers[0] in ("yes", "no") else "other",
                "question_id": name,
            }
        )
    about = {"info": {"year": 2017}, "data_type": "mscoco", "data_subtype": "val2014"}
    dumped(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {**about, "questions": questions})
    dumped(folder / "v2_mscoco_val2014_annotations.json", {**about, "annotations": annotations})


def refcoco(folder: Path, found: Sequence[Item], *, form: str = "jsonl") -> None:
    """Answers are boxes ``[x0, y0, x1, y1]`` in pixels, written as JSON."""
    seen: list[Image.Image] = []
    rows = []
    for picture, phrase, (box, *_) in found:
        name = f"COCO_train2014_{picture_number(seen, picture):012}.jpg"
        saved(folder, f"train2014/{name}", picture)
        rows.append((name, phrase, json.loads(box), picture.size))
    if form == "jsonl":
        given = [
            {"image": f"data/coco/train2014/{n}", "sent": p, "bbox": b, "height": s[1], "width": s[0]}
            for n, p, b, s in rows
        ]
        lines(folder / "refcoco_val.jsonl", given)
        return
    images = [
        {"id": i, "file_name": n, "caption": p, "height": s[1], "width": s[0], "dataset_name": "refcoco"}
        for i, (n, p, _, s) in enumerate(rows)
    ]
    boxes = [
        {"image_id": i, "id": i, "bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]], "category_id": 1}
        for i, (_, _, b, _) in enumerate(rows)
    ]
    dumped(folder / "finetune_refcoco_val.json", {"info": [], "images": images, "annotations": boxes})


def ocrbench(folder: Path, found: Sequence[Item], *, category: str = "Regular Text Recognition") -> None:
    seen: list[Image.Image] = []
    rows = [
        {
            "dataset_name": "IIIT5K",
            "image_path": saved(
                folder / "OCRBench_Images", f"IIIT5K/{picture_number(seen, picture)}.png", picture
            ).removeprefix("OCRBench_Images/"),
            "question": question,
            "answers": list(answers),
            "type": category,
        }
        for picture, question, answers in found
    ]
    dumped(folder / "OCRBench.json", rows)


def mmbench(folder: Path, found: Sequence[Item]) -> None:
    """The first answer is right, the others are the other options."""
    seen: dict[int, int] = {}
    header = "index question hint A B C D answer category image l2-category split".split()
    rows = ["\t".join(header)]
    for i, (picture, question, answers) in enumerate(found):
        options = [*answers[1:], answers[0]]
        if id(picture) in seen:
            image = str(seen[id(picture)])
        else:
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            image, seen[id(picture)] = base64.b64encode(buffer.getvalue()).decode(), i
        letters = dict(zip("ABCD", options, strict=False))
        cells = {
            "index": str(i),
            "question": question,
            "hint": "nan" if i else "Look well.",
            **letters,
            "answer": "ABCD"[len(options) - 1],
            "category": "attribute",
            "image": image,
            "l2-category": "attribute_reasoning",
            "split": "dev",
        }
        rows.append("\t".join(cells.get(name, "") for name in header))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "MMBench_DEV_EN.tsv").write_text("\n".join(rows) + "\n")


def pope(folder: Path, found: Sequence[Item]) -> None:
    seen: list[Image.Image] = []
    rows = []
    for i, (picture, question, answers) in enumerate(found):
        name = f"COCO_val2014_{picture_number(seen, picture):012}.jpg"
        saved(folder, f"val2014/{name}", picture)
        rows.append({"question_id": i + 1, "image": name, "text": question, "label": answers[0]})
    for kind in ("random", "popular"):
        lines(folder / f"coco_pope_{kind}.json", rows)


def captions(folder: Path, found: Sequence[Item]) -> None:
    """Answers are what people say of the picture."""
    images, annotations = [], []
    for i, (picture, _, texts) in enumerate(found):
        saved(folder, f"val2014/COCO_val2014_{i:012}.jpg", picture)
        images.append({"id": i, "file_name": f"COCO_val2014_{i:012}.jpg"})
        annotations += [{"image_id": i, "id": 10 * i + j, "caption": text} for j, text in enumerate(texts)]
    dumped(folder / "annotations" / "captions_val2014.json", {"images": images, "annotations": annotations})


BOXES = [["[4, 4, 24, 20]"], ["[10, 2, 40, 30]"], ["[0, 0, 10, 10]"], ["[5.5, 6, 20, 31]"]]
OPTIONS = [["red", "green", "blue"], ["red", "blue"], ["green", "red", "blue", "black"], ["blue", "red"]]
YES_NO = [["yes"], ["no"], ["yes"], ["no"]]
SAID = [["a red card", "red all over"], ["one red card"], ["a green card on the table"], ["a blue card"]]


def written(layout: str, folder: Path) -> None:
    """The folder of a layout, with four questions about three drawn pictures (of captions, four pictures)."""
    answers = {"refcoco": BOXES, "mmbench": OPTIONS, "pope": YES_NO, "captions": SAID}.get(layout)
    found = items()
    if answers is not None:
        found = [(picture, question, a) for (picture, question, _), a in zip(found, answers, strict=True)]
    WRITERS[layout](folder, found)


WRITERS: dict[str, Callable[[Path, Sequence[Item]], None]] = {
    "docvqa": docvqa,
    "chartqa": chartqa,
    "textvqa": textvqa,
    "vqav2": vqav2,
    "refcoco": refcoco,
    "ocrbench": ocrbench,
    "mmbench": mmbench,
    "pope": pope,
    "captions": captions,
}
