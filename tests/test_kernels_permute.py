"""Rows are moved to experts and back by gathers alone, and the whole layer equals its dense definition."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas import LARGE, LARGE_RACES, SMALL, SMALL_RACES, compile_for, run_without_races

from vl_jax.kernels.activation import SWIGLU
from vl_jax.kernels.aot import TOPOLOGIES
from vl_jax.kernels.combine import combine, expert_mlp
from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.kernels.permute import Moves, permute, unpermute
from vl_jax.kernels.router import rank_in_expert, sort_by_expert
from vl_jax.kernels.target import Target

# Several steps of transfers, the last one short.
T, K, E, D, F = 75, 3, 5, 256, 128


def plan(num_experts: int = E) -> tuple[jax.Array, jax.Array, Moves, jax.Array]:
    """(experts, choice, moves, counts): some choices unused, one expert without any."""
    experts = np.random.default_rng(0).integers(0, num_experts + 1, (T, K), np.int32)
    experts = jnp.asarray(np.where(experts == 1, 2, experts) if num_experts > 2 else experts)
    return experts, *_sorted(experts, num_experts)


@functools.partial(jax.jit, static_argnums=1)
def _sorted(experts: jax.Array, num_experts: int) -> tuple[jax.Array, Moves, jax.Array]:
    rank, counts = rank_in_expert(experts, num_experts=num_experts)
    return *sort_by_expert(experts, rank, counts), counts


def normal(seed: int, *shape: int, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype))


@functools.partial(jax.jit, static_argnames=("which", "kernel", "target"))
def moved(x, upstream, moves, *, which, kernel="pallas", target=SMALL) -> tuple:
    """(rows, gradient)."""
    y, pullback = jax.vjp(lambda x: which(x, moves, kernel=kernel, target=target), x)
    return y, pullback(upstream)[0]


@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        (jnp.float32, 200),
        (jnp.bfloat16, 256),
        pytest.param(jnp.float32, 256, marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, 200, marks=pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_pallas_moves_what_the_definition_moves(dtype, width):
    _, _, moves, counts = plan()
    x, rows = normal(1, T, width, dtype=dtype), normal(2, T * K, width, dtype=dtype)
    used = int(counts.sum())
    there = [moved(x, rows, moves, which=permute, kernel=k) for k in ("pallas", "reference")]
    np.testing.assert_array_equal(there[0][0][:used], there[1][0][:used])
    back = [moved(rows, x, moves, which=unpermute, kernel=k) for k in ("pallas", "reference")]
    np.testing.assert_array_equal(back[0][1][:used], back[1][1][:used])
    # Sums of three, rounded once; their order may differ by a unit of the dtype.
    for a, b in ((there[0][1], there[1][1]), (back[0][0], back[1][0])):
        np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), rtol=float(jnp.finfo(dtype).eps), atol=1e-6
        )


def dense(x, gates, experts, weights) -> jax.Array:
    """Every expert on every token."""
    hidden = SWIGLU.of(*jnp.einsum("TD,EDXF->XTEF", x, weights.w_in))
    out = jnp.einsum("TEF,EFD->TED", hidden, weights.w_out)
    share = jnp.einsum("TK,TKE->TE", gates, jax.nn.one_hot(experts, weights.w_out.shape[0]))
    return jnp.einsum("TE,TED->TD", share, out)


@jax.jit
def defined(x, gates, weights, upstream, experts) -> tuple:
    """(output, (gradients of x, gates and weights)) by the definition."""
    y, pullback = jax.vjp(lambda x, gates, weights: dense(x, gates, experts, weights), x, gates, weights)
    return y, pullback(upstream)


@functools.partial(jax.jit, static_argnames=("kernel", "target"))
def layer(x, gates, weights, upstream, choice, moves, counts, *, kernel="pallas", target=SMALL) -> tuple:
    """(output, (gradients of x, gates and weights))."""

    def run(x, gates, weights) -> jax.Array:
        return expert_mlp(x, gates, choice, moves, counts, weights, kernel=kernel, target=target)

    y, pullback = jax.vjp(run, x, gates, weights)
    return y, pullback(upstream)


def layer_inputs(num_experts: int) -> tuple:
    weights = ExpertWeights(normal(3, num_experts, D, 2, F) * D**-0.5, normal(4, num_experts, F, D) * F**-0.5)
    return normal(1, T, D), jax.nn.softmax(normal(5, T, K)), weights, normal(6, T, D)


def close(actual, expected) -> None:
    def check(a, b) -> None:
        # Sums over up to 200 rows.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(b).max())))

    jax.tree.map(check, actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_experts", "kernel", "target"),
    [
        (E, "reference", SMALL),
        (E, "blocked", SMALL),
        (E, "pallas", SMALL),
        (E, "pallas", LARGE),
        (1, "pallas", LARGE),
    ],
    ids=["reference", "blocked", "gathered before", "gathered inside", "one expert"],
)
def test_the_layer_equals_its_dense_definition(num_experts, kernel, target):
    experts, choice, moves, counts = plan(num_experts)
    *arguments, upstream = layer_inputs(num_experts)
    close(
        layer(*arguments, upstream, choice, moves, counts, kernel=kernel, target=target),
        defined(*arguments, upstream, experts),
    )


def test_combine_weighs_rows_by_their_gates():
    experts, choice, moves, _ = plan()
    rows, gates, upstream = normal(2, T * K, D), normal(5, T, K), normal(6, T, D)

    def expected(rows, gates) -> jax.Array:
        padded = jnp.pad(rows, ((0, 1), (0, 0)))
        return jnp.einsum("TKD,TK->TD", padded[moves.inverse], jnp.where(experts < E, gates, 0.0))

    def actual(rows, gates) -> jax.Array:
        return combine(rows, gates, choice, moves)

    @jax.jit
    def both(rows, gates) -> list:
        pairs = (jax.vjp(f, rows, gates) for f in (actual, expected))
        return [(y, *pullback(upstream)) for y, pullback in pairs]

    (y, grad_rows, grad_gates), (z, rows_expected, gates_expected) = both(rows, gates)
    used = int((experts < E).sum())
    close((y, grad_rows[:used], grad_gates), (z, rows_expected[:used], gates_expected))


@pytest.mark.parametrize("kernel", ["reference", "pallas"])
@pytest.mark.slow
def test_no_gather_is_transposed_to_a_scatter(kernel):
    _, choice, moves, counts = plan()
    program = jax.make_jaxpr(functools.partial(layer, kernel=kernel, target=Target()))
    assert "scatter" not in str(program(*layer_inputs(E), choice, moves, counts))


@pytest.mark.slow
@pytest.mark.parametrize("target", [SMALL_RACES, LARGE_RACES], ids=["gathered before", "gathered inside"])
def test_no_races(target, capfd):
    _, choice, moves, counts = plan()
    arguments = (*layer_inputs(E), choice, moves, counts)
    actual = run_without_races(functools.partial(layer, target=target), *arguments, capfd=capfd)
    close(actual, layer(*arguments, kernel="reference"))


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_layer_compiles_forward_and_backward(topology):
    tokens, top_k, depth, width, experts = 4096, 6, 2048, 1408, 64

    def shape(*sizes: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    x = shape(tokens, depth)
    weights = ExpertWeights(shape(experts, depth, 2, width), shape(experts, width, depth))
    choice, counts = shape(tokens * top_k, dtype=jnp.int32), shape(experts, dtype=jnp.int32)
    moves = Moves(choice, shape(tokens, top_k, dtype=jnp.int32))
    gates = shape(tokens, top_k, dtype=jnp.float32)
    cost = compile_for(
        topology,
        lambda target: functools.partial(layer, target=target),
        *(x, gates, weights, x, choice, moves, counts),
    )
    assert 0.99 < cost.flops / (3 * 3 * 2 * tokens * top_k * depth * width) < 1.02
