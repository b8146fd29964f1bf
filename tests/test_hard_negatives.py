"""Negatives that count by how hard they are, and wrong texts as further columns of a contrastive loss."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl_jax import sharding
from vl_jax.heads.pairs import FOREIGN
from vl_jax.sharding import MeshConfig, make_mesh
from vl_jax.train.objectives.contrastive_losses import PairSums, sigmoid_sums, softmax_sums

FORMS = ["softmax", "sigmoid"]
SCALE, BIAS = jnp.asarray(math.log(5.0)), jnp.asarray(-1.0)
E = 5
SEVERAL = [0, 1, 2, 3, 0, 1, 9, -1]  # images that appear twice, and padding
# Two texts for each of them: its own, and one that is wrong of all. One is missing, and one is unknown.
TEXTS = [0, FOREIGN, 1, FOREIGN, 2, -1, 3, FOREIGN, 0, FOREIGN, 7, FOREIGN, 9, FOREIGN, -1, -1]


def vectors(rows: int, seed: int) -> jax.Array:
    x = np.random.default_rng(seed).normal(size=(rows, E))
    return jnp.asarray((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32))


def arguments(image_ids: Any, text_ids: Any) -> tuple[jax.Array, ...]:
    image_ids, text_ids = jnp.asarray(image_ids, jnp.int32), jnp.asarray(text_ids, jnp.int32)
    return vectors(len(image_ids), 0), vectors(len(text_ids), 1), SCALE, BIAS, image_ids, text_ids


def sums(form: str, chunk: int, hardness: float, *args: jax.Array) -> PairSums:
    images, texts, scale, bias, image_ids, text_ids = args
    options = {"image_ids": image_ids, "text_ids": text_ids, "chunk": chunk, "hardness": hardness}
    if form == "sigmoid":
        return sigmoid_sums(images, texts, scale, bias, **options)
    return softmax_sums(images, texts, scale, **options)


@functools.cache
def value(form: str, chunk: int, hardness: float) -> Any:
    return jax.jit(lambda *args: sums(form, chunk, hardness, *args).loss)


def definition(form: str, hardness: float, *args: jax.Array) -> jax.Array:
    """The loss by its words, on all logits at once; its gradient is autodiff's."""
    images, texts, scale, bias, image_ids, text_ids = args
    valid = (image_ids[:, None] >= 0) & (text_ids >= 0)
    positive = valid & (image_ids[:, None] == text_ids)
    z = jnp.exp(scale) * jnp.matmul(images, texts.T, precision="highest")
    z = z + bias if form == "sigmoid" else z

    def one_way(z, valid, positive):
        negative = valid & ~positive
        weights = jnp.where(negative, jnp.exp(hardness * z), 0.0)
        mean = jnp.sum(weights, axis=1, keepdims=True) / jnp.maximum(
            jnp.sum(negative, axis=1, keepdims=True).astype(jnp.float32), 1.0
        )
        weights = weights / jnp.where(mean > 0, mean, 1.0)
        if form == "sigmoid":
            yes = jnp.sum(jnp.where(positive, jax.nn.softplus(-z), 0.0))
            return yes + jnp.sum(weights * jax.nn.softplus(z))
        total = jnp.sum(jnp.where(positive, jnp.exp(z), 0.0) + weights * jnp.exp(z), axis=1)
        count = jnp.sum(positive, axis=1).astype(jnp.float32)
        own = jnp.sum(jnp.where(positive, z, 0.0), axis=1) / jnp.maximum(count, 1.0)
        return jnp.sum(jnp.where(count > 0, jnp.log(jnp.where(count > 0, total, 1.0)) - own, 0.0))

    return (one_way(z, valid, positive) + one_way(z.T, valid.T, positive.T)) / 2


@functools.cache
def compiled(form: str, chunk: int | None, hardness: float, devices: int = 1) -> Any:
    """The loss and its gradients to vectors, scale and bias; of the definition where there is no chunk."""

    def loss(*args):
        return definition(form, hardness, *args) if chunk is None else sums(form, chunk, hardness, *args).loss

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
    if devices == 1:
        return gradient

    def spread(*args):
        with sharding.use_mesh(make_mesh(MeshConfig(data=4, fsdp=2))):
            return gradient(*args)

    return spread


