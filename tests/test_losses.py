"""The written-down gradient of the cross-entropy against autodiff of its definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vl_jax import losses


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_loss_and_gradient_are_those_of_the_definition(dtype):
    logits = (5 * jax.random.normal(jax.random.key(0), (3, 4, 11))).astype(dtype)
    targets = jax.random.randint(jax.random.key(1), (3, 4), 0, 11)
    weights = jax.random.uniform(jax.random.key(2), (3, 4))

    def ours(logits):
        return jnp.sum(losses.cross_entropy(logits, targets)[0].astype(jnp.float32) * weights)

    def definition(logits):
        nll = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
        return jnp.sum(nll * weights)

    tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
    (value, gradient), (expected, expected_gradient) = map(
        lambda f: jax.value_and_grad(f)(logits), (ours, definition)
    )
    assert gradient.dtype == dtype
    np.testing.assert_allclose(value, expected, rtol=tolerance)
    np.testing.assert_allclose(
        gradient.astype(jnp.float32), expected_gradient.astype(jnp.float32), rtol=tolerance, atol=tolerance
    )


def test_huge_logits_overflow_neither_way():
    logits = jnp.array([[[1e4, -1e4, 0.0]]])
    for target, nll in ((0, 0.0), (1, 2e4)):
        value, gradient = jax.value_and_grad(
            lambda z, t=target: losses.cross_entropy(z, jnp.array([[t]]))[0].sum()
        )(logits)
        np.testing.assert_allclose(value, nll)
        assert bool(jnp.all(jnp.isfinite(gradient)))


def test_the_hit_has_no_gradient():
    logits = jnp.ones((1, 1, 3))
    gradient = jax.grad(lambda z: losses.cross_entropy(z, jnp.array([[1]]))[1].sum())(logits)
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("chunk", [1, 6, 100])  # rows at least; of 2 x 7: seven pieces, three, one
def test_the_loss_of_the_head_is_that_of_its_logits(monkeypatch, dtype, chunk):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 1)
    monkeypatch.setattr(losses, "CHUNK_ROWS", chunk)
    hidden = jax.random.normal(jax.random.key(0), (2, 7, 5)).astype(dtype)
    kernel = jax.random.normal(jax.random.key(1), (5, 11)).astype(dtype)
    targets = jax.random.randint(jax.random.key(2), (2, 7), 0, 11)
    weights = jax.random.uniform(jax.random.key(3), (2, 7))

    def fused(hidden, kernel):
        return losses.head_cross_entropy(hidden, kernel, targets, weights)

    def definition(hidden, kernel):
        nll, hit = losses.cross_entropy((hidden @ kernel).astype(jnp.float32), targets)
        return jnp.sum(nll * weights), jnp.sum(hit * weights)

    tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
    results = [
        jax.value_and_grad(f, argnums=(0, 1), has_aux=True)(hidden, kernel) for f in (fused, definition)
    ]
    results.append((fused(hidden, kernel), results[0][1]))  # without a gradient
    wide = [jax.tree.map(lambda a: a.astype(jnp.float32), r) for r in results]
    for result in wide[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), wide[0], result
        )
    assert all(g.dtype == dtype for g in results[0][1])
