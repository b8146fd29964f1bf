"""Experts that are added: what was there keeps its bits, and what the layer says while they are closed."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl_jax import params as params_lib
from vl_jax.moe import routing
from vl_jax.moe.checks.decisions import make_inputs
from vl_jax.moe.config import BalanceConfig, GateConfig, SharedExpertsConfig
from vl_jax.moe.layer import DynamicMoE
from vl_jax.moe.routing import MoEConfig
from vl_jax.moe.specialise import growing, per_expert
from vl_jax.moe.specialise.growing import GrowthConfig
from vl_jax.moe.stacks import Stack
from vl_jax.train.specialise import growth

WIDTH, OLD, NEW = 8, 4, 7
# Not those by which experts choose tokens: they have fewer slots each when there are more of them.
SCHEMES = ["top_k", "loss_free", "v_moe", "top_p", "remoe", "smear"]


def moe(scheme: str, experts: int, **options) -> MoEConfig:
    return MoEConfig(
        **{
            "scheme": scheme,
            "num_experts": experts,
            "top_k": 2,
            "expert_dim": 6,
            "shared": SharedExpertsConfig(num=1),
            "gates": GateConfig(normalize=scheme == "loss_free"),
            "router_bias": True,
            "expert_bias": True,
            **options,
        }
    )


@functools.cache
def made(config: MoEConfig, seed: int):
    """Random parameters of a layer, below ``stack/moe``, and its state."""
    x, context = make_inputs(seed, config)
    state = routing.init_state(config)
    shapes = jax.eval_shape(DynamicMoE(config).init, jax.random.key(0), x, context, state)["params"]
    random = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda p: jnp.asarray(0.5 * random.standard_normal(p.shape, np.float32)), nn.meta.unbox(shapes)
    )
    state = jax.tree.map(lambda s: s + 0.1 * random.standard_normal(s.shape).astype(np.float32), state)
    return {"stack": {"moe": params}}, state


def stack(config: MoEConfig) -> Stack:
    return Stack(config, (0,), (("stack", "moe"),))


@functools.partial(jax.jit, static_argnums=0)
def said(config: MoEConfig, params, state, x, context):
    return DynamicMoE(config).apply({"params": params["stack"]["moe"]}, x, context, state)[0]


def grown(scheme: str, given: GrowthConfig, seed: int, **options):
    """(small config, its parameters and state, large config, its parameters and state)."""
    small, large = moe(scheme, OLD, **options), moe(scheme, NEW, **options)
    (params, state), (fresh, first) = made(small, seed), made(large, seed + 100)
    key = jax.random.key(seed)
    longer = growing.grow(params, fresh, stack(large), given, key)
    return small, params, state, large, longer, growing.grow_state(state, first, stack(large), given)


@pytest.mark.slow
@pytest.mark.parametrize("given", [GrowthConfig(), GrowthConfig((1, 3), noise=0.1)], ids=["fresh", "copies"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_grown_layer_says_what_it_said_while_nobody_may_take_what_is_new(scheme, given):
    for seed in range(3):
        small, params, state, large, longer, larger = grown(scheme, given, seed)
        x, context = make_inputs(seed, small)
        closed = {**larger, routing.EXCLUDED: (jnp.arange(NEW) >= OLD)[None, None]}
        before, after = said(small, params, state, x, context), said(large, longer, closed, x, context)
        np.testing.assert_array_equal(after, before)
        if scheme in ("top_k", "smear"):
            assert np.any(np.asarray(said(large, longer, larger, x, context)) != np.asarray(before))


def test_old_parts_stand_first_and_copies_follow_in_turn():
    old, fresh = jnp.arange(6.0).reshape(3, 2), jnp.full((6, 2), 9.0)
    key = jax.random.key(0)
    found = growing.grow_leaf(old, fresh, -2, GrowthConfig((2, 0)), key)
    np.testing.assert_array_equal(found, [[0, 1], [2, 3], [4, 5], [4, 5], [0, 1], [4, 5]])
    found = growing.grow_leaf(old, fresh, 0, GrowthConfig(), key)
    np.testing.assert_array_equal(found, [[0, 1], [2, 3], [4, 5], [9, 9], [9, 9], [9, 9]])
    large = jax.random.normal(key, (3, 5000))
    noisy = growing.grow_leaf(3 * large, jnp.zeros((4, 5000)), 0, GrowthConfig((1,), noise=0.5), key)
    assert 1.45 < float(jnp.std(noisy[3] - 3 * large[1])) < 1.55  # half of 3


def test_copies_are_told_apart_by_noise_only():
    _, params, state, large, longer, larger = grown("loss_free", GrowthConfig((2,)), 0)
    flat, old = params_lib.flatten(longer), params_lib.flatten(params)
    places = per_expert.axes(longer, stack(large))
    assert {path.rpartition("/")[2] for path in places} == {
        *("w_in", "w_out", "b_in", "b_out", "router", "router_bias")
    }
    for path, axis in places.items():
        for number in range(NEW):
            parent = number if number < OLD else 2
            np.testing.assert_array_equal(
                jnp.take(flat[path], number, axis), jnp.take(old[path], parent, axis)
            )
    assert all(flat[path] is old[path] for path in flat.keys() - places.keys())
    np.testing.assert_array_equal(larger["bias"], [*state["bias"], *[state["bias"][2]] * 3])


@pytest.mark.parametrize("scheme", ["noisy_top_k", "null_experts", "dselect_k"])
def test_a_router_without_a_column_for_each_expert_is_refused(scheme):
    with pytest.raises(ValueError, match=f"scheme='{scheme}': the .* columns of its router are not one for"):
        per_expert.check_columns(moe(scheme, 8, balance=BalanceConfig(weight=0.0)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GrowthConfig(noise=0.1), r"noise=0.1 is added to copies"),
        (lambda: GrowthConfig((0,), noise=-1.0), r"noise=-1.0 of new experts must be >= 0"),
        (
            lambda: growing.grow_leaf(
                jnp.zeros((2, 3)), jnp.zeros((4, 3)), 0, GrowthConfig((2,)), jax.random.key(0)
            ),
            "copies names expert 2; there are 0 to 1",
        ),
        (
            lambda: growing.grow_leaf(
                jnp.zeros((2, 3)), jnp.zeros((2, 3)), 0, GrowthConfig(), jax.random.key(0)
            ),
            r"\(2, 3\) does not grow to \(2, 3\) along axis 0",
        ),
    ],
)
def test_what_cannot_grow_is_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def places(had: int, given: GrowthConfig) -> tuple[dict[str, int], dict[str, Any], dict[str, Any]]:
    """What grows of a run with so many experts; the leaves of the run, and those of the model."""
    have, need = (
        {f"params/{path}": leaf for path, leaf in params_lib.flatten(made(moe("top_k", count), 0)[0]).items()}
        for count in (had, NEW)
    )
    stacks = {"image": stack(moe("top_k", NEW))}
    return growth.places(stacks, have, need, given, where="runs/x"), have, need


@pytest.mark.parametrize(
    ("had", "given", "message"),
    [
        (4, GrowthConfig((4,)), "config.init_experts.copies: 4 is no expert of runs/x; expected 0 to 3"),
        (9, GrowthConfig(), "config.init_experts: runs/x has 9 experts, the model 7; they can only be more"),
        (7, GrowthConfig(), "config.init_experts: runs/x has as many experts as the model in every sparse"),
    ],
)
def test_a_run_that_cannot_be_added_to_is_one_line(had: int, given: GrowthConfig, message: str):
    with pytest.raises(ValueError, match=message):
        places(had, given)


def test_the_leaves_that_grow_are_those_with_a_part_for_each_expert():
    found, have, need = places(OLD, GrowthConfig())
    assert found.keys() == {path for path in need if need[path].shape != have[path].shape}
