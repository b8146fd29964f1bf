"""Metrics of answers: values worked by hand, definitions written out, and what the packages say."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from vl_jax.evaluate.metrics import extra
from vl_jax.evaluate.metrics.per_sample import PerSample, SampleList, TextScores, references_of
from vl_jax.evaluate.metrics.text.anls import ANLS, anls
from vl_jax.evaluate.metrics.text.circular import CircularScores, read_option
from vl_jax.evaluate.metrics.text.error_rate import ErrorRate, errors_of, folded
from vl_jax.evaluate.metrics.text.ocrbench import FORMULAS, OCRBenchScores, holds_reference
from vl_jax.evaluate.metrics.text.relaxed import RelaxedAccuracy, is_relaxed_match
from vl_jax.evaluate.metrics.text.vqa import VQAAccuracy, vqa_accuracy
from vl_jax.evaluate.metrics.text.vqa_text import evalai_form, vqa_form
from vl_jax.evaluate.metrics.text.yes_no import YesNo, read_yes_no

CASES = 1000


def random_text(rng: np.random.Generator, letters: str = "ab c", longest: int = 8) -> str:
    return "".join(rng.choice(list(letters), size=rng.integers(0, longest)))


def edits(one, other) -> int:
    """The edit distance, from its definition."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, start=1):
            before, row[j] = row[j], min(before + (a != b), row[j] + 1, row[j - 1] + 1)
    return row[-1]


# Values by sample.


def test_a_score_is_the_sum_of_sums_over_the_sum_of_sizes_and_clusters_add_up():
    found = SampleList(("rate",))
    for total, size, cluster in ((1.0, 2.0, "a"), (3.0, 4.0, "b"), (0.0, 2.0, "a"), (0.0, 0.0, None)):
        found.add({"rate": (total, size)}, cluster)
    rate = found.samples()["rate"]
    assert rate.score == 0.5 and found.compute() == {"rate": 0.5}
    assert rate.values.tolist() == [0.5, 0.75, 0, 0]
    sums, sizes = rate.by_cluster()
    assert sums.tolist() == [1, 3, 0] and sizes.tolist() == [4, 4, 0]
    assert rate.clusters == ("a", "b", "a", "sample 3")
    assert PerSample(np.zeros(2), np.zeros(2), ("a", "b")).score == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, (1.0, -1.0), (1.0, math.nan)])
def test_what_is_no_number_is_named_by_its_sample(value):
    found = SampleList(("score",))
    found.add({"score": 1.0})
    with pytest.raises(ValueError, match="sample 1: score is .* expected finite numbers"):
        found.add({"score": value})


def test_nothing_to_score_and_missing_references_are_refused():
    metric = TextScores(("same",), lambda references, said: {"same": float(said in references)})
    with pytest.raises(ValueError, match="same: no sample to score"):
        metric.compute()
    metric.update("a", "a")
    with pytest.raises(ValueError, match="sample 1: no reference"):
        metric.update([], "a")
    with pytest.raises(ValueError, match="sample 7: reference is int, expected a text"):
        references_of([1], "a", 7)
    assert metric.compute() == {"same": 1.0}


@pytest.mark.parametrize("metric", [ANLS(), ErrorRate()])
def test_a_missing_package_is_named_with_its_extra(metric, monkeypatch):
    def absent(name: str):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

    monkeypatch.setattr(extra.importlib, "import_module", absent)
    with pytest.raises(ValueError, match=r"needs (rapidfuzz|jiwer), which is not installed: pip install"):
        metric.start()


# VQA accuracy.


@pytest.mark.parametrize("variant", ["official", "evalai", "lmms_eval", "vlmevalkit", "vlmevalkit_2026"])
def test_vqa_accuracy_by_the_number_of_people_who_agree(variant):
    for n, expected in enumerate([0, 0.3, 0.6, 0.9, 1, 1, 1]):
        answers = ["dog"] * n + [f"cat {i}" for i in range(10 - n)]
        assert vqa_accuracy(answers, "dog", variant=variant) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "vqa", "evalai"),
    [
        ("The dog!", "dog", "dog"),
        ("two\tdogs\n", "2 dogs", "2 dogs"),
        ("None", "0", "0"),
        ("dont", "don't", "don't"),
        ("wouldnt've", "wouldn't've", "wouldn't've"),
        ("somebody'd", "somebodyd", "somebodyd"),
        ("1,000 (dogs)", "1000 dogs", "1000 dogs"),  # a comma in a number: marks leave no space behind
        ("red/blue", "red blue", "red blue"),
        ("1,000/2", "10002", "1000 2"),  # the answer processor has taken the comma out before
        ("red,blue", "red blue", "redblue"),
        ("yes.", "yes", "yes"),
        ("U.S.", "us", "us"),
        ("3.5 m", "3.5 m", "3.5 m"),
        ("dog's", "dog's", "dog 's"),
        ("a an the", "", ""),
    ],
)
def test_answers_are_brought_to_one_form(text, vqa, evalai):
    assert vqa_form(text) == vqa and evalai_form(text) == evalai


