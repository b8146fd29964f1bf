"""The domain of a source: a label that all of its samples have."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from vl_jax.data.sample import Sample, Source, Strays

DOMAIN = "domain"  # name of the label


class InDomain:
    """The samples of a source, each with its domain among the labels; files and strays are the source's."""

    def __init__(self, source: Source, domain: str):
        self._source, self._domain = source, domain
        self.files: Sequence[Path] = getattr(source, "files", ())
        self.strays: Sequence[Strays] = getattr(source, "strays", ())

    def __len__(self) -> int:
        return len(self._source)

    def __repr__(self) -> str:
        return repr(self._source)

    def __getitem__(self, index: int) -> Sample:
        """The sample of a record; raises as the source does."""
        sample = self._source[index]
        return dataclasses.replace(sample, labels={**sample.labels, DOMAIN: self._domain})
