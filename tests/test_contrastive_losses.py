"""Contrastive losses by chunks and over devices against their definitions on all logits at once."""

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
from vl_jax.sharding import AxisRules, MeshConfig, make_mesh
from vl_jax.train.objectives.contrastive_losses import PairSums, sigmoid_sums, softmax_sums

FORMS = ["softmax", "sigmoid"]
SCALE, BIAS = jnp.asarray(math.log(10.0)), jnp.asarray(-2.0)
B, E = 16, 5  # rows of most tests, and the width of their vectors
SEVERAL = [0, 1, 2, 3, 0, 1, 9, 5, 5, 5, 7, 8, -1, 11, -1, 0]  # images that appear twice, and padding
TEXTS = [0, 1, 2, 3, 4, 1, 9, 9, 5, 5, 10, 8, -1, 11, 3, -1]  # some with no image, or with no text
# Halves with no row at all, and rows that belong together far apart.
FEW, FEW_TEXTS = [-1] * 9 + [5, 2, 4, 4, -1, 7, 5], [4, 5, -1, 5, 2, 6] + [-1] * 10


def vectors(rows: int, seed: int) -> jax.Array:
    x = np.random.default_rng(seed).normal(size=(rows, E))
    return jnp.asarray((x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32))


def arguments(image_ids: Any, text_ids: Any) -> tuple[jax.Array, ...]:
    image_ids, text_ids = jnp.asarray(image_ids, jnp.int32), jnp.asarray(text_ids, jnp.int32)
    return vectors(len(image_ids), 0), vectors(len(text_ids), 1), SCALE, BIAS, image_ids, text_ids


def sums(form: str, chunk: int, images, texts, scale, bias, image_ids, text_ids) -> PairSums:
    ids = {"image_ids": image_ids, "text_ids": text_ids}
    if form == "sigmoid":
        return sigmoid_sums(images, texts, scale, bias, **ids, chunk=chunk)
    return softmax_sums(images, texts, scale, **ids, chunk=chunk)


def similarity(images, texts, scale, bias) -> jax.Array:
    """The logits of all pairs."""
    logits = jnp.exp(scale) * jnp.matmul(images, texts.T, precision="highest")
    return logits if bias is None else logits + bias


def clip_loss(logits: jax.Array) -> jax.Array:
    """CLIP, figure 3: image i is classified among all texts as text i, and back; the mean over rows."""
    pairs = jnp.diagonal(logits)
    texts, images = (jnp.mean(jax.nn.logsumexp(logits, axis=axis) - pairs) for axis in (1, 0))
    return (texts + images) / 2


def siglip_loss(logits: jax.Array) -> jax.Array:
    """SigLIP, equation 1: every pair is a yes or no, summed, by the batch size."""
    signs = 2 * jnp.eye(len(logits), dtype=logits.dtype) - 1
    return -jnp.sum(jax.nn.log_sigmoid(signs * logits)) / len(logits)


def definition(form: str, images, texts, scale, bias, image_ids, text_ids) -> jax.Array:
    """The loss written down without a thought of memory; its gradient is autodiff's."""
    valid = (image_ids[:, None] >= 0) & (text_ids >= 0)
    positive = valid & (image_ids[:, None] == text_ids)
    if form == "sigmoid":
        logits = similarity(images, texts, scale, bias)
        return -jnp.sum(jnp.where(valid, jax.nn.log_sigmoid(jnp.where(positive, logits, -logits)), 0.0))
    z = similarity(images, texts, scale, None)

    def one_way(z, valid, positive):
        log_softmax = z - jax.nn.logsumexp(jnp.where(valid, z, -1e9), axis=1, keepdims=True)
        count = jnp.sum(positive, axis=1).astype(jnp.float32)
        return -jnp.sum(jnp.sum(jnp.where(positive, log_softmax, 0.0), axis=1) / jnp.maximum(count, 1.0))

    return (one_way(z, valid, positive) + one_way(z.T, valid.T, positive.T)) / 2


@functools.cache
def compiled(form: str, chunk: int | None, rules: AxisRules | None = None) -> Any:
    """All sums and the gradients to vectors, scale and bias; of the definition where there is no chunk.

    ``jit`` knows the mesh but not the rules, so that these have programs of their own.
    """

    def objective(*args):
        if chunk is None:
            loss = definition(form, *args)
            return loss, PairSums(loss, jnp.zeros(()), jnp.zeros(()))
        result = sums(form, chunk, *args)
        return result.loss, result

    gradient = jax.value_and_grad(objective, argnums=(0, 1, 2, 3), has_aux=True)
    return jax.jit(lambda *args: gradient(*args))