def test_where_all_people_agree_the_official_script_normalises_nothing():
    answers = ["Yes."] * 10
    assert vqa_accuracy(answers, "yes", variant="official") == 0
    assert vqa_accuracy(answers, " Yes.\n", variant="official") == 1
    assert vqa_accuracy(answers, "yes", variant="vlmevalkit") == 1
    assert vqa_accuracy(answers, "yes", variant="lmms_eval") == 1
    assert vqa_accuracy(["5."] * 10, "5", variant="vlmevalkit") == 1
    assert vqa_accuracy(["5."] * 10, "5", variant="vlmevalkit_2026") == 0  # a full stop behind a digit
    assert vqa_accuracy([*answers[:9], "yes"], "yes", variant="official") == 1


def test_vqa_accuracy_is_the_mean_of_leaving_each_person_out():
    rng = np.random.default_rng(0)
    for _ in range(CASES):
        answers = [f"w{i}" for i in rng.integers(0, 4, size=rng.integers(4, 12))]
        said = f"w{rng.integers(0, 5)}"
        left_out = [
            min(1, sum(a == said for j, a in enumerate(answers) if j != i) / 3) for i in range(len(answers))
        ]
        assert vqa_accuracy(answers, said) == pytest.approx(np.mean(left_out), abs=1e-12)


def test_vqa_accuracy_refuses_a_single_reference():
    metric = VQAAccuracy().start()
    with pytest.raises(ValueError, match=r"sample 0: .*1 reference\(s\), needs at least 4"):
        metric.update("dog", "dog")


# ANLS.


@pytest.mark.parametrize(
    ("references", "said", "strict", "vlmevalkit", "lmms_eval"),
    [
        (["Paris"], " paris ", 1, 1, 1),
        (["paris"], "pari", 0.8, 0.8, 0.8),
        (["rome", "paris"], "paris!", 5 / 6, 5 / 6, 5 / 6),
        (["ab"], "ax", 0, 0.5, 0.5),  # exactly half
        (["abcd"], "abcx      ", 0.75, 0.75, 0.9),  # spaces at the end make it longer
        (["abcdef"], "zzzzzz", 0, 0, 0),
        ([""], "", 1, 1, 1),
    ],
)
def test_anls_worked_by_hand(references, said, strict, vlmevalkit, lmms_eval):
    pytest.importorskip("rapidfuzz")
    for variant, expected in (("strict", strict), ("vlmevalkit", vlmevalkit), ("lmms_eval", lmms_eval)):
        assert anls(references, said, variant=variant) == pytest.approx(expected, abs=1e-12)


def test_anls_is_that_of_its_definition():
    pytest.importorskip("rapidfuzz")
    rng = np.random.default_rng(0)
    for _ in range(CASES):
        references, said = [random_text(rng) for _ in range(2)], random_text(rng)
        threshold = float(rng.uniform(0.2, 1))
        best = 0.0
        for reference in references:
            a, b = (" ".join(t.split()) for t in (reference, said))
            distance = edits(a, b) / max(len(a), len(b), 1)
            best = max(best, 1 - distance if distance < threshold else 0)
        assert anls(references, said, threshold=threshold) == pytest.approx(best, abs=1e-12)


# Relaxed accuracy.


@pytest.mark.parametrize(
    ("truth", "said", "right"),
    [
        ("100", "105", True),
        ("100", "105.1", False),
        ("-100", "-95", True),
        ("0", "0", True),
        ("0", "0.0", False),  # a reference of 0 is a text
        ("12%", "0.12", True),
        ("12%", "12", False),
        ("1,000", "1000", False),
        ("Yes", "yes", True),
        ("yes", "yes it is", False),
        ("nan", "nan", False),
    ],
)
def test_relaxed_accuracy_worked_by_hand(truth, said, right):
    assert is_relaxed_match(truth, said) is right
    assert is_relaxed_match(truth, said, variant="lmms_eval") is right


