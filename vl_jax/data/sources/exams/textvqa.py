"""TextVQA: questions about text in photographs, each answered by ten people.

    TextVQA_0.5.1_val.json    {"data": [{"question_id", "question", "image_id", "answers": [ten texts]}]}
    train_images/             the photographs ``<image_id>.jpg``, of the training and the validation split

Texts that a character reader found (``TextVQA_Rosetta_OCR_v0.2_val.json``) are not put into the prompt.
Source: Singh et al., "Towards VQA Models That Can Read", 2019; textvqa.org.
"""

from __future__ import annotations

from collections.abc import Iterator

from vl_jax.data.sources.exams.folder import ExamEntry, ExamFolder, text_of, texts_of


def read(folder: ExamFolder, split: str) -> Iterator[ExamEntry]:
    """The questions of a split; ``val`` where none is named."""
    file = folder.find(split or "val", "TextVQA_0.5.1_{split}.json", "TextVQA_*_{split}.json")
    for where, item in folder.items(file, "data"):
        name = f"{text_of(where, item, 'image_id')}.jpg"
        image = folder.image(
            where, *(f"{place}{name}" for place in ("train_images/", "test_images/", "images/"))
        )
        yield ExamEntry(
            id=text_of(where, item, "question_id"),
            question=text_of(where, item, "question"),
            references=texts_of(where, item, "answers"),
            image=image,
            cluster=image,
        )