def assert_same(actual: Any, expected: Any) -> None:
    """The same sums in another order: equal to 1e-6 by norm, of terms up to exp(SCALE)."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.isfinite(a).all()
        assert np.linalg.norm(a - b) <= 1e-6 * max(np.linalg.norm(b), 10.0, expected[0])


def three_pairs() -> tuple[jax.Array, ...]:
    """Exponentials of the logits are 2 1 1 / 1 4 2 / 3 1 1; pairs are on the diagonal."""
    z = jnp.log(jnp.asarray([[2.0, 1.0, 1.0], [1.0, 4.0, 2.0], [3.0, 1.0, 1.0]]))
    rows = jnp.arange(3, dtype=jnp.int32)
    return jnp.eye(3), z.T, jnp.zeros(()), jnp.zeros(()), rows, rows


def test_three_pairs_worked_by_hand():
    # Of hardness 1 a negative counts by its exponential: 1 and 2 become 2 * 1/3 * 1 and 2 * 2/3 * 2.
    images = [2 / (2 + 2), 4 / (4 + 2 * 5 / 3), 1 / (1 + 2 * 10 / 4)]
    texts = [2 / (2 + 2 * 10 / 4), 4 / (4 + 2), 1 / (1 + 2 * 5 / 3)]
    expected = -sum(map(math.log, images + texts)) / 2
    np.testing.assert_allclose(value("softmax", 2, 1.0)(*three_pairs()), expected, rtol=1e-6)


def test_three_yes_and_six_no_worked_by_hand():
    two, three, four = map(math.log, (2, 3, 4))  # losses of a no to logits of exponential 1, 2 and 3
    yes = math.log(1.5) + math.log(1.25) + math.log(2)
    images = 2 * two, 2 * (two + 2 * three) / 3, 2 * (3 * four + two) / 4
    texts = 2 * (two + 3 * four) / 4, 2 * two, 2 * (two + 2 * three) / 3
    expected = yes + (sum(images) + sum(texts)) / 2
    np.testing.assert_allclose(value("sigmoid", 2, 1.0)(*three_pairs()), expected, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow
def test_without_hardness_the_loss_is_the_plain_one_to_the_bit(form: str):
    args = arguments(SEVERAL, TEXTS)

    def plain(images, texts, scale, bias, image_ids, text_ids):
        options = {"image_ids": image_ids, "text_ids": text_ids, "chunk": 3}
        if form == "sigmoid":
            return sigmoid_sums(images, texts, scale, bias, **options).loss
        return softmax_sums(images, texts, scale, **options).loss

    assert value(form, 3, 0.0)(*args) == jax.jit(plain)(*args)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow
def test_a_little_hardness_is_almost_the_plain_loss(form: str):
    args = arguments(SEVERAL, TEXTS)
    plain, hard = compiled(form, 3, 0.0)(*args), compiled(form, 3, 1e-7)(*args)
    for a, b in zip(jax.tree.leaves(hard), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("hardness", [0.5, 2.0])
@pytest.mark.slow
def test_loss_and_gradient_are_those_of_the_definition(form: str, hardness: float):
    args = arguments(SEVERAL, TEXTS)
    assert_same(compiled(form, 3, hardness)(*args), compiled(form, None, hardness)(*args))


ids = st.lists(st.integers(-1, 4) | st.just(FOREIGN), min_size=7, max_size=7)


@settings(max_examples=10, deadline=None)
@given(ids, ids, st.sampled_from(FORMS), st.sampled_from([1, 3]))
@pytest.mark.slow
def test_the_size_of_a_chunk_does_not_matter(image_ids, text_ids, form, chunk):
    image_ids = [-1 if i == FOREIGN else i for i in image_ids]
    args = arguments(image_ids, text_ids)
    assert_same(compiled(form, chunk, 1.0)(*args), compiled(form, None, 1.0)(*args))


@pytest.mark.parametrize("hardness", [0.0, 1.0])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow
def test_eight_devices_compute_what_one_does(form: str, hardness: float):
    args = arguments(SEVERAL, TEXTS)
    assert_same(compiled(form, 2, hardness, devices=8)(*args), compiled(form, 2, hardness)(*args))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow
def test_logits_of_any_size_have_a_loss(form: str):
    rows, scale = jnp.arange(3, dtype=jnp.int32), jnp.asarray(math.log(1e4))
    for texts in (jnp.eye(3), -jnp.eye(3)):
        found = compiled(form, 1, 2.0)(jnp.eye(3), texts, scale, jnp.zeros(()), rows, rows)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.slow
def test_only_pairs_make_no_loss_of_negatives():
    args = arguments([4, 4, -1], [4, 4, -1])
    np.testing.assert_allclose(value("softmax", 2, 3.0)(*args), value("softmax", 2, 0.0)(*args), rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_text_is_a_column_that_asks_for_nothing(form: str):
    """Its share of the loss is that of a negative of every image."""
    args = arguments([0, 1], [0, FOREIGN, 1, FOREIGN])
    images, texts, scale, bias = args[:4]
    z = np.asarray(jnp.exp(scale) * images @ texts.T, np.float64)
    if form == "sigmoid":
        sign = np.asarray([[1, -1, -1, -1], [-1, -1, 1, -1]])
        expected = np.log1p(np.exp(-sign * (z + float(bias)))).sum()
    else:
        by_image = np.log(np.exp(z).sum(1)) - z[[0, 1], [0, 2]]
        own = z[:, [0, 2]]
        expected = (by_image.sum() + (np.log(np.exp(own).sum(0)) - np.diagonal(own)).sum()) / 2
    np.testing.assert_allclose(value(form, 3, 0.0)(*args), expected, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow
def test_constants_of_a_program_within_a_program_are_arrays(form: str):
    """They come as arrays of numpy to the rules of the gradient."""
    images, texts, *_, image_ids, text_ids = arguments(range(4), range(4))

    @jax.jit
    def loss(images):
        constants = jnp.zeros(()), jnp.asarray(-2.0)
        return sums(form, 2, 0.0, images, texts, *constants, image_ids, text_ids).loss

    assert jax.jit(jax.grad(loss))(images).shape == images.shape


@pytest.mark.parametrize("hardness", [-0.5, math.nan])
def test_a_hardness_below_zero_is_refused(hardness: float):
    with pytest.raises(ValueError, match=f"hardness={hardness}: must be >= 0"):
        sums("softmax", 2, hardness, *arguments([0], [0]))
