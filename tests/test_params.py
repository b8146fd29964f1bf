"""Parameter trees: paths, selection by pattern, splitting and merging."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vl_jax import params as params_lib

TREE = {"a": {"kernel": 1, "bias": 2}, "ab": {"kernel": 3}, "c": 4}
names = st.text("abc", min_size=1, max_size=2)
trees = st.recursive(st.integers(), lambda inner: st.dictionaries(names, inner, min_size=1), max_leaves=8)
mappings = st.dictionaries(names, trees, min_size=1)


def test_paths_join_the_keys():
    assert params_lib.flatten(TREE) == {"a/kernel": 1, "a/bias": 2, "ab/kernel": 3, "c": 4}


@given(mappings)
@pytest.mark.slow
def test_unflatten_undoes_flatten(tree):
    assert params_lib.unflatten(params_lib.flatten(tree)) == tree


@given(mappings, st.data())
@pytest.mark.slow
def test_merge_undoes_split(tree, data):
    chosen = data.draw(st.sets(st.sampled_from(sorted(params_lib.flatten(tree)))))
    first, second = params_lib.split(tree, chosen)
    assert set(params_lib.flatten(first)) == chosen
    assert not chosen & set(params_lib.flatten(second))
    assert params_lib.merge(first, second) == tree


def test_map_paths_gives_path_and_leaf():
    assert params_lib.map_paths(lambda path, leaf: f"{path}={leaf}", TREE)["a"]["bias"] == "a/bias=2"


@pytest.mark.parametrize(
    ("patterns", "paths"),
    [
        ((".*",), {"a/kernel", "a/bias", "ab/kernel", "c"}),
        (("a/.*",), {"a/kernel", "a/bias"}),
        ((".*/kernel",), {"a/kernel", "ab/kernel"}),
        (("a/bias", "c"), {"a/bias", "c"}),
        ((), set()),
    ],
)
def test_a_pattern_matches_whole_paths(patterns, paths):
    assert params_lib.select(TREE, patterns) == paths


def test_a_pattern_that_matches_nothing_is_named_with_the_tops():
    with pytest.raises(ValueError, match="pattern 'kernel' matches no parameter; top-level names: a, ab, c"):
        params_lib.select(TREE, ("a/.*", "kernel"))


def test_a_pattern_that_is_no_expression_is_named():
    with pytest.raises(ValueError, match=r"pattern '\(' is not a regular expression: "):
        params_lib.select(TREE, ("(",))


def test_count_counts_numbers_not_leaves():
    assert params_lib.count({"a": np.zeros((2, 3)), "b": jax.ShapeDtypeStruct((4,), np.float32)}) == 10
