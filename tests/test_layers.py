"""Products with a written-down gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl_jax.nn.layers import join_heads, project, split_heads


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)], ids=str)
@pytest.mark.slow
def test_values_and_gradients_of_a_product_are_those_of_autodiff(shape):
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], (5, 4))
    upstream = jax.random.normal(keys[2], (*shape[:-1], 4))
    for multiply in (project, jax.jit(project)):
        found, pull = jax.vjp(multiply, x, kernel)
        expected, plain = jax.vjp(jnp.matmul, x, kernel)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        for a, b in zip(pull(upstream), plain(upstream), strict=True):
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_heads_are_split_and_joined_as_the_definition_says():
    x, up = jax.random.normal(jax.random.key(0), (2, 3, 4)), jax.random.normal(jax.random.key(1), (4, 5, 6))
    down = jax.random.normal(jax.random.key(2), (5, 6, 4))

    def ours(x, up, down):
        return jnp.sum(jnp.sin(join_heads(jnp.sin(split_heads(x, up)), down)))

    def definition(x, up, down):
        heads = jnp.sin(jnp.einsum("BTD,DNH->BTNH", x, up))
        return jnp.sum(jnp.sin(jnp.einsum("BTNH,NHD->BTD", heads, down)))

    found, expected = (jax.value_and_grad(f, argnums=(0, 1, 2))(x, up, down) for f in (ours, definition))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
