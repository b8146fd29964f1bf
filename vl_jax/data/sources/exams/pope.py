"""POPE: whether an object is in a photograph of COCO, in three sets of questions.

    coco_pope_random.json, coco_pope_popular.json, coco_pope_adversarial.json
        {"question_id": 1, "image": "COCO_val2014_000000000042.jpg", "text", "label": "yes"}, one a line
    val2014/                the photographs

Ids begin anew in every file: a question is ``random/1``. All files of the folder are read, and reported
apart; a split is one of them, such as ``random``. Source: Li et al., "Evaluating Object Hallucination in
Large Vision-Language Models", 2023; github.com/RUCAIBox/POPE.
"""

from __future__ import annotations

from collections.abc import Iterator

from vl_jax.data.sources.exams.folder import ExamEntry, ExamFolder, text_of


def read(folder: ExamFolder, split: str) -> Iterator[ExamEntry]:
    """The questions of all sets, or of one."""
    for file in folder.find_all(split, "coco_pope_{split}.json", "*/coco_pope_{split}.json"):
        kind = file.stem.rpartition("_")[2]
        for where, item in folder.json_lines(file):
            name = text_of(where, item, "image")
            image = folder.image(where, f"val2014/{name}", f"images/{name}", name)
            label = text_of(where, item, "label").strip().lower()
            if label not in ("yes", "no"):
                raise ValueError(f"{where}: label={label!r}: expected 'yes' or 'no'")
            yield ExamEntry(
                id=f"{kind}/{text_of(where, item, 'question_id')}",
                question=text_of(where, item, "text"),
                references=(label,),
                image=image,
                cluster=image,
                groups={"set": kind},
            )
