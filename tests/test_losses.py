"""The written-down gradient of the cross-entropy against autodiff of its definition."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vl_jax import losses, sharding


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_loss_and_gradient_are_those_of_the_definition(dtype):
    random = np.random.default_rng(0)
    logits = (5 * random.standard_normal((3, 4, 11), np.float32)).astype(dtype)
    targets = jnp.asarray(random.integers(0, 11, (3, 4), np.int32))
    weights = jnp.asarray(random.random((3, 4), np.float32))

    def ours(logits):
        return jnp.sum(losses.cross_entropy(logits, targets)[0].astype(jnp.float32) * weights)

    def definition(logits):
        nll = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
        return jnp.sum(nll * weights)

    tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
    both = jax.jit(lambda logits: [jax.value_and_grad(f)(logits) for f in (ours, definition)])
    (value, gradient), (expected, expected_gradient) = both(logits)
    assert gradient.dtype == dtype
    np.testing.assert_allclose(value, expected, rtol=tolerance)
    np.testing.assert_allclose(
        gradient.astype(jnp.float32), expected_gradient.astype(jnp.float32), rtol=tolerance, atol=tolerance
    )


def test_huge_logits_overflow_neither_way():
    logits = np.array([[[1e4, -1e4, 0.0]]], np.float32)
    loss = jax.jit(jax.value_and_grad(lambda z, target: losses.cross_entropy(z, target)[0].sum()))
    for target, nll in ((0, 0.0), (1, 2e4)):
        value, gradient = loss(logits, np.array([[target]]))
        np.testing.assert_allclose(value, nll)
        assert np.isfinite(gradient).all()


def test_the_hit_has_no_gradient():
    logits = jnp.ones((1, 1, 3))
    gradient = jax.grad(lambda z: losses.cross_entropy(z, jnp.array([[1]]))[1].sum())(logits)
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("chunk", [1, 6, 100])  # rows at least; of 2 x 7: seven pieces, three, one
@pytest.mark.slow
def test_the_loss_of_the_head_is_that_of_its_logits(monkeypatch, dtype, chunk):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(losses, "CHUNK_ROWS", chunk)
    random = np.random.default_rng(0)
    hidden = random.standard_normal((2, 7, 5), np.float32).astype(dtype)
    kernel = random.standard_normal((5, 11), np.float32).astype(dtype)
    targets = jnp.asarray(random.integers(0, 11, (2, 7), np.int32))
    weights = jnp.asarray(random.random((2, 7), np.float32))

    def fused(hidden, kernel):
        return losses.head_cross_entropy(hidden, kernel, targets, weights)

    def definition(hidden, kernel):
        nll, hit = losses.cross_entropy((hidden @ kernel).astype(jnp.float32), targets)
        return jnp.sum(nll * weights), jnp.sum(hit * weights)

    tolerance = 1e-5 if dtype == jnp.float32 else 3e-2

    @jax.jit
    def compute(hidden, kernel):
        both = [
            jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(hidden, kernel) for f in (fused, definition)
        ]
        return [*both, (fused(hidden, kernel), both[0][1])]  # the last without a gradient

    results = jax.device_get(compute(hidden, kernel))
    wide = [jax.tree.map(lambda a: np.asarray(a, np.float32), r) for r in results]
    for result in wide[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), wide[0], result
        )
    assert all(g.dtype == dtype for g in results[0][1])


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 8},
        {"data": 2, "fsdp": 4},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"data": 1, "expert": 2, "fsdp": 2, "tensor": 2},
        {"data": 1, "tensor": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [8, 6])  # 6 do not divide: then every device has all of them
@pytest.mark.slow
def test_the_loss_of_the_head_is_the_same_over_devices(monkeypatch, sizes, rows):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(losses, "CHUNK_ROWS", 4)
    random = np.random.default_rng(0)
    hidden = random.standard_normal((rows, 7, 8), np.float32)
    kernel = random.standard_normal((8, 24), np.float32)
    targets = jnp.asarray(random.integers(0, 24, (rows, 7), np.int32))
    weights = jnp.asarray(random.random((rows, 7), np.float32))

    def loss(hidden, kernel):
        return losses.head_cross_entropy(hidden, kernel, targets, weights)

    both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    alone = jax.jit(both)(hidden, kernel)
    with sharding.use_mesh(sharding.make_mesh(sharding.MeshConfig(**sizes))):
        spread, forward = jax.jit(lambda *a: (both(*a), loss(*a)))(hidden, kernel)
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(compare, alone, spread)
    jax.tree.map(compare, alone[0], forward)
