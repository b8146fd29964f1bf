"""What a layer tells of its router in the log, by hand-worked values; flops, capacity at test time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vl_jax import cli
from vl_jax.evaluate.capacity import capacity_curve
from vl_jax.moe import figures
from vl_jax.moe.assignment import ExpertChoice, RoutingContext, RoutingStats, Soft, TokenChoice
from vl_jax.report import load

SCORES = np.array([[[0.5, 0.25, 0.25, 0.0], [0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]]], np.float32)
WHERE = RoutingContext(valid=jnp.array([[True, True, False]]), modality=jnp.array([[0, 1, 0]]))


def summary(assignment, losses=None) -> dict[str, np.ndarray]:
    dropped = jnp.array([[[False, False], [False, True], [False, False]]])
    found = figures.count(assignment, dropped, jnp.asarray(SCORES), WHERE)
    found |= figures.of_losses(losses or {}, WHERE.valid)
    importance = jnp.asarray([SCORES[0, 0], SCORES[0, 1]])
    stats = RoutingStats(jnp.zeros((2, 4)), importance, jnp.array([1, 1]), jnp.zeros(2), figures=found)
    both = jax.tree.map(lambda a: a + a, stats)  # of two micro-batches alike
    return {k: np.asarray(v)[0] for k, v in figures.summarize(jax.tree.map(lambda a: a[None], both)).items()}


def entropy(p) -> float:
    return float(-sum(x * np.log(x) for x in p if x > 0))


def test_figures_of_chosen_experts():
    experts = jnp.array([[[0, 4], [3, 2], [4, 4]]])  # the second token loses its second choice
    gates = jnp.array([[[0.5, 0.0], [0.4, 0.3], [0.0, 0.0]]])
    found = summary(TokenChoice(experts, gates), {"balance": jnp.float32(0.25)})
    np.testing.assert_allclose(
        found["entropy"], (entropy(SCORES[0, 0]) + entropy(SCORES[0, 1])) / 2, rtol=1e-6
    )
    np.testing.assert_allclose(found["margin"], (0.25 + 0.1) / 2, rtol=1e-5)
    np.testing.assert_allclose(found["gate_mass"], (0.5 + 0.4) / 2, rtol=1e-6)
    np.testing.assert_allclose([found["experts"], found["experts_deviation"]], [1.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(found["importance"], SCORES[0, :2], rtol=1e-6)
    together = np.zeros((4, 4))
    together[0, 0] = together[2, 2] = together[3, 3] = together[2, 3] = together[3, 2] = 0.5
    np.testing.assert_allclose(found["co_activation"], together)
    np.testing.assert_allclose(found["loss_balance"], 0.25)


def test_figures_of_experts_that_choose_and_of_mixed_tokens():
    tokens, gates = jnp.array([[[0], [1], [0], [1]]]), jnp.array([[[0.5], [0.2], [0.25], [0.0]]])
    found = summary(ExpertChoice(tokens, gates))
    np.testing.assert_allclose([found["experts"], found["gate_mass"]], [1.5, 0.95 / 2], rtol=1e-6)
    assert "margin" not in found and found["co_activation"][0, 2] == 0.5
    found = summary(Soft(jnp.zeros((1, 3, 4, 1)), jnp.full((1, 3, 4, 1), 0.25).at[0, 2].set(0.0)))
    np.testing.assert_allclose(found["gate_mass"], 1.0)
    assert found.keys() == {"entropy", "gate_mass", "importance"}


def test_the_page_knows_what_a_scheme_brings():
    lines = [
        {"step": 1, "loss_balance": [0.1], "state_bias": [[0.0, 1.0]], "state_l1_weight": [3.0], "load": []}
    ]
    assert load.own_charts(lines) == [
        ("Loss of the router: balance", "loss_balance"),
        ("State of the scheme: l1_weight", "state_l1_weight"),
    ]


@pytest.mark.slow
def test_a_run_logs_its_router_and_its_flops(tmp_path: Path):
    pytest.importorskip("ml_collections")
    pytest.importorskip("grain")
    file = str(tiny.__file__).replace("tiny.py", "tiny_experiment.py")
    short = ["--config.stages.first.steps=2", "--config.stages.second.steps=2", "--config.loop.flops=True"]
    assert cli.main(["train", f"--config={file}", f"--workdir={tmp_path / 'run'}", *short]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = {name.removeprefix("routing/") for name in lines[1] if name.startswith("routing/")}
    wanted = {"entropy", "margin", "gate_mass", "importance", "experts", "co_activation", "loss_balance"}
    assert wanted | {"state_bias"} <= told
    assert np.shape(lines[1]["routing/co_activation"]) == (1, 4, 4)
    np.testing.assert_allclose(lines[1]["routing/experts"], [2.0])
    np.testing.assert_allclose(
        np.sum(lines[1]["routing/loss_balance"]), lines[1]["auxiliary_loss"], rtol=1e-4
    )
    flops = [line["flops"] for line in lines]
    np.testing.assert_allclose(np.diff(flops)[0], flops[0])
    assert flops == sorted(flops) and flops[0] > 1e6
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Margin of the choice" in page and "Loss of the router: balance" in page


@pytest.mark.slow
def test_fewer_slots_cost_and_enough_of_them_change_nothing():
    model = tiny.of_text(tiny.config("top_k"))
    model = dataclasses.replace(model, language=dataclasses.replace(model.language, num_layers=1))
    (params, state), batches = tiny.build(model), [tiny.varied_batch(4)]
    given = (tiny.layout_of(model), params, state, batches)
    found = capacity_curve(*given, stack="language", factors=(0.25, 4.0))
    whole = capacity_curve(*given, stack="language", factors=(1000.0,))[1000.0]
    np.testing.assert_allclose(found[4.0], whole, rtol=1e-6)
    assert abs(found[0.25] - whole) > 1e-3
    mixed = dataclasses.replace(model, moe=dataclasses.replace(model.moe, scheme="soft_moe"))
    assert capacity_curve(tiny.layout_of(mixed), *tiny.build(mixed), batches, stack="language") == {}
