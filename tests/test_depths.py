"""Mixture of depths: who takes a block, in training and afterwards, and what the others keep."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_step
import tiny

from vl_jax import params as params_lib
from vl_jax.language.depths import DepthsConfig
from vl_jax.model import LANGUAGE, VisionLanguageConfig
from vl_jax.moe import comparisons, conformance
from vl_jax.moe.assignment import RoutingContext
from vl_jax.moe.config import BalanceConfig
from vl_jax.moe.schemes.predicted import best_of_sample, most_of

STACK = f"{LANGUAGE}_depths"
LENGTH = 24


def model(
    *layers: int, share: float = 0.25, options: tuple[tuple[str, Any], ...] = (), **language: Any
) -> VisionLanguageConfig:
    """Text alone: one dense and two sparse layers, some of which tokens may pass by."""
    plain = tiny.config("top_k", balance=BalanceConfig(weight=0.0, scope="batch"))
    router = dataclasses.replace(DepthsConfig().router, options=(("share", share), ("hidden", 4), *options))
    depths = DepthsConfig(layers, router) if layers else None
    sizes = dataclasses.replace(plain.language, depths=depths, **language)
    return dataclasses.replace(plain, encoder=None, language=sizes)


def rows(*layouts: list[int]) -> Any:
    """Packed rows of samples of these lengths, without pictures."""
    made = [
        [tiny.example(10 * i + j, text=n, tiles=0) for j, n in enumerate(r)] for i, r in enumerate(layouts)
    ]
    return jax.tree.map(jnp.asarray, tiny.batch(made, length=LENGTH))


@functools.partial(jax.jit, static_argnums=(0,), static_argnames=("training", "sow"))
def run(
    config: Any, params: Any, state: Any, batch: Any, *, training: bool = False, sow: bool = False
) -> Any:
    rngs = {"routing": jax.random.key(0)} if training else None
    options = {"mutable": ["intermediates"]} if sow else {}
    return config.build().apply({"params": params}, batch, state, rngs=rngs, **options)


def share_of(output: Any) -> np.ndarray:
    """The tokens that took each passable layer."""
    return np.asarray(output.routed[STACK].stats.load).sum(axis=(1, 2))


def test_the_best_of_every_sample_are_chosen():
    scores = jnp.array([3.0, 1, 2, 5, 4, 9, 7, 8, 6, 0])[:, None]
    where = RoutingContext(
        valid=jnp.arange(10) < 9,
        modality=jnp.zeros(10, jnp.int32),
        positions=jnp.array([0, 1, 2, 3, 0, 1, 2, 3, 4, 0]),
    )
    chosen = best_of_sample(scores, where.valid[:, None], where, share=0.5)[:, 0]
    assert np.flatnonzero(chosen).tolist() == [0, 3, 5, 7]  # 2 of 4, and 2 of 5
    few = best_of_sample(scores, where.valid[:, None] & (scores < 5), where, share=0.5)[:, 0]
    assert np.flatnonzero(few).tolist() == [0, 2, 4]
    assert [most_of(n, 0.3, most=100) for n in (0, 1, 3, 4, 10, 100)] == [0, 0, 0, 1, 3, 30]


def test_in_training_a_share_of_every_sample_takes_the_block():
    config = model(1, 2)
    params, state = tiny.build(config)
    output = run(config, params, state, rows([4, 9], [20], [3, 3, 3]), training=True)
    assert share_of(output).tolist() == [1 + 2 + 5 + 0] * 2
    assert output.routed[STACK].losses["predictor"].shape == (2,)


def test_who_passes_the_only_layer_by_leaves_as_he_came():
    config = model(0, num_layers=1, num_dense_layers=1)
    params, state = tiny.build(config)
    batch = rows([20], [16])
    output, kept = run(config, params, state, batch, training=True, sow=True)
    block = kept["intermediates"][LANGUAGE]["dense_layers"]["depth"]["assignment"][0]
    chosen = np.asarray(block.experts[0] == 0).any(-1)
    embedded = params[LANGUAGE]["embedding"][batch.tokens]
    expected = embedded * jax.lax.rsqrt(jnp.mean(embedded**2, -1, keepdims=True) + 1e-6)
    expected = np.asarray(expected * params[LANGUAGE]["norm"]["scale"])
    valid = np.asarray(batch.segment_ids > 0)
    same = np.abs(np.asarray(output.hidden) - expected).max(-1) < 1e-5
    assert (same[valid] == ~chosen[valid]).all() and chosen.sum() == 5 + 4


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_places_of_their_own_and_masked_rows_give_the_same(training):
    """What is computed for the chosen tokens alone equals the same computed for all."""
    config = model(1, 2, share=0.5)
    params, state = tiny.build(config)
    batch = rows([4, 9], [20], [3, 3, 3])
    alone = run(config, params, state, batch, training=training)
    masked, _ = run(config, params, state, batch, training=training, sow=True)
    np.testing.assert_allclose(alone.hidden, masked.hidden, atol=2e-5)
    assert share_of(alone).tolist() == share_of(masked).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("odds", [-1e3, 1e3])
def test_more_or_fewer_than_there_is_room_for_may_take_the_block(odds):
    config = model(1)
    params, state = tiny.build(config)
    router = params[LANGUAGE]["moe_layers"]["depth"]["scheme"]
    router["predict_bias"] = jnp.full_like(router["predict_bias"], odds)
    batch = rows([20], [16])
    output = run(config, params, state, batch)
    masked, _ = run(config, params, state, batch, sow=True)
    assert share_of(output).tolist() == [36 if odds > 0 else 0]
    np.testing.assert_allclose(output.hidden, masked.hidden, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_packed_samples_are_as_separate_ones(training):
    config = model(1, 2)
    params, state = tiny.build(config)
    packed = run(config, params, state, rows([9, 4, 8]), training=training)
    for number, (first, length) in enumerate(((0, 9), (9, 4), (13, 8))):
        own = [tiny.example(number, text=length, tiles=0)]
        alone = jax.tree.map(jnp.asarray, tiny.batch([own], length=LENGTH))
        found = run(config, params, state, alone, training=training)
        part = packed.hidden[0, first : first + length]
        np.testing.assert_allclose(found.hidden[0, :length], part, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 7])
def test_with_a_cache_it_is_as_without(cut):
    config = model(0, 2, share=0.5)
    params, state = tiny.build(config)
    for run_of_layers in ("dense_layers", "moe_layers_1"):
        router = params[LANGUAGE][run_of_layers]["depth"]["scheme"]
        router["predict_out"] *= 10
        router["predict_bias"] = 0 * router["predict_bias"] - 0.5
    batch = rows([20], [20])
    full = run(config, params, state, batch)
    taken = share_of(full)
    assert (taken > 0).all() and (taken < 40).all()
    cache = config.init_cache(batch=4, slots=LENGTH)
    fields = ("tokens", "positions", "segment_ids", "branch_ids", "visual_slot")
    step = jax.jit(lambda part, cache: config.build().apply({"params": params}, part, state, cache=cache))
    hidden, first = [], 0
    for last in (cut, *range(cut + 1, 20), 20):
        part = batch.replace(**{name: getattr(batch, name)[:, first:last] for name in fields})
        output = step(part, cache)
        cache, first = output.cache, last
        hidden.append(output.hidden)
    found = jnp.concatenate(hidden, axis=1)
    np.testing.assert_allclose(found[:2], full.hidden[:2, :20], atol=3e-5)


@pytest.mark.slow
def test_after_training_no_gradient_comes_from_later_tokens():
    config = model(1, 2, share=0.5)
    params, state = tiny.build(config)
    batch = rows([20])
    tokens = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32) + 4, batch.tokens.shape)
    batch = batch.replace(tokens=tokens)

    def total(table: Any, until: int) -> Any:
        changed = {**params, LANGUAGE: {**params[LANGUAGE], "embedding": table}}
        return jnp.sum(jnp.sin(run(config, changed, state, batch).hidden[:, until]))

    for until in (2, 9):
        moved = np.abs(jax.grad(total)(params[LANGUAGE]["embedding"], until)).sum(axis=1)
        assert moved[4 + until] > 0 and not moved[5 + until :].any()


@pytest.mark.slow
def test_router_and_predictor_learn_and_the_predictor_moves_nothing_else():
    config = model(1, 2)
    params, state = tiny.build(config)
    batch = rows([20], [16], [9, 9])

    def total(params: Any, weight: float) -> Any:
        output = run(config, params, state, batch, training=True)
        task = jnp.sum(jnp.sin(output.hidden) * (batch.segment_ids > 0)[..., None].astype(jnp.float32))
        return (1 - weight) * task + weight * jnp.sum(output.routed[STACK].losses["predictor"])

    by_task, by_loss = (params_lib.flatten(jax.grad(total)(params, weight)) for weight in (0.0, 1.0))
    for path, gradient in by_task.items():
        assert np.isfinite(gradient).all(), path
        if "/depth/" in path:
            assert ("predict" in path) != bool(np.abs(gradient).max() > 1e-6), path
    moved = {path for path, gradient in by_loss.items() if np.abs(gradient).max() > 0}
    assert moved == {path for path in by_loss if "/predict" in path}


@pytest.mark.slow
def test_flops_fall_with_the_share():
    def flops(config: VisionLanguageConfig) -> float:
        params, state = tiny.build(config)
        lowered = run.lower(config, params, state, rows([LENGTH]), training=True)
        return lowered.compile().cost_analysis()["flops"]

    sizes = {"num_layers": 4, "num_dense_layers": 4, "embed_dim": 64, "mlp_dim": 256}
    whole, passed = flops(model(**sizes)), flops(model(0, 1, 2, 3, share=0.25, **sizes))
    assert passed < 0.45 * whole


@pytest.mark.slow
def test_scanned_and_unrolled_layers_give_the_same():
    config = model(1, 2)
    params, state = tiny.build(config)
    apart = model(1, 2, scan_layers=False)
    of_layers = params[LANGUAGE]["moe_layers"]
    language = {k: v for k, v in params[LANGUAGE].items() if k != "moe_layers"}
    language["moe_layers"], language["moe_layers_1"] = (
        jax.tree.map(lambda a, i=i: a[i : i + 1], of_layers) for i in (0, 1)
    )
    batch = rows([4, 9], [20])
    for training in (True, False):
        expected = run(config, params, state, batch, training=training)
        found = run(apart, {**params, LANGUAGE: language}, state, batch, training=training)
        np.testing.assert_allclose(found.hidden, expected.hidden, atol=2e-5)
        assert share_of(found).tolist() == share_of(expected).tolist()


@pytest.mark.slow
def test_eight_devices_give_the_same():
    config = model(1, 2, share=0.5)
    expected = test_step.results(config)
    found = test_step.results(config, test_step.MESHES["fsdp2-expert2-tensor2"])
    test_step.assert_same(found, expected)
    np.testing.assert_array_equal(found[2][STACK].load, expected[2][STACK].load)


@pytest.mark.parametrize(
    "layers, options, said",
    [
        ((3,), {}, "different numbers from 0 to 2"),
        ((1, 1), {}, "different numbers"),
        ((1,), {"windows": (0, 4, 0)}, "a window counts tokens"),
    ],
)
def test_layers_that_cannot_be_passed_by_are_refused(layers, options, said):
    with pytest.raises(ValueError, match=said):
        model(*layers, **options)


def test_the_router_has_one_expert():
    with pytest.raises(ValueError, match="one expert, the block"):
        DepthsConfig((1,), dataclasses.replace(DepthsConfig().router, num_experts=2))


@pytest.mark.slow
def test_the_router_conforms_as_a_scheme_of_many_experts(monkeypatch):
    monkeypatch.setattr(comparisons, "KERNELS", ("reference", "blocked"))
    found = conformance.check("predicted_choice")
    assert not [str(result) for result in found if result.passed is False]
    assert {r.property for r in found if r.passed is None} <= {
        "given routes are taken",
        "kernels agree with few slots",
    }
