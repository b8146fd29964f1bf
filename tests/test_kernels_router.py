"""The router kernel chooses, weighs, counts and ranks exactly as its definition, and as a stable sort."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas import SMALL, SMALL_RACES, compile_for, run_without_races

from vl_jax.kernels.aot import TOPOLOGIES
from vl_jax.kernels.router import TOKEN_TILE, Routing, rank_in_expert, route_top_k, sort_by_expert

# More than one tile of tokens, the last one short.
T = TOKEN_TILE + 44


def logits(num_experts: int) -> jax.Array:
    # Rounded, so that there are ties.
    return jnp.asarray(
        np.round(8 * np.random.default_rng(0).standard_normal((T, num_experts), np.float32)) / 4
    )


@functools.partial(jax.jit, static_argnames=("kernel", "top_k", "score", "target"))
def both(x, bias, valid, upstream, *, top_k, score, kernel="pallas", target=SMALL) -> tuple:
    """(routing, gradient of the logits)."""

    def gates(x) -> tuple[jax.Array, Routing]:
        routing = route_top_k(
            x, top_k=top_k, score=score, bias=bias, valid=valid, kernel=kernel, target=target
        )
        return routing.gates, routing

    _, pullback, routing = jax.vjp(gates, x, has_aux=True)
    return routing, pullback(upstream)[0]


def inputs(num_experts: int, top_k: int) -> tuple:
    random = np.random.default_rng(1)
    return (
        logits(num_experts),
        0.1 * random.standard_normal((num_experts,), np.float32),
        random.random(T) < 0.9,
        random.standard_normal((T, top_k), np.float32),
    )


def check(actual: tuple, expected: tuple) -> None:
    for name in ("experts", "rank", "counts"):
        np.testing.assert_array_equal(getattr(actual[0], name), getattr(expected[0], name), err_msg=name)
    np.testing.assert_allclose(actual[0].gates, expected[0].gates, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "score"),
    [
        (4, 2, "sigmoid"),
        (256, 16, "softmax"),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in ((4, 2, "softmax"), (3, 3, "sigmoid"))),
        (1, 1, "softmax"),
    ],
)
@pytest.mark.slow
def test_pallas_equals_the_definition(num_experts, top_k, score):
    arguments = inputs(num_experts, top_k)
    options = {"top_k": top_k, "score": score}
    check(both(*arguments, **options), both(*arguments, **options, kernel="reference"))


@pytest.mark.parametrize("kernel", ["reference", "pallas"])
def test_ranks_sort_the_choices(kernel):
    # Choices that no router made: one expert twice, unused ones among the used.
    experts = np.random.default_rng(2).integers(0, 9, (T, 3), np.int32)

    @jax.jit
    def sort(experts):
        rank, counts = rank_in_expert(experts, num_experts=8, kernel=kernel, target=SMALL)
        return *sort_by_expert(experts, rank, counts), counts

    choice, moves, counts = sort(experts)
    flat = np.asarray(experts).reshape(-1)
    order, used = np.argsort(flat, kind="stable"), int((flat < 8).sum())
    np.testing.assert_array_equal(choice[:used], order[:used])
    inverse = np.asarray(moves.inverse).reshape(-1)
    np.testing.assert_array_equal(inverse[order[:used]], np.arange(used))
    assert (inverse[order[used:]] == 3 * T).all()
    np.testing.assert_array_equal(counts, np.bincount(flat, minlength=9)[:8])


@pytest.mark.slow
def test_nan_shows_in_the_gates():
    x = logits(8).at[5, 3].set(jnp.nan)
    routing = route_top_k(x, top_k=2, kernel="pallas", target=SMALL)
    assert jnp.isnan(routing.gates[5]).all() and not jnp.isnan(jnp.delete(routing.gates, 5, axis=0)).any()


def test_experts_that_are_shut_are_chosen_last():
    bias = jnp.array([-jnp.inf, -jnp.inf, 0.0, -jnp.inf])
    routing = route_top_k(logits(4), top_k=3, bias=bias, kernel="pallas", target=SMALL)
    assert (np.asarray(routing.experts) == [2, 0, 1]).all()


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ValueError, match="top_k=5"):
        route_top_k(logits(4), top_k=5)


@pytest.mark.slow
def test_no_races(capfd):
    arguments, options = inputs(8, 3), {"top_k": 3, "score": "sigmoid"}
    actual = run_without_races(
        functools.partial(both, **options, target=SMALL_RACES), *arguments, capfd=capfd
    )
    check(actual, both(*arguments, **options, kernel="reference"))


@pytest.mark.tpu_aot
@pytest.mark.parametrize(("num_experts", "top_k", "score"), [(64, 6, "softmax"), (256, 16, "sigmoid")])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_compiles_forward_and_backward(topology, num_experts, top_k, score):
    shapes = (
        jax.ShapeDtypeStruct((4096, num_experts), jnp.float32),
        jax.ShapeDtypeStruct((num_experts,), jnp.float32),
        jax.ShapeDtypeStruct((4096,), bool),
        jax.ShapeDtypeStruct((4096, top_k), jnp.float32),
    )
    cost = compile_for(
        topology,
        lambda target: functools.partial(both, top_k=top_k, score=score, target=target),
        *shapes,
    )
    # Mostly the sums over the earlier tokens of a tile.
    assert cost.flops > 2 * TOKEN_TILE * 4096 * num_experts


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_ranking_compiles(topology):
    compile_for(
        topology,
        lambda target: functools.partial(rank_in_expert, num_experts=64, kernel="pallas", target=target),
        jax.ShapeDtypeStruct((4096, 6), jnp.int32),
    )