def test_variants_of_relaxed_accuracy_differ_in_texts_alone():
    found = [is_relaxed_match("Yes", t, variant=v) for v in ("vlmevalkit", "lmms_eval", "big_vision") for t in (" yes", "yes", "Yes")]  # fmt: skip # noqa: E501
    assert found == [True, True, True, False, True, True, False, False, True]
    metric = RelaxedAccuracy().start()
    metric.update(["blue", "10"], "10.4")
    assert metric.compute() == {"relaxed_accuracy": 1.0}


def test_a_number_is_right_within_the_tolerance():
    rng = np.random.default_rng(0)
    for _ in range(CASES):
        truth, off = float(rng.integers(1, 10_000)) / 100, int(rng.integers(-99, 100))
        if abs(off) != 50:
            assert is_relaxed_match(f"{truth}", f"{truth * (1 + off / 1000)}") is (abs(off) < 50)


# OCRBench.


def test_ocrbench_worked_by_hand():
    scores = OCRBenchScores()
    scores.update("STOP", "it says Stop!", category="Regular Text Recognition", cluster="a")
    scores.update(["12", "twelve"], "thirteen", category="Digit String Recognition")
    scores.update("x ^ 2\n+ Y", "x^2 + Y", category=FORMULAS)
    scores.update("x + Y", "x+y", category=FORMULAS)
    found = scores.compute()
    assert found == {
        "ocrbench": 0.5,
        "answer_length": (13 + 8 + 7 + 3) / 4,
        "points": 2,
        "points/Regular Text Recognition": 1,
        "points/Digit String Recognition": 0,
        "points/Text Recognition": 1,
        f"points/{FORMULAS}": 1,
    }
    assert scores.compute() == found  # no state is kept from one count to the next
    assert scores.samples()["ocrbench"].values.tolist() == [1, 0, 1, 0]
    with pytest.raises(ValueError, match="sample 4: category='Maths': expected one of"):
        scores.update("a", "a", category="Maths")
    with pytest.raises(ValueError, match="sample 4: a reference is empty"):
        scores.update(" ", "a", category=FORMULAS)


@pytest.mark.slow
def test_an_answer_holds_a_reference_wherever_it_stands_and_however_it_is_spaced():
    rng = np.random.default_rng(0)
    for _ in range(CASES):
        truth = "".join(rng.choice(list("abC"), size=4))
        said = f"{random_text(rng, 'xyz ')}{truth}{random_text(rng, 'xyz ')}"
        assert holds_reference(["w", truth.swapcase()], said)
        assert holds_reference([truth], " ".join(said), formulas=True)
        assert not holds_reference([truth], said.swapcase(), formulas=True)
        assert not holds_reference([truth], said.replace(truth, truth[:3]))


# Yes or no.

POPE = [
    ("yes", "Yes, there is a dog."),
    ("yes", "No"),
    ("yes", "maybe"),
    ("no", "yes"),
    ("no", "No."),
    ("no", "There is not one"),
]


@pytest.mark.parametrize(
    ("reading", "expected"),
    [  # accuracy, precision, recall, F1, yes rate, unreadable
        ("first", (2 / 6, 1 / 2, 1 / 3, 2 / 5, 2 / 6, 2 / 6)),
        ("official", (4 / 6, 2 / 3, 2 / 3, 2 / 3, 3 / 6, 0)),
        ("vlmevalkit", (2 / 6, 1 / 2, 1 / 3, 2 / 5, 2 / 6, 2 / 6)),
        ("lmms_eval", (0, 0, 0, 0, 1 / 6, 4 / 6)),
    ],
)
def test_yes_or_no_worked_by_hand(reading, expected):
    metric = YesNo(reading=reading).start()
    for truth, said in POPE:
        metric.update(truth, said)
    assert tuple(metric.compute().values()) == pytest.approx(expected)


def test_readings_of_yes_and_no():
    assert (
        read_yes_no("Well: no, yes") is False and read_yes_no("Well: no, yes", reading="vlmevalkit") is None
    )
    assert read_yes_no("nothing") is None and read_yes_no("", reading="official") is True
    assert (
        read_yes_no(" Yes ", reading="lmms_eval") is True and read_yes_no("Yes.", reading="lmms_eval") is None
    )
    with pytest.raises(ValueError, match="sample 0: references 'perhaps': expected 'yes' or 'no'"):
        YesNo().start().update("perhaps", "yes")


