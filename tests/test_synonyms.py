"""Synonyms in training texts: what is said stays true, answers and labels above all."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vl_jax.data.config import ConversationConfig, DataConfig, PackingConfig
from vl_jax.data.images.phrases import Phrases
from vl_jax.data.sample import TEXT, Box, Sample, Turn
from vl_jax.data.sources.scene_text import COLOUR_NAMES, PLACES, SHAPE_NAMES
from vl_jax.data.text.swaps import swaps
from vl_jax.data.text.synonyms import CHINESE, ENGLISH, SynonymsConfig, replaced, with_synonyms

ALL = SynonymsConfig(rate=1.0)


def caption(text: str, **labels) -> Sample:
    return Sample("x", (Turn("<image>\n", text, TEXT),), labels=labels)


def said(sample: Sample, config: SynonymsConfig = ALL, seed: int = 0) -> str:
    return with_synonyms(sample, config, random.Random(seed)).turns[0].answer


def test_words_are_replaced_with_capitals_and_articles():
    assert replaced("Big bike near a sofa", 1.0, random.Random(0)) == "Large bicycle close to a couch"
    assert replaced("a car, an automobile", 1.0, random.Random(0)) == "an automobile, a car"
    assert replaced("男人在街道旁边", 1.0, random.Random(0)) == "男子在马路边上"
    assert replaced("carpet, nearby, biggest", 1.0, random.Random(0)) == "carpet, nearby, biggest"


def test_what_follows_from_the_seed_and_the_rate():
    text = "a big car near a shop beside a sofa and a happy kid"
    assert said(caption(text), seed=1) == said(caption(text), seed=1)
    half = SynonymsConfig(rate=0.5)
    assert len({said(caption(text), half, seed) for seed in range(20)}) > 10


@given(st.randoms(use_true_random=False), st.sampled_from([w for g in (*ENGLISH, *CHINESE) for w in g]))
def test_answers_and_labels_are_never_changed(rng, word):
    question = Turn(f"<image>\nIs it a {word} or a big car?", word, "shape")
    changed = with_synonyms(Sample("x", (question,)), ALL, rng).turns[0]
    assert changed.answer == word and f"a {word} or" in changed.question.replace("an ", "a ")
    assert word in with_synonyms(caption(f"see the {word} here", label=word), ALL, rng).turns[0].answer


def test_no_word_takes_the_place_of_another_that_an_answer_has():
    question = Turn("a big one or a small one?", "large", "shape")
    assert "large" not in with_synonyms(Sample("x", (question,)), ALL, random.Random(0)).turns[0].question


def test_texts_that_are_pointed_at_stay():
    boxes = (Box("big car", (0, 0, 1, 1)),)
    asked = Turn("<image>\nwhere is the big car?", "left", "position", boxes=boxes)
    assert with_synonyms(Sample("x", (asked,)), ALL, random.Random(0)).turns[0] == asked
    assert said(caption("a big car", phrases=Phrases((), (1, 1)))) == "a big car"
    assert replaced("<|ref|>big car<|/ref|>", 1.0, random.Random(0)) == "<|ref|>big car<|/ref|>"


def test_no_list_has_what_one_asks_about():
    words = {w for group in (*ENGLISH, *CHINESE) for w in group}
    assert len(words) == sum(map(len, (*ENGLISH, *CHINESE)))
    assert not words & {*COLOUR_NAMES, *SHAPE_NAMES, *PLACES["en"], *PLACES["zh"]}
    assert not any(any(swaps(word)) for word in words)


def test_bad_settings():
    with pytest.raises(ValueError, match="must lie above 0"):
        SynonymsConfig(rate=0.0)
    talk = ConversationConfig(synonyms=ALL)
    with pytest.raises(ValueError, match="a text would change its length"):
        DataConfig(conversation=talk, packing=PackingConfig())
