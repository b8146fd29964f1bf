"""Relaxed accuracy, of ChartQA and PlotQA: a number may be off by 5 %, any other answer has to be the same.

What is a number is what Python reads as one, where "12%" is 0.12. So "1,000", "$5" and "3 million" are
texts, "12%" does not match "12", and a reference of 0 is compared as a text. ChartQA reports its human
and its augmented half apart, and the mean of both. Source: Masry et al., "ChartQA", 2022, section 5.1;
the variants are what the scripts do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from vl_jax.evaluate.metrics.per_sample import TextScores

Variant = Literal["vlmevalkit", "lmms_eval", "big_vision"]


def is_relaxed_match(
    reference: str, prediction: str, *, tolerance: float = 0.05, variant: Variant = "vlmevalkit"
) -> bool:
    """Whether an answer is near enough to its reference.

    Args:
      tolerance: share of the reference that a number may be off by.
      variant: how texts are compared. ``vlmevalkit``: in lower case, without spaces at the ends of the
        prediction. ``lmms_eval``: in lower case. ``big_vision``: as they are.
    """
    if variant == "vlmevalkit":
        prediction = prediction.strip()
    said, truth = _number(prediction), _number(reference)
    if said is not None and truth:
        return abs(said - truth) / abs(truth) <= tolerance
    if variant == "big_vision":
        return prediction == reference
    return prediction.lower() == reference.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


@dataclasses.dataclass(frozen=True)
class RelaxedAccuracy:
    """The share of answers that match one of their references."""

    name: str = "relaxed_accuracy"
    tolerance: float = 0.05  # share of the reference that a number may be off by
    variant: Variant = "vlmevalkit"  # how texts are compared, see ``is_relaxed_match``

    def __post_init__(self):
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance={self.tolerance}: expected a share of 0 or more and below 1")

    def start(self) -> TextScores:
        """No answers yet."""
        return TextScores((self.name,), self._score)

    def _score(self, references: Sequence[str], prediction: str) -> dict[str, float]:
        options = {"tolerance": self.tolerance, "variant": self.variant}
        return {self.name: float(any(is_relaxed_match(r, prediction, **options) for r in references))}
