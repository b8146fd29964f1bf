"""OCRBench: reading text, in ten categories.

    OCRBench.json         [{"question", "answers": text or [text, ...], "type": category, "image_path",
                            "dataset_name"}]
    OCRBench_Images/      the pictures, at their ``image_path``

A question has no id of its own: it is its place in the file. Source: Liu et al., "OCRBench", 2023;
github.com/Yuliang-Liu/MultimodalOCR.
"""

from __future__ import annotations

from collections.abc import Iterator

from vl_jax.data.sources.exams.folder import ExamEntry, ExamFolder, text_of, texts_of


def read(folder: ExamFolder, split: str) -> Iterator[ExamEntry]:
    """All questions; there is one split."""
    file = folder.find(split, "OCRBench.json", "OCRBench/OCRBench.json")
    for number, (where, item) in enumerate(folder.items(file)):
        name = text_of(where, item, "image_path")
        image = folder.image(where, f"OCRBench_Images/{name}", name, f"images/{name}")
        category = text_of(where, item, "type", "question_type")
        yield ExamEntry(
            id=str(number),
            question=text_of(where, item, "question"),
            references=texts_of(where, item, "answers", "answer"),
            image=image,
            cluster=image,
            facts={"category": category},
            groups={"category": category},
        )
