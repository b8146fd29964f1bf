"""Choices of a fixed batch, watched while a model trains."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vl_jax import sharding
from vl_jax.evaluate.routes import churn
from vl_jax.moe.routing import MoEConfig
from vl_jax.train.probe import Probe
from vl_jax.train.step import TrainState

E = 8


def test_churn_is_the_share_of_new_choices():
    before = jnp.array([[[[0, 1], [2, E], [3, 0]]]])
    after = jnp.array([[[[1, 0], [3, 2], [E, E]]]])  # of four choices, one is new; order does not matter
    np.testing.assert_array_equal(churn(before, after, num_experts=E), [0.25])


def state_of(params, routing) -> TrainState:
    return TrainState(jnp.zeros((), jnp.int32), params, None, routing, {})


@pytest.mark.slow
def test_looks_are_compared():
    config = tiny.config()
    layout, (params, routing) = tiny.layout_of(config), tiny.build(config)
    probe = Probe(layout, tiny.varied_batch(2))
    # Turned over, a router prefers the experts that it liked least.
    turned = jax.tree_util.tree_map_with_path(
        lambda path, leaf: -leaf if "router" in jax.tree_util.keystr(path) else leaf, params
    )
    with sharding.use_mesh(layout.mesh, layout.rules):
        same, again, other = [
            probe.look(state_of(p, routing), lora_scale=1.0) for p in (params, params, turned)
        ]
        (unchanged,), (changed,) = (probe.compare(same, o).values() for o in (again, other))
    assert unchanged.shape == (len(config.language.sparse_layers),)
    assert not unchanged.any() and changed.all()


@pytest.mark.slow
def test_a_scheme_without_choices_is_refused():
    config = dataclasses.replace(tiny.config(), moe=MoEConfig("soft_moe", num_experts=E, expert_dim=4))
    layout, (params, routing) = tiny.layout_of(config), tiny.build(config)
    probe = Probe(layout, tiny.varied_batch(2))
    with sharding.use_mesh(layout.mesh, layout.rules), pytest.raises(ValueError, match="scheme='soft_moe'"):
        probe.look(state_of(params, routing), lora_scale=1.0)
