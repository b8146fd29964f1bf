"""Scoring short answers, against values worked by hand."""

from __future__ import annotations

import pytest

from vl_jax.data.text.normalize import normalize
from vl_jax.evaluate.metrics.exact_match import ExactMatch
from vl_jax.evaluate.task import Compared, Grouped
from vl_jax.evaluate.tasks.answers import Answers, Prior


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Red", "red"),
        ("  two \t words\n", "two words"),
        ("A red circle.", "a red circle"),
        ("红色。", "红色"),
        ("红色．", "红色"),
        ("ＡＢＣ１", "abc1"),
        ("STRASSE", "strasse"),
        ("Straße", "strasse"),
        ("3.5", "3.5"),
        ("", ""),
        (".", ""),
    ],
)
def test_normalising_folds_form_case_space_and_the_final_stop(text, normal):
    assert normalize(text) == normal
    assert normalize(normal) == normal


def test_different_answers_stay_different():
    assert len({normalize(t) for t in ("red", "dark red", "3", "3.5", "红", "红色")}) == 6


def test_the_prior_answers_by_question_then_by_kind_then_nothing():
    prior = Prior(
        [
            ("What colour?", "colour", "red"),
            ("What colour?", "colour", "blue"),
            ("what colour? ", "colour", "blue"),
            ("Which colour?", "colour", "green"),
            ("How many?", "count", "2"),
        ]
    )
    assert prior.predict("WHAT COLOUR?", "colour") == "blue"
    assert prior.predict("A new question", "colour") == "blue"
    assert prior.predict("A new question", "count") == "2"
    assert prior.predict("A new question", "shape") == ""


def test_a_tie_of_the_prior_goes_to_the_answer_seen_first():
    assert Prior([("q", "k", "b"), ("q", "k", "a")]).predict("q", "k") == "b"


BASELINES = ("blind", "prior")
# kind, language, truth, prediction, blind, prior
ANSWERS = [
    ("colour", "en", "red", "Red.", "red", "blue"),
    ("colour", "zh", "红色", "红色。", "蓝色", "红色"),
    ("count", "en", "2", "3", "2", "3"),
    ("", "en", "yes", "yes", "no", "no"),
]


def scores(answers) -> dict[str, float]:
    metric = Compared((ExactMatch(),), BASELINES)
    for _, _, truth, prediction, blind, prior in answers:
        metric.update(truth, prediction, blind=blind, prior=prior)
    return metric.compute()


def test_scores_are_shares_of_exact_matches():
    assert scores(ANSWERS) == {
        "exact_match": 0.75,
        "blind_exact_match": 0.5,
        "prior_exact_match": 0.25,
        "count": 4,
    }


def test_groups_are_by_kind_and_language_and_leave_out_the_unnamed():
    grouped = Grouped(lambda: Compared((ExactMatch(),), BASELINES), ("kind", "language"))
    for kind, language, truth, prediction, blind, prior in ANSWERS:
        record = {"kind": kind, "language": language}
        grouped.update(record, truth, prediction, blind=blind, prior=prior)
    found = grouped.findings()
    assert found.scores == scores(ANSWERS)
    assert found.groups["kind"] == {"colour": scores(ANSWERS[:2]), "count": scores(ANSWERS[2:3])}
    assert found.groups["language"]["en"]["count"] == 3
    assert found.groups["language"]["zh"]["prior_exact_match"] == 1.0


def test_no_answers_score_zero():
    assert scores([]) == {"exact_match": 0, "blind_exact_match": 0, "prior_exact_match": 0, "count": 0}


def test_a_baseline_may_be_the_headline_and_an_unknown_score_may_not():
    assert Answers(headline="blind_exact_match").headline == "blind_exact_match"
    with pytest.raises(ValueError, match="headline='f1': expected one of exact_match, blind_exact_match"):
        Answers(headline="f1")
