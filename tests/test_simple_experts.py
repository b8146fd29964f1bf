"""Experts that multiply by no matrix: zero, copy and constant ones."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl_jax.moe import comparisons, conformance
from vl_jax.moe.assignment import weights_of
from vl_jax.moe.checks import decisions
from vl_jax.moe.checks.subject import NO_SHARED
from vl_jax.moe.config import CapacityConfig, SimpleExpertsConfig
from vl_jax.moe.layer import DynamicMoE
from vl_jax.moe.routing import MoEConfig


def layer(scheme: str, **options: Any) -> tuple[Any, ...]:
    config = MoEConfig(
        scheme, 8, 2, 4, shared=NO_SHARED, simple=SimpleExpertsConfig(zero=1, copy=2, constant=2), **options
    )
    x, context = decisions.make_inputs(0, config)
    x, context = jnp.asarray(x), jax.tree.map(jnp.asarray, context)
    module, random = DynamicMoE(config), np.random.default_rng(0)
    shapes = nn.meta.unbox(jax.eval_shape(module.init, jax.random.key(0), x, context, {}))["params"]
    params = jax.tree.map(lambda p: jnp.asarray(random.standard_normal(p.shape), jnp.float32), shapes)
    (y, found), kept = module.apply({"params": params}, x, context, {}, mutable=["intermediates"])
    return config, params, np.float64(x), context, y, found.stats, kept["intermediates"]["assignment"][0]


@pytest.mark.parametrize("scheme", ["top_k", "expert_choice"])
def test_every_expert_gives_what_it_says(scheme):
    config, params, x, context, y, stats, assignment = layer(scheme)
    assert params["w_in"].shape[0] == 3 and params["router"].shape[1] == 8
    gates = np.asarray(weights_of(assignment, context.valid, config.num_experts), np.float64)
    outputs = [np.asarray(_mlp(params, x, e)) for e in range(3)] + [0 * x, x, x]
    for vector, shares in zip(params["simple"]["vectors"], params["simple"]["shares"], strict=True):
        logits = x @ np.float64(shares)
        a = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        outputs.append(a[..., :1] * x + a[..., 1:] * np.float64(vector))
    expected = np.einsum("GTE,EGTD->GTD", gates, np.stack(outputs))
    np.testing.assert_allclose(y, expected, atol=2e-5)
    assert (np.asarray(stats.load).sum(axis=0) > 0).sum() == 8


def _mlp(params: Any, x: np.ndarray, expert: int) -> np.ndarray:
    gate, up = (x @ np.float64(params["w_in"][expert, :, i]) for i in (0, 1))
    return (gate / (1 + np.exp(-gate)) * up) @ np.float64(params["w_out"][expert])


@pytest.mark.slow
@pytest.mark.parametrize("limit", [CapacityConfig(), CapacityConfig(slots=3)], ids=["dropless", "slots"])
def test_a_layer_with_them_conforms(limit, monkeypatch):
    monkeypatch.setattr(comparisons, "KERNELS", ("reference", "blocked"))
    config = MoEConfig("top_k", 8, 2, 4, simple=SimpleExpertsConfig(1, 2, 1), limit=limit)
    found = conformance.check("top_k", config)
    assert not [str(result) for result in found if result.passed is False]


def test_one_expert_must_have_matrices_and_none_are_mixed():
    with pytest.raises(ValueError, match="simple has 8 of num_experts=8 experts; it must leave one"):
        MoEConfig(num_experts=8, top_k=2, simple=SimpleExpertsConfig(zero=8))
    with pytest.raises(ValueError, match="scheme='smear': simple=.1, 2, 2. experts cannot be mixed"):
        layer("smear")
