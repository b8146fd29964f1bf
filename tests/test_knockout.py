"""An expert's knock-out costs what a layer costs that never had it, for every built-in scheme."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vl_jax import params as params_lib
from vl_jax.evaluate import interventions
from vl_jax.model import VisionLanguage
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


SIZE = 4  # experts of the model


def of_one_layer(scheme: str) -> Any:
    """A language model of one layer, which is sparse."""
    top_k = 1 if scheme == "switch" else 2
    model = tiny.of_text(tiny.config())
    language = dataclasses.replace(model.language, num_layers=1)
    return dataclasses.replace(
        model, language=language, moe=MoEConfig(scheme, SIZE, top_k, 8, shared=NO_SHARED)
    )


def recomputed(expert: int, model: Any, params: Any, state: Any, batch: Any) -> float:
    """The loss of a model that never had an expert: all of its rows are dropped by hand."""
    flat, moe = params_lib.flatten(params), model.moe
    at = "language/moe_layers/moe/"
    kept = np.arange(SIZE) != expert
    if moe.scheme == "dselect_k":  # a selector whose expert is gone has no second choice
        flat[at + "w_out"] = jnp.where(kept[None, :, None, None], flat[at + "w_out"], 0.0)
    else:
        columns = np.arange(flat[at + "router"].shape[-1])
        columns = (columns % SIZE if moe.scheme == "noisy_top_k" else columns) != expert
        flat[at + "router"] = flat[at + "router"][..., columns]
        flat |= {at + name: flat[at + name][:, kept] for name in ("w_in", "w_out")}
        state = jax.tree.map(lambda a: a[..., kept] if a.ndim > 1 else a, state)
        changes: dict[str, Any] = {"num_experts": SIZE - 1}
        if moe.scheme in ("modality_top_k", "modality_expert_choice"):
            changes["options"] = (("vision_experts", SIZE // 2 - (expert >= SIZE // 2)),)
            changes["top_k"] = 1 if moe.scheme == "modality_top_k" else moe.top_k
        if moe.scheme == "expert_choice":  # the others take as many tokens as before
            changes["limit"] = CapacityConfig(factor=(SIZE - 1) / SIZE)
        if moe.scheme == "modality_expert_choice":
            own = SIZE // 2
            changes["limit"] = CapacityConfig(factor=(own - 1) / own)
        model = dataclasses.replace(model, moe=dataclasses.replace(moe, **changes))
    run = jax.jit(functools.partial(interventions.target_losses, model=VisionLanguage(model)))
    losses = np.asarray(run(params_lib.unflatten(flat), state, batch), np.float64)
    return float(np.sum(losses * batch.loss_weights) / np.sum(batch.loss_weights))


@pytest.mark.parametrize(
    "scheme", [pytest.param(s, marks=() if s == "expert_choice" else pytest.mark.slow) for s in SCHEMES]
)
def test_the_table_of_a_study_is_what_models_without_the_experts_lose(scheme):
    model = of_one_layer(scheme)
    if scheme == "modality_top_k":  # of two experts one must be left
        model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, top_k=1))
    (params, state), batch = tiny.build(model), tiny.varied_batch(4)
    found = interventions.study(tiny.layout_of(model), params, state, [batch], stack="language")
    assert found.load.sum() > 0 and np.isfinite(found.rerouted).all()
    # Of text tokens the experts for pictures take none, and a hash follows from the number of an expert.
    experts = {"hash": (SIZE - 1,), "modality_top_k": (0,), "modality_expert_choice": (0,)}
    for expert in experts.get(scheme, (0, SIZE - 1)):
        expected = recomputed(expert, model, params, state, batch)
        assert abs((found.knockout[0, expert] - found.loss) - (expected - found.loss)) <= 1e-5
    assert np.abs(found.knockout - found.loss).max() > 1e-3
