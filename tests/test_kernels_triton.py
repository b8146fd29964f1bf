"""The Pallas Triton kernels for GPUs equal the definition where they are interpreted, and lower for a GPU."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pallas import TRITON_WARNING, tracing_for
from triton_aot import compile_kernels

from vl_jax.kernels.activation import SWIGLU, Activation
from vl_jax.kernels.combine import expert_mlp
from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.kernels.router import rank_in_expert, sort_by_expert
from vl_jax.kernels.target import KIB, GpuTarget, choose, current_gpu, gpu_target_of
from vl_jax.kernels.triton_product import SUMS, BlockShape, choose_tiles, plan_visits

pytestmark = pytest.mark.filterwarnings(TRITON_WARNING)

# Several tiles in every direction.
SMALL = GpuTarget(rows=16, columns=32, depth=16, interpret=True)
T, K, E = 23, 2, 4
KINDS = ("NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090")


def inputs(
    activation: Activation = SWIGLU, *, width: int = 48, hidden: int = 64, experts: int = E, tokens: int = T
) -> tuple:
    """(x, gates, weights, upstream)."""
    random, parts = np.random.default_rng(0), activation.inputs

    def normal(*shape: int, size: float = 1.0) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape, np.float32) * np.float32(size))

    weights = ExpertWeights(
        w_in=normal(experts, width, parts, hidden, size=width**-0.5),
        w_out=normal(experts, hidden, width, size=hidden**-0.5),
        b_in=None if activation is SWIGLU else normal(experts, parts, hidden),
        b_out=None if activation is SWIGLU else normal(experts, width),
    )
    gates = jnp.asarray(random.random((tokens, K), np.float32))
    return normal(tokens, width), gates, weights, normal(tokens, width)


@functools.partial(jax.jit, static_argnames=("activation", "kernel", "target"))
def layer(
    x: jax.Array,
    gates: jax.Array,
    weights: ExpertWeights,
    upstream: jax.Array,
    experts: jax.Array,
    *,
    activation: Activation = SWIGLU,
    kernel: str = "triton",
    target: GpuTarget | None = SMALL,
) -> tuple:
    """(output, (gradients of x, gates and weights)); choices of expert E are unused."""
    rank, counts = rank_in_expert(experts, num_experts=weights.w_out.shape[0])
    choice, moves = sort_by_expert(experts, rank, counts)

    def run(x: jax.Array, gates: jax.Array, weights: ExpertWeights) -> jax.Array:
        options: dict[str, Any] = {"activation": activation, "kernel": kernel, "target": target}
        return expert_mlp(x, gates, choice, moves, counts, weights, **options)

    y, pullback = jax.vjp(run, x, gates, weights)
    return y, pullback(upstream)


def check(arguments: tuple, experts: jax.Array, *, tolerance: float = 1e-5, **options: Any) -> None:
    actual = layer(*arguments, experts, **options)
    expected = layer(*arguments, experts, **options | {"kernel": "reference"})

    def close(a: jax.Array, b: jax.Array) -> None:
        atol = tolerance * max(1.0, float(np.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=atol)

    jax.tree.map(close, actual, expected)


def chosen(experts: int = E, *, tokens: int = T) -> jax.Array:
    """Some choices are unused."""
    return jnp.asarray(np.random.default_rng(1).integers(0, experts + 1, (tokens, K), np.int32))


@pytest.mark.parametrize(
    "experts",
    [chosen(), jnp.full((T, K), 2), jnp.full((T, K), E), jnp.where(chosen() == 1, 0, chosen())],
    ids=["ragged", "one expert", "none", "an empty one"],
)
@pytest.mark.slow
def test_equals_the_definition(experts):
    check(inputs(), experts)


@pytest.mark.parametrize(
    "activation",
    [
        Activation(limit=0.7),
        pytest.param(Activation(kind="relu", gated=False), marks=pytest.mark.slow),
        pytest.param(Activation(kind="gelu_tanh"), marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.slow
def test_biases_and_activations_equal_the_definition(activation):
    check(inputs(activation), chosen(), activation=activation)


@pytest.mark.parametrize(("width", "hidden"), [(40, 24), pytest.param(8, 72, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_widths_may_be_any(width, hidden):
    check(inputs(width=width, hidden=hidden), chosen())


@pytest.mark.slow
def test_one_expert_and_one_token():
    check(inputs(experts=1, tokens=1), jnp.zeros((1, K), jnp.int32))


@pytest.mark.slow
def test_bfloat16_differs_by_its_rounding():
    arguments = inputs()
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), arguments)
    rounded = layer(half[0], arguments[1], half[2], half[3], chosen())
    assert rounded[0].dtype == jnp.bfloat16
    for a, b in zip(jax.tree.leaves(rounded), jax.tree.leaves(layer(*arguments, chosen())), strict=True):
        # A unit of bfloat16 is 2^-8: inputs, hidden units and results are rounded to it.
        assert np.abs(a.astype(jnp.float32) - b).max() < 0.02 * np.abs(b).max()


def test_tokens_of_no_expert_do_not_matter():
    x, gates, weights, upstream = inputs()
    experts = chosen().at[5].set(E)
    y, (grad_x, grad_gates, grad_weights) = layer(
        x.at[5].set(jnp.nan), gates, weights, upstream.at[5].set(jnp.nan), experts
    )
    clean = layer(x, gates, weights, upstream, experts)
    jax.tree.map(
        np.testing.assert_array_equal, (y, grad_x, grad_weights), (clean[0], clean[1][0], clean[1][2])
    )
    np.testing.assert_array_equal(grad_gates[5], 0)


def test_visits_are_those_of_the_drawing():
    visits = plan_visits(jnp.array([5, 0, 3], jnp.int32), 10, 4)
    assert visits.group.tolist() == [0, 0, 2, 3, 4, 4]
    assert visits.first[:4].tolist() == [0, 4, 5, 8]
    assert visits.end[:4].tolist() == [5, 5, 8, 10]


@pytest.mark.parametrize("sizes", [[0, 0], [7, 9], [16, 0], [1, 1], [8, 8]], ids=str)
def test_visits_cover_every_row_once(sizes):
    visits = plan_visits(jnp.array(sizes, jnp.int32), 16, 4)
    steps = zip(visits.group.tolist(), visits.first.tolist(), visits.end.tolist(), strict=True)
    rows = [r for group, first, end in steps if group <= 2 for r in range(first, min(first + 4, end))]
    assert rows == list(range(16))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_tiles_fit(kind, dtype):
    target = gpu_target_of(kind)
    for left, right, sums in ((1, 2, 2), (1, 1, 1), (2, 2, 1), (1, 1, 2)):
        tiles = choose_tiles(target, 1536, 1408, 2048, dtype=dtype, left=left, right=right, sums=sums)
        step = (left * tiles.rows + right * tiles.columns) * tiles.depth * jnp.dtype(dtype).itemsize
        assert tiles.stages * step <= target.shared_memory
        assert sums * tiles.rows * tiles.columns <= SUMS and tiles.stages >= 2


def test_tiles_of_a_hopper_gpu_for_a_large_layer():
    assert choose_tiles(GpuTarget(227 * KIB), 1536, 1408, 2048, dtype=jnp.bfloat16) == BlockShape(
        128, 256, 64, 8, 4
    )


def test_which_gpus():
    assert gpu_target_of("NVIDIA H200").shared_memory > gpu_target_of("NVIDIA L4").shared_memory
    assert gpu_target_of("cpu").interpret
    with tracing_for("NVIDIA H200"):
        assert current_gpu() == gpu_target_of("NVIDIA H200")
    with pytest.raises(ValueError, match=r"kernel='triton' has no kernels for 'AMD Instinct MI300X'"):
        gpu_target_of("AMD Instinct MI300X")
    with pytest.raises(ValueError, match="rows=24: must be a power of two"):
        GpuTarget(rows=24)


def lowered_for(kind: str, dtype: Any) -> jax.stages.Lowered:
    """A layer of DeepSeek-VL2, forward and backward."""

    def shape(*sizes: int, dtype: Any = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype)

    weights = ExpertWeights(shape(64, 2048, 2, 1408), shape(64, 1408, 2048))
    x, gates = shape(16384, 2048), shape(16384, 6, dtype=jnp.float32)
    experts = shape(16384, 6, dtype=jnp.int32)
    with tracing_for(kind):
        assert choose("auto", 2048, 1408) == "triton"
        traced = jax.jit(functools.partial(layer, target=None)).trace(x, gates, weights, x, experts)
        return traced.lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_lowers_for_a_gpu(kind):
    program = lowered_for(kind, jnp.bfloat16).as_text()
    assert program.count("__gpu$xla.gpu.triton") == 6  # two forward, four backward


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(("kind", "capability"), list(zip(KINDS, (90, 80, 89), strict=True)))
def test_triton_compiles_every_kernel(kind, capability, dtype, tmp_path):
    kernels = compile_kernels(lowered_for(kind, dtype), capability, tmp_path)
    assert len(kernels) == 6
    for kernel in kernels:
        assert kernel.shared_memory <= gpu_target_of(kind).shared_memory, kernel
        # Float32 is multiplied exactly, which tensor cores do not.
        assert kernel.matrix_units == (dtype == jnp.bfloat16), kernel
        # The epilogue with the most tiles puts some aside once; the loops are to fit into the registers.
        assert kernel.spilled <= (1024 if kernel.name == "grouped_grad_hidden" else 512), kernel


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("experts", [8, 64])
def test_runs_on_a_gpu(experts, dtype):
    arguments = inputs(width=256, hidden=384, experts=experts, tokens=3000)
    x, gates, weights, upstream = jax.tree.map(lambda a: a.astype(dtype), arguments)
    arguments = x, gates.astype(jnp.float32), weights, upstream
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    with jax.default_matmul_precision("highest"):
        check(arguments, chosen(experts, tokens=3000), tolerance=tolerance, target=None)
