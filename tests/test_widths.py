"""Experts of different widths behind one router."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vl_jax.moe import conformance, losses
from vl_jax.moe.assignment import RoutingContext
from vl_jax.moe.config import (
    BalanceConfig,
    CapacityConfig,
    ExecutionConfig,
    SharedExpertsConfig,
    SimpleExpertsConfig,
)
from vl_jax.moe.layer import DynamicMoE
from vl_jax.moe.routing import MoEConfig
from vl_jax.moe.specialise import per_expert
from vl_jax.moe.stacks import Stack
from vl_jax.moe.varied import widths

NONE = SharedExpertsConfig(num=0)


def layer(**fields: Any) -> MoEConfig:
    """Eight experts, of which two are chosen, 2, 4, 8 and 16 wide."""
    sizes = {"num_experts": 8, "top_k": 2, "widths": (2, 4, 8, 16), "shared": NONE}
    return MoEConfig(**{**sizes, **fields})


def inputs(rows: int = 3, length: int = 7) -> tuple[jax.Array, RoutingContext]:
    random = np.random.default_rng(0)
    valid = np.arange(length) < np.array([length, length - 2, 1])[:rows, None]
    context = RoutingContext(valid=jnp.asarray(valid), modality=jnp.asarray(valid, jnp.int32))
    return jnp.asarray(random.standard_normal((rows, length, 8), np.float32)), context


def params_of(config: MoEConfig) -> Any:
    x, context = inputs()
    shapes = jax.eval_shape(DynamicMoE(config).init, jax.random.key(0), x, context, {})["params"]
    random = np.random.default_rng(1)
    plain = jax.tree.map(lambda p: p.value, shapes, is_leaf=lambda p: hasattr(p, "value"))
    return jax.tree.map(lambda p: jnp.asarray(0.5 * random.standard_normal(p.shape, np.float32)), plain)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"limit": CapacityConfig(factor=0.75)},
        {"simple": SimpleExpertsConfig(zero=1, copy=2, constant=1), "widths": (4, 2), "top_k": 3},
        {"scheme": "top_p", "balance": BalanceConfig(by_width=True)},
        {"expert_bias": True, "execution": ExecutionConfig(kernel="reference")},
    ],
)
def test_narrow_experts_are_wide_ones_whose_other_units_are_zero(fields):
    config = layer(**fields)
    x, context = inputs()
    params = params_of(config)
    parts, widest = config.widths, max(config.widths)
    alike = dataclasses.replace(
        config, widths=(), expert_dim=widest, balance=dataclasses.replace(config.balance, by_width=False)
    )
    names = {"w_in": -1, "w_out": -2, "b_in": -1, "b_out": None}
    wide = {k: v for k, v in params.items() if k.rpartition("_")[0] not in names}
    for name, axis in names.items():
        own = [params[f"{name}_{i}"] for i in range(len(parts)) if f"{name}_{i}" in params]
        if axis is not None:
            own = [jnp.pad(w, _behind(w.ndim, axis, widest - w.shape[axis])) for w in own]
        if own:
            wide[name] = jnp.concatenate(own)

    def run(config: MoEConfig, params: Any) -> Any:
        return DynamicMoE(config).apply({"params": params}, x, context, {})

    (found, output), (expected, same) = run(config, params), run(alike, wide)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_array_equal(output.stats.load, same.stats.load)
    np.testing.assert_array_equal(output.stats.dropped, same.stats.dropped)


def _behind(dims: int, axis: int, more: int) -> list[tuple[int, int]]:
    return [(0, more if i == dims + axis else 0) for i in range(dims)]


def test_parameters_have_the_widths_that_are_asked_for():
    shapes = {name: p.shape for name, p in params_of(layer()).items()}
    assert shapes == {
        "router": (8, 8),
        **{f"w_in_{i}": (2, 8, 2, width) for i, width in enumerate((2, 4, 8, 16))},
        **{f"w_out_{i}": (2, width, 8) for i, width in enumerate((2, 4, 8, 16))},
    }


def test_load_counts_by_width():
    """Half of the choices go to a narrow expert, half to one three times as wide: 1/2 and 3/2 of the mean."""
    config = layer(num_experts=2, top_k=1, widths=(2, 6), balance=BalanceConfig(weight=1.0, by_width=True))
    np.testing.assert_allclose(losses.costs_of(config), [0.5, 1.5])
    scores = jnp.array([[0.8, 0.2], [0.4, 0.6]])
    found = losses.balance_loss(
        scores, jnp.array([[0], [1]]), jnp.ones(2, bool), scope="sequence", costs=losses.costs_of(config)
    )
    np.testing.assert_allclose(found, 2 * (0.5 * 0.5 * 0.6 + 1.5 * 0.5 * 0.4), rtol=1e-6)
    simple = dataclasses.replace(config, num_experts=3, simple=SimpleExpertsConfig(copy=1))
    np.testing.assert_allclose(losses.costs_of(simple), [0.6, 1.8, 0.6], rtol=1e-6)


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"widths": (2, 4, 8)}, "divide the 8 experts"),
        ({"widths": (0, 4)}, "numbers >= 1"),
        ({"widths": (), "balance": BalanceConfig(by_width=True)}, "by_width=True needs widths"),
    ],
)
def test_widths_that_cannot_be_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        layer(**fields)


def test_weights_of_several_widths_are_not_mixed():
    with pytest.raises(ValueError, match="cannot be mixed"):
        params_of(layer(scheme="smear"))


def test_parts_plan_for_their_share_of_the_choices():
    parts = widths.parts_of(layer(top_k=6))
    assert [(p.num_experts, p.top_k, p.expert_dim) for p in parts] == [(2, 2, w) for w in (2, 4, 8, 16)]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["top_k", "top_p", "loss_free", "expert_choice", "soft_moe"])
def test_a_layer_of_several_widths_conforms(scheme):
    config = layer(scheme=scheme, num_experts=8, top_k=2, widths=(4, 2))
    found = conformance.check(scheme, config)
    assert not [str(result) for result in found if result.passed is False]


def test_single_experts_of_several_widths_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"moe.widths=\(2, 4, 8, 16\): .* it must be \(\)"):
        per_expert.axes({}, Stack(layer(), (0,), (("layer", "moe"),)))
