"""Experts in bounded room: output and gradients of the plain definition, and memory by experts in use."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl_jax.kernels.accumulate import add_gradients
from vl_jax.kernels.activation import SWIGLU, Activation
from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.kernels.grouped_matmul import grouped_mlp
from vl_jax.moe import dispatch, routing
from vl_jax.moe.assignment import RoutingContext, TokenChoice
from vl_jax.moe.bounded import windows
from vl_jax.moe.layer import sparse_mlp
from vl_jax.moe.routing import MoEConfig

T, D, E, F = 11, 4, 20, 3


def weights_of(
    activation: Activation = SWIGLU, *, biased: bool, seed: int = 1, experts: int = E
) -> ExpertWeights:
    random, inputs = np.random.default_rng(seed), activation.inputs
    shapes = [(experts, D, inputs, F), (experts, F, D), (experts, inputs, F), (experts, D)]
    found = [random.standard_normal(s, np.float32) for s in shapes[: 4 if biased else 2]]
    return ExpertWeights(*map(jnp.asarray, found))


def results(apply, x, assignment, weights):
    def loss(x, gates, weights):
        y = apply(x, TokenChoice(assignment.experts, gates), weights)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)), y

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, assignment.gates, weights)


@functools.cache
def compiled(room: int | None, kernel: str):
    if room is None:
        apply = functools.partial(dispatch.apply_experts, activation=SWIGLU, kernel="reference")
    else:
        apply = functools.partial(windows.apply_experts, how=windows.Experts(SWIGLU, kernel, room))
    return jax.jit(functools.partial(results, apply))


def same(found, expected):
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        off = np.linalg.norm(np.asarray(a) - b)
        assert off <= 1e-6 * np.linalg.norm(b), f"{jax.tree_util.keystr(path)}: {off}"


def drawn(seed: int, used: float) -> TokenChoice:
    """Every expert for every token, or a part of them; in any order."""
    random = np.random.default_rng(seed)
    experts = np.argsort(random.random((2, T, E)), axis=-1).astype(np.int32)
    experts[random.random(experts.shape) >= used] = E
    return TokenChoice(
        experts, np.where(experts < E, random.random(experts.shape, np.float32), np.float32(0))
    )


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0.0, 0.02, 0.2, 1.0]),
    st.sampled_from([E, 50]),
    st.sampled_from(["blocked", "reference"]),
    st.booleans(),
)
@pytest.mark.slow
def test_windows_have_output_and_gradients_of_the_plain_definition(seed, used, room, kernel, biased):
    x = np.random.default_rng(seed).standard_normal((2, T, D), np.float32)
    arguments = x, drawn(seed, used), weights_of(biased=biased)
    same(compiled(room, kernel)(*arguments), compiled(None, "reference")(*arguments))


def test_less_room_than_for_one_token_is_refused():
    x = jnp.zeros((2, T, D))
    how = windows.Experts(SWIGLU, "blocked", E - 1)
    with pytest.raises(ValueError, match="room=19 is less than for the 20 choices of one token"):
        windows.apply_experts(x, drawn(0, 1.0), weights_of(biased=False), how)


@pytest.mark.parametrize(("activation", "biased"), [(SWIGLU, True), (Activation("gelu", gated=False), False)])
@pytest.mark.slow
def test_gradients_added_block_by_block_are_those_of_the_products(activation, biased):
    """Of groups of no row, of a few and of several blocks; rows past the last group have none."""
    sizes, rows = jnp.array([0, 3, 0, 300, 17, 0]), 400
    weights, random = weights_of(activation, biased=biased, experts=6), np.random.default_rng(3)
    x, grad = (random.standard_normal((rows, D), np.float32) for _ in range(2))
    gates = jnp.asarray(random.random(rows, np.float32))

    def products(x, gates, weights):
        return grouped_mlp(x, sizes, weights, gates=gates, activation=activation, kernel="reference")

    *expected, of_weights = jax.jit(lambda: jax.vjp(products, x, gates, weights)[1](grad))()
    sums = weights_of(activation, biased=biased, seed=5, experts=6)
    add = functools.partial(add_gradients, activation=activation)
    for kernel in ("blocked", "reference"):
        *found, total = jax.jit(functools.partial(add, kernel=kernel))(x, gates, grad, sizes, weights, sums)
        for a, b in zip(
            jax.tree.leaves((found, total)),
            jax.tree.leaves((expected, jax.tree.map(jnp.add, sums, of_weights))),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def temporaries(scheme: str, *, training: bool) -> int:
    """Bytes besides arguments and results of routing and experts at 64 experts, six a token."""
    config, dtype = MoEConfig(scheme=scheme, num_experts=64, top_k=6, expert_dim=64), jnp.float32

    def layer(x, router, weights, state):
        where = jnp.zeros(x.shape[:2], jnp.int32)
        context = RoutingContext(valid=where == 0, modality=where, tokens=where, positions=where, x=x)
        logits = x @ router
        assignment, losses = routing.route(logits, context, state, config)
        y, _ = sparse_mlp(x, logits, assignment, weights, context=context, config=config)
        return jnp.sum(y * y) + sum(losses.values())

    leaf, width = jax.ShapeDtypeStruct, 128
    weights = ExpertWeights(leaf((64, width, 2, 64), dtype), leaf((64, 64, width), dtype))
    arguments = leaf((2, 512, width), dtype), leaf((width, 64), dtype), weights
    state = jax.eval_shape(lambda: routing.init_state(config))
    function = jax.grad(layer, argnums=(0, 1, 2)) if training else layer
    return jax.jit(function).lower(*arguments, state).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.slow
def test_dynamic_schemes_need_about_the_memory_of_top_k(training):
    most = 1.5 * temporaries("top_k", training=training)
    for scheme in ("expert_threshold", "remoe"):
        assert temporaries(scheme, training=training) <= most, scheme
