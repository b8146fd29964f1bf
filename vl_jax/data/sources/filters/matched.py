"""Samples of two sources side by side, as if they had been recorded together.

first   tile, "crack"          first   tile, "free"
second  series, "ball"         second  series, "normal"        both of one kind, at the rate of agreement
second  series, "normal"       second  series, "ball"          else of different kinds

No such recordings exist, so what is measured on them is about a model that may read both, and not about
factories or patients. The rate says how much one tells of the other: at 1 the second alone knows the kind.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path

from vl_jax.data.sample import TEXT, BadSample, Sample, Source, Strays, Turn


@dataclasses.dataclass(frozen=True)
class SameKind:
    """Labels of the two sources that mean the same."""

    first: tuple[str, ...]
    second: tuple[str, ...]


class Matched:
    """Every sample of the first source, with the inputs of a sample of the second, or with several by turns.

    Labels are those of both; where both have one of a name, it is that of the first. The partners of a sample
    follow from the seed and its id, so they are the same in every epoch. A sample of the first source that
    cannot be read, or is of no kind, stays bad; such of the second are nobody's partner.
    """

    def __init__(
        self,
        first: Source,
        second: Source,
        *,
        labels: tuple[str, str],
        kinds: tuple[SameKind, ...],
        agreement: float,
        partners: int = 1,
        seed: int,
    ):
        """Reads the label of every sample of the second source.

        Args:
          labels: the label of each source that says of which kind a sample is.
          partners: how often a sample of the first source comes, each time with another partner.

        Raises:
          ValueError: the second source has no sample of a kind.
        """
        self._first, self._second = first, second
        self._label, self._kinds = labels[0], kinds
        self._agreement, self._turns, self._seed = agreement, partners, seed
        kind_of = {value: i for i, kind in enumerate(kinds) for value in kind.second}
        self._partners: list[list[int]] = [[] for _ in kinds]
        for index in range(len(second)):
            value = _label(second, index, labels[1])
            if value in kind_of:
                self._partners[kind_of[value]].append(index)
        empty = next((kind for kind, found in zip(kinds, self._partners, strict=True) if not found), None)
        if empty is not None:
            raise ValueError(
                f"no sample of the second source has {labels[1]} in {empty.second}, so none can be matched"
            )
        self.files: Sequence[Path] = (*getattr(first, "files", ()), *getattr(second, "files", ()))
        self.strays: Sequence[Strays] = (*getattr(first, "strays", ()), *getattr(second, "strays", ()))

    def __len__(self) -> int:
        return len(self._first) * self._turns

    def __repr__(self) -> str:
        return f"Matched({self._first!r}, {self._second!r}, agreement {self._agreement:g})"

    def __getitem__(self, index: int) -> Sample:
        """The sample of a record of the first source and its partner's.

        Raises:
          IndexError: there is none of that index.
          BadSample: one of them cannot be read, or the first is of no kind.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        turn, place = divmod(index, len(self._first))
        sample = self._first[place]
        value = str(sample.labels.get(self._label))
        own = next((i for i, kind in enumerate(self._kinds) if value in kind.first), None)
        if own is None:
            message = f"sample {sample.id}: {self._label}={value!r} is of no kind that can be matched"
            raise BadSample("unknown_label", message)
        draw = random.Random(f"{self._seed}/{turn}/{sample.id}")
        others = [i for i in range(len(self._kinds)) if i != own]
        kind = own if draw.random() < self._agreement or not others else draw.choice(others)
        return _together(sample, self._second[draw.choice(self._partners[kind])])


def _together(first: Sample, second: Sample) -> Sample:
    """One sample with the inputs of two, whose texts must not both say something.

    Raises:
      BadSample: both have a text.
    """
    texts = [turn for sample in (first, second) for turn in sample.turns if turn.answer]
    if len(texts) > 1 or any(turn.kind != TEXT for turn in (*first.turns, *second.turns)):
        message = f"sample {first.id}: it and {second.id} both have a text, and a row has room for one"
        raise BadSample("two_texts", message)
    said = texts[0] if texts else Turn("", "")
    opening = "".join(turn.question for sample in (first, second) for turn in sample.turns)
    return dataclasses.replace(
        first,
        id=f"{first.id}+{second.id}",
        turns=(dataclasses.replace(said, question=opening, kind=TEXT),),
        images=(*first.images, *second.images),
        labels={**second.labels, **first.labels},
        media={**first.media, **second.media},
        notes=(*first.notes, *second.notes),
    )


def _label(source: Source, index: int, name: str) -> str | None:
    """The label of a sample, as it is written; None where it cannot be read."""
    try:
        return str(source[index].labels.get(name))
    except BadSample:
        return None
