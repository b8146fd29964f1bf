"""Few-shot evaluation: classes told apart by frozen vectors and a few labelled examples."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier

from vl_jax.evaluate.metrics.few_shot import balanced_accuracy, draw, linear_probe, nearest_mean
from vl_jax.evaluate.tasks.few_shot import FewShot


def blobs(classes: int = 4, each: int = 12, spread: float = 0.3, width: int = 6):
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), each)
    centres = random.standard_normal((classes, width))
    return centres[labels] + spread * random.standard_normal((len(labels), width)), labels


def test_a_draw_takes_so_many_of_each_class():
    _, labels = blobs()
    chosen = draw(labels, 3, np.random.default_rng(1))
    assert np.bincount(labels[chosen]).tolist() == [3] * 4


def test_nearest_mean_by_hand():
    examples = np.asarray([[1.0, 0.0], [3.0, 0.2], [0.0, 2.0]])
    said = nearest_mean(examples, np.asarray([0, 0, 1]), np.asarray([[9.0, 1.0], [0.1, 0.2]]), 2)
    assert said.tolist() == [0, 1]
    assert balanced_accuracy(np.asarray([0, 0, 1]), np.asarray([0, 0, 0]) + [0, 1, 1], 2) == 0.75


def test_the_linear_probe_is_that_of_scikit_learn():
    vectors, labels = blobs(spread=1.0)
    chosen = draw(labels, 5, np.random.default_rng(0))
    examples = vectors[chosen] - vectors[chosen].mean(axis=0)
    penalty = 0.01 * np.trace(examples @ examples.T) / len(examples)
    other = RidgeClassifier(alpha=penalty).fit(vectors[chosen], labels[chosen]).predict(vectors[~chosen])
    np.testing.assert_array_equal(linear_probe(vectors[chosen], labels[chosen], vectors[~chosen], 4), other)


def test_scores_rise_with_examples_and_noise_is_chance():
    vectors, labels = blobs(spread=0.8)
    scores, intervals, right = FewShot(shots=(1, 8))._scores(vectors, labels)
    assert scores["nearest_mean_at_8"] > scores["nearest_mean_at_1"] > 0.4
    assert all(low <= scores[name] <= high for name, (low, high) in intervals.items())
    assert len(right) == len(labels)
    noise = np.random.default_rng(0).standard_normal((400, 6))
    scores, intervals, _ = FewShot(shots=(2,))._scores(noise, np.repeat(np.arange(4), 100))
    assert scores["nearest_mean_at_2"] == pytest.approx(0.25, abs=0.03)


def test_draws_follow_from_the_seed():
    vectors, labels = blobs(spread=1.0)
    one, same, other = (FewShot(seed=seed)._scores(vectors, labels)[0] for seed in (0, 0, 1))
    assert one == same != other
    with pytest.raises(ValueError, match="draws >= 2"):
        FewShot(draws=1)
