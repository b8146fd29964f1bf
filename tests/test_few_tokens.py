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
    random = np.random.default_rng(0)
    shapes = [(E, D, 2, F), (E, F, D), (E, 2, F), (E, D)]
    w_in, w_out, b_in, b_out = (random.standard_normal(s, np.float32) for s in shapes)
    return ExpertWeights(w_in, w_out, *((b_in, b_out) if biased else ()))


@jax.jit
def results(x, experts, gates, weights):
    """(output, gradients) of the experts fetched, and by the definition."""

    def of(kernel: str):
        def loss(x, gates, weights):
            assignment = TokenChoice(experts, gates)
            y = dispatch.apply_experts(x, assignment, weights, activation=SWIGLU, kernel=kernel)
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, gates, weights)

    return of("blocked"), of("reference")


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("experts", [[[0, 5]], [[2, E], [E, E]], [[1, 3], [3, 1], [4, 0]]], ids=str)
@pytest.mark.slow
def test_fetched_experts_are_those_of_the_definition(experts, biased):
    experts, random = np.array([experts], np.int32), np.random.default_rng(1)
    gates = np.where(experts < E, random.random(experts.shape, np.float32), np.float32(0))
    x = random.standard_normal((*experts.shape[:2], D), np.float32)
    assert experts.size <= E  # else the choices would be sorted

    found, expected = results(x, experts, gates, weights(biased))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