def results(form: str, chunk: int | None, *args: jax.Array) -> tuple[PairSums, tuple[jax.Array, ...]]:
    (_, result), gradients = compiled(form, chunk)(*args)
    return result, gradients


def assert_same(actual: Any, expected: Any) -> None:
    """Loss and gradients are the same sums in another order, so equal to 1e-6 by norm.

    Where terms cancel the error is that of the terms: in a gradient one is up to exp(SCALE), and for scale
    and bias they add up to about the loss.
    """
    loss, *gradients = expected[0].loss, *expected[1]
    for number, (a, b) in enumerate(zip(actual[1], gradients, strict=True)):
        assert np.isfinite(a).all()
        size = max(np.linalg.norm(b), 10.0, loss if number > 1 else 0.0)
        assert np.linalg.norm(a - b) <= 1e-6 * size
    assert abs(actual[0].loss - loss) <= 1e-6 * max(loss, 1.0)


# Values.


def test_two_pairs_worked_by_hand():
    images, texts = jnp.eye(2), jnp.asarray([[1.0, 0.0], [1.0, 0.0]])  # both texts are like image 0
    rows, scale = jnp.arange(2, dtype=jnp.int32), jnp.asarray(math.log(3.0))
    result, _ = results("softmax", 2, images, texts, scale, BIAS, rows, rows)  # logits 3 3 / 0 0
    image_side = 2 * math.log(2)
    text_side = math.log(1 + math.exp(-3)) + math.log(1 + math.exp(3))
    np.testing.assert_allclose(result.loss, (image_side + text_side) / 2, rtol=1e-6)
    assert result.images_right == 0  # texts tie: nobody knows which one is meant
    assert result.texts_right == 1
    result, _ = results("sigmoid", 2, images, texts, scale, BIAS, rows, rows)  # logits 1 1 / -2 -2
    signed = [1, -1, 2, -2]  # yes to 1, no to 1, no to -2, yes to -2
    np.testing.assert_allclose(result.loss, sum(math.log(1 + math.exp(-z)) for z in signed), rtol=1e-6)


