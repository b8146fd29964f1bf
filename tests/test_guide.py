"""Routes that a batch brings are taken, and logits that it brings draw routers to them."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vl_jax import cli
from vl_jax import params as params_lib
from vl_jax.evaluate import interventions
from vl_jax.model import VisionLanguage
from vl_jax.moe import routing
from vl_jax.moe.specialise import replay
from vl_jax.moe.specialise.drawn import taught_loss
from vl_jax.train import step
from vl_jax.train.specialise import guide
from vl_jax.train.specialise.guide import GuideConfig


def test_the_loss_of_a_teacher_is_the_weighted_divergence():
    random = np.random.default_rng(0)
    teacher, own = random.standard_normal((2, 2, 5, 3)).astype(np.float32)
    weight = random.random((2, 5)).astype(np.float32)
    valid = np.arange(5) < np.array([[5], [3]])
    found = taught_loss(
        jnp.asarray(own), jnp.concatenate([teacher, weight[..., None]], -1), jnp.asarray(valid)
    )
    p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (teacher, own))
    divergence = np.sum(p * np.log(p / q), axis=-1) * weight * valid
    np.testing.assert_allclose(found, np.mean(divergence.sum(1) / valid.sum(1)), rtol=1e-5)
    same = jnp.concatenate([own, weight[..., None]], -1)
    np.testing.assert_allclose(taught_loss(jnp.asarray(own), same, jnp.asarray(valid)), 0, atol=1e-6)


def test_what_layers_decided_comes_back_group_by_group():
    batch = tiny.varied_batch(2)
    routes = np.arange(3 * 8 * 5 * 2).reshape(3, 8, 5, 2)  # two groups in each of four rows
    batch = replay.with_routes(batch, {"language": jnp.asarray(routes)})
    assert batch.media["language/routes"].values.shape == (4, 2, 3, 5, 2)
    state = {"language": {"bias": jnp.zeros((3, 4))}, "encoder": {}}
    found = replay.guided(state, batch)
    np.testing.assert_array_equal(found["language"][routing.ROUTES], routes)
    assert found["language"].keys() == {"bias", routing.ROUTES} and found["encoder"] == {}
    assert replay.guided(state, tiny.varied_batch(2)) is state


@pytest.mark.slow
def test_a_batch_with_routes_is_trained_on_with_them():
    config = tiny.of_text(tiny.config("loss_free"))
    (params, state), model, layout = tiny.build(config), VisionLanguage(config), tiny.layout_of(config)
    batch = jax.tree.map(jnp.asarray, tiny.varied_batch(4))
    changed = jax.tree.map(
        lambda p: np.asarray(p) + 0.3 * np.cos(np.arange(p.size, dtype=np.float32)).reshape(p.shape), params
    )
    record = jax.jit(functools.partial(guide.recorded, layout=layout, collections={}))
    own, others = (record(p, state, batch).media["language/routes"] for p in (params, changed))
    assert own.values.shape == (4, 1, 2, batch.tokens.shape[1], 2) and np.any(own.values != others.values)
    losses_of = jax.jit(functools.partial(interventions.target_losses, model=model))
    losses = [
        np.asarray(losses_of(params, state, dataclasses.replace(batch, media=routes)))
        for routes in ({}, {"language/routes": own}, {"language/routes": others})
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert np.max(np.abs(losses[2] - losses[0])) > 1e-3
    given = dataclasses.replace(batch, media={"language/routes": others})

    def gradients(accumulation: int):
        options = {"model": model, "trainable": set(params_lib.flatten(params)), "accumulation": accumulation}
        run = jax.jit(lambda b: step.gradients(step.TrainState(0, params, None, state), b, **options))
        return run(given)

    (whole, metrics, sums), (parts, of_parts, _) = gradients(1), gradients(2)
    np.testing.assert_allclose(of_parts["loss"], metrics["loss"], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(np.abs(b).max() + 1e-6))
    # Gates are of today's scores: routers learn although nothing is chosen.
    assert np.abs(whole["language"]["moe_layers"]["moe"]["router"]).max() > 1e-6
    valid = np.asarray(batch.segment_ids) > 0
    counted = np.bincount(np.asarray(others.values)[:, 0, 0][valid].reshape(-1), minlength=5)[:4]
    np.testing.assert_array_equal(np.asarray(sums.stats["language"].load)[0].sum(axis=0), counted)


def test_a_guide_that_cannot_be_is_one_line():
    with pytest.raises(ValueError, match="guide.weight=0.0 must be > 0"):
        GuideConfig("x", weight=0.0)


def test_a_run_of_other_routers_and_a_scheme_without_routes_are_refused():
    config, other = tiny.config("top_k"), tiny.config("top_k", num_experts=8)
    with pytest.raises(ValueError, match=r"language has \(2, 8, 8\) layers, .* there and \(2, 4, 4\) here"):
        guide.check(GuideConfig("x"), config.stacks, other.stacks)
    chosen = tiny.config("expert_choice")
    with pytest.raises(ValueError, match="guide.way='replay': scheme='expert_choice' of language takes no"):
        guide.check(GuideConfig("x", "replay"), chosen.stacks, chosen.stacks)
    guide.check(GuideConfig("x", "distil"), chosen.stacks, chosen.stacks)


@pytest.mark.slow
def test_a_stage_follows_another_run(tmp_path: Path, capsys):
    pytest.importorskip("ml_collections")
    pytest.importorskip("grain")
    file = str(tiny.__file__).replace("tiny.py", "tiny_experiment.py")
    short = ["--config.stages.first.steps=3", "--config.stages.second.steps=1", "--config.loop.churn=False"]
    teacher = tmp_path / "teacher"
    assert cli.main(["train", f"--config={file}", f"--workdir={teacher}", *short]) == 0
    lines = {}
    for way in ("replay", "distil"):
        run, at = tmp_path / way, "--config.guide"
        given = [f"{at}.run={teacher}", f"{at}.way={way}", *([f"{at}.weight=50"] if way == "distil" else [])]
        train = ["train", f"--config={file}", f"--workdir={run}", *short, *given, "--config.seed=3"]
        assert cli.main(train) == 0
        lines[way] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    taught = [line["auxiliary_loss"] for line in lines["distil"][:3]]
    assert taught[0] > 1e-3 and lines["replay"][0]["loss"] > 0
    capsys.readouterr()
    wrong = ["--config.guide.run=" + str(teacher), "--config.model.moe.num_experts=8"]
    assert cli.main(["train", f"--config={file}", f"--workdir={tmp_path / 'x'}", *short, *wrong]) == 2
    assert "config.guide.run=" in capsys.readouterr().err
