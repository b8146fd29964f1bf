"""Sparse layers that differ from one another: their settings, stacks, programs and gradients."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_step
import tiny

from vl_jax import config as config_lib
from vl_jax.model import LANGUAGE, VisionLanguageConfig
from vl_jax.moe import routing
from vl_jax.moe.routing import MoEConfig
from vl_jax.moe.varied import per_layer
from vl_jax.schema import ConfigError, from_json, to_json

MIXED = (("1.top_k", 1), ("1.num_experts", 8), ("2-3.expert_dim", 16), ("2.scheme", "switch"), ("2.top_k", 1))


def model(*layers: tuple[str, Any], scheme: str = "top_k", **language: Any) -> VisionLanguageConfig:
    """Text alone, four sparse layers."""
    plain = tiny.config(scheme)
    options = {"num_layers": 4, "num_dense_layers": 0, **language}
    return dataclasses.replace(
        plain,
        encoder=None,
        language=dataclasses.replace(plain.language, **options),
        moe=dataclasses.replace(plain.moe, layers=layers),
    )


def runs_of(config: VisionLanguageConfig) -> Any:
    """How its layers are stacked."""
    return config.language.runs_with(config.moe)


def rows_of_text(seed: int = 0) -> Any:
    """Rows without pictures, for a model without a tower."""
    rows = [[tiny.example(10 * seed + i, text=5 + i, tiles=0)] for i in range(4)]
    return jax.tree.map(jnp.asarray, tiny.batch(rows))


def test_settings_are_of_the_layers_they_name_and_later_ones_win():
    moe = MoEConfig(layers=(("0-3.top_k", 1), ("2,5-.num_experts", 8), ("3.top_k", 2), ("1.shared.num", 0)))
    own = [per_layer.settings(moe, layer) for layer in range(7)]
    assert [m.top_k for m in own] == [1, 1, 1, 2, 6, 6, 6]
    assert [m.num_experts for m in own] == [64, 64, 8, 64, 64, 8, 8]
    assert [m.shared.num for m in own] == [2, 0, 2, 2, 2, 2, 2]
    assert not any(m.layers for m in own)


def test_the_command_line_sets_a_field_of_some_layers():
    text = [("layers.0-3.top_k", "1"), ("layers.2.limit.factor", "1.5"), ("layers.0-3.top_k", "2")]
    moe = config_lib.replace(MoEConfig(), text)
    assert moe.layers == (("2.limit.factor", 1.5), ("0-3.top_k", 2))
    assert from_json(to_json(moe), MoEConfig) == moe


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("first.top_k", 1, "must be layers and a field"),
        ("3", 1, "must be layers and a field"),
        ("3-1.top_k", 1, "last layer before its first"),
        ("0.topk", 1, "did you mean 'top_k'"),
        ("0.top_k", 99, "top_k=99 must be from 1 to num_experts=64"),
        ("0.layers", 1, "layers of its own"),
        ("1-.scheme", "hush", "hush"),
    ],
)
def test_a_wrong_setting_is_refused(name, value, said):
    with pytest.raises(ValueError, match=said):
        MoEConfig(layers=((name, value),))


@pytest.mark.parametrize("name", ["4.top_k", "0-4.top_k", "1.top_k"])
def test_layers_that_are_not_sparse_are_refused(name):
    with pytest.raises((ValueError, ConfigError), match="not within the sparse layers"):
        model((name, 1), other_dense_layers=(1,))


@pytest.mark.slow
def test_equal_layers_are_one_stack_as_before():
    plain, same = model(), model(("1.top_k", 2), ("2-.scheme", "top_k"))
    assert same.stacks == plain.stacks and list(same.stacks) == [LANGUAGE]
    assert runs_of(same) == plain.language.runs
    batch = rows_of_text()
    texts = []
    for config in (plain, same):
        params, state = tiny.build(config)
        texts.append(jax.jit(config.build().apply).lower({"params": params}, batch, state).as_text())
    assert texts[0] == texts[1]


def test_groups_are_stacks_and_neighbours_run_together():
    config = model(("1.top_k", 1), ("3.top_k", 1))
    assert {n: (s.layers, s.moe.top_k) for n, s in config.stacks.items()} == {
        LANGUAGE: ((0, 2), 2),
        f"{LANGUAGE}_layer_1": ((1, 3), 1),
    }
    assert [run.layers for run in runs_of(config)] == [(0,), (1,), (2,), (3,)]
    assert [run.layers for run in runs_of(model(*MIXED))] == [(0,), (1,), (2,), (3,)]
    assert [run.layers for run in runs_of(model(("2-.top_k", 1)))] == [(0, 1), (2, 3)]


def unrolled(params: Any, config: VisionLanguageConfig) -> Any:
    """The same parameters for the model whose layers are not scanned."""
    apart = dataclasses.replace(config, language=dataclasses.replace(config.language, scan_layers=False))
    names = {run.layers[0]: run.name for run in runs_of(apart)}
    language = {k: v for k, v in params["language"].items() if not k.startswith("moe_layers")}
    for run in runs_of(config):
        for i, layer in enumerate(run.layers):
            one = jax.tree.map(lambda a, i=i: a[i : i + 1], params["language"][run.name])
            language[names[layer]] = one
    return apart, {**params, "language": language}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["top_k", "loss_free"])
def test_scanned_and_unrolled_layers_give_the_same(scheme):
    config = model(("2-3.num_experts", 8), ("2-.expert_dim", 4), ("2-.top_k", 1), scheme=scheme)
    assert [run.layers for run in runs_of(config)] == [(0, 1), (2, 3)]
    params, state = tiny.build(config)
    apart, split = unrolled(params, config)
    batch = rows_of_text()
    expected = config.build().apply({"params": params}, batch, state)
    found = apart.build().apply({"params": split}, batch, state)
    np.testing.assert_allclose(found.hidden, expected.hidden, rtol=1e-5, atol=1e-6)
    assert found.routed.keys() == expected.routed.keys() == config.stacks.keys()
    for name, stack in config.stacks.items():
        load = expected.routed[name].stats.load
        assert load.shape[0] == 2 and load.shape[-1] == stack.moe.num_experts
        np.testing.assert_array_equal(found.routed[name].stats.load, load)


@pytest.mark.slow
def test_layers_that_alternate_keep_their_states_and_their_order():
    """Layers 0 and 2 are one stack, 1 and 3 another: every bias reaches the layer that it is of."""
    config = model(("1,3.top_k", 1), scheme="loss_free")
    params, state = tiny.build(config)
    batch, built = rows_of_text(), config.build()
    before = built.apply({"params": params}, batch, state).routed
    for name, stack in config.stacks.items():
        for place, layer in enumerate(stack.layers):
            pushed = {**state, name: {"bias": state[name]["bias"].at[place, 3].add(1e3)}}
            after = built.apply({"params": params}, batch, pushed).routed
            tokens = int(np.sum(batch.segment_ids > 0))
            assert np.sum(after[name].stats.load[place, :, 3]) == tokens
            for other, of in config.stacks.items():
                for i, number in enumerate(of.layers):
                    if number < layer:
                        np.testing.assert_array_equal(after[other].stats.load[i], before[other].stats.load[i])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp2-expert2-tensor2", "data2-expert4"])
def test_layers_that_differ_are_the_same_on_eight_devices(mesh):
    config = model(("1.top_k", 1), ("1.num_experts", 8), ("2-3.expert_dim", 16), scheme="loss_free")
    expected, found = test_step.results(config), test_step.results(config, test_step.MESHES[mesh])
    test_step.assert_same(found, expected)
    for name in config.stacks:
        np.testing.assert_array_equal(found[2][name].load, expected[2][name].load)


@pytest.mark.slow
def test_no_gradient_comes_from_later_tokens():
    config = model(*MIXED)
    params, state = tiny.build(config)
    batch = rows_of_text()
    tokens = np.broadcast_to(np.arange(batch.tokens.shape[1]) + 4, batch.tokens.shape).astype(np.int32)
    batch = batch.replace(tokens=jnp.asarray(tokens))

    @jax.jit
    def gradient(table: Any, until: Any) -> Any:
        def total(table: Any) -> Any:
            language = {**params["language"], "embedding": table}
            output = config.build().apply({"params": {**params, "language": language}}, batch, state)
            seen = jnp.where((jnp.arange(tokens.shape[1]) == until)[:, None], jnp.sin(output.hidden), 0)
            return jnp.sum(seen)

        return jax.grad(total)(table)

    for until in (0, 3):
        moved = np.abs(gradient(params["language"]["embedding"], until)).sum(axis=1)
        assert (moved[4 : 5 + until] > 0).all() and not moved[5 + until :].any()


def test_only_causal_layers_may_be_packed_and_decoding_warns_of_others():
    config = model(("2.scheme", "expert_choice"))
    assert config.decoding_moe is not None and not routing.is_causal(config.decoding_moe)
    assert routing.is_causal(model(*MIXED).decoding_moe)
    assert model(num_dense_layers=4).decoding_moe is None
