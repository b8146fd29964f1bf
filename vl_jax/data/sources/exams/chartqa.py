"""ChartQA: questions about charts, half of them written by people, half made from captions.

    test/test_human.json, test/test_augmented.json      [{"imgname": "x.png", "query", "label"}]
    test/png/                                           the charts

Both halves are read, and reported apart. A question has no id of its own: it is ``human/0``, by its place.
Source: Masry et al., "ChartQA", 2022; github.com/vis-nlp/ChartQA, folder ``ChartQA Dataset``.
"""

from __future__ import annotations

from collections.abc import Iterator

from vl_jax.data.sources.exams.folder import ExamEntry, ExamFolder, text_of, texts_of


def read(folder: ExamFolder, split: str) -> Iterator[ExamEntry]:
    """The questions of a split, human ones first; ``test`` where none is named."""
    split = split or "test"
    patterns = [
        f"{place}{split}_{half}.json" for place in ("", f"{split}/") for half in ("human", "augmented")
    ]
    for file in sorted(folder.find_all(split, *patterns), key=lambda file: "human" not in file.name):
        half = file.stem.removeprefix(f"{split}_")
        inside = file.parent.relative_to(folder.path)
        for number, (where, item) in enumerate(folder.items(file)):
            name = text_of(where, item, "imgname")
            image = folder.image(where, str(inside / "png" / name), str(inside / name))
            yield ExamEntry(
                id=f"{half}/{number}",
                question=text_of(where, item, "query"),
                references=texts_of(where, item, "label"),
                image=image,
                cluster=image,
                groups={"half": half},
            )
