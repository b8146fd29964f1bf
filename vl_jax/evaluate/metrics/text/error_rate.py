"""Word and character error rate of what was heard, or read from a picture.

    (words changed + left out + put in) / words of the reference, over all samples together

It may exceed 1. Counts are jiwer's. A rate depends on what is normalised: with ``fold`` case, width and
punctuation are of no account, as they are in most published tables; characters count the single spaces
between words.
"""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal

from vl_jax.evaluate.metrics.extra import needed
from vl_jax.evaluate.metrics.per_sample import TextScores


def errors_of(reference: str, prediction: str, *, unit: Literal["word", "character"]) -> tuple[int, int]:
    """The fewest changes that make one text of the other, and the length of the reference.

    Raises:
      UserError: jiwer is not installed.
    """
    jiwer: Any = needed("jiwer", by="an error rate")
    said, truth = " ".join(prediction.split()), " ".join(reference.split())
    length = len(truth.split() if unit == "word" else truth)
    if not length or not said:  # jiwer takes no empty text in some versions
        return max(length, len(said.split() if unit == "word" else said)), length
    found = (jiwer.process_words if unit == "word" else jiwer.process_characters)(truth, said)
    return found.substitutions + found.deletions + found.insertions, length


def folded(text: str) -> str:
    """Compatibility form, lower case, and spaces for punctuation except for apostrophes within words."""
    plain = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    kept = (c if c == "'" or not unicodedata.category(c).startswith("P") else " " for c in plain)
    return " ".join(word.strip("'") for word in "".join(kept).split())


@dataclasses.dataclass(frozen=True)
class ErrorRate:
    """The error rate over all samples; of several references the one with the lowest rate counts."""

    name: str = "wer"
    unit: Literal["word", "character"] = "word"  # "character" for CER, and for languages without spaces
    fold: bool = True  # case, width and punctuation are of no account

    @property
    def shares(self) -> tuple[str, ...]:
        """A rate may exceed one."""
        return ()

    def start(self) -> TextScores:
        """No texts yet; UserError without jiwer."""
        needed("jiwer", by="an error rate")
        return TextScores((self.name,), self._score)

    def _score(self, references: Sequence[str], prediction: str) -> dict[str, tuple[float, float]]:
        form = folded if self.fold else str
        found = [errors_of(form(text), form(prediction), unit=self.unit) for text in references]
        if not any(length for _, length in found):
            raise ValueError("the reference has no word")
        errors, length = min((pair for pair in found if pair[1]), key=lambda pair: pair[0] / pair[1])
        return {self.name: (float(errors), float(length))}
