"""Few examples: how well classes are told apart by frozen vectors and k labelled examples of each.

Two ways that train nothing but a few numbers: the class whose mean is nearest (by cosine), and a linear
probe, the ridge regression on one-hot classes, in closed form.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

Way = Callable[[np.ndarray, np.ndarray, np.ndarray, int], np.ndarray]


def draw(labels: Int[np.ndarray, " N"], shots: int, rng: np.random.Generator) -> Bool[np.ndarray, " N"]:
    """Which rows are the examples: ``shots`` of every class."""
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        chosen[rng.choice(np.flatnonzero(labels == label), shots, replace=False)] = True
    return chosen


def nearest_mean(
    examples: Float[np.ndarray, "S E"],
    labels: Int[np.ndarray, " S"],
    queries: Float[np.ndarray, "Q E"],
    classes: int,
) -> Int[np.ndarray, " Q"]:
    """The class of each query by the mean of its examples that points most nearly where the query does."""
    means = np.stack([_unit(examples)[labels == label].mean(axis=0) for label in range(classes)])
    return np.argmax(_unit(queries) @ _unit(means).T, axis=1)


def linear_probe(
    examples: Float[np.ndarray, "S E"],
    labels: Int[np.ndarray, " S"],
    queries: Float[np.ndarray, "Q E"],
    classes: int,
) -> Int[np.ndarray, " Q"]:
    """The class of each query by ridge regression; the penalty is a hundredth of the mean variance."""
    mean, targets = examples.mean(axis=0), np.eye(classes)[labels]
    x = examples - mean
    gram = x @ x.T
    penalty = 0.01 * max(np.trace(gram) / len(x), 1e-12)
    weights = np.linalg.solve(gram + penalty * np.eye(len(x)), targets - targets.mean(axis=0))
    return np.argmax((queries - mean) @ x.T @ weights + targets.mean(axis=0), axis=1)


WAYS: dict[str, Way] = {"nearest_mean": nearest_mean, "linear_probe": linear_probe}


def balanced_accuracy(said: Int[np.ndarray, " Q"], truth: Int[np.ndarray, " Q"], classes: int) -> float:
    """The mean over classes of the share that is right."""
    return float(np.mean([np.mean(said[truth == label] == label) for label in range(classes)]))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
