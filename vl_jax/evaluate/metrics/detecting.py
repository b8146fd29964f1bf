"""Detecting one class among others: how well its score tells it apart, whatever the threshold.

``false_alarms_95`` is the share of samples of other classes whose score is at least the highest threshold
at which 95 % of the class are found. So models are compared at equal recall.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from vl_jax.evaluate.metrics.classification import LabelScores
from vl_jax.evaluate.metrics.ranking import RankingScores


def false_alarms(
    positive: Float[np.ndarray, " P"], negative: Float[np.ndarray, " N"], *, recall: float = 0.95
) -> float:
    """The share of negatives with at least the score that so many of the positives have.

    Raises:
      ValueError: one of them is empty, or ``recall`` is not in (0, 1].
    """
    if not len(positive) or not len(negative) or not 0 < recall <= 1:
        raise ValueError(
            f"false alarms: {len(positive)} positives, {len(negative)} negatives, recall={recall}: expected "
            "one of each at least, and a recall in (0, 1]"
        )
    needed = math.ceil(recall * len(positive) - 1e-9)  # 0.95 of 20 are 19
    threshold = np.sort(positive)[len(positive) - needed]
    return float(np.mean(negative >= threshold))


class DetectingScores:
    """The scores of ``LabelScores``, and how one class is told from the others.

    A group in which one of the two does not occur has no AUROC.
    """

    def __init__(self, classes: Sequence[str], positive: str):
        self._labels, self._positive = LabelScores(classes), list(classes).index(positive)
        self._found: list[tuple[bool, float]] = []  # whether a sample is of the class, and its score

    def update(self, truth: int, prediction: int, *, scores: Float[np.ndarray, " K"]) -> None:
        """Counts one sample, by the probability of the class."""
        self._labels.update(truth, prediction)
        odds = np.delete(scores, self._positive).astype(np.float64)
        highest = float(odds.max())
        rest = highest + math.log(float(np.exp(odds - highest).sum()))
        # Log-odds rank as probabilities do, and do not round to one number near 0 and 1.
        self._found.append((truth == self._positive, float(scores[self._positive]) - rest))

    def compute(self) -> dict[str, float]:
        """All scores."""
        found = self._labels.compute()
        if len({is_class for is_class, _ in self._found}) < 2:
            return found
        ranking = RankingScores(threshold=0.0)
        for is_class, score in self._found:
            ranking.update(is_class, score)
        sides = ([s for of, s in self._found if of is side] for side in (True, False))
        positive, negative = (np.array(scores) for scores in sides)
        return {
            **found,
            "auroc": ranking.compute()["auroc"],
            "false_alarms_95": false_alarms(positive, negative),
        }
