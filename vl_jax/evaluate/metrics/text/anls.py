"""ANLS: the average normalised Levenshtein similarity, of DocVQA and InfographicVQA.

    NL = edit distance / length of the longer text;   1 - NL where NL < 0.5, else 0;   best of the references

Texts are compared in lower case with single spaces. Source: Biten et al., "Scene Text Visual Question
Answering", 2019, equation 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from vl_jax.evaluate.metrics.extra import needed
from vl_jax.evaluate.metrics.per_sample import TextScores

Variant = Literal["strict", "vlmevalkit", "lmms_eval"]


def anls(
    references: Sequence[str], prediction: str, *, threshold: float = 0.5, variant: Variant = "strict"
) -> float:
    """The similarity of one answer to the nearest of its references; two empty texts have 1.

    Args:
      threshold: of NL. A larger distance counts as none of the answer.
      variant: ``strict``: NL of exactly the threshold scores 0, as in the paper. ``vlmevalkit``: it scores
        ``1 - threshold``. ``lmms_eval``: so it does, and the length is that of the texts with all their
        spaces, by which spaces at the ends raise the score; the packaged VLMEvalKit (ms_vlmeval 0.0.20,
        nvidia_vlmeval 26.3) does the same, its later source does not.

    Raises:
      UserError: rapidfuzz is not installed.
    """
    levenshtein: Any = needed("rapidfuzz.distance.Levenshtein", by="ANLS")
    said, best = _folded(prediction), 1.0
    for reference in references:
        truth = _folded(reference)
        length = max(len(truth), len(said))
        if variant == "lmms_eval":
            length = max(len(reference.upper()), len(prediction.upper()))
        best = min(best, levenshtein.distance(truth, said) / length if length else 0.0)
    near = best < threshold if variant == "strict" else 1 - best >= threshold
    return 1 - best if near else 0.0


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


@dataclasses.dataclass(frozen=True)
class ANLS:
    """The mean similarity."""

    name: str = "anls"
    threshold: float = 0.5  # of the normalised distance, beyond which an answer scores 0
    variant: Variant = "strict"  # see ``anls``

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}: expected a share above 0 and up to 1")

    def start(self) -> TextScores:
        """No answers yet; UserError without rapidfuzz."""
        needed("rapidfuzz", by="ANLS")
        return TextScores((self.name,), self._score)

    def _score(self, references: Sequence[str], prediction: str) -> dict[str, float]:
        return {self.name: anls(references, prediction, threshold=self.threshold, variant=self.variant)}
