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
