"""Classification: what share is right, over all and by class, beside a model that always says the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int


def classification(
    truth: Int[np.ndarray, " N"], prediction: Int[np.ndarray, " N"], num_classes: int
) -> dict[str, Any]:
    """Accuracy, balanced accuracy, macro F1 and the confusion matrix of predicted classes.

    Balanced accuracy is the mean recall over the classes that occur. Macro F1 is the mean over classes that
    occur or were predicted. A row whose truth is negative has no label, and is left out.

    Returns:
      ``count``, ``accuracy``, ``balanced_accuracy``, ``macro_f1``, ``confusion`` (rows are truths, columns
      predictions), and the first three scores of always saying the most frequent class of these truths:
      ``majority_class``, ``majority_accuracy``, ``majority_balanced_accuracy``, ``majority_macro_f1``.

    Raises:
      ValueError: no row has a label, or a class is not one of ``num_classes``.
    """
    confusion = confusion_matrix(truth, prediction, num_classes)
    if not confusion.any():
        raise ValueError(f"none of {len(truth)} rows has a label")
    counts = confusion.sum(axis=1)
    majority = int(np.argmax(counts))
    constant = np.zeros_like(confusion)
    constant[:, majority] = counts
    baseline = {f"majority_{name}": score for name, score in _scores(constant).items()}
    return {
        "count": int(counts.sum()),
        **_scores(confusion),
        "majority_class": majority,
        **baseline,
        "confusion": confusion.tolist(),
    }


def confusion_matrix(
    truth: Int[np.ndarray, " N"], prediction: Int[np.ndarray, " N"], num_classes: int
) -> Int[np.ndarray, "K K"]:
    """How often each class (row) was called each class (column); rows without a label are left out.

    Raises:
      ValueError: a class is not one of ``num_classes``.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes={num_classes} must be >= 1")
    labelled = truth >= 0
    truth, prediction = truth[labelled].astype(np.int64), prediction[labelled].astype(np.int64)
    for name, classes in (("truth", truth), ("prediction", prediction)):
        wrong = classes[(classes < 0) | (classes >= num_classes)]
        if wrong.size:
            raise ValueError(f"{name} {wrong[0]} is no class; expected 0 to {num_classes - 1}")
    pairs = np.bincount(truth * num_classes + prediction, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes)


def _scores(confusion: np.ndarray) -> dict[str, float]:
    right, truths, predictions = np.diagonal(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    occurs, either = truths > 0, truths + predictions > 0
    return {
        "accuracy": float(right.sum() / truths.sum()),
        "balanced_accuracy": float(np.mean(right[occurs] / truths[occurs])),
        "macro_f1": float(np.mean(2 * right[either] / (truths + predictions)[either])),
    }


class LabelScores:
    """``classification`` over samples that come one after another."""

    def __init__(self, classes: Sequence[str]):
        self._classes = tuple(classes)
        self._truths: list[int] = []
        self._predictions: list[int] = []

    def update(self, truth: int, prediction: int) -> None:
        """Counts one sample."""
        self._truths.append(truth)
        self._predictions.append(prediction)

    @property
    def confusion(self) -> Int[np.ndarray, "K K"]:
        """How often each class (row) was called each class (column)."""
        return confusion_matrix(np.array(self._truths), np.array(self._predictions), len(self._classes))

    def compute(self) -> dict[str, float]:
        """The scores, those of always saying the most frequent class, and the count."""
        found = classification(np.array(self._truths), np.array(self._predictions), len(self._classes))
        return {name: value for name, value in found.items() if name not in ("confusion", "majority_class")}
