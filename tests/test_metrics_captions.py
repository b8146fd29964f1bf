"""Metrics of captions: values worked by hand, definitions written out, and what the packages say."""

from __future__ import annotations

import importlib
import math
import shutil
import subprocess
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vl_jax.evaluate.metrics.text.bleu import BLEU, ChrF
from vl_jax.evaluate.metrics.text.cider import CIDErD, cider_d
from vl_jax.evaluate.metrics.text.ptb import ptb_words
from vl_jax.evaluate.metrics.text.rouge import RougeL, longest_common, rouge_l

CASES = 1000
WORDS = "a the dog cat runs sits on under red mat".split()


def captions(rng: np.random.Generator, count: int, *, fewest: int = 0) -> list[list[str]]:
    return [list(rng.choice(WORDS, size=rng.integers(fewest, 9))) for _ in range(count)]


def other(module: str):
    """A package that is compared with; it may warn as it likes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(module)


# Words.

SENTENCES = {
    "A man's dog can't jump over the U.S. flag.": "a man 's dog ca n't jump over the u.s. flag",
    'Don\'t "stop" now (really) -- it\'s 10:30!': "do n't stop now -lrb- really -rrb- it 's 10:30",
    "cannot gonna o'clock": "can not gon na o'clock",
    "black-and-white shirt, and/or $3,000.5 (5%)": "black-and-white shirt and/or $ 3,000.5 -lrb- 5 % -rrb-",
    "The dogs' bones... Mr. Smith vs. St. John's": "the dogs bones mr. smith vs. st. john 's",
    "I'm we're they've you'll he'd wouldn't've": "i 'm we 're they 've you 'll he 'd would n't 've",
    "He said: ‘hello’ “world” – café 3rd '90s": "he said hello world café 3rd '90s",
    "someone 's AT&T #1 ?!": "someone 's at&t # 1 ?!",
}  # fmt: skip


@pytest.mark.parametrize("text", SENTENCES)
def test_words_are_those_of_the_penn_treebank(text):
    assert ptb_words(text) == SENTENCES[text].split()


def test_a_chinese_character_is_a_word():
    assert ptb_words("红色的dog。") == ["红", "色", "的", "dog", "。"]
    assert ptb_words("") == []


def test_words_are_those_of_the_program_in_java(tmp_path):
    tokenizer = other("pycocoevalcap.tokenizer.ptbtokenizer")
    if shutil.which("java") is None:
        pytest.skip("no java")
    file = tmp_path / "captions.txt"
    file.write_text("\n".join(SENTENCES))
    jar = Path(tokenizer.__file__).parent / tokenizer.STANFORD_CORENLP_3_4_1_JAR
    program = ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", str(file)]
    printed = subprocess.run(
        ["java", "-cp", str(jar), *program], capture_output=True, check=True, timeout=600
    ).stdout
    for text, line in zip(SENTENCES, printed.decode().splitlines(), strict=True):
        assert ptb_words(text) == [w for w in line.split() if w not in tokenizer.PUNCTUATIONS]


# CIDEr-D.


def test_cider_worked_by_hand():
    # Every group of words is in one of two pictures, so all weigh log 2. There are no groups of 3 or 4.
    references = [[["a", "b"]], [["c", "d"]]]
    assert cider_d(references, [["a", "b"], ["c", "d"]]) == pytest.approx([5, 5])
    repeated, shorter = cider_d(references, [["a", "a"], ["c"]])
    assert repeated == pytest.approx(10 / 4 / (2 * math.sqrt(2)))  # the second "a" does not count
    assert shorter == pytest.approx(10 / 4 / math.sqrt(2) * math.exp(-1 / 72))
    # In a corpus of three that all know "a", only "b" and the pair weigh.
    corpus = [*references, [["a"]]]
    log3, log15 = math.log(3), math.log(1.5)
    (score, _) = cider_d(references, [["a", "a"], ["c", "d"]], corpus=corpus)
    cosine = min(2 * log15, log15) * log15 / (2 * log15 * math.hypot(log15, log3))
    assert score == pytest.approx(10 / 4 * cosine)


def vector(found: list[tuple[str, ...]], place: dict[tuple[str, ...], int]) -> np.ndarray:
    return np.bincount(np.array([place[group] for group in found], np.int64), minlength=len(place))


def groups(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def defined_cider(references: list, predictions: list) -> np.ndarray:
    """CIDEr-D from its definition, by vectors over all groups of words."""
    scores = np.zeros(len(references))
    for n in (1, 2, 3, 4):
        per_image = [{g for words in texts for g in groups(words, n)} for texts in references]
        known = {g for image in per_image for g in image} | {g for p in predictions for g in groups(p, n)}
        place = {g: i for i, g in enumerate(sorted(known))}
        counts = Counter(g for image in per_image for g in image)
        weights = np.array([math.log(len(references) / max(1, counts[g])) for g in place])

        for row, (texts, said) in enumerate(zip(references, predictions, strict=True)):
            for words in texts:
                a, b = (vector(groups(text, n), place) * weights for text in (said, words))
                norm = np.linalg.norm(a) * np.linalg.norm(b)
                apart = max(0, len(said) - 1) - max(0, len(words) - 1)
                cosine = np.minimum(a, b) @ b / norm if norm else 0.0
                scores[row] += 10 / 4 / len(texts) * cosine * math.exp(-(apart**2) / 72)
    return scores


def test_cider_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    for size in (2, 3, 195, 800):
        references = [captions(rng, int(rng.integers(1, 4)), fewest=1) for _ in range(size)]
        predictions = captions(rng, size)
        expected = defined_cider(references, predictions)
        assert cider_d(references, predictions) == pytest.approx(expected, abs=1e-9)
        assert size < 100 or np.mean(expected > 0) > 0.5


def test_cider_and_rouge_are_those_of_pycocoevalcap():
    cider = other("pycocoevalcap.cider.cider")
    rouge = other("pycocoevalcap.rouge.rouge")
    rng = np.random.default_rng(1)
    references = [captions(rng, 3, fewest=1) for _ in range(CASES)]
    predictions = captions(rng, CASES, fewest=1)
    truths = {i: [" ".join(words) for words in texts] for i, texts in enumerate(references)}
    said = {i: [" ".join(words)] for i, words in enumerate(predictions)}
    _, expected = cider.Cider().compute_score(truths, said)
    assert cider_d(references, predictions) == pytest.approx(expected, abs=1e-9)
    _, expected = rouge.Rouge().compute_score(truths, said)
    found = [rouge_l(r, p) for r, p in zip(references, predictions, strict=True)]
    assert found == pytest.approx(expected, abs=1e-9)


def test_cider_needs_two_pictures_and_a_reference_for_each():
    with pytest.raises(ValueError, match=r"by 1 picture\(s\); with fewer than 2 all scores are 0"):
        cider_d([[["a"]]], [["a"]])
    with pytest.raises(ValueError, match="sample 1: no reference"):
        cider_d([[["a"]], []], [["a"], ["a"]])
    with pytest.raises(ValueError, match="2 lists of references for 1 captions"):
        cider_d([[["a"]], [["b"]]], [["a"]])
    metric = CIDErD().start()
    with pytest.raises(ValueError, match="fewer than 2"):
        metric.compute()
    metric.update(["A dog.", "One dog"], "a dog", cluster="x")
    assert math.isnan(metric.compute()["cider_d"])  # the only picture of a group
    metric.update("A cat!", "a cat")
    assert metric.samples()["cider_d"].clusters == ("x", "sample 1")
    assert 0 < metric.compute()["cider_d"] < 10


# ROUGE-L.


def test_rouge_worked_by_hand():
    truth, said = "the cat sat on the mat".split(), "the cat on mat".split()
    assert longest_common(truth, said) == 4
    assert rouge_l([truth], said) == pytest.approx(2.44 * (2 / 3) / (2 / 3 + 1.44))
    assert rouge_l([truth], said, variant="f1") == pytest.approx(0.8)
    # The best precision is one reference's, the best recall another's.
    assert rouge_l([truth, ["cat"]], said) == pytest.approx(1.0)
    assert rouge_l([truth, ["cat"]], said, variant="f1") == pytest.approx(0.8)
    assert rouge_l([["dog"], []], said) == rouge_l([truth], []) == 0
    metric = RougeL(variant="f1").start()
    metric.update("The cat, sat!", "the-cat")
    assert metric.compute() == {"rouge_l": pytest.approx(0.8)}


def test_the_longest_common_sequence_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    for one, two in zip(captions(rng, CASES), captions(rng, CASES), strict=True):
        table = np.zeros((len(one) + 1, len(two) + 1), int)
        for i, a in enumerate(one):
            for j, b in enumerate(two):
                table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
        assert longest_common(one, two) == table[-1, -1]


def test_rouge_of_summaries_is_that_of_rouge_score():
    package = other("rouge_score.rouge_scorer")
    scorer, rng = package.RougeScorer(["rougeL"]), np.random.default_rng(0)
    for truth, said in zip(captions(rng, CASES), captions(rng, CASES), strict=True):
        expected = scorer.score(" ".join(truth), " ".join(said))["rougeL"].fmeasure
        assert rouge_l([truth], said, variant="f1") == pytest.approx(expected)


# BLEU and chrF.


def scored(metric, *pairs) -> float:
    started = metric.start()
    for truth, said in pairs:
        started.update(truth, said)
    (value,) = started.compute().values()
    return value


def test_bleu_and_chrf_worked_by_hand():
    other("sacrebleu")
    pair = ("the cat is on the mat", "the cat sat on the mat")
    # 5 of 6 words, 3 of 5 pairs, 1 of 4 threes, none of 3 fours (which counts as half of one).
    assert scored(BLEU(), pair) == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** (1 / 4))
    assert scored(BLEU(), (pair[0], pair[0])) == pytest.approx(100)
    # Shorter than the reference by one word: all is right, times exp(1 - 5 / 4).
    assert scored(BLEU(), ("a b c d e", "a b c d")) == pytest.approx(100 * math.exp(1 - 5 / 4))
    assert scored(BLEU(lowercase=True), ("A B C D", "a b c d")) == pytest.approx(100)
    assert scored(ChrF(), ("ac", "ab")) == pytest.approx(25)  # 1 of 2 letters, none of 1 pairs
    assert scored(ChrF(), ("ab", "ab")) == pytest.approx(100)


def test_bleu_of_chinese_counts_characters():
    other("sacrebleu")
    pair = ("我喜欢猫", "我喜欢狗")  # 3 of 4, 2 of 3, 1 of 2, and none of 1
    assert scored(BLEU(tokenizer="zh"), pair) == pytest.approx(100 * (3 / 4 * 2 / 3 / 2 / 2) ** (1 / 4))
    assert scored(BLEU(), pair) == 0  # to the tokenizer of English it is one word


def defined_bleu(references: list, predictions: list) -> float:
    """BLEU of the whole set from its definition; for a reference length the nearest, of two the shorter."""
    logs, said = 0.0, sum(map(len, predictions))
    near = [min(map(len, r), key=lambda n: (abs(n - len(p)), n)) for r, p in zip(references, predictions, strict=True)]  # fmt: skip # noqa: E501
    for n in (1, 2, 3, 4):
        right = total = 0
        for texts, words in zip(references, predictions, strict=True):
            count = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
            most = Counter[tuple[str, ...]]()
            for text in texts:
                most |= Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))
            right, total = right + (count & most).total(), total + count.total()
        if not right:
            return math.nan
        logs += math.log(right / total) / 4
    return 100 * math.exp(logs + min(0, 1 - sum(near) / said))


def test_bleu_is_that_of_its_definition():
    other("sacrebleu")
    rng, checked = np.random.default_rng(0), 0
    while checked < CASES:
        references = [captions(rng, int(rng.integers(1, 4)), fewest=4) for _ in range(2)]
        predictions = [list(texts[0]) for texts in references]
        for words in predictions:
            words[int(rng.integers(len(words)))] = str(rng.choice(WORDS))
        expected = defined_bleu(references, predictions)
        if math.isfinite(expected):
            pairs = ([[" ".join(t) for t in r], " ".join(p)] for r, p in zip(references, predictions, strict=True))  # fmt: skip # noqa: E501
            assert scored(BLEU(tokenizer="none"), *pairs) == pytest.approx(expected)
            checked += 1


def test_chrf_is_that_of_its_definition():
    other("sacrebleu")
    rng = np.random.default_rng(0)
    for truth, said in zip(captions(rng, CASES, fewest=4), captions(rng, CASES, fewest=4), strict=True):
        a, b = "".join(truth), "".join(said)
        parts = []
        for n in range(1, 7):
            one, two = (Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in (a, b))
            parts.append(((one & two).total() / two.total(), (one & two).total() / one.total()))
        precision, recall = np.mean(parts, axis=0)
        expected = 100 * 5 * precision * recall / (4 * precision + recall) if precision * recall else 0
        assert scored(ChrF(), (" ".join(truth), " ".join(said))) == pytest.approx(expected)


def test_corpus_scores_refuse_nothing_and_no_reference():
    other("sacrebleu")
    metric = BLEU().start()
    with pytest.raises(ValueError, match="bleu: no sample to score"):
        metric.compute()
    with pytest.raises(ValueError, match="sample 0: no reference"):
        metric.update([], "a")
    assert not hasattr(metric, "samples") and importlib.util.find_spec("sacrebleu")
    with pytest.raises(ValueError, match="word_order=-1 must be >= 0"):
        ChrF(word_order=-1)
