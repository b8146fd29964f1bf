"""Expert parallelism gives the output and gradients of one device, for either kind of assignment."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl_jax import sharding
from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.moe import dispatch, exchange
from vl_jax.moe.config import CapacityConfig, ExecutionConfig
from vl_jax.moe.routing import ExpertChoice, MoEConfig, TokenChoice
from vl_jax.sharding import MeshConfig, make_mesh

G, T, D, E, K, F = 8, 6, 4, 4, 2, 4
CONFIG = MoEConfig(num_experts=E, top_k=K, expert_dim=F)
ROOM = CapacityConfig(slots=T * K)  # for every choice


def assignments():
    random = np.random.default_rng(0)
    experts = random.integers(0, E + 1, (G, T, K), np.int32)  # E is "unused"
    tokens = random.integers(0, T, (G, E, 3), np.int32)
    used = np.where(experts < E, random.random((G, T, K), np.float32), np.float32(0))
    by_expert = random.random((G, E, 3), np.float32)
    by_expert[:, 1] = 0
    found = {"token choice": TokenChoice(experts, used), "expert choice": ExpertChoice(tokens, by_expert)}
    return jax.tree.map(jnp.asarray, found)


def weights():
    random = np.random.default_rng(4)
    shapes = ((G, T, D), (E, D, 2, F), (E, F, D))
    return [jnp.asarray(random.standard_normal(shape, np.float32)) for shape in shapes]


@functools.partial(jax.jit, static_argnums=0)
def results(config, assignment, x, w_in, w_out):
    """Gradients of x, gates and weights, and the output."""

    def objective(x, gates, w_in, w_out):
        weights = ExpertWeights(w_in, w_out)
        y = exchange.apply_experts(x, assignment.replace(gates=gates), weights, config)
        return jnp.sum(jnp.sin(y)), y

    gradients = jax.grad(objective, argnums=(0, 1, 2, 3), has_aux=True)
    return jax.tree.leaves(gradients(x, assignment.gates, w_in, w_out))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("token choice", {}),
        ("expert choice", {}),
        ("token choice", {"execution": ExecutionConfig("all_to_all"), "limit": ROOM}),
        pytest.param(
            "token choice",
            {"execution": ExecutionConfig("all_to_all", kernel="pallas"), "limit": ROOM},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "token choice",
            {"execution": ExecutionConfig("ragged", kernel="pallas", chunks=2, slices=2)},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "token choice", {"execution": ExecutionConfig("all_gather", buffer=1.0)}, marks=pytest.mark.slow
        ),
        ("token choice", {"execution": ExecutionConfig("ring")}),
        pytest.param("expert choice", {"execution": ExecutionConfig("ring")}, marks=pytest.mark.slow),
        ("token choice", {"execution": ExecutionConfig("ragged")}),
        pytest.param(
            "token choice", {"execution": ExecutionConfig("ragged"), "limit": ROOM}, marks=pytest.mark.slow
        ),
    ],
    ids=[
        "token choice",
        "expert choice",
        "all to all",
        "all to all, kernel",
        "ragged, kernel, chunks, slices",
        "all gather, tight",
        "ring",
        "ring, by experts",
        "ragged",
        "ragged, slots",
    ],
)
@pytest.mark.parametrize("sizes", [(1, 2, 2, 2), pytest.param((2, 1, 4, 1), marks=pytest.mark.slow)])
def test_experts_spread_over_devices_compute_what_one_device_computes(kind, changes, sizes):
    assignment, config = assignments()[kind], dataclasses.replace(CONFIG, **changes)
    expected = results(CONFIG, assignment, *weights())  # one device drops nothing
    with sharding.use_mesh(make_mesh(MeshConfig(*sizes))):
        actual = results(config, assignment, *weights())
    for a, b in zip(actual, expected, strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@functools.partial(jax.jit, static_argnums=0)
def kept_only(config, chosen, x, w):
    """The experts' output for the choices that have a slot, and which have none."""
    every = jnp.ones(x.shape[:2], bool)
    kept, dropped = dispatch.apply_capacity(chosen, every, config)
    return exchange.apply_experts(x, kept, w, config), dropped


