"""Detecting one class: AUROC, and false alarms at equal recall."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vl_jax.evaluate.metrics.detecting import DetectingScores, false_alarms
from vl_jax.evaluate.tasks.labels import Labels

numbers = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=40).map(np.array)


def test_false_alarms_worked_by_hand():
    positive, negative = np.arange(1.0, 21.0), np.array([0.5, 1.5, 2.0, 3.0])
    assert false_alarms(positive, negative) == 0.5  # 19 of 20 are at least 2, and so are two of four
    assert false_alarms(positive, negative, recall=1.0) == 0.75


@given(numbers, numbers, st.sampled_from([0.05, 0.5, 0.95, 1.0]))
def test_they_are_those_of_the_best_threshold_that_scikit_learn_knows(positive, negative, recall):
    metrics = pytest.importorskip("sklearn.metrics")
    truth = np.r_[np.ones(len(positive)), np.zeros(len(negative))]
    false, true, _ = metrics.roc_curve(truth, np.r_[positive, negative], drop_intermediate=False)
    expected = false[true >= recall - 1e-9].min()
    assert false_alarms(positive, negative, recall=recall) == pytest.approx(expected)


def test_scores_are_of_the_probability_of_the_class():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    logits, truth = rng.normal(size=(60, 3)) * 30, rng.integers(0, 3, 60)
    found = DetectingScores(("a", "b", "c"), "b")
    for row, of in zip(logits, truth, strict=True):
        found.update(int(of), int(np.argmax(row)), scores=row)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    scores = found.compute()
    assert scores["auroc"] == pytest.approx(metrics.roc_auc_score(truth == 1, shares[:, 1]), abs=5e-3)
    assert scores["accuracy"] == np.mean(np.argmax(logits, 1) == truth)


def test_a_group_of_one_kind_has_no_auroc():
    found = DetectingScores(("a", "b"), "b")
    found.update(0, 0, scores=np.array([1.0, 0.0]))
    assert "auroc" not in found.compute() and found.compute()["accuracy"] == 1.0


def test_headlines_that_do_not_exist_are_refused():
    assert Labels(positive="b", headline="auroc").headline == "auroc"
    with pytest.raises(ValueError, match="headline='auroc': expected one of accuracy"):
        Labels(headline="auroc")
    with pytest.raises(ValueError, match="1 positives, 0 negatives"):
        false_alarms(np.ones(1), np.ones(0))
