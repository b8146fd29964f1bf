"""A blind model of texts, and how often own texts are told from wrong ones."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vl_jax.data.config import ConversationConfig, DataConfig
from vl_jax.data.sources.negatives import NegativesConfig
from vl_jax.data.sources.scenes import ScenesConfig, SceneTextsConfig
from vl_jax.evaluate.blind import NGrams, training_texts
from vl_jax.evaluate.metrics.told_apart import ToldApart
from vl_jax.evaluate.tasks.retrieval import Retrieval


def test_a_likelihood_worked_by_hand():
    counted = NGrams(["A cat", "a dog"])
    # Words: a 2, cat 1, dog 1, and two ends; one more for each of four, and one for all others: 11 in all.
    single = {"a": 3 / 11, "cat": 2 / 11, "": 3 / 11, "fox": 1 / 11}
    start, pair, end = 0.7 * 1 + 0.3 * single["a"], 0.7 / 2 + 0.3 * single["cat"], 0.7 * 1 + 0.3 * single[""]
    assert counted.log_likelihood("a cat") == pytest.approx(math.log(start * pair * end))
    assert counted.mean_log_likelihood("a cat") == pytest.approx(math.log(start * pair * end) / 3)
    # Nothing is known of what follows a word that was never seen.
    unseen = start * 0.3 * single["fox"] * single[""]
    assert counted.log_likelihood("a fox") == pytest.approx(math.log(unseen))


def test_a_chinese_character_is_a_word():
    counted = NGrams(["红狗", "红猫"])
    assert counted.log_likelihood("红狗") > counted.log_likelihood("狗红")


def test_without_texts_nothing_is_known():
    counted = NGrams([])
    assert not counted and counted.log_likelihood("a") == counted.log_likelihood("b") == 0.0
    assert NGrams(["a"])


texts = st.lists(st.sampled_from("abc"), max_size=4).map(" ".join)


@given(st.lists(texts, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_the_shares_of_all_next_words_add_up_to_one(training: list[str], rng: random.Random):
    counted = NGrams(training)
    known = sorted(counted._words)
    for before in ("", *known):
        unseen = counted._share(before, "never")
        assert sum(counted._share(before, word) for word in known) + unseen == pytest.approx(1.0)
    rng.shuffle(training)
    assert counted.log_likelihood("a b") == NGrams(training).log_likelihood("a b")


def scenes(name: str, seed: int, **options) -> SceneTextsConfig:
    drawn = ScenesConfig("drawn", 600, seed, min_objects=2, max_objects=2, word_rate=0.0)
    return SceneTextsConfig(name, drawn, pictures=True, negatives=True, **options)


@pytest.mark.parametrize("relations", [False, True])
@pytest.mark.slow
def test_nobody_tells_wrong_texts_of_scenes_apart_without_looking(relations: bool):
    """What two things exchange, another scene has: true and wrong texts are alike in distribution."""
    held_out = scenes("held_out", 2, relations=relations)
    data = DataConfig(
        sources=(scenes("train", 1, relations=relations),),
        evaluation=(held_out,),
        conversation=ConversationConfig(negatives=NegativesConfig()),
    )
    blind, metric = NGrams(training_texts(data, 600)), ToldApart()
    for index in range(600):
        sample = held_out.open("")[index]
        wrong = random.Random(index).choice(sample.negatives)
        own = blind.log_likelihood(sample.turns[0].answer)
        metric.update(0.0, [0.0], own, [blind.log_likelihood(wrong)])
    found = metric.compute()
    assert abs(found["blind_told_apart"] - 0.5) < 4 * 0.5 / math.sqrt(600)
    assert found["told_apart"] == 0.0  # a tie is wrong


def test_shares_worked_by_hand():
    metric = ToldApart()
    metric.update(
        0.5, [0.4, 0.5], -1.0, [-1.0, -2.0]
    )  # one of two is below; blind has half of a tie, and one
    metric.update(0.1, [0.0], -3.0, [-2.0])
    metric.update(0.1, [], -3.0, [])
    assert metric.compute() == {
        "told_apart": pytest.approx(2 / 3),
        "blind_told_apart": pytest.approx(1.5 / 3),
        "chance_told_apart": 0.5,
        "all_told_apart": 0.5,
        "wrong_texts": 3,
        "texts_without_wrong": 1,
    }
    assert ToldApart().compute() == {"wrong_texts": 0, "texts_without_wrong": 0}


def test_the_headline_is_a_choice():
    assert Retrieval(ks=(5,)).headline == "text_to_image_recall_at_5"
    assert Retrieval(first="told_apart").headline == "told_apart"
