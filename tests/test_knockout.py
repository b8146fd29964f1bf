"""An expert's knock-out costs what a layer costs that never had it, for every built-in scheme."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl_jax.moe import routing
from vl_jax.moe.checks import decisions
from vl_jax.moe.checks.subject import NO_SHARED
from vl_jax.moe.config import CapacityConfig
from vl_jax.moe.layer import DynamicMoE
from vl_jax.moe.routing import SCHEMES, MoEConfig

E, G, T, D = 8, decisions.GROUPS, decisions.LENGTH, decisions.WIDTH
QUICK = ("top_k", "expert_choice", "soft_moe")


def small(scheme: str) -> MoEConfig:
    return MoEConfig(scheme, E, 1 if scheme == "switch" else 2, 4, shared=NO_SHARED)


def output(config: MoEConfig, params: Any, state: Any, x: Any, context: Any) -> np.ndarray:
    run = jax.jit(lambda p, s, x, where: DynamicMoE(config).apply({"params": p}, x, where, s)[0])
    return np.asarray(run(params, state, x, context), np.float64)


def random_layer(config: MoEConfig) -> tuple[Any, Any, Any, Any]:
    """(parameters, state, x, context), nothing of which is at its beginning."""
    random = np.random.default_rng(0)
    x, context = decisions.make_inputs(0, config)
    x, context = jnp.asarray(x), jax.tree.map(jnp.asarray, context)
    state = {
        name: jnp.asarray(leaf + 0.1 * random.standard_normal(np.shape(leaf)), jnp.float32)
        for name, leaf in routing.init_state(config).items()
    }
    layer = DynamicMoE(config)
    shapes = nn.meta.unbox(jax.eval_shape(layer.init, jax.random.key(0), x, context, state))["params"]
    params = jax.tree.map(lambda p: jnp.asarray(random.standard_normal(p.shape), jnp.float32), shapes)
    return params, state, x, context


def without(expert: int, config: MoEConfig, params: Any, state: Any) -> tuple[MoEConfig, Any, Any]:
    """The layer without one of its experts: its rows are dropped from all arrays."""
    columns = np.arange(params["router"].shape[1])
    owner = columns % E if config.scheme == "noisy_top_k" else columns
    kept = np.arange(E) != expert
    params = {
        "router": params["router"][:, owner != expert],
        "w_in": params["w_in"][kept],
        "w_out": params["w_out"][kept],
    }
    state = {name: leaf[..., kept] if leaf.ndim else leaf for name, leaf in state.items()}
    changes: dict[str, Any] = {"num_experts": E - 1}
    if config.scheme in ("modality_top_k", "modality_expert_choice"):
        changes["options"] = (("vision_experts", E // 2 - (expert >= E // 2)),)
    if config.scheme == "expert_choice":  # the others take as many tokens as before
        changes["limit"] = CapacityConfig(factor=(E - 1) / E)
    return dataclasses.replace(config, **changes), params, state


def by_hand(expert: int, config: MoEConfig, layer: tuple[Any, Any, Any, Any]) -> np.ndarray:
    params, state, x, context = layer
    if config.scheme == "dselect_k":  # a selector whose expert is gone has no second choice
        whole = output(config, params, state, x, context)
        alone = {**params, "w_out": jnp.where(jnp.arange(E)[:, None, None] == expert, params["w_out"], 0.0)}
        return whole - output(config, alone, state, x, context)
    reduced, params, state = without(expert, config, params, state)
    found = output(reduced, params, state, x, context)
    if config.scheme != "modality_expert_choice":
        return found
    # The other experts of the modality take as many tokens as before; those of the other one are all there.
    fewer = dataclasses.replace(reduced, limit=CapacityConfig(factor=(E // 2 - 1) / (E // 2)))
    own = np.asarray(context.modality) == int(expert >= E // 2)
    return np.where(own[..., None], output(fewer, params, state, x, context), found)


@pytest.mark.parametrize(
    "scheme", [pytest.param(s, marks=() if s in QUICK else pytest.mark.slow) for s in SCHEMES]
)
def test_a_knockout_is_the_layer_without_the_experts_rows(scheme):
    config = small(scheme)
    params, state, x, context = layer = random_layer(config)
    probe = np.random.default_rng(1).standard_normal((G, T, D))
    whole = output(config, params, state, x, context)
    harms = []
    # A hash follows from the number of an expert, so that only the last one leaves the others theirs.
    for expert in (E - 1,) if scheme == "hash" else (0, 5, E - 1):
        excluded = jnp.arange(E)[None, None] == expert
        found = output(config, params, {**state, routing.EXCLUDED: excluded}, x, context)
        expected = by_hand(expert, config, layer)
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(whole).max())
        harm, wanted = (np.mean(probe * (y - whole)) for y in (found, expected))
        assert abs(harm - wanted) <= 1e-5
        harms.append(abs(harm))
    assert max(harms) > 1e-3
