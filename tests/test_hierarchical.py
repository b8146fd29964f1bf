"""Hierarchical alignment: each level by hand, labels that lie in text and picture, and the objective."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_joint import IMAGE, TEXT, joint, random_batch, results

from vl_jax.ablation import miniature
from vl_jax.batch import Given
from vl_jax.data.config import DataConfig, ModelSpec
from vl_jax.data.encode import make_encoder
from vl_jax.data.images.phrases import Phrase, Phrases
from vl_jax.data.images.spatial import Cut
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sample import BadSample, Sample
from vl_jax.data.sources.scenes import SceneTextsConfig
from vl_jax.heads.levels.regions import PhraseRegions, RegionVectors, box_means, span_means
from vl_jax.heads.levels.tokens import TokenPairs
from vl_jax.heads.pairs import Pairs
from vl_jax.joint import Tower
from vl_jax.sharding import MeshConfig
from vl_jax.train.objectives.contrastive import ContrastivePairs
from vl_jax.train.objectives.hierarchical import Hierarchical, Level, region_sums
from vl_jax.train.objectives.word_pairs import nearness, word_sums
from vl_jax.train.updates.groups import groups_of


def softmax_loss(z: np.ndarray, right: list[int]) -> float:
    return float(sum(np.log(np.exp(row).sum()) - row[i] for row, i in zip(z, right, strict=True)))


# Tokens and words.


def test_words_by_hand():
    """Two pictures of two tokens, two texts of two words and of one; the second word of text 1 is padding."""
    a, b, c = np.eye(3, dtype=np.float32)
    images = jnp.asarray(np.stack([[a, b], [c, c]]))
    texts = jnp.asarray(np.stack([[a, a], [c, b]]))
    there = jnp.asarray([[True, True], [True, False]])
    from_image, from_text = nearness(images, jnp.ones((2, 2), bool), texts, there, chunk=1)
    # Picture 0 has a and b: text 0 has its a, nothing of b: 1/2. Picture 1 is c, as the one word of text 1.
    np.testing.assert_allclose(from_image, [[0.5, 0.0], [0.0, 1.0]], atol=1e-6)
    # Both words of text 0 are in picture 0; the word of text 1 is in picture 1 alone.
    np.testing.assert_allclose(from_text, [[1.0, 0.0], [0.0, 1.0]], atol=1e-6)
    ids = jnp.arange(2)
    sums = word_sums(from_image, from_text, jnp.asarray(0.0), image_ids=ids, text_ids=ids)
    expected = (math.log(1 + math.exp(-0.5)) + 3 * math.log(1 + math.exp(-1.0))) / 2
    np.testing.assert_allclose(sums.loss, expected, rtol=1e-5)
    assert sums.images_right == 2 and sums.texts_right == 2


def test_words_do_not_depend_on_chunks_or_on_what_padding_holds():
    random = np.random.default_rng(0)
    images, texts = (random.standard_normal((6, n, 4)).astype(np.float32) for n in (5, 3))
    seen, there = random.random((6, 5)) < 0.8, random.random((6, 3)) < 0.7
    there[:, 0] = seen[:, 0] = True
    there[2] = False
    sides = [jnp.asarray(x) for x in (images, seen, texts, there)]
    expected, close = nearness(*sides, chunk=6), functools.partial(np.testing.assert_allclose, rtol=1e-5)
    for chunk in (1, 4):
        jax.tree.map(close, nearness(*sides, chunk=chunk), expected)
    sides[2] = jnp.where(sides[3][..., None], sides[2], 1e6)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5), nearness(*sides, chunk=6), expected
    )
    assert not np.any(expected[0][:, 2]) and not np.any(expected[1][:, 2])  # a text without words
    by_hand = np.mean([max(p @ w for w in texts[1][there[1]]) for p in images[0][seen[0]]])
    np.testing.assert_allclose(expected[0][0, 1], by_hand, rtol=1e-5)


# Regions and phrases.


def test_means_over_boxes_and_spans_by_hand():
    grid = jnp.arange(4.0).reshape(1, 2, 2, 1)  # 0 1 / 2 3
    boxes = jnp.asarray(
        [[[0, 0, 1, 1], [0, 0, 0.5, 0.5], [0.25, 0, 1, 0.5], [0.6, 0.6, 0.7, 0.7], [0, 0, 0, 0]]]
    )
    # The third has half of cell 0 and all of cell 1; the fourth lies in cell 3; the last has no area.
    found = box_means(grid, boxes)
    np.testing.assert_allclose(found[0, :, 0], [1.5, 0.0, 2 / 3, 3.0, 0.0], atol=1e-5)
    tokens = jnp.asarray([[[1.0], [2.0], [4.0]]])
    found = span_means(tokens, jnp.asarray([[0.0, 1.0, 2.0]]), jnp.asarray([[2.0, 3.0, 2.0]]))
    np.testing.assert_allclose(found[0, :, 0], [1.5, 3.0, 0.0])


def region_label(*rows: list[list[float]], present: list[bool] | None = None) -> Given:
    return Given(jnp.asarray(rows, jnp.float32), jnp.asarray(present or [True] * len(rows)))


def test_regions_by_hand():
    """Two rows with a picture of one cell each; row 0 has one phrase, row 1 has another, and one unused."""
    grid = jnp.asarray([[[[1.0, 0.0]]], [[[0.0, 2.0]]]])
    tokens = jnp.asarray([[[3.0, 0.0]], [[0.0, 1.0]]])
    nothing = [0, 0, 0, 0, 0, 0, -1]
    label = region_label([[0, 0, 1, 1, 0, 1, 7], nothing], [[0, 0, 1, 1, 0, 1, 8], nothing])
    said = RegionVectors(grid, tokens, jnp.asarray(0.0))
    sums = region_sums(said, label, chunk=3)
    np.testing.assert_allclose(sums.loss, 2 * math.log(1 + math.exp(-1.0)), rtol=1e-5)
    assert sums.images_right == 2
    # Where both say the same, every region has both phrases as its own: nothing tells them apart.
    same = region_label([[0, 0, 1, 1, 0, 1, 7], nothing], [[0, 0, 1, 1, 0, 1, 7], nothing])
    expected = math.log(1 + math.e) - 0.5
    np.testing.assert_allclose(region_sums(said, same, chunk=3).loss, 2 * expected, rtol=1e-5)
    # A row without a label takes no part.
    alone = dataclasses.replace(label, present=jnp.asarray([True, False]))
    np.testing.assert_allclose(region_sums(said, alone, chunk=3).loss, 0.0, atol=1e-6)


# Labels.


def scene_texts(**options) -> SceneTextsConfig:
    scenes = miniature.scenes("scenes", 1, 40, min_objects=2, num_colours=8, num_shapes=6)
    return SceneTextsConfig("texts", scenes, pictures=True, phrases=True, **options)


@pytest.mark.parametrize("relations", [False, True])
def test_scenes_say_which_words_name_what(relations):
    source = scene_texts(relations=relations).open("")
    for index in range(40):
        sample = source[index]
        label, text = sample.labels["phrases"], sample.turns[0].answer
        boxes = sample.images[0].scene.objects
        assert len(label.phrases) == len(boxes)
        for phrase in label.phrases:
            assert text[slice(*phrase.span)] == phrase.text
            assert phrase.corners in {item.corners for item in boxes}


def test_spans_become_those_of_tokens_and_boxes_those_of_the_tile():
    side, heads = 32, (PhraseRegions(size=32),)
    spec = ModelSpec(tile_tokens_side=4, fusion="gated", vocab_size=2048, reads="text", labels=heads)
    data = DataConfig(max_tokens=32, tiling=TilingConfig(tile_size=side, views="global"))
    encoder, source = make_encoder(data, spec), scene_texts().open("")
    for index in range(20):
        sample = source[index]
        example = encoder.example(sample)
        for row, phrase in zip(example.labels["regions"], sample.labels["phrases"].phrases, strict=False):
            start, stop = row[4:6].astype(int)
            said = encoder.tokenizer.decode(example.tokens[start:stop].tolist())
            assert said.strip() == phrase.text or phrase.text in said
            np.testing.assert_allclose(row[:4] * side, phrase.corners, atol=0.1)
            assert 0 <= row[6] < 2**24
    short = make_encoder(dataclasses.replace(data, max_tokens=8), spec).example(source[0])
    assert (short.labels["regions"][:, 5] <= 7).all()


def test_phrases_move_with_the_picture_and_a_wrong_label_is_a_finding():
    label = Phrases((Phrase("a", (0, 1), (0, 0, 4, 4)), Phrase("b", (2, 3), (6, 6, 8, 8))), (8, 8))
    cut = label.cut(Cut((0, 0, 4, 4), (8, 8)))
    assert [(p.text, p.corners) for p in cut.phrases] == [("a", (0, 0, 8, 8))]
    placed = label.in_tokens([0, 2], 3, first=1, room=1)
    assert [p.span for p in placed.phrases] == [(1, 2)]  # the second phrase was cut off
    with pytest.raises(BadSample, match="is a int, expected phrases"):
        PhraseRegions().read(Sample("x", (), labels={"phrases": 3}))


@pytest.mark.parametrize("ids", [[0, 1, 2], [0, -1, 2], [-1, -1, -1]])
def test_rows_that_show_nothing_bring_no_loss_and_a_finite_gradient(ids):
    near = jnp.asarray(np.random.default_rng(0).standard_normal((3, 3)), jnp.float32)

    def loss(near, scale):
        return word_sums(near, near, scale, image_ids=jnp.asarray(ids), text_ids=jnp.asarray(ids)).loss

    value, gradients = jax.value_and_grad(loss, (0, 1))(near, jnp.float32(4.0))
    assert all(np.isfinite(leaf).all() for leaf in gradients)
    there = np.flatnonzero(np.asarray(ids) >= 0)
    left, few = near[np.ix_(there, there)], jnp.asarray(ids)[there]
    alone = 0.0
    if len(few):
        alone = word_sums(left, left, jnp.float32(4.0), image_ids=few, text_ids=few).loss
    np.testing.assert_allclose(value, alone, rtol=1e-6)


# The objective.


LEVELS = joint(
    towers=(
        Tower("image", dataclasses.replace(IMAGE, moe=None, sparse_layers=())),
        Tower("text", TEXT, "tokens"),
    ),
    heads=(Pairs(dim=8), TokenPairs(dim=8), PhraseRegions(dim=8, size=16, most=2)),
)
ALL = Hierarchical(whole=Level("pairs", 0.5), word_chunk=3)


def test_a_level_without_weight_is_not_there():
    objective = Hierarchical(regions=Level("regions", 0.0), words=Level("words", 2.0))
    assert dict(objective.weights) == {"pairs/loss": 1.0, "words/loss": 2.0}
    assert groups_of(objective) == {"pairs/loss": "pairs", "words/loss": "words"}
    with pytest.raises(ValueError, match="all have the weight 0"):
        Hierarchical(Level("pairs", 0.0), Level("regions", 0.0), Level("words", 0.0))


@pytest.fixture
def levels_batch(monkeypatch):
    """The batch of ``test_joint`` with labels of all levels."""

    def made(config):
        batch, random = random_batch(config), np.random.default_rng(3)
        rows = len(batch.tokens)
        low = random.random((rows, 2, 2)) * 0.5
        span = random.integers(0, 2, (rows, 2, 1))
        number = random.integers(-1, 5, (rows, 2, 1))
        values = np.concatenate([low, low + 0.4, span, span + 1, number], axis=2).astype(np.float32)
        pairs = batch.labels["pairs"]
        labels = {"pairs": pairs, "words": pairs, "regions": Given(values, random.random(rows) < 0.8)}
        return dataclasses.replace(batch, labels=labels)

    monkeypatch.setattr("test_joint.random_batch", made)
    results.cache_clear()
    yield
    results.cache_clear()


@pytest.mark.slow
def test_eight_devices_are_one_and_the_whole_alone_is_contrastive(levels_batch):
    expected = results(LEVELS, ALL)
    found = results(LEVELS, ALL, MeshConfig(data=2, expert=4))
    for name, value in expected[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found[0], expected[0])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected[0]))
    alone = Hierarchical(regions=Level("regions", 0.0), words=Level("words", 0.0))
    one, other = results(LEVELS, alone), results(LEVELS, ContrastivePairs())
    np.testing.assert_allclose(one[1]["loss"], other[1]["loss"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one[0], other[0])
