"""Exact match: the share of short answers that are right, once both sides are normalised."""

from __future__ import annotations

import dataclasses

from vl_jax.data.text.normalize import normalize


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
        self._name, self._right, self._count = name, 0, 0

    def update(self, truth: str, prediction: str) -> None:
        """Counts one question: its truth, and what was answered."""
        self._count += 1
        self._right += is_match(truth, prediction)

    def compute(self) -> dict[str, float]:
        """The share, which is 0 without a question."""
        return {self._name: self._right / max(1, self._count)}
