"""Tokens exchanged by all-to-all: output and gradients of one device, for a layer with a capacity."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vl_jax.kernels import aot
from vl_jax.kernels.activation import SWIGLU
from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.moe import all_to_all, dispatch
from vl_jax.moe.config import CapacityConfig
from vl_jax.moe.routing import MoEConfig, TokenChoice

G, T, D, E, K, F = 8, 6, 4, 8, 2, 4
MIB = 2**20


make_slots = jax.jit(all_to_all.make_slots, static_argnames=("num_experts", "slots"))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.sampled_from([(1, 3), (2, 1), (2, 12)]))
def test_slots_and_choices_name_each_other(seed, sizes):
    groups, slots = sizes
    experts = np.random.default_rng(seed).integers(0, E + 1, (groups, 5, K), np.int32)
    plan = make_slots(experts, num_experts=E, slots=slots)
    size = E * groups * slots
    choice, inverse = np.asarray(plan.choice), np.asarray(plan.inverse).reshape(-1)
    filled = np.flatnonzero(choice < experts.size)
    np.testing.assert_array_equal(inverse[choice[filled]], filled)
    for number, (slot, expert) in enumerate(zip(inverse, experts.reshape(-1), strict=True)):
        if slot < size:
            assert choice[slot] == number and slot // (groups * slots) == expert
            assert slot // slots % groups == number // (5 * K)
        else:  # unused, or its expert's slots are taken by earlier choices of the group
            mine = experts[number // (5 * K)].reshape(-1)[: number % (5 * K)]
            assert expert == E or np.sum(mine == expert) >= slots


def inputs(biased: bool):
    random = np.random.default_rng(4)
    shapes = ((G, T, D), (E, D, 2, F), (E, F, D), (E, 2, F), (E, D))
    x, w_in, w_out, b_in, b_out = (random.standard_normal(s, np.float32) for s in shapes)
    return x, ExpertWeights(w_in, w_out, *((b_in, b_out) if biased else ()))


@pytest.mark.parametrize(("shards", "biased"), [(1, True), (4, False), (8, True)])
@pytest.mark.slow
def test_output_and_gradients_are_those_of_one_device(shards, biased):
    x, weights = inputs(biased)
    random = np.random.default_rng(0)
    experts = random.integers(0, E, (G, T, K), np.int32)
    gates = random.random((G, T, K), np.float32)
    config = MoEConfig(num_experts=E, top_k=K, expert_dim=F, limit=CapacityConfig(slots=2))
    limited = jax.jit(lambda chosen: dispatch.apply_capacity(chosen, jnp.ones((G, T), bool), config))
    kept, dropped = jax.device_get(limited(TokenChoice(experts, gates)))
    assert 0 < dropped.sum() < dropped.size
    mesh, rows = Mesh(np.array(jax.devices()[:shards]), ("expert",)), P("expert")
    local = functools.partial(all_to_all.apply_experts, slots=2, activation=SWIGLU)
    spread = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows), out_specs=rows, check_vma=False)
    alone = functools.partial(dispatch.apply_experts, activation=SWIGLU, kernel="reference")

    def results(apply):
        def loss(x, gates, weights):
            y = apply(x, TokenChoice(kept.experts, gates), weights)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(x, kept.gates, weights)

    found, expected = jax.tree.leaves(results(spread)), jax.tree.leaves(results(alone))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.tpu_aot
def test_what_a_tpu_would_move_and_keep():
    """The layer of DeepSeek-V2-Lite's size on eight v5e: bytes of collectives, and temporary memory."""
    pytest.importorskip("libtpu")
    rows, length, width, hidden, experts, top_k = 8, 2048, 2048, 1408, 64, 6
    config = MoEConfig(num_experts=experts, top_k=top_k, expert_dim=hidden, limit=CapacityConfig(factor=1.25))
    mesh, spread = Mesh(np.array(aot.devices("v5e")), ("expert",)), P("expert")

    def leaf(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spread))

    slots = config.capacity_of(length)
    local = functools.partial(all_to_all.apply_experts, slots=slots, activation=SWIGLU)
    layer = jax.shard_map(
        local, mesh=mesh, in_specs=(spread, spread, spread), out_specs=spread, check_vma=False
    )
    choices = (rows, length, top_k)
    lowered = jax.jit(lambda x, e, g, w: layer(x, TokenChoice(e, g), w)).lower(
        leaf(rows, length, width),
        leaf(*choices, dtype=jnp.int32),
        leaf(*choices, dtype=jnp.float32),
        ExpertWeights(leaf(experts, width, 2, hidden), leaf(experts, hidden, width)),
    )
    compiled = aot.compile_absent(lowered)
    # There and back, every shard sends its slots once; the partitioner's own choice moves 451 MiB.
    results = re.findall(
        r"= (\S+?)\{\S* (all-[a-z-]+|reduce-scatter|collective-permute)\(", compiled.as_text()
    )
    assert {name for _, name in results} == {"all-to-all"}
    sizes = [math.prod(map(int, re.findall(r"\d+", shape.partition("[")[2]))) for shape, _ in results]
    assert all(shape.startswith("bf16") for shape, _ in results)
    assert 2 * sum(sizes) == 2 * experts * slots * width * 2 <= 120 * MIB
    assert compiled.memory_analysis().temp_size_in_bytes <= 127e6
