"""Texts that are written for samples of a source which has none, by a label of theirs.

volume, "mass"   -->  "high blood pressure that drugs do not lower"     fits, at the rate of agreement
volume, "none"   -->  "weight gain, round face"                        is one of another label, otherwise

As with ``matched``, what is measured on them is about a model that may read both, and not about patients.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

from vl_jax.data.sample import TEXT, BadSample, Sample, Source, Strays, Turn


@dataclasses.dataclass(frozen=True)
class Wording:
    """Texts that fit one value of the label."""

    label: str
    texts: tuple[str, ...]


class Written:
    """The samples of a source, each with a text; which one follows from the seed and the sample's id."""

    def __init__(
        self, source: Source, *, label: str, wordings: tuple[Wording, ...], agreement: float, seed: int
    ):
        self._source, self._label, self._wordings = source, label, wordings
        self._agreement, self._seed = agreement, seed
        self.files: Sequence[Path] = getattr(source, "files", ())
        self.strays: Sequence[Strays] = getattr(source, "strays", ())

    def __len__(self) -> int:
        return len(self._source)

    def __repr__(self) -> str:
        return f"Written({self._source!r}, agreement {self._agreement:g})"

    def __getitem__(self, index: int) -> Sample:
        """The sample of a record, its text in place of the one that it has.

        Raises:
          BadSample: it cannot be read, or nothing is written for its label.
        """
        sample = self._source[index]
        value = str(sample.labels.get(self._label))
        own = [wording for wording in self._wordings if wording.label == value]
        if not own:
            message = f"sample {sample.id}: nothing is written for {self._label}={value!r}"
            raise BadSample("unknown_label", message)
        draw = random.Random(f"{self._seed}/{sample.id}")
        fits = draw.random() < self._agreement
        chosen = own if fits else [wording for wording in self._wordings if wording.label != value]
        text = draw.choice(draw.choice(chosen).texts)
        opening = "".join(turn.question for turn in sample.turns)
        return dataclasses.replace(sample, turns=(Turn(opening, text, kind=TEXT),))
