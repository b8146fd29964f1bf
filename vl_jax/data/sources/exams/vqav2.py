"""VQAv2: open questions about photographs of COCO, each answered by ten people.

    v2_OpenEnded_mscoco_val2014_questions.json    {"questions": [{"image_id", "question", "question_id"}]}
    v2_mscoco_val2014_annotations.json            {"annotations": [{"question_id", "image_id", "answer_type",
                                                    "multiple_choice_answer", "answers": [{"answer"}, ...]}]}
    val2014/COCO_val2014_000000000042.jpg         the photographs

Source: Goyal et al., "Making the V in VQA Matter", 2017; visualqa.org/download.html.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from vl_jax.data.sources.exams.folder import ExamEntry, ExamFolder, field_of, text_of


class _Answers(NamedTuple):
    """What people answered to a question."""

    frequent: str  # the answer that most of them gave
    all: tuple[str, ...]
    kind: str


def read(folder: ExamFolder, split: str) -> Iterator[ExamEntry]:
    """The questions of a split; ``val2014`` where none is named."""
    split = split or "val2014"
    questions = folder.find(
        split, "v2_OpenEnded_mscoco_{split}_questions.json", "OpenEnded_mscoco_{split}_questions.json"
    )
    annotations = folder.find(split, "v2_mscoco_{split}_annotations.json", "mscoco_{split}_annotations.json")
    answers = {}
    for where, item in folder.items(annotations, "annotations"):
        name = text_of(where, item, "question_id")
        if name in answers:
            raise ValueError(f"{where}: question_id={name} has answers already")
        given = field_of(where, item, "answers")
        if not isinstance(given, list) or not given or not all(isinstance(a, dict) for a in given):
            raise ValueError(f"{where}: answers: expected a list of objects with 'answer'")
        people = tuple(text_of(where, answer, "answer") for answer in given)
        answers[name] = _Answers(
            str(item.get("multiple_choice_answer") or people[0]), people, str(item.get("answer_type") or "")
        )
    for where, item in folder.items(questions, "questions"):
        name, picture = text_of(where, item, "question_id"), text_of(where, item, "image_id")
        if name not in answers:
            raise ValueError(f"{where}: question_id={name} has no answers in {annotations.name}")
        found = answers[name]
        file = f"COCO_{split}_{picture:>012}"
        yield ExamEntry(
            id=name,
            question=text_of(where, item, "question"),
            references=found.all,
            image=folder.image(
                where, *(f"{p}{file}{end}" for p in (f"{split}/", "images/") for end in (".jpg", ".png"))
            ),
            cluster=picture,
            facts={"target": found.frequent},
            groups={"answer_type": found.kind},
        )
