"""Scoring short answers, against values worked by hand."""

from __future__ import annotations

import typing

import pytest

from vl_jax import schema
from vl_jax.data.text.normalize import normalize
from vl_jax.evaluate.metrics.exact_match import ExactMatch
from vl_jax.evaluate.metrics.text.anls import ANLS
from vl_jax.evaluate.metrics.text.cider import CIDErD
from vl_jax.evaluate.metrics.text.error_rate import ErrorRate
from vl_jax.evaluate.metrics.text.yes_no import YesNo
from vl_jax.evaluate.task import Compared, Grouped, scores_of, shares_of
from vl_jax.evaluate.tasks.answers import Answers, BuiltIn, Prior


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


ALL = tuple(option() for option in typing.get_args(BuiltIn) if option is not ErrorRate)


def test_built_in_metrics_are_named_in_a_config_without_their_module():
    task = Answers(metrics=(*ALL, ErrorRate(), ErrorRate(name="cer", unit="character")), headline="blind_cer")
    written = schema.to_json(task)
    assert '"VQAAccuracy"' in written and "vl_jax." not in written
    assert schema.from_json(written, Answers) == task


def test_two_scores_of_one_name_are_refused():
    with pytest.raises(
        ValueError, match="metrics: two scores are called 'anls'; give one metric another name"
    ):
        Answers(metrics=(ANLS(), ANLS(variant="vlmevalkit")), headline="anls")
    assert Answers(metrics=(ANLS(), ANLS("kit", variant="vlmevalkit")), headline="kit")


def test_metrics_of_several_scores_and_references_give_values_by_sample():
    compared = Compared((ExactMatch(), YesNo()), ("blind",))
    compared.update(("yes", "YES"), "yes", blind="no", cluster="picture")
    compared.update("no", "yes", blind="no", cluster="picture")
    found, samples = compared.compute(), compared.samples()
    assert (found["exact_match"], found["pope_recall"], found["blind_pope_recall"]) == (0.5, 1, 0)
    assert found["count"] == 2 and samples.keys() == found.keys() - {"count"}
    assert all(samples[name].score == found[name] for name in samples)
    assert samples["exact_match"].values.tolist() == [1, 0]
    assert samples["blind_pope_yes_rate"].clusters == ("picture", "picture")


def test_a_metric_without_values_by_sample_stands_beside_the_others():
    class Said:
        name = "said"

        def start(self):
            self.texts = []
            return self

        def update(self, truth, prediction):
            self.texts.append(prediction)

        def compute(self):
            return {"said": len(self.texts)}

    compared = Compared((Said(), ExactMatch()))
    compared.update("a", "a", cluster="picture")
    assert compared.compute() == {"said": 1, "exact_match": 1, "count": 1}
    assert compared.samples().keys() == {"exact_match"}


def test_scores_that_are_no_shares_are_not_shown_as_percentages():
    assert shares_of(CIDErD()) == shares_of(ErrorRate()) == () and scores_of(CIDErD()) == ("cider_d",)
    assert shares_of(ANLS()) == ("anls",) and "pope_f1" in shares_of(YesNo())
