"""DocVQA, task 1: questions about scanned pages.

    val_v1.0.json             {"data": [{"questionId", "question", "image": "documents/x.png", "docId",
                                         "answers": [text, ...], "question_types": [...]}]}
    documents/                the pages

``val_v1.0_withQT.json`` and ``spdocvqa_images/``, of the newer distribution, are read alike. The answers of
the test split are at the server only. Source: Mathew et al., "DocVQA", 2021; rrc.cvc.uab.es, challenge 17.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from vl_jax.data.sources.exams.folder import ExamEntry, ExamFolder, text_of, texts_of


def read(folder: ExamFolder, split: str) -> Iterator[ExamEntry]:
    """The questions of a split; ``val`` where none is named."""
    split = split or "val"
    file = folder.find(split, "{split}_v1.0.json", "{split}_v1.0_withQT.json", "*/{split}_v1.0*.json")
    inside = file.parent.relative_to(folder.path)
    for where, item in folder.items(file, "data"):
        name = text_of(where, item, "image")
        short = PurePosixPath(name).name
        image = folder.image(
            where,
            name,
            *(str(inside / n) for n in (name, f"spdocvqa_images/{short}")),
            f"spdocvqa_images/{short}",
        )
        kinds = item.get("question_types") or ()
        yield ExamEntry(
            id=text_of(where, item, "questionId"),
            question=text_of(where, item, "question"),
            references=texts_of(where, item, "answers"),
            image=image,
            cluster=image,
            groups={"question_type": str(kinds[0])} if isinstance(kinds, list) and kinds else {},
        )
