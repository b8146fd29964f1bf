"""The Pallas kernels for grouped feed-forward equal its definition, race-free, and compile for every TPU."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas import SMALL, SMALL_RACES, compile_for, run_without_races

from vl_jax.kernels.activation import SWIGLU, Activation
from vl_jax.kernels.aot import TOPOLOGIES
from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.kernels.grouped_matmul import grouped_mlp
from vl_jax.kernels.target import Target
from vl_jax.kernels.visits import plan_visits

# Three row tiles of which the last is short, several tiles of columns and of depth.
R, D, F, E = 44, 256, 128, 4
SIZES = ([11, 11, 11, 11], [0, 0, 0, R], [0, 0, 0, 0], [0, 30, 0, 7], [16, 16, 12, 0], [1, 0, 1, 42])


def inputs(activation: Activation, *, bias: bool = False, gated: bool = True) -> tuple:
    """(rows, weights, gates, upstream)."""
    random, parts = np.random.default_rng(0), activation.inputs

    def normal(*shape: int, size: float = 1.0) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape, np.float32) * np.float32(size))

    weights = ExpertWeights(
        w_in=normal(E, D, parts, F, size=D**-0.5),
        w_out=normal(E, F, D, size=F**-0.5),
        b_in=normal(E, parts, F) if bias else None,
        b_out=normal(E, D) if bias else None,
    )
    gates = jnp.asarray(random.random(R, np.float32)) if gated else None
    return normal(R, D), weights, gates, normal(R, D)


@functools.partial(jax.jit, static_argnames=("activation", "kernel", "target"))
def both(rows, weights, gates, upstream, sizes, *, activation=SWIGLU, kernel="pallas", target=SMALL) -> tuple:
    """(output, (gradients of rows, weights, gates))."""

    def mlp(rows, weights, gates) -> jax.Array:
        return grouped_mlp(
            rows, sizes, weights, gates=gates, activation=activation, kernel=kernel, target=target
        )

    y, pullback = jax.vjp(mlp, rows, weights, gates)
    return y, pullback(upstream)


def check(arguments: tuple, sizes: list[int], **options) -> None:
    sizes = jnp.array(sizes, jnp.int32)
    actual = both(*arguments, sizes, **options)
    for kernel in ("reference", "blocked"):
        jax.tree.map(close, actual, both(*arguments, sizes, **options | {"kernel": kernel}))


def close(actual: jax.Array, expected: jax.Array) -> None:
    # Sums of up to 256 products in other orders.
    atol = 1e-5 * max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.slow
def test_pallas_equals_the_definition(sizes):
    check(inputs(SWIGLU), sizes)


@pytest.mark.parametrize(
    "activation",
    [
        Activation(limit=0.7),
        pytest.param(Activation(kind="relu", gated=False), marks=pytest.mark.slow),
        pytest.param(SWIGLU, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.slow
def test_biases_and_activations_equal_the_definition(activation):
    check(inputs(activation, bias=True, gated=activation is SWIGLU), [0, 30, 0, 7], activation=activation)


@pytest.mark.slow
def test_one_expert_and_one_row():
    rows, weights, gates, upstream = inputs(SWIGLU)
    one = jax.tree.map(lambda w: w[:1], weights)
    check((rows[:1], one, gates[:1], upstream[:1]), [1])


@pytest.mark.slow
def test_bfloat16_differs_by_its_rounding():
    sizes = jnp.array([5, 0, 30, 0], jnp.int32)
    exact = both(*inputs(SWIGLU), sizes)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), inputs(SWIGLU))
    rounded = both(half[0], half[1], inputs(SWIGLU)[2], half[3], sizes)
    assert rounded[0].dtype == jnp.bfloat16
    for a, b in zip(jax.tree.leaves(rounded), jax.tree.leaves(exact), strict=True):
        # A unit of bfloat16 is 2^-8: inputs, hidden units and results are rounded to it.
        assert np.abs(a.astype(jnp.float32) - b).max() < 0.02 * np.abs(b).max()


def test_what_stands_in_rows_of_no_group_does_not_matter():
    rows, weights, gates, upstream = inputs(SWIGLU)
    sizes = jnp.array([5, 0, 9, 0], jnp.int32)
    filled = both(rows.at[14:].set(jnp.nan), weights, gates, upstream.at[14:].set(jnp.nan), sizes)
    jax.tree.map(np.testing.assert_array_equal, filled, both(rows, weights, gates, upstream, sizes))
    assert not filled[0][14:].any() and not filled[1][0][14:].any()


def test_visits_are_those_of_the_drawing():
    visits = plan_visits(jnp.array([6, 12, 4], jnp.int32), 27, 8, cover="rows")
    steps = int(visits.count[0])
    assert visits.tile[:steps].tolist() == [0, 0, 1, 2, 2, 2, 3]
    assert visits.group[:steps].tolist() == [0, 1, 1, 1, 2, 3, 3]
    visits = plan_visits(jnp.array([6, 0, 4], jnp.int32), 27, 8, cover="groups")
    assert visits.tile[: int(visits.count[0])].tolist() == [0, 0, 0, 1]
    assert visits.group[: int(visits.count[0])].tolist() == [0, 1, 2, 2]


@pytest.mark.slow
def test_no_races(capfd):
    arguments = (*inputs(SWIGLU), jnp.array([0, 30, 0, 7], jnp.int32))
    actual = run_without_races(functools.partial(both, target=SMALL_RACES), *arguments, capfd=capfd)
    expected = both(*arguments, kernel="reference")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), actual, expected)


def test_widths_no_kernel_has_are_refused():
    weights = ExpertWeights(jnp.zeros((2, 8, 2, 128)), jnp.zeros((2, 128, 8)))
    with pytest.raises(ValueError, match="multiples of 128"):
        grouped_mlp(jnp.zeros((4, 8)), jnp.array([2, 2]), weights, kernel="pallas", target=Target())


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    ("dtype", "rows", "depth", "width", "experts"),
    [
        (jnp.bfloat16, 4096 * 6, 2048, 1408, 64),
        # In float32 an exact product takes six, and as much longer to compile; and few, ragged rows.
        (jnp.float32, 4096 * 6, 512, 384, 256),
        (jnp.bfloat16, 300, 256, 384, 8),
        (jnp.bfloat16, 40, 256, 384, 8),
    ],
    ids=["bfloat16", "float32", "300 rows", "40 rows"],
)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_compiles_forward_and_backward(topology, dtype, rows, depth, width, experts):

    def shape(*sizes: int, dtype=dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    weights = ExpertWeights(shape(experts, depth, 2, width), shape(experts, width, depth))
    gates, sizes = shape(rows, dtype=jnp.float32), shape(experts, dtype=jnp.int32)
    cost = compile_for(
        topology,
        lambda target: functools.partial(both, target=target),
        *(shape(rows, depth), weights, gates, shape(rows, depth), sizes),
    )
    # Three products forward, and twice as many backward; and the sums that are gradients of gates.
    assert 0.99 < cost.flops / (3 * 3 * 2 * rows * depth * width) < 1.03
