"""Captions of COCO: what five people say of a photograph.

    captions_val2014.json, annotations/captions_val2017.json
        {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
    val2014/, val2017/      the photographs

Source: Chen et al., "Microsoft COCO Captions", 2015; cocodataset.org. Flickr30k and NoCaps are distributed in
this form too.
"""

from __future__ import annotations

from collections.abc import Iterator

from vl_jax.data.sources.exams.folder import ExamEntry, ExamFolder, text_of


def read(folder: ExamFolder, split: str) -> Iterator[ExamEntry]:
    """The photographs of a split such as ``val2014``; with none named, those of the only file."""
    file = folder.find(split, "captions_{split}.json", "annotations/captions_{split}.json")
    split = file.stem.removeprefix("captions_")
    captions: dict[str, list[str]] = {}
    for where, item in folder.items(file, "annotations"):
        captions.setdefault(text_of(where, item, "image_id"), []).append(text_of(where, item, "caption"))
    known = set()
    for where, item in folder.items(file, "images"):
        name, picture = text_of(where, item, "id"), text_of(where, item, "file_name")
        known.add(name)
        if name not in captions:
            raise ValueError(f"{where}: id={name} has no caption")
        yield ExamEntry(
            id=name,
            question="",
            references=tuple(captions[name]),
            image=folder.image(where, f"{split}/{picture}", f"images/{picture}", picture),
            cluster=name,
        )
    if stray := captions.keys() - known:
        raise ValueError(f"{file}: image_id={min(stray)} of a caption is that of no image")
