"""A few tokens, whose experts are fetched one choice at a time: the same values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl_jax.kernels.activation import SWIGLU
from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.moe import dispatch
from vl_jax.moe.routing import TokenChoice

E, D, F = 6, 8, 4


def weights(biased: bool) -> ExpertWeights:
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(E, D, 2, F), (E, F, D), (E, 2, F), (E, D)]
    w_in, w_out, b_in, b_out = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    return ExpertWeights(w_in, w_out, *((b_in, b_out) if biased else ()))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("experts", [[[0, 5]], [[2, E], [E, E]], [[1, 3], [3, 1], [4, 0]]], ids=str)
def test_fetched_experts_are_those_of_the_definition(experts, biased):
    experts = jnp.array([experts], jnp.int32)
    gates = jnp.where(experts < E, jax.random.uniform(jax.random.key(1), experts.shape), 0.0)
    x = jax.random.normal(jax.random.key(2), (*experts.shape[:2], D))
    assert experts.size <= E  # else the choices would be sorted

    def result(kernel: str):
        def loss(x, gates, weights):
            assignment = TokenChoice(experts, gates)
            y = dispatch.apply_experts(x, assignment, weights, activation=SWIGLU, kernel=kernel)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(x, gates, weights(biased))

    found, expected = jax.tree.leaves(result("blocked")), jax.tree.leaves(result("reference"))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
