"""Schemes with parameters of their own, and schemes that know their layer and the one before."""

from __future__ import annotations

import dataclasses
import inspect
import pydoc
import textwrap
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_step
import tiny

import vl_jax
from vl_jax import params as params_lib
from vl_jax.model import LANGUAGE, VisionLanguageConfig
from vl_jax.moe import conformance
from vl_jax.moe.config import BalanceConfig
from vl_jax.moe.layer import OWN, DynamicMoE
from vl_jax.moe.routing import MoEConfig, Param, RoutingContext, Scheme
from vl_jax.moe.stacks import sown

ROUTERS = Path(__file__).resolve().parent.parent / "experiments" / "routers"
MLP, COSINE, RECURRENT = (f"{ROUTERS / name}.py:{name}" for name in ("mlp", "cosine", "recurrent"))


def model(scheme: str, **language: Any) -> VisionLanguageConfig:
    """Two sparse layers of a scheme."""
    config = tiny.of_text(tiny.config("top_k"))
    moe = dataclasses.replace(config.moe, scheme=scheme, balance=BalanceConfig(weight=0.01))
    return dataclasses.replace(config, moe=moe, language=dataclasses.replace(config.language, **language))


@pytest.mark.parametrize("file", sorted(ROUTERS.glob("*.py")), ids=lambda file: file.stem)
def test_worked_examples_are_short_and_conform(file):
    assert len(file.read_text().splitlines()) <= 40
    found = conformance.check(f"{file}:{file.stem}", properties=conformance.PROPERTIES)
    assert not [str(result) for result in found if result.passed is False]


def test_logits_of_a_scheme_stand_in_for_the_linear_router():
    config = MoEConfig(MLP, num_experts=4, top_k=2, expert_dim=4, options=(("hidden", 3),))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 8), np.float32))
    valid = jnp.ones((2, 5), bool)
    context = RoutingContext(valid=valid, modality=valid.astype(jnp.int32))
    layer = DynamicMoE(config)
    params: Any = nn.meta.unbox(layer.init(jax.random.key(0), x, context, {}))["params"]
    own = params[OWN]
    assert "router" not in params and {n: w.shape for n, w in own.items()} == {
        "w_in": (8, 3),
        "w_out": (3, 4),
    }
    _, kept = layer.apply({"params": params}, x, context, {}, mutable=["intermediates"])
    expected = np.tanh(np.float64(x) @ own["w_in"]) @ own["w_out"]
    np.testing.assert_allclose(kept["intermediates"]["logits"][0], expected, atol=1e-6)


def test_a_parameter_names_all_its_dimensions():
    with pytest.raises(ValueError, match=r"names=\('embed',\) must name every dimension of shape=\(8, 4\)"):
        Param((8, 4), ("embed",))


def test_a_layer_finds_the_logits_of_the_one_before_scanned_and_unrolled():
    batch = jax.tree.map(jnp.asarray, tiny.varied_batch(4))
    found = {}
    for scan in (True, False):
        config = model(RECURRENT, scan_layers=scan, num_layers=3)
        network = vl_jax.VisionLanguage(config)
        params, state = tiny.build(config)
        if scan:
            params = params_lib.map_paths(_numbered, params)
            stacked = params
        else:
            params = _apart(params, stacked)
        output, kept = network.apply({"params": params}, batch, state, mutable=["intermediates"])
        found[scan] = output.hidden, sown(kept["intermediates"], config.stacks[LANGUAGE])
    np.testing.assert_allclose(found[True][0], found[False][0], atol=1e-5)
    for together, alone in zip(found[True][1], found[False][1], strict=True):
        np.testing.assert_allclose(together.scores, alone.scores, atol=1e-5)
    previous = 0.0
    for number, layer in enumerate(found[True][1]):
        share = 0.5 + 0.1 * number
        expected = jax.nn.softmax(layer.logits + share * previous, axis=-1)
        np.testing.assert_allclose(layer.scores, expected, atol=1e-5)
        previous = layer.logits


def _numbered(path: str, leaf: Any) -> Any:
    """The share of every layer is another one."""
    return 0.5 + 0.1 * np.arange(len(leaf), dtype=np.float32) if path.endswith("share") else leaf


def _apart(params: Any, stacked: Any) -> Any:
    """Parameters of layers that were stacked, under names of their own."""
    language = dict(stacked["language"])
    runs = sorted(name for name in params["language"] if name.startswith("moe_layers"))
    together = language.pop("moe_layers")
    for number, name in enumerate(runs):
        language[name] = jax.tree.map(lambda leaf, n=number: leaf[n : n + 1], together)
    return {**stacked, "language": language}


LAYERS = """
    import jax
    import jax.numpy as jnp
    from vl_jax.moe.routing import Scheme, TokenChoice

    def route(logits, context, state, config):
        assert context.depth == 3 and context.modalities == ("text", "vision")
        only = jnp.where(context.valid, context.layer, config.num_experts)[:, None]
        return TokenChoice(only.astype(jnp.int32), context.valid[:, None].astype(jnp.float32)), {}

    by_layer = Scheme(route)
"""


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
def test_a_scheme_knows_its_layer(tmp_path, scan):
    file = tmp_path / "by_layer.py"
    file.write_text(textwrap.dedent(LAYERS))
    config = model(f"{file}:by_layer", scan_layers=scan, num_layers=3, num_dense_layers=1)
    routed = tiny.forward(config, tiny.varied_batch(4))[1]
    chosen = np.asarray(routed.stats.load).sum(axis=1) > 0  # [L E]; the dense layer is number 0
    np.testing.assert_array_equal(chosen, [[False, True, False, False], [False, False, True, False]])


@pytest.mark.slow
@pytest.mark.parametrize("scheme", [MLP, COSINE, RECURRENT], ids=["mlp", "cosine", "recurrent"])
def test_eight_devices_train_the_parameters_of_a_scheme_as_one_does(scheme):
    expected = test_step.results(model(scheme))
    found = test_step.results(model(scheme, remat="full"), test_step.MESHES["data2-expert4"], accumulation=2)
    test_step.assert_same(found, expected)


@pytest.mark.slow
def test_a_run_of_a_scheme_with_parameters_goes_on_as_if_it_had_not_stopped(tmp_path):
    wanted = {"model.moe.scheme": MLP, "model.moe.options.hidden": 4, "stages.first.steps": 4}
    wanted |= {f"stages.{stage}.optimizer.schedule": "constant" for stage in ("first", "second")}
    experiment = str(Path(__file__).with_name("tiny_experiment.py"))

    def trained(folder, steps):
        run = vl_jax.train(experiment, tmp_path / folder, {**wanted, "stages.second.steps": steps})
        return params_lib.flatten(run.params)

    first, resumed, whole = trained("run", 1), trained("run", 4), trained("whole", 4)
    read = params_lib.flatten(vl_jax.load_run(tmp_path / "run").params)
    own = {path for path in read if f"/moe/{OWN}/" in path}
    assert {path.rpartition("/")[2] for path in own} == {"w_in", "w_out"}
    assert not any(np.array_equal(first[path], resumed[path]) for path in own)
    for path in read:
        np.testing.assert_array_equal(resumed[path], whole[path])
        np.testing.assert_array_equal(read[path], whole[path])


@pytest.mark.parametrize("cls", [Scheme, RoutingContext, MoEConfig, Param])
def test_help_explains_every_field(cls):
    told = inspect.getdoc(cls) or ""
    assert not [f.name for f in dataclasses.fields(cls) if f"\n  {f.name}: " not in told]
    assert all(f.name in pydoc.render_doc(cls) for f in dataclasses.fields(cls))
