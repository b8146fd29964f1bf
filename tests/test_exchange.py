"""Expert parallelism gives the output and gradients of one device, for either kind of assignment."""

from __future__ import annotations

import dataclasses

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
    gates = jax.random.uniform(jax.random.key(0), (G, T, K))
    experts = jax.random.randint(jax.random.key(1), (G, T, K), 0, E + 1)  # E is "unused"
    tokens = jax.random.randint(jax.random.key(2), (G, E, 3), 0, T)
    by_expert = jax.random.uniform(jax.random.key(3), (G, E, 3)).at[:, 1].set(0.0)
    used = jnp.where(experts < E, gates, 0.0)
    return {"token choice": TokenChoice(experts, used), "expert choice": ExpertChoice(tokens, by_expert)}


def weights():
    keys = jax.random.split(jax.random.key(4), 3)
    shapes = ((G, T, D), (E, D, 2, F), (E, F, D))
    return [jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("token choice", {}),
        ("expert choice", {}),
        ("token choice", {"execution": ExecutionConfig("all_to_all"), "limit": ROOM}),
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
        "ring",
        "ring, by experts",
        "ragged",
        "ragged, slots",
    ],
)
@pytest.mark.parametrize("sizes", [(1, 2, 2, 2), pytest.param((2, 1, 4, 1), marks=pytest.mark.slow)])
def test_experts_spread_over_devices_compute_what_one_device_computes(kind, changes, sizes):
    assignment, config = assignments()[kind], dataclasses.replace(CONFIG, **changes)

    def objective(x, gates, w_in, w_out):
        weights = ExpertWeights(w_in, w_out)
        y = exchange.apply_experts(x, assignment.replace(gates=gates), weights, config)
        return jnp.sum(jnp.sin(y)), y

    def results(x, w_in, w_out):
        compiled = jax.jit(jax.value_and_grad(objective, argnums=(0, 1, 2, 3), has_aux=True))
        return jax.tree.leaves(compiled(x, assignment.gates, w_in, w_out))

    expected = results(*weights())
    with sharding.use_mesh(make_mesh(MeshConfig(*sizes))):
        actual = results(*weights())
    for a, b in zip(actual, expected, strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize(
    "how",
    ["all_to_all", "ragged", *(pytest.param(h, marks=pytest.mark.slow) for h in ("all_gather", "ring"))],
)
def test_an_exchange_keeps_what_one_device_keeps_where_floats_would_count_a_slot_too_many(how):
    limit = CapacityConfig(factor=1.2)  # 1.2 * 2 / 4 * 25 is 15, and in float32 a little more
    one = dataclasses.replace(CONFIG, limit=limit)
    spread = dataclasses.replace(one, execution=ExecutionConfig(how))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((G, 25, D)), jnp.float32)
    experts = jnp.asarray(
        np.where(rng.random((G, 25, K)) < 0.5, 3, rng.integers(0, E, (G, 25, K))), jnp.int32
    )
    chosen, every = TokenChoice(experts, jnp.ones((G, 25, K))), jnp.ones((G, 25), bool)
    w = ExpertWeights(*weights()[1:])

    def results(config):
        def run(x):
            kept, dropped = dispatch.apply_capacity(chosen, every, config)
            return exchange.apply_experts(x, kept, w, config), dropped

        return jax.jit(run)(x)

    expected, dropped = results(one)
    kept = np.sum((experts == 3) & ~dropped, axis=(1, 2))
    assert one.capacity_of(25) == 15 and set(kept.tolist()) == {15}
    with sharding.use_mesh(make_mesh(MeshConfig(1, 1, 4, 2))):
        actual, dropped_there = results(spread)
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
