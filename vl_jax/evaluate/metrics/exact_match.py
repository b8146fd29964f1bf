"""Exact match: the share of short answers that are right, once both sides are normalised."""

from __future__ import annotations

from collections.abc import Sequence

from vl_jax.data.text.normalize import normalize


def is_match(truth: str, prediction: str) -> bool:
    """Whether two spellings are one answer."""
    return normalize(truth) == normalize(prediction)


class ExactMatch:
    """The share of exact matches of a model, and of baselines that answer the same questions.

    Args:
      baselines: their names; the score of each is ``<name>_exact_match``.
    """

    def __init__(self, baselines: Sequence[str] = ()):
        self.names = ("exact_match", *(f"{name}_exact_match" for name in baselines))
        self._right = dict.fromkeys(self.names, 0)
        self._count = 0

    def update(self, truth: str, prediction: str, **baselines: str) -> None:
        """Counts one question: its truth, what the model says, and what each baseline says."""
        self._count += 1
        self._right["exact_match"] += is_match(truth, prediction)
        for name, text in baselines.items():
            self._right[f"{name}_exact_match"] += is_match(truth, text)

    def compute(self) -> dict[str, float]:
        """The shares, and ``count``; without a question every share is 0."""
        shares = {name: right / max(1, self._count) for name, right in self._right.items()}
        return {**shares, "count": self._count}
