"""Scoring short answers, against values worked by hand."""

from __future__ import annotations

import pytest

from vl_jax.data.text.normalize import normalize
from vl_jax.evaluate.answers import Answer, Prior, scores, summarize


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


def answer(kind: str, language: str, truth: str, prediction: str, blind: str = "", prior: str = "") -> Answer:
    return Answer("id", "q", truth, kind, language, prediction, blind, prior)


ANSWERS = [
    answer("colour", "en", "red", "Red.", blind="red", prior="blue"),
    answer("colour", "zh", "红色", "红色。", blind="蓝色", prior="红色"),
    answer("count", "en", "2", "3", blind="2", prior="3"),
    answer("", "en", "yes", "yes", blind="no", prior="no"),
]


def test_scores_are_shares_of_exact_matches():
    assert scores(ANSWERS) == {
        "count": 4,
        "exact_match": 0.75,
        "blind_exact_match": 0.5,
        "prior_exact_match": 0.25,
    }


def test_summary_splits_by_kind_and_language_and_leaves_out_the_unnamed():
    result = summarize(ANSWERS)
    assert result["num_questions"] == 4 and result["exact_match"] == 0.75
    assert result["by_kind"].keys() == {"colour", "count"}
    assert result["by_kind"]["colour"] == scores(ANSWERS[:2])
    assert result["by_kind"]["count"]["exact_match"] == 0.0
    assert result["by_language"]["en"]["count"] == 3
    assert result["by_language"]["zh"]["prior_exact_match"] == 1.0


def test_no_answers_score_zero():
    assert scores([])["exact_match"] == 0.0 and scores([])["count"] == 0
