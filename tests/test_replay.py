"""Routes that are given: replayed, or dealt out so that load is even."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.evaluate import interventions
from vl_jax.evaluate.routes import routes as routes_of
from vl_jax.model import VisionLanguage
from vl_jax.moe import routing
from vl_jax.moe.config import BalanceConfig
from vl_jax.moe.routing import MoEConfig, RoutingContext, scheme_of
from vl_jax.sharding import MeshConfig, make_mesh
from vl_jax.train import step

G, T, E = 4, 6, 8
# Each chooses or weighs in its own way; that every scheme takes routes is one of its conformance checks.
BY_TOKEN = ("hash", "loss_free", "null_experts", "top_k", "top_p")


def config(scheme: str, **options) -> MoEConfig:
    top_k = 1 if scheme == "switch" else 2
    return MoEConfig(scheme, num_experts=E, top_k=top_k, expert_dim=4, **options)


def context(lengths=(T, T, 4, 0)) -> RoutingContext:
    index = np.broadcast_to(np.arange(T, dtype=np.int32), (G, T))
    valid = index < np.array(lengths)[:, None]
    return RoutingContext(jnp.asarray(valid), jnp.asarray(index % 2), tokens=jnp.asarray(7 * index))


@functools.partial(jax.jit, static_argnums=0)
def route(config: MoEConfig, logits, extra):
    return routing.route(logits, context(), routing.init_state(config) | extra, config)


def routed(config: MoEConfig, seed: int, **extra):
    """(assignment, losses) for logits of a seed."""
    shape = (G, T, scheme_of(config).columns(config))
    return route(config, np.random.default_rng(seed).standard_normal(shape, np.float32), extra)


@pytest.mark.parametrize("scheme", BY_TOKEN)
def test_own_routes_change_nothing_and_those_of_another_pass_are_taken(scheme):
    c = config(scheme)
    (own, losses), (other, _) = routed(c, 0), routed(c, 1)
    again, again_losses = routed(c, 0, routes=own.experts)
    np.testing.assert_array_equal(again.experts, own.experts)
    np.testing.assert_allclose(again.gates, own.gates, rtol=1e-6)
    if scheme != "null_experts":  # which of them it was, routes do not say
        for name, value in losses.items():
            np.testing.assert_allclose(again_losses[name], value, rtol=1e-6, err_msg=name)
    taken = routed(c, 0, routes=other.experts)[0]
    np.testing.assert_array_equal(taken.experts, other.experts)
    assert scheme in ("hash",) or not np.allclose(taken.gates, other.gates)  # they are of today's logits


def test_a_scheme_without_choices_takes_no_routes_and_routes_have_to_fit():
    routes = jnp.zeros((G, T, 2), jnp.int32)
    with pytest.raises(ValueError, match="scheme='expert_choice': routes .4, 6, 2. are given .* takes none"):
        routed(config("expert_choice"), 0, routes=routes)
    with pytest.raises(ValueError, match=r"scheme='top_k': routes \(4, 5, 2\) are given for \(4, 6\) tokens"):
        routed(config("top_k"), 0, routes=routes[:, 1:])
    with pytest.raises(ValueError, match="balance.forced=True: scheme='soft_moe' takes no routes"):
        config("soft_moe", balance=BalanceConfig(forced=True))


balanced_routes = jax.jit(functools.partial(routing.balanced_routes, num_experts=E, top_k=3))


@pytest.mark.parametrize("lengths", [(T, T, 4, 0), (1, 0, 5, 2), (0, 0, 0, 0), (T, T, T, T)])
@pytest.mark.parametrize("devices", [1, 8])
def test_balanced_routes_load_experts_evenly(lengths, devices):
    valid = np.tile(context(lengths).valid, (2, 1))
    with sharding.use_mesh(make_mesh(MeshConfig(data=devices), devices=jax.devices()[:devices])):
        routes = np.asarray(balanced_routes(valid))
    np.testing.assert_array_equal((routes < E).all(axis=-1), valid)
    np.testing.assert_array_equal((routes == E).all(axis=-1), ~valid)
    load = np.bincount(routes[valid].reshape(-1), minlength=E)
    assert load.max() - load.min() == (load.sum() % E > 0)
    assert all(len(set(token)) == 3 for token in routes[valid].tolist())


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["loss_free", "capacity"])
def test_a_model_follows_the_routes_of_another(scheme):
    model_config = tiny.of_text(tiny.config(scheme))
    (params, state), model = tiny.build(model_config), VisionLanguage(model_config)
    batch = jax.tree.map(jnp.asarray, tiny.varied_batch(2))
    changed = jax.tree.map(
        lambda p: np.asarray(p) + 0.3 * np.cos(np.arange(p.size, dtype=np.float32)).reshape(p.shape), params
    )
    follow = jax.jit(functools.partial(routes_of, model=model))
    losses_of = jax.jit(functools.partial(interventions.target_losses, model=model))
    own = np.asarray(follow(params, state, batch)["language"])
    others = np.asarray(follow(changed, state, batch)["language"])
    assert own.shape == (2, *batch.tokens.shape, 2) and np.any(own != others)

    def given(**extra: Any) -> Any:
        return {"language": {**state["language"], **extra}}

    followed = follow(params, given(**{routing.ROUTES: others}), batch)["language"]
    np.testing.assert_array_equal(followed, others)
    losses = [
        np.asarray(losses_of(params, given(**routes), batch))
        for routes in ({}, {routing.ROUTES: own}, {routing.ROUTES: others})
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert np.max(np.abs(losses[2] - losses[0])) > 1e-3


@pytest.mark.slow
def test_a_model_with_balanced_routes_has_even_loads():
    model_config = tiny.of_text(tiny.config("top_k"))
    balance = dataclasses.replace(model_config.moe.balance, forced=True)
    balanced = dataclasses.replace(model_config, moe=dataclasses.replace(model_config.moe, balance=balance))
    load = np.asarray(tiny.forward(balanced, tiny.varied_batch(4))[1].stats.load).sum(axis=1)
    assert np.all(load.max(axis=-1) - load.min(axis=-1) <= 1) and load.sum() > 0


@pytest.mark.slow
def test_every_micro_batch_gets_the_routes_of_its_rows():
    model_config = tiny.of_text(tiny.config("loss_free"))
    (params, state), model = tiny.build(model_config), VisionLanguage(model_config)
    batch = jax.tree.map(jnp.asarray, tiny.varied_batch(4))
    noise = np.random.default_rng(0).random((2, *batch.tokens.shape, 4))
    routes = np.argsort(noise, axis=-1)[..., :2].astype(np.int32)

    @functools.partial(jax.jit, static_argnums=2)
    def gradients_of(routes: jax.Array, batch: Any, accumulation: int) -> Any:
        given = step.TrainState(0, params, None, {"language": {**state["language"], routing.ROUTES: routes}})
        options = {"model": model, "trainable": set(params_lib.flatten(params)), "accumulation": accumulation}
        return step.gradients(given, batch, **options)

    (whole, metrics, sums), (parts, metrics_of_parts, sums_of_parts) = (
        gradients_of(routes, batch, accumulation) for accumulation in (1, 2)
    )
    np.testing.assert_allclose(metrics_of_parts["loss"], metrics["loss"], rtol=1e-5)
    np.testing.assert_array_equal(sums_of_parts.stats["language"].load, sums.stats["language"].load)
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.abs(b).max() + 1e-6))
    assert abs(float(gradients_of(routes[:, ::-1], batch, 2)[1]["loss"] - metrics["loss"])) > 1e-4
