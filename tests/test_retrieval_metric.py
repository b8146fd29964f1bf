"""Recall at K: hand-worked pools, ties, several matches, and the level of chance."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl_jax.evaluate.metrics.retrieval import chance, neighbours, ranks_of, retrieval

quick = settings(max_examples=30, deadline=None)


def vectors(rows: int, seed: int = 0) -> np.ndarray:
    """Of a few whole numbers, so that there are ties."""
    return np.random.default_rng(seed).integers(-1, 2, size=(rows, 3)).astype(np.float32)


def test_a_pool_worked_by_hand():
    images = np.eye(3, dtype=np.float32)
    # Scores of a row are those of the text with images 0, 1 and 2.
    texts = np.asarray([[9, 0, 0], [8, 0, 5], [0, 7, 6], [0, 3, 1]], np.float32)
    result = retrieval(images, texts, np.arange(3), np.asarray([0, 0, 1, 2]), ks=(1, 2, 4))
    # Image 0 finds text 0. Image 1 finds text 2. Image 2 finds text 3 behind texts 2 and 1.
    assert result["image_to_text"] == {
        "recall_at_1": pytest.approx(2 / 3),
        "recall_at_2": pytest.approx(2 / 3),
        "recall_at_4": 1.0,
        # Two of four texts for image 0, one of four for the others.
        "chance_at_1": pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3),
        "chance_at_2": pytest.approx((1 - 1 / 6 + 1 / 2 + 1 / 2) / 3),
        "chance_at_4": 1.0,
        "median_rank": 1.0,
        "queries": 3,
        "unmatched": 0,
        "pool": 4,
    }
    # Texts 0, 1 and 2 find theirs. Text 3 finds image 2 behind image 1.
    backwards = result["text_to_image"]
    assert (backwards["recall_at_1"], backwards["recall_at_2"]) == (0.75, 1.0)
    assert (backwards["queries"], backwards["pool"]) == (4, 3)
    assert backwards["chance_at_2"] == pytest.approx(2 / 3)
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize("width", [1, 7, 64])
def test_a_model_that_sees_no_difference_has_the_last_rank(width: int):
    rng = np.random.default_rng(0)
    vector = rng.normal(size=(1, width)).astype(np.float32)
    same = np.repeat(vector / np.linalg.norm(vector), 301, axis=0)  # their products may differ in float32
    result = retrieval(same, same, np.arange(301), np.arange(301), chunk=17)
    for way in result.values():
        assert way["recall_at_10"] == 0.0 and way["median_rank"] == 301


def test_a_match_that_ties_with_a_match_is_no_worse_for_it():
    images, texts = np.ones((1, 1), np.float32), np.asarray([[2], [2], [1]], np.float32)
    assert ranks_of(images, texts, np.zeros(1, int), np.asarray([0, 0, 1]))[0] == [1]
    assert ranks_of(images, texts, np.zeros(1, int), np.asarray([0, 1, 1]))[0] == [2]


def test_what_is_no_number_goes_against_the_model():
    images = np.asarray([[np.nan, 0], [0, 1]], np.float32)
    texts = np.asarray([[1, 0], [0, 1]], np.float32)
    ids = np.arange(2)
    assert ranks_of(images, texts, ids, ids)[0].tolist() == [2, 1]  # image 0 has no score
    assert ranks_of(texts, images, ids, ids)[0].tolist() == [2, 2]  # and stands before any other


def test_a_row_without_a_match_distracts_but_does_not_ask():
    images = np.asarray([[1.0, 0.0], [0.0, 1.0]], np.float32)
    texts = np.asarray([[1.0, 0.0], [2.0, 0.0]], np.float32)
    result = retrieval(images, texts, np.asarray([3, 4]), np.asarray([3, 5]))
    expected = {"queries": 1, "unmatched": 1, "pool": 2, "median_rank": 2.0, "recall_at_1": 0.0}
    assert expected.items() <= result["image_to_text"].items()
    assert {"queries": 1, "recall_at_1": 1.0}.items() <= result["text_to_image"].items()


ids = st.lists(st.integers(-1, 4), min_size=1, max_size=12).filter(lambda x: max(x) >= 0)


@quick
@given(ids, ids, st.integers(0, 9), st.integers(1, 5))
def test_ranks_are_those_of_a_sorted_list(queries, pool, seed, chunk):
    query_ids, pool_ids = np.asarray(queries), np.asarray(pool)
    query_ids = np.where(np.isin(query_ids, pool_ids), query_ids, pool_ids[0])
    one, other = vectors(len(query_ids), seed), vectors(len(pool_ids), seed + 100)
    ranks, positives = ranks_of(one, other, query_ids, pool_ids, chunk=chunk)
    for row in range(len(query_ids)):
        match = pool_ids == query_ids[row]
        # The best first; of equals, what is wrong first.
        order = sorted(
            zip((other @ one[row]).tolist(), match.tolist(), strict=True), key=lambda x: (-x[0], x[1])
        )
        assert ranks[row] == 1 + [right for _, right in order].index(True)
        assert positives[row] == match.sum()


@quick
@given(ids, st.integers(0, 9), st.integers(1, 5), st.randoms(use_true_random=False))
def test_order_padding_and_chunks_change_nothing(numbers, seed, chunk, random):
    image_ids = np.asarray(numbers)
    text_ids = np.concatenate([image_ids, image_ids[:3]])
    images, texts = vectors(len(image_ids), seed), vectors(len(text_ids), seed + 100)
    expected = retrieval(images, texts, image_ids, text_ids, ks=(1, 2))
    first, second = (random.sample(range(n), n) for n in (len(image_ids), len(text_ids)))
    padding, none = np.full((2, 3), np.nan, np.float32), np.full(2, -1)
    actual = retrieval(
        np.concatenate([padding, images[first]]),
        np.concatenate([texts[second], padding]),
        np.concatenate([none, image_ids[first]]),
        np.concatenate([text_ids[second], none]),
        ks=(1, 2),
        chunk=chunk,
    )
    for way, scores in expected.items():
        assert actual[way] == pytest.approx(scores)


def test_chance_is_the_share_of_all_draws():
    for pool in range(1, 6):
        for positives, k in itertools.product(range(pool + 1), range(1, 8)):
            draws = list(itertools.combinations(range(pool), min(k, pool)))
            share = np.mean([any(item < positives for item in draw) for draw in draws])
            assert chance(np.asarray([positives]), pool=pool, k=k)[0] == pytest.approx(share)


def test_a_random_model_is_at_chance():
    rng = np.random.default_rng(0)
    images, texts = rng.normal(size=(400, 16)), rng.normal(size=(2000, 16))
    result = retrieval(images, texts, np.arange(400), np.repeat(np.arange(400), 5))
    for way in result.values():
        for k in (1, 5, 10):
            found, expected = way[f"recall_at_{k}"], way[f"chance_at_{k}"]
            spread = np.sqrt(expected * (1 - expected) / 400)  # 400 images, whose captions may depend
            assert abs(found - expected) < 4 * spread


@pytest.mark.parametrize("options", [{"ks": ()}, {"ks": (0, 1)}, {"chunk": 0}])
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match="expected at least one K, and all of them >= 1"):
        retrieval(vectors(2), vectors(2), np.arange(2), np.arange(2), **options)


def test_a_pool_without_any_match_is_refused():
    with pytest.raises(ValueError, match="none of 2 images has an id of one of 1 texts"):
        retrieval(vectors(2), vectors(3), np.arange(2), np.asarray([5, -1, -1]))


def test_neighbours_by_hand():
    vectors = np.array([[1.0, 0], [0.9, 0.1], [0, 1], [0.6, 0.5]])
    found = neighbours(vectors, np.array([0, 0, 1, 1]), ks=(1, 2))
    # 0 and 1 find one another first; 2 finds 3 first; of 3 the others are 0 (0.6), 1 (0.59) and 2 (0.5).
    assert found["recall_at_1"] == 0.75 and found["recall_at_2"] == 0.75 and found["pool"] == 3
    assert found["chance_at_1"] == pytest.approx(1 / 3) and found["queries"] == 4
    lonely = neighbours(vectors, np.array([0, 0, 1, 2]), ks=(1,))
    assert lonely["unmatched"] == 2 and lonely["recall_at_1"] == 1.0
    with pytest.raises(ValueError, match="no two of 4 rows"):
        neighbours(vectors, np.arange(4))


@given(st.integers(2, 12), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_neighbours_are_rows_of_a_pool_without_themselves(rows, kinds, seed):
    rng = np.random.default_rng(seed)
    vectors, of = rng.integers(-2, 3, (rows, 2)).astype(float), rng.integers(0, kinds, rows)
    if len(set(of.tolist())) == rows:
        return
    hits = []
    for row in range(rows):
        others = [i for i in range(rows) if i != row]
        right = [vectors[row] @ vectors[i] for i in others if of[i] == of[row]]
        wrong = [vectors[row] @ vectors[i] for i in others if of[i] != of[row]]
        if right:
            hits.append(max(right) > max(wrong, default=-np.inf))
    assert neighbours(vectors, of, ks=(1,))["recall_at_1"] == pytest.approx(np.mean(hits))