def test_a_row_with_two_positives_has_half_of_its_target_on_each():
    images, texts = jnp.asarray([[1.0, 0.0]]), jnp.asarray([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    image_ids, text_ids = jnp.asarray([4], jnp.int32), jnp.asarray([4, 4, 7], jnp.int32)
    result, slopes = results("softmax", 2, images, texts, jnp.zeros(()), BIAS, image_ids, text_ids)
    total = math.e + 1 + 1 / math.e  # of logits 1, 0, -1
    np.testing.assert_allclose(result.loss, (math.log(total) - (1 + 0) / 2) / 2, rtol=1e-6)
    by_logit = np.asarray([math.e / total - 0.5, 1 / total - 0.5, 1 / math.e / total]) / 2
    np.testing.assert_allclose(slopes[1], by_logit[:, None] * [[1.0, 0.0]], rtol=1e-6)
    assert (result.images_right, result.texts_right) == (1, 2)  # either text has one image: no doubt


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow
def test_ids_that_are_all_different_give_the_loss_of_the_diagonal(form: str):
    args = arguments(range(B), range(B))
    loss, bias = {
        "softmax": (clip_loss, None),
        "sigmoid": (siglip_loss, BIAS),
    }[form]

    def diagonal(images, texts):
        return B * loss(similarity(images, texts, SCALE, bias))

    value, gradients = jax.jit(jax.value_and_grad(diagonal, argnums=(0, 1)))(*args[:2])
    actual, slopes = results(form, 3, *args)
    assert_same((actual, slopes[:2]), (actual.replace(loss=value), gradients))
    logits = np.asarray(similarity(*args[:3], None))
    assert int(actual.images_right) == sum(logits.argmax(axis=1) == np.arange(B))
    assert int(actual.texts_right) == sum(logits.argmax(axis=0) == np.arange(B))


@pytest.mark.parametrize("form", FORMS)
def test_several_positives_and_padding_are_those_of_the_definition(form: str):
    args = arguments(SEVERAL, TEXTS)
    assert_same(results(form, 3, *args), results(form, None, *args))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.slow
def test_there_may_be_more_texts_than_images(form: str):  # made-up texts that fit no image, say
    args = arguments(range(6), [*range(6), *range(100, 109)])
    assert_same(results(form, 4, *args), results(form, None, *args))


@pytest.mark.parametrize("form", FORMS)
def test_logits_of_any_size_have_a_loss(form: str):
    rows = jnp.arange(3, dtype=jnp.int32)
    images, scale, bias = jnp.eye(3), jnp.asarray(math.log(1e4)), jnp.zeros(())
    # A logit of 0 leaves a sigmoid undecided: log 2 for each of the six negatives. Where the positives are at
    # -10,000, a softmax has two equals far above: log 2 for each of three rows.
    near, far = (
        (0.0, 3e4 + 3 * math.log(2)) if form == "softmax" else (6 * math.log(2), 3e4 + 6 * math.log(2))
    )
    for texts, expected in ((images, near), (-images, far)):
        actual, slopes = results(form, 1, images, texts, scale, bias, rows, rows)
        np.testing.assert_allclose(actual.loss, expected, rtol=1e-6)
        assert all(np.isfinite(slope).all() for slope in slopes)


# Properties.

ids = st.lists(st.integers(-1, 5), min_size=7, max_size=7)
quick = settings(max_examples=10, deadline=None)


@quick
@given(ids, ids, st.sampled_from(FORMS), st.sampled_from([1, 3]))
@pytest.mark.slow
def test_the_size_of_a_chunk_does_not_matter(image_ids, text_ids, form, chunk):
    args = arguments(image_ids, text_ids)
    actual, expected = results(form, chunk, *args), results(form, 100, *args)
    assert_same(actual, expected)
    assert_same(actual, results(form, None, *args))
    assert actual[0].images_right == expected[0].images_right
    assert actual[0].texts_right == expected[0].texts_right


@quick
@given(ids, ids, st.sampled_from(FORMS), st.permutations(range(7)), st.permutations(range(7)))
def test_rows_may_stand_in_any_order(image_ids, text_ids, form, first, second):
    images, texts, scale, bias, image_ids, text_ids = arguments(image_ids, text_ids)
    first, second = np.asarray(first), np.asarray(second)
    expected, slopes = results(form, 3, images, texts, scale, bias, image_ids, text_ids)
    actual = results(form, 3, images[first], texts[second], scale, bias, image_ids[first], text_ids[second])
    assert_same(actual, (expected, (slopes[0][first], slopes[1][second], *slopes[2:])))
    assert actual[0].images_right == expected.images_right
    assert actual[0].texts_right == expected.texts_right


@quick
@given(ids, ids, st.sampled_from(FORMS), st.sampled_from([0.0, 1e30, math.nan, math.inf]))
def test_padding_changes_nothing_whatever_it_holds(image_ids, text_ids, form, content):
    images, texts, scale, bias, image_ids, text_ids = arguments(image_ids, text_ids)
    expected, slopes = results(form, 3, images, texts, scale, bias, image_ids, text_ids)
    rows, none = jnp.full((5, E), content), jnp.full(5, -1, jnp.int32)
    # Padding of the images ahead of them, of the texts behind.
    padded = jnp.concatenate([rows, images]), jnp.concatenate([texts, rows])
    padded_ids = jnp.concatenate([none, image_ids]), jnp.concatenate([text_ids, none])
    actual, padded_slopes = results(form, 3, *padded, scale, bias, *padded_ids)
    np.testing.assert_array_equal(padded_slopes[0][:5], 0)
    np.testing.assert_array_equal(padded_slopes[1][7:], 0)
    assert_same(
        (actual, (padded_slopes[0][5:], padded_slopes[1][:7], *padded_slopes[2:])), (expected, slopes)
    )
    assert (actual.images_right, actual.texts_right) == (expected.images_right, expected.texts_right)


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_twice_over_is_twice_the_loss_and_log_2_a_row(form: str):
    args = arguments(range(8), range(8))
    images, texts, scale, bias, image_ids, text_ids = args
    twice = [jnp.concatenate([x, x]) for x in (images, texts)]
    once, again = (
        results(form, 3, *args)[0],
        results(form, 3, *twice, scale, bias, *(jnp.concatenate([x, x]) for x in (image_ids, text_ids)))[0],
    )
    # A softmax now has every term twice; of the pairs of a sigmoid there are four for each.
    expected = 2 * once.loss + 16 * math.log(2) if form == "softmax" else 4 * once.loss
    np.testing.assert_allclose(again.loss, expected, rtol=1e-6)
    assert again.images_right == 2 * once.images_right


@pytest.mark.parametrize("form", FORMS)
def test_no_pair_at_all_is_no_loss(form: str):
    args = arguments([-1] * 7, [4, 5, -1, 5, 6, 7, 8])
    actual, slopes = results(form, 3, *args)
    for leaf in jax.tree.leaves((actual, slopes)):
        np.testing.assert_array_equal(leaf, 0)


def test_narrow_vectors_are_compared_in_float32():
    images, texts, *rest = arguments(range(B), range(B))
    narrow = [x.astype(jnp.bfloat16) for x in (images, texts)]
    actual, slopes = results("sigmoid", 3, *narrow, *rest)
    expected, exact = results("sigmoid", 3, *(x.astype(jnp.float32) for x in narrow), *rest)
    assert actual.loss == expected.loss
    assert slopes[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(slopes[0], exact[0].astype(jnp.bfloat16))


# Memory and devices.


def sizes_of(jaxpr: Any) -> dict[str, int]:
    """The largest result of every primitive, in all programs within."""
    largest: dict[str, int] = {}
    for equation in jaxpr.eqns:
        found = {equation.primitive.name: max((v.aval.size for v in equation.outvars), default=0)}
        for parameter in jax.tree.leaves(equation.params):
            inner = getattr(parameter, "jaxpr", parameter)
            for name, size in (sizes_of(inner) if hasattr(inner, "eqns") else {}).items():
                found[name] = max(size, found.get(name, 0))
        for name, size in found.items():
            largest[name] = max(size, largest.get(name, 0))
    return largest


@pytest.mark.parametrize("form", FORMS)
def test_all_logits_never_exist_at_once(form: str):
    args = arguments(range(64), range(64))
    assert max(sizes_of(jax.make_jaxpr(compiled(form, None))(*args).jaxpr).values()) == 64 * 64
    assert max(sizes_of(jax.make_jaxpr(compiled(form, 4))(*args).jaxpr).values()) == 64 * E
    with sharding.use_mesh(make_mesh(MeshConfig())):
        found = sizes_of(jax.make_jaxpr(lambda *a: compiled(form, 4)(*a))(*args).jaxpr)
    assert not {name for name in found if "gather" in name} and "ppermute" in found
    outside = {"jit", "pjit", "shard_map", "custom_vjp_call", "custom_vjp_call_jaxpr"}
    inside = {name: size for name, size in found.items() if name not in outside}
    assert max(inside.values()) == 64 * E  # padding set to zero, before the rows are spread


@pytest.mark.parametrize(
    "form, mesh, rules",
    [
        ("softmax", MeshConfig(data=2, expert=2, tensor=2), None),
        ("sigmoid", MeshConfig(data=2, fsdp=2, expert=2), None),
        ("softmax", MeshConfig(fsdp=4, tensor=2), AxisRules(batch=("fsdp",))),
        ("sigmoid", MeshConfig(data=8), AxisRules(batch=())),
    ],
    ids=["a tensor axis", "three axes", "own rules", "whole batch"],
)
@pytest.mark.slow
def test_many_devices_compute_what_one_does(form: str, mesh: MeshConfig, rules: AxisRules | None):
    for ids in ((SEVERAL, TEXTS), (FEW, FEW_TEXTS)):
        args = arguments(*ids)
        expected, slopes = results(form, 3, *args)
        with sharding.use_mesh(make_mesh(mesh), rules):
            (_, actual), actual_slopes = compiled(form, 3, rules)(*args)
        assert_same((actual, actual_slopes), (expected, slopes))
        assert actual.images_right == expected.images_right
        assert actual.texts_right == expected.texts_right


def test_rows_that_do_not_divide_and_chunks_of_nothing_are_named():
    images, texts, scale, _, image_ids, text_ids = arguments(range(8), range(6))
    with (
        sharding.use_mesh(make_mesh(MeshConfig(data=4, tensor=2))),
        pytest.raises(ValueError, match=r"6 texts do not divide by mesh axes data\*fsdp\*expert=4"),
    ):
        softmax_sums(images, texts, scale, image_ids=image_ids, text_ids=text_ids, chunk=4)
    with pytest.raises(ValueError, match="chunk=0 texts at once; expected 1 or more"):
        softmax_sums(images, texts, scale, image_ids=image_ids, text_ids=text_ids, chunk=0)
