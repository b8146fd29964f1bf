"""The source of a published exam: its questions, one a sample, read from a folder as it is distributed.

    ExamConfig(name="docvqa", layout="docvqa", folder="DocVQA")

A sample has one turn, the question as it is published, with what is to be learnt as its answer. Its labels
hold the rest: ``references`` (all answers), ``cluster``, ``facts`` and ``groups``, see ``ExamEntry``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from vl_jax.data.picture import Orientation
from vl_jax.data.sample import (
    DEFAULT_MAX_PIXELS,
    IMAGE_PLACEHOLDER,
    EncodedImage,
    FileImage,
    Sample,
    Turn,
)
from vl_jax.data.sources.exams import (
    captions,
    chartqa,
    docvqa,
    mmbench,
    ocrbench,
    pope,
    refcoco,
    textvqa,
    vqav2,
)
from vl_jax.data.sources.exams.folder import ExamEntry, ExamFolder

LAYOUTS: Mapping[str, Callable[[ExamFolder, str], Iterator[ExamEntry]]] = {
    "docvqa": docvqa.read,
    "chartqa": chartqa.read,
    "textvqa": textvqa.read,
    "vqav2": vqav2.read,
    "refcoco": refcoco.read,
    "ocrbench": ocrbench.read,
    "mmbench": mmbench.read,
    "pope": pope.read,
    "captions": captions.read,
}


@dataclass(frozen=True)
class ExamConfig:
    """The folder of a published exam, relative to the data root, and the split that is read."""

    name: str
    layout: str  # how its files are laid out, one of ``LAYOUTS``
    folder: str = ""  # empty: the data root
    split: str = ""  # empty: the one that is reported as a rule, see the file of the layout
    max_pixels: int = DEFAULT_MAX_PIXELS

    def __post_init__(self):
        if not self.name:
            raise ValueError("name='' of a source: must not be empty")
        if self.layout not in LAYOUTS:
            raise ValueError(
                f"layout={self.layout!r} of source {self.name!r}: there are {', '.join(LAYOUTS)}"
            )
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels={self.max_pixels} of source {self.name!r}: must be at least 1")

    def open(self, root: str, *, orientation: Orientation = "shown") -> ExamSource:
        """The source; files are relative to ``root``."""
        return ExamSource(self, root=root, orientation=orientation)


class ExamSource:
    """Random access to the questions of an exam; their files are read as it is opened, pictures are not.

    Attributes:
      files: those that were read.

    Raises (on opening):
      ValueError: a file is missing or malformed, two questions have one id, or a picture is not there; one
        line with the place in the file.
    """

    def __init__(self, config: ExamConfig, *, root: str = ".", orientation: Orientation = "shown"):
        self._config = config
        self._orientation: Orientation = orientation
        self._folder = ExamFolder(Path(root) / config.folder, f"source {config.name!r}")
        self._entries = list(LAYOUTS[config.layout](self._folder, config.split))
        self.files = self._folder.read
        if not self._entries:
            raise ValueError(f"source {config.name!r}: {self.files[0]} has no question")
        seen = set[str]()
        for entry in self._entries:
            if entry.id in seen:
                raise ValueError(f"source {config.name!r}: {self.files[0]}: id {entry.id!r} is there twice")
            seen.add(entry.id)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        entry = self._entries[index]
        answer = entry.facts.get("target", entry.references[0])
        kind = next(iter(entry.groups.values()), "")
        question = entry.question.replace(IMAGE_PLACEHOLDER, "")  # the picture is marked by us alone
        labels = {
            "references": entry.references,
            "cluster": entry.cluster,
            "facts": entry.facts,
            "groups": entry.groups,
        }
        return Sample(
            id=entry.id,
            turns=(Turn(f"{IMAGE_PLACEHOLDER}\n{question}".strip(), answer, kind=kind),),
            images=(self._image(entry),),
            labels=labels,
        )

    @property
    def digest(self) -> str:
        """What the questions follow from: the files that were read, and name and size of every picture."""
        found = hashlib.sha256()
        for file in self.files:
            found.update(file.relative_to(self._folder.path).as_posix().encode())
            with file.open("rb") as opened:
                found.update(hashlib.file_digest(opened, "sha256").digest())
        names = dict.fromkeys(e.image for e in self._entries if isinstance(e.image, str))
        for name in names:
            found.update(f"{name}\0{(self._folder.path / name).stat().st_size}\n".encode())
        return found.hexdigest()

    def _image(self, entry: ExamEntry) -> FileImage | EncodedImage:
        where = f"sample {entry.id} ({self._config.name})"
        if isinstance(entry.image, str):
            path = self._folder.path / entry.image
            return FileImage(path, where, self._config.max_pixels, self._orientation)
        content = entry.image
        return EncodedImage(lambda: content, "its picture", where, self._config.max_pixels, self._orientation)
