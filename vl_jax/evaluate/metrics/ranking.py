"""How well a number tells two classes apart, and what a threshold on it gives.

``auroc`` is the chance that a sample of the class has a higher number than one that is not, where equal
ones count half. ``average_precision`` is the area under precision by recall, in steps. Both are
scikit-learn's, and do not depend on the threshold; F1, precision and recall do. With few positives,
average precision says more than AUROC.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vl_jax.evaluate.metrics.extra import needed
from vl_jax.evaluate.metrics.per_sample import PerSample, SampleList


def multiclass_auroc(truth: Int[np.ndarray, " N"], scores: Float[np.ndarray, "M K"]) -> float:
    """The mean over classes of the AUROC of each against all others (macro, one against the rest).

    Raises:
      UserError: scikit-learn is not installed.
      ValueError: a class has no sample or all of them, or a score is not finite.
    """
    if len(truth) != len(scores) or not np.isfinite(scores).all():
        raise ValueError(f"AUROC: {len(truth)} truths for {len(scores)} rows, all of which must be finite")
    missing = sorted(set(range(scores.shape[1])) ^ set(truth.tolist()))
    if missing or scores.shape[1] < 2:
        raise ValueError(
            f"AUROC: class {missing[0] if missing else 0} of {scores.shape[1]} has no sample to compare"
        )
    metrics: Any = needed("sklearn.metrics", by="AUROC")
    is_class = truth[:, None] == np.arange(scores.shape[1])
    return float(np.mean(metrics.roc_auc_score(is_class.astype(int), scores, average=None)))


class RankingScores:
    """AUROC and average precision of one class, and F1 at a threshold.

    Args:
      threshold: a number of at least so much says that it is the class.
    """

    def __init__(self, threshold: float = 0.5):
        needed("sklearn.metrics", by="AUROC")
        self._threshold = threshold
        self._found = SampleList(("f1", "precision", "recall", "accuracy"))
        self._truths: list[bool] = []
        self._scores: list[float] = []

    def update(self, truth: bool, score: float, *, cluster: str | None = None) -> None:
        """Takes one sample: whether it is of the class, and the number; ValueError if it is not finite."""
        if not math.isfinite(score):
            raise ValueError(f"sample {len(self._truths)}: score={score} is not finite")
        truth, said = bool(truth), bool(score >= self._threshold)
        hit, false_yes, false_no = truth and said, said and not truth, truth and not said
        counts = {
            "f1": (2 * hit, 2 * hit + false_yes + false_no),
            "precision": (hit, said),
            "recall": (hit, truth),
            "accuracy": (said == truth, 1),
        }
        self._found.add({k: (float(total), float(size)) for k, (total, size) in counts.items()}, cluster)
        self._truths.append(truth)
        self._scores.append(float(score))

    def samples(self) -> dict[str, PerSample]:
        """What depends on the threshold, sample by sample; ValueError without a sample."""
        return self._found.samples()

    def compute(self) -> dict[str, float]:
        """All scores.

        Raises:
          ValueError: there is no sample, or all are of one kind.
        """
        scores = self._found.compute()
        if len(set(self._truths)) < 2:
            raise ValueError(f"AUROC: all {len(self._truths)} samples are of one kind; needs both")
        metrics: Any = needed("sklearn.metrics", by="AUROC")
        return {
            "auroc": float(metrics.roc_auc_score(self._truths, self._scores)),
            "average_precision": float(metrics.average_precision_score(self._truths, self._scores)),
            **scores,
        }
