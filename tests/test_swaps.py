"""Wrong texts by rules and from scenes: what is changed, what must not be, and what goes with a sample."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vl_jax.data.config import ConversationConfig, DataConfig, ModelSpec, PackingConfig, opened
from vl_jax.data.encode import make_encoder
from vl_jax.data.sample import TEXT, Sample, Turn
from vl_jax.data.sources.negatives import NegativesConfig, WithNegatives
from vl_jax.data.sources.scene_text import CHINESE, Scene, SceneObject, caption, exchanged, relation_caption
from vl_jax.data.sources.scenes import ScenesConfig, SceneTextsConfig
from vl_jax.data.text.swaps import swaps

# Rules.


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("A red bus beside two green cars.", "A green bus beside two red cars."),
        ("An orange cat by a red box", "A red cat by an orange box"),
        ("Three men and two women", "Two men and three women"),
        ("a dog on the left, a cat on the right", "a dog on the right, a cat on the left"),
        ("红色的车和蓝色的狗", "蓝色的车和红色的狗"),
        ("两只狗和三个人", "三只狗和两个人"),
    ],
)
def test_two_words_are_exchanged(text: str, wrong: str):
    assert wrong in swaps(text).exchanged
    # The other way round it is the text again.
    assert text in swaps(wrong).exchanged


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("A grey dog", "A black dog"),
        ("a red hat", "an orange hat"),
        ("two dogs", "three dogs"),
        ("four boys", "five boys"),
        ("a ball to the left of a box", "a ball to the right of a box"),
        ("his right hand", "his left hand"),
        ("it jumps over a log", "it jumps under a log"),
        ("a lamp above the bed", "a lamp below the bed"),
        ("Behind the house", "In front of the house"),
        ("穿红衣服的人", "穿蓝衣服的人"),
        ("三个孩子", "四个孩子"),
        ("二个女孩", "三个女孩"),
        ("杯子左边", "杯子右边"),
        ("树的前面", "树的后面"),
    ],
)
def test_a_word_is_replaced(text: str, wrong: str):
    assert wrong in swaps(text).replaced
    assert not swaps(text).exchanged


@pytest.mark.parametrize(
    "text",
    [
        "a cat", "he left right now", "it is over", "two of them", "one dog", "",
        "黄昏的海", "黑人", "三轮车", "左右", "一个人",
    ],
)  # fmt: skip
def test_words_that_mean_something_else_stay(text: str):
    assert swaps(text) == ((), ())


@pytest.mark.parametrize(
    "text",
    [
        "a black and white dog", "a black dog and a white dog", "black, white cows", "two cats or three cats",
        "黑色和白色的狗", "黑色的狗和白色的狗",
    ],
)  # fmt: skip
def test_what_says_the_same_is_not_exchanged(text: str):
    assert not swaps(text).exchanged


words = st.sampled_from(
    "a an the red blue orange grey dog dogs two three left right of 红色 蓝 狗 两 个 左 右 边 . ,".split()
)


@given(st.lists(words, max_size=9).map(" ".join))
def test_no_wrong_text_is_the_text_or_comes_twice(text: str):
    found = swaps(text)
    every = (*found.exchanged, *found.replaced)
    assert text not in every and len(set(every)) == len(every)
    assert found == swaps(text)
    for other in every:
        # One word or two have changed, and articles.
        changed = sum(a != b for a, b in itertools.zip_longest(text, other)) if len(text) == len(other) else 1
        assert changed


# Scenes.


def thing(colour: str, shape: str, cell: tuple[int, int]) -> SceneObject:
    return SceneObject(colour, shape, cell, (0.0, 0.0), 1.0, 0.0)


def scene(*things: SceneObject) -> Scene:
    return Scene(64, (0, 0, 0), things, "", "", (0.0,) * 4)


def test_a_scene_worked_by_hand():
    shown = scene(thing("red", "square", (0, 0)), thing("orange", "circle", (2, 0)))
    assert caption(shown, "en") == "a red square at the top left, an orange circle at the top right."
    assert [caption(other, "en") for other in exchanged(shown)] == [
        "an orange square at the top left, a red circle at the top right.",
        "a red circle at the top left, an orange square at the top right.",
        "an orange circle at the top left, a red square at the top right.",
    ]
    assert relation_caption(shown, "en") == "a red square left of an orange circle."
    assert relation_caption(shown, "zh") == "一个红色正方形在一个橙色圆形的左边。"
    assert [relation_caption(other, "en") for other in exchanged(shown)] == [
        "an orange square left of a red circle.",
        "a red circle left of an orange square.",
        "a red square right of an orange circle.",
    ]
    above = scene(thing("red", "square", (1, 0)), thing("red", "circle", (1, 2)))
    assert [relation_caption(other, "en") for other in [above, *exchanged(above)]] == [
        "a red square above a red circle.",
        "a red circle above a red square.",
        "a red square below a red circle.",
    ]


def test_things_that_look_alike_cannot_be_exchanged():
    assert exchanged(scene(thing("red", "square", (0, 0)), thing("red", "square", (2, 2)))) == []
    assert exchanged(scene(thing("red", "square", (0, 0)))) == []


def looks(of: Scene) -> Counter:
    return Counter((o.colour, o.shape, o.cell) for o in of.objects)


def source(**options) -> SceneTextsConfig:
    scenes = ScenesConfig("drawn", 60, 3, min_objects=2, max_objects=2, word_rate=0.0)
    return SceneTextsConfig("scenes", scenes, pictures=True, negatives=True, **options)


@pytest.mark.parametrize("relations", [False, True])
def test_no_wrong_text_of_a_scene_is_true_of_it(relations: bool):
    texts = source(relations=relations).open("")
    for index in range(60):
        sample = texts[index]
        (turn,), (image,) = sample.turns, sample.images
        shown = image.scene  # pyright: ignore[reportFunctionMemberAccess]
        assert sample.labels == {"image": sample.id}
        others = [other for other in exchanged(shown) if looks(other) != looks(shown)]
        assert len(others) == len(exchanged(shown))
        say = relation_caption if relations else caption
        language = "zh" if turn.language == "zh" else "en"
        expected = {say(other, language) for other in others}
        assert set(sample.negatives) == expected and turn.answer not in expected and expected


@pytest.mark.slow
def test_no_direction_is_more_frequent_than_its_opposite():
    scenes = ScenesConfig("drawn", 2000, 3, min_objects=2, max_objects=2, languages=("en",), word_rate=0.0)
    texts = SceneTextsConfig("scenes", scenes, pictures=True, relations=True).open("")
    found = Counter(word for i in range(2000) for word in texts[i].turns[0].answer.split() if word in CHINESE)
    for one, other in (("left", "right"), ("above", "below")):
        total = found[one] + found[other]
        assert abs(found[one] - total / 2) < 4 * (total / 4) ** 0.5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"relations": True}, r"relations of source 's': .* are \(1, 4\), must be 2 each"),
        ({"questions": True, "negatives": True}, "questions of source 's': must be False"),
    ],
)
def test_options_that_contradict_are_named(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SceneTextsConfig("s", **options)


# Samples.


def sample(text: str, *negatives: str, number: int = 0) -> Sample:
    return Sample(f"a-{number}", (Turn("<image>\n", text, TEXT),), negatives=negatives)


def test_words_that_are_exchanged_come_before_words_that_are_replaced():
    for seed in range(9):
        config = NegativesConfig(count=2, seed=seed)
        (found,) = WithNegatives([sample("a red bus by a green car")], config)
        assert found.negatives[0] == "a green bus by a red car" and len(found.negatives) == 2
        (again,) = WithNegatives([sample("a red bus by a green car")], config)
        assert found == again


def test_which_one_follows_from_seed_and_id():
    def first(seed: int, number: int) -> str:
        (found,) = WithNegatives([sample("a red bus", number=number)], NegativesConfig(seed=seed))
        return found.negatives[0]

    assert len({first(0, n) for n in range(20)}) > 3
    assert len({first(s, 0) for s in range(20)}) > 3


def test_a_source_that_brings_its_own_is_believed():
    (found,) = WithNegatives([sample("a red bus", "no bus at all")], NegativesConfig(count=3))
    assert found.negatives == ("no bus at all",) and not found.notes


def test_a_text_without_a_wrong_one_is_counted():
    two = dataclasses.replace(
        sample("a red bus"), turns=(Turn("a red bus?", "yes"), Turn("a red car?", "no"))
    )
    for one in (sample("a bus"), two):
        (found,) = WithNegatives([one], NegativesConfig())
        assert found.negatives == () and [note.reason for note in found.notes] == ["no_negative"]


def test_the_config_decides():
    config = DataConfig(sources=(source(),))
    assert not isinstance(opened(config, config.sources[0]), WithNegatives)
    config = dataclasses.replace(config, conversation=ConversationConfig(negatives=NegativesConfig(count=2)))
    found = opened(config, config.sources[0])
    assert len(found) == 60 and all(len(found[i].negatives) in (1, 2) for i in range(60))
    with pytest.raises(ValueError, match=r"negatives\.count=0: must be at least 1"):
        NegativesConfig(count=0)
    with pytest.raises(ValueError, match="packing with conversation.negatives: .* set packing=None"):
        dataclasses.replace(config, packing=PackingConfig())
    spec = ModelSpec(tile_tokens_side=1, fusion="gated", vocab_size=1 << 20)
    with pytest.raises(
        ValueError, match=r"data\.conversation\.negatives=2 with a model that reads 'dialogue': must be None"
    ):
        make_encoder(config, spec)


def test_rows_bring_them_along():
    config = DataConfig(
        sources=(source(),),
        conversation=ConversationConfig(negatives=NegativesConfig(count=2)),
        max_tokens=40,
    )
    encoder = make_encoder(config, ModelSpec(1, "gated", 1 << 20, reads="text"))
    texts = opened(config, config.sources[0])
    examples = [encoder.example(dataclasses.replace(texts[i], images=())) for i in range(3)]
    given = encoder.collate([[e] for e in examples]).media["negatives"]
    assert given.values.shape == (3, 2, 41) and given.present.all()
    decoded = encoder.tokenizer.decode(given.values[0, 0, 1 : given.values[0, 0, 0]].tolist())
    assert decoded.strip() == texts[0].negatives[0]
