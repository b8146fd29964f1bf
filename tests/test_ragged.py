"""Exchange in bounded rooms: whatever comes, output and gradients are those of one device."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from vl_jax.kernels.activation import SWIGLU
from vl_jax.kernels.expert_weights import ExpertWeights
from vl_jax.moe import dispatch
from vl_jax.moe.assignment import TokenChoice
from vl_jax.moe.bounded import ragged
from vl_jax.moe.bounded.rooms import Traffic

D, F = 4, 3
TIGHT = {"factor": 1.0}


@dataclasses.dataclass(frozen=True)
class Case:
    """Tokens of 8 devices and what they choose."""

    tokens: int
    num_experts: int
    choices: int
    load: str
    seed: int

    def draw(self):
        """(x, experts, gates) of all devices, [8 T ...]."""
        random = np.random.default_rng(self.seed)
        shape = (8, self.tokens, self.choices)
        noise = random.random((8, self.tokens, self.num_experts))
        experts = np.argsort(noise, axis=-1)[..., : self.choices].astype(np.int32)
        if self.load == "one expert":
            experts = np.full(shape, self.num_experts, np.int32)
            experts[..., random.integers(self.choices)] = random.integers(self.num_experts)
        elif self.load == "padding":
            experts[:] = self.num_experts
        elif self.load == "one device chooses":
            experts[1:] = self.num_experts
        elif self.load == "sparse":
            experts[random.random(shape) < 0.6] = self.num_experts
        elif self.load == "twice the same":
            experts[..., -1] = experts[..., 0]
        gates = np.where(experts < self.num_experts, random.random(shape, np.float32), np.float32(0))
        return random.standard_normal((8, self.tokens, D), np.float32), experts, gates


def weights_of(num_experts: int) -> ExpertWeights:
    random = np.random.default_rng(1)
    shapes = ((num_experts, D, 2, F), (num_experts, F, D), (num_experts, 2, F), (num_experts, D))
    return ExpertWeights(*(random.standard_normal(shape, np.float32) for shape in shapes))


def results(apply, x, experts, gates, weights):
    """The output, and gradients of x, gates and weights."""

    def loss(x, gates, weights):
        y = apply(x, TokenChoice(experts, gates), weights)
        return jnp.sum(y * jnp.sin(1.0 + jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)), y

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, gates, weights)


alone = jax.jit(
    functools.partial(
        results, functools.partial(dispatch.apply_experts, activation=SWIGLU, kernel="reference")
    )
)


@functools.cache
def spread(traffic: Traffic, kernel: str = "reference"):
    mesh, rows = Mesh(np.array(jax.devices()[: traffic.shards]), ("expert",)), P("expert")
    local = functools.partial(ragged.apply_experts, activation=SWIGLU, kernel=kernel, traffic=traffic)
    layer = jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows), out_specs=rows, check_vma=False)
    return jax.jit(functools.partial(results, layer))


def same(found, expected):
    for (path, a), b in zip(jax.tree.leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        off = np.linalg.norm(np.asarray(a) - b)
        assert off <= 1e-6 * np.linalg.norm(b), f"{jax.tree_util.keystr(path)}: {off}"


LOADS = ("even", "one expert", "padding", "one device chooses", "sparse", "twice the same")
# Rooms: of one hop, with experts side by side and one a device; in chunks; over slices.
LAYERS = {
    "plain": (Case(5, 16, 3, "", 0), {}),
    "tight": (Case(7, 8, 2, "", 0), {"factor": 1.0, "chunks": 1}),
    "chunks": (Case(9, 16, 3, "", 0), {"chunks": 4}),
    "slices": (Case(5, 16, 4, "", 0), {"slices": 2}),
    "slices and chunks": (Case(11, 8, 3, "", 0), {"slices": 4, "chunks": 3, "factor": 1.0}),
    "dynamic": (Case(6, 24, 24, "", 0), {"top_k": 2, "chunks": 2}),
}


def check(name: str, load: str, seed: int, kernel: str = "reference") -> None:
    case, options = LAYERS[name]
    case = dataclasses.replace(case, load=load, seed=seed)
    top_k = options.get("top_k", case.choices)
    options = {"most_choices": case.choices, **options, "top_k": top_k}
    traffic = Traffic(tokens=case.tokens, num_experts=case.num_experts, shards=8, **options)
    arguments = (*case.draw(), weights_of(case.num_experts))
    same(spread(traffic, kernel)(*arguments), alone(*arguments))


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.slow
def test_whatever_is_chosen_the_result_is_that_of_one_device(load):
    for seed, name in enumerate(LAYERS):
        check(name, load, seed)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(LAYERS)), st.sampled_from(LOADS), st.integers(0, 10**6))
@pytest.mark.slow
def test_whatever_is_drawn_the_result_is_that_of_one_device(name, load, seed):
    check(name, load, seed)
