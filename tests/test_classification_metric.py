"""Scores of predicted classes: hand-worked values, and what has to hold for any."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vl_jax.evaluate.metrics.classification import classification, confusion_matrix


def test_scores_worked_by_hand():
    truth = np.asarray([0, 0, 0, 0, 1, 1, 3])
    prediction = np.asarray([0, 0, 0, 1, 1, 2, 3])
    scores = classification(truth, prediction, 5)
    assert scores["confusion"] == [
        [3, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0],
    ]
    assert scores["count"] == 7
    assert scores["accuracy"] == pytest.approx(5 / 7)
    assert scores["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)  # classes 0, 1 and 3 occur
    # F1 is 2 * right / (truths + predictions). Class 2 was predicted and never true; class 4 is neither.
    assert scores["macro_f1"] == pytest.approx((6 / 7 + 2 / 4 + 0 + 1) / 4)
    assert scores["majority_class"] == 0
    assert scores["majority_accuracy"] == pytest.approx(4 / 7)
    assert scores["majority_balanced_accuracy"] == pytest.approx(1 / 3)
    assert scores["majority_macro_f1"] == pytest.approx(8 / 11 / 3)
    assert json.loads(json.dumps(scores)) == scores


rows = st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 3)), min_size=1, max_size=20).filter(
    lambda pairs: any(truth >= 0 for truth, _ in pairs)
)


def split(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray([t for t, _ in pairs]), np.asarray([p for _, p in pairs])


@given(rows)
def test_scores_are_those_of_their_definitions(pairs):
    scores = classification(*split(pairs), 4)
    labelled = [(t, p) for t, p in pairs if t >= 0]
    assert scores["count"] == len(labelled) == np.sum(scores["confusion"])
    assert scores["accuracy"] == pytest.approx(np.mean([t == p for t, p in labelled]))
    recalls, f1s = [], []
    for c in range(4):
        hits = sum(t == p == c for t, p in labelled)
        truths, predictions = (sum(pair[i] == c for pair in labelled) for i in (0, 1))
        recall = hits / truths if truths else 0.0
        precision = hits / predictions if predictions else 0.0
        recalls += [recall] * (truths > 0)
        f1 = 2 * recall * precision / (recall + precision) if hits else 0.0
        f1s += [f1] * (truths + predictions > 0)
    assert scores["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert scores["macro_f1"] == pytest.approx(np.mean(f1s))


@given(rows, st.randoms(use_true_random=False), st.permutations(range(4)))
def test_neither_order_nor_names_nor_unlabelled_rows_matter(pairs, random, names):
    expected = classification(*split(pairs), 4)
    changed = [(names[t] if t >= 0 else t, names[p]) for t, p in pairs] + [(-1, 0), (-7, 3)]
    random.shuffle(changed)
    actual = classification(*split(changed), 4)
    for name in expected.keys() - {"confusion", "majority_class", "majority_macro_f1"}:
        assert actual[name] == pytest.approx(expected[name])
    order = np.asarray(names)
    np.testing.assert_array_equal(
        np.asarray(actual["confusion"])[np.ix_(order, order)], expected["confusion"]
    )


@given(rows)
def test_the_baseline_is_the_score_of_saying_its_class(pairs):
    truth, prediction = split(pairs)
    scores = classification(truth, prediction, 4)
    constant = classification(truth, np.full(len(truth), scores["majority_class"]), 4)
    for name in ("accuracy", "balanced_accuracy", "macro_f1"):
        assert scores[f"majority_{name}"] == constant[name] == constant[f"majority_{name}"]
    others = [classification(truth, np.full(len(truth), c), 4)["accuracy"] for c in range(4)]
    assert scores["majority_accuracy"] == max(others)


@pytest.mark.parametrize(
    "truth, prediction, num_classes, message",
    [
        ([0, 4], [0, 1], 4, "truth 4 is no class; expected 0 to 3"),
        ([0, 1], [0, -1], 4, "prediction -1 is no class; expected 0 to 3"),
        ([0, 1], [9, 0], 4, "prediction 9 is no class; expected 0 to 3"),
        ([0], [0], 0, "num_classes=0 must be >= 1"),
    ],
)
def test_classes_that_do_not_exist_are_named(truth, prediction, num_classes, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(np.asarray(truth), np.asarray(prediction), num_classes)


def test_rows_without_any_label_have_no_score():
    with pytest.raises(ValueError, match="none of 2 rows has a label"):
        classification(np.asarray([-1, -1]), np.asarray([0, 1]), 2)