@pytest.mark.parametrize(
    "how",
    ["all_to_all", "ragged", *(pytest.param(h, marks=pytest.mark.slow) for h in ("all_gather", "ring"))],
)
@pytest.mark.slow
def test_an_exchange_keeps_what_one_device_keeps_where_floats_would_count_a_slot_too_many(how):
    limit = CapacityConfig(factor=1.2)  # 1.2 * 2 / 4 * 25 is 15, and in float32 a little more
    one = dataclasses.replace(CONFIG, limit=limit)
    spread = dataclasses.replace(one, execution=ExecutionConfig(how))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((G, 25, D), np.float32)
    experts = np.where(rng.random((G, 25, K)) < 0.5, 3, rng.integers(0, E, (G, 25, K))).astype(np.int32)
    chosen = TokenChoice(experts, np.ones((G, 25, K), np.float32))
    arguments = chosen, x, ExpertWeights(*weights()[1:])
    expected, dropped = kept_only(one, *arguments)
    kept = np.sum((experts == 3) & ~dropped, axis=(1, 2))
    assert one.capacity_of(25) == 15 and set(kept.tolist()) == {15}
    with sharding.use_mesh(make_mesh(MeshConfig(1, 1, 4, 2))):
        actual, dropped_there = kept_only(spread, *arguments)
    np.testing.assert_array_equal(dropped_there, dropped)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_an_exchange_that_does_not_fit_the_scheme_is_named():
    with pytest.raises(ValueError, match="execution.exchange='all_to_all' needs limit.factor or limit.slots"):
        dataclasses.replace(CONFIG, execution=ExecutionConfig("all_to_all"))
    x, w_in, w_out = weights()
    config = dataclasses.replace(
        CONFIG,
        scheme="expert_choice",
        execution=ExecutionConfig("all_to_all"),
        limit=CapacityConfig(factor=1.0),
    )
    with (
        sharding.use_mesh(make_mesh(MeshConfig(1, 1, 4, 2))),
        pytest.raises(ValueError, match="for tokens that choose; scheme='expert_choice' gives ExpertChoice"),
    ):
        exchange.apply_experts(x, assignments()["expert choice"], ExpertWeights(w_in, w_out), config)


@pytest.mark.parametrize("kernel", ["auto", "blocked", "pallas", "triton", "reference"])
def test_all_to_all_computes_with_the_kernel_that_is_asked_for(kernel):
    x, w_in, w_out = weights()
    execution = ExecutionConfig("all_to_all", kernel=kernel)
    config = dataclasses.replace(CONFIG, execution=execution, limit=ROOM)
    with sharding.use_mesh(make_mesh(MeshConfig(1, 1, 4, 2))):
        layer = functools.partial(exchange.apply_experts, config=config)
        program = str(jax.make_jaxpr(layer)(x, assignments()["token choice"], ExpertWeights(w_in, w_out)))
    assert ("pallas_call" in program) == (kernel in ("pallas", "triton"))
    assert ("blocked_mlp" in program or "sequential_vmap" in program) == (kernel == "blocked")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buffer": 0.5}, "buffer=0.5 must be >= 1 and finite"),
        ({"exchange": "ragged", "chunks": 0}, "chunks=0 must be >= 1"),
        ({"slices": 2}, "exchange='all_gather' takes no chunks=None and slices=2; 'ragged' does"),
    ],
)
def test_rooms_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ExecutionConfig(**options)


def test_slices_that_do_not_divide_the_devices_are_named():
    x, w_in, w_out = weights()
    config = dataclasses.replace(CONFIG, execution=ExecutionConfig("ragged", slices=3))
    with (
        sharding.use_mesh(make_mesh(MeshConfig(1, 1, 4, 2))),
        pytest.raises(ValueError, match="execution.slices=3 does not divide mesh axis expert=4"),
    ):
        exchange.apply_experts(x, assignments()["token choice"], ExpertWeights(w_in, w_out), config)


def test_a_ring_of_many_shards_is_refused(monkeypatch):
    monkeypatch.setattr(exchange, "MOST_IN_RING", 2)
    x, w_in, w_out = weights()
    config = dataclasses.replace(CONFIG, execution=ExecutionConfig("ring"))
    with (
        sharding.use_mesh(make_mesh(MeshConfig(1, 1, 4, 2))),
        pytest.raises(ValueError, match="exchange='ring' is for up to 2 shards, mesh axis expert=4"),
    ):
        exchange.apply_experts(x, assignments()["token choice"], ExpertWeights(w_in, w_out), config)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1, 1, 8, 1), "num_experts=4 does not divide by mesh axes expert=8"),
        ((1, 1, 1, 8), "expert_dim=4 does not divide by mesh axes tensor=8"),
    ],
)
def test_sizes_that_do_not_divide_are_named(sizes, message):
    x, w_in, w_out = weights()
    with (
        sharding.use_mesh(make_mesh(MeshConfig(*sizes))),
        pytest.raises(ValueError, match=message),
    ):
        exchange.apply_experts(x, assignments()["token choice"], ExpertWeights(w_in, w_out), CONFIG)


def test_rows_that_do_not_divide_are_named():
    x, w_in, w_out = weights()
    few = jax.tree.map(lambda a: a[:6], assignments()["token choice"])
    with (
        sharding.use_mesh(make_mesh(MeshConfig(data=4, tensor=2))),
        pytest.raises(ValueError, match="batch rows=6 does not divide by mesh axes data.fsdp.expert=4"),
    ):
        exchange.apply_experts(x[:6], few, ExpertWeights(w_in, w_out), CONFIG)
