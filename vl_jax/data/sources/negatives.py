"""Sources whose texts come with wrong ones: what a picture does not show, in nearly the same words.

    "a red cube left of a blue ball"  -->  "a blue cube left of a red ball", "a red cube right of a blue ball"

A source that knows its pictures brings wrong texts itself, exactly. For others they are made by rules
(``text.swaps``). So hard negatives for contrastive training are made (Yuksekgonul et al. 2023, arXiv
2210.01936, section 4), and so is it asked whether a model reads more than a bag of words.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vl_jax.data.sample import Note, Sample, Source
from vl_jax.data.text.swaps import swaps
from vl_jax.data.text.written import written


@dataclass(frozen=True)
class NegativesConfig:
    """Wrong texts beside each text."""

    count: int = 1  # at most; many texts have no word that can be changed
    seed: int = 0  # which ones, where there are more

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"negatives.count={self.count}: must be at least 1; negatives=None makes none")


class WithNegatives:
    """The samples of a source, each with wrong texts where there are any.

    Which ones follows from the seed and the sample's id. Those with two words exchanged come first: no count
    of words tells them from the text itself.
    """

    def __init__(self, source: Source, config: NegativesConfig):
        self.files: Sequence[Path] = getattr(source, "files", ())
        self.strays = getattr(source, "strays", ())
        self._source, self._config = source, config

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Sample:
        """The sample of a record; raises as the source does."""
        sample = self._source[index]
        found = _found(sample, random.Random(f"{self._config.seed}/{sample.id}"))
        notes = sample.notes
        if not found:
            message = f"sample {sample.id}: no wrong text, for nothing in its text can be changed by a rule"
            notes = (*notes, Note("no_negative", message))
        return dataclasses.replace(sample, negatives=found[: self._config.count], notes=notes)


def _found(sample: Sample, rng: random.Random) -> tuple[str, ...]:
    """The wrong texts of a sample in random order, the hardest first; its own, if it has any."""

    def mixed(texts: Sequence[str]) -> list[str]:
        return rng.sample(texts, len(texts))

    if sample.negatives:
        return tuple(mixed(sample.negatives))
    # The whole text of a sample must be what a row reads, and of several turns a draw may take only some.
    if len(sample.turns) != 1:
        return ()
    changed = swaps(written(sample))
    return (*mixed(changed.exchanged), *mixed(changed.replaced))
