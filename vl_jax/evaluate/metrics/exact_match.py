"""Exact match: the share of short answers that are right, once both sides are normalised."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from vl_jax.data.text.normalize import normalize
from vl_jax.evaluate.metrics.per_sample import PerSample, SampleList, references_of


def is_match(truth: str, prediction: str) -> bool:
    """Whether two spellings are one answer."""
    return normalize(truth) == normalize(prediction)


@dataclasses.dataclass(frozen=True)
class ExactMatch:
    """The share of exact matches."""

    name: str = "exact_match"

    def start(self) -> Matches:
        """A count of no answers yet."""
        return Matches(self.name)


class Matches:
    """Counts answers, and those that match.

    Args:
      name: of the score.
    """

    def __init__(self, name: str = "exact_match"):
        self._name, self._found = name, SampleList((name,))

    def update(self, truth: str | Sequence[str], prediction: str, *, cluster: str | None = None) -> None:
        """Counts one question: its truth, or the texts any of which is right, and what was answered."""
        references = references_of(truth, prediction, len(self._found))
        self._found.add({self._name: float(any(is_match(r, prediction) for r in references))}, cluster)

    def samples(self) -> dict[str, PerSample]:
        """The matches, question by question; ValueError without a question."""
        return self._found.samples()

    def compute(self) -> dict[str, float]:
        """The share, which is 0 without a question."""
        return self._found.compute() if len(self._found) else {self._name: 0.0}