@pytest.mark.slow
def test_scores_of_yes_or_no_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    truths, said = np.random.default_rng(0).integers(0, 2, size=(2, 8, CASES))
    # To scikit-learn each case is one label of eight samples.
    expected = metrics.precision_recall_fscore_support(truths, said, average=None, zero_division=0)[:3]
    for case in range(CASES):
        metric = YesNo(name="x").start()
        for truth, answer in zip(truths[:, case], said[:, case], strict=True):
            metric.update(("no", "yes")[truth], ("No.", "Yes.")[answer])
        found = metric.compute()
        scores = [found[f"x_{name}"] for name in ("precision", "recall", "f1", "accuracy")]
        assert scores == pytest.approx([*(e[case] for e in expected), np.mean(truths == said, axis=0)[case]])


# Circular evaluation.

OPTIONS = {"A": "a red dog", "B": "a cat"}
TURNED = {"A": "a cat", "B": "a red dog"}


@pytest.mark.parametrize(
    ("said", "kit", "strict"),
    [
        ("A", "A", "A"),
        ("(B).", "B", "B"),
        ("The answer is B", "B", None),
        ("a red dog", "A", "A"),
        ("it shows a cat", "B", None),
        ("A or B", None, None),
        ("B is what I would say of this one, as far as I can see", None, None),  # too far from the end
        ("", None, None),
    ],
)
def test_which_option_is_meant(said, kit, strict):
    assert read_option(said, OPTIONS) == kit
    assert read_option(said, OPTIONS, reading="strict") == strict


def test_a_question_is_right_only_under_all_rotations():
    scores = CircularScores()
    for question, first, second in (("q1", "A", "B"), ("q2", "A", "A"), ("q3", "hm", "hm")):
        scores.update(question, OPTIONS, "A", first, cluster="picture")
        if question == "q3":
            with pytest.raises(ValueError, match="question 'q3': 1 of 2 rotations"):
                scores.compute()
            with pytest.raises(ValueError, match="question 'q3': a rotation of its options was given twice"):
                scores.update(question, OPTIONS, "A", first)
        scores.update(question, TURNED, "B", second)
    assert scores.compute() == pytest.approx({"circular": 1 / 3, "vanilla": 2 / 3, "unreadable": 2 / 6})
    assert scores.samples()["circular"].by_cluster()[0].tolist() == [1]
    with pytest.raises(ValueError, match="truth='C': expected one of A, B"):
        scores.update("q4", OPTIONS, "C", "A")


def test_circular_is_the_share_of_questions_without_a_wrong_rotation():
    rng = np.random.default_rng(0)
    texts = "apple bread cider dough".split()
    scores, right = CircularScores(), Counter()
    for question in range(CASES):
        for turn in range(4):
            options = dict(zip("ABCD", texts[turn:] + texts[:turn], strict=True))
            truth, said = (
                "ABCD"[-turn % 4],
                "ABCD"[rng.integers(4)] if rng.random() < 0.2 else "ABCD"[-turn % 4],
            )
            scores.update(str(question), options, truth, said)
            right[question] += truth == said
    assert scores.compute()["circular"] == pytest.approx(np.mean([right[q] == 4 for q in range(CASES)]))


# Error rates.


def test_error_rates_worked_by_hand():
    pytest.importorskip("jiwer")
    words, letters = ErrorRate().start(), ErrorRate(name="cer", unit="character").start()
    for truth, said in (("The cat sat.", "the cat sit down"), ("a b", "A b")):
        words.update(truth, said)
        letters.update(truth, said)
    assert words.compute() == {"wer": pytest.approx(2 / 5)}  # no mean of 2 / 3 and 0
    assert letters.compute() == {"cer": pytest.approx(6 / 14)}
    raw = ErrorRate(fold=False).start()
    raw.update(["x", "The cat"], "the cat")
    assert raw.compute() == {"wer": 0.5}  # the reference with the lowest rate
    with pytest.raises(ValueError, match="sample 1: the reference has no word"):
        raw.update(" ", "a")


def test_folding_leaves_words_alone():
    assert folded("“It’s  ＯＫ,” she said.") == "it's ok she said"


@pytest.mark.parametrize("unit", ["word", "character"])
def test_errors_are_the_edit_distance(unit):
    pytest.importorskip("jiwer")
    rng = np.random.default_rng(0)
    for _ in range(CASES):
        truth, said = (" ".join(random_text(rng).split()) for _ in range(2))
        sides = (truth.split(), said.split()) if unit == "word" else (truth, said)
        assert errors_of(truth, said, unit=unit) == (edits(*sides), len(sides[0]))
