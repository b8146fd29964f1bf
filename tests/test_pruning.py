"""Experts that are left out or merged: the smaller model is the larger one without them, and trains on."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

import vl_jax
from vl_jax import cli
from vl_jax import params as params_lib
from vl_jax.moe.config import ExpertGroupsConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.moe.specialise import pruning

E = 8


def random_leaves(seed: int, *, layers: int = 2, width: int = 6, hidden: int = 5) -> pruning.Leaves:
    random = np.random.default_rng(seed)
    shapes = {
        "w_in": (layers, E, width, 2, hidden),
        "w_out": (layers, E, hidden, width),
        "b_in": (layers, E, 2, hidden),
        "b_out": (layers, E, width),
        "router": (layers, width, E),
        "shared/w_in": (layers, width, 2, hidden),
    }
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_the_least_harmful_go_and_the_others_stay_as_they_are():
    harm = np.array([[3.0, 1, 4, 1, 5, 9, 2, 6], [0, 1, 2, 3, 4, 5, 6, 7]])
    kept = pruning.least_harmful(harm, 6)
    assert kept.tolist() == [[0, 2, 4, 5, 6, 7], [2, 3, 4, 5, 6, 7]]
    leaves = random_leaves(0)
    found = pruning.mix(leaves, pruning.choosing(kept, E), kept)
    for name, leaf in leaves.items():
        axis = {"router": 1}.get(name, 0)
        for layer in range(2):
            expected = leaf[layer] if name.startswith("shared") else np.take(leaf[layer], kept[layer], axis)
            np.testing.assert_array_equal(found[name][layer], expected)


def test_a_merged_expert_is_the_mean_by_use_whatever_the_order_of_its_units():
    leaves = random_leaves(1, layers=1)
    random = np.random.default_rng(0)
    order = random.permutation(5)
    for name, axis in {"w_in": -1, "w_out": -2, "b_in": -1}.items():  # 1 is 0 with its units in another order
        leaves[name][:, 1] = np.take(leaves[name][:, 0], order, axis=axis)
    leaves["b_out"][:, 1] = leaves["b_out"][:, 0]
    leaves["router"][..., 1] = 2 * leaves["router"][..., 0]  # as like as can be
    kept, load = np.array([[0, 2, 3, 4, 5, 6, 7]]), np.full((1, E), 10.0)
    load[0, 1] = 30.0
    mixing = pruning.merging(kept, load, leaves["router"].astype(np.float64))
    np.testing.assert_allclose(mixing.sum(axis=-1), 1)
    assert mixing[0, 0, :2].tolist() == [0.25, 0.75] and np.count_nonzero(mixing) == E
    found = pruning.mix(leaves, mixing, kept)
    for name in ("w_in", "w_out", "b_in", "b_out"):
        np.testing.assert_allclose(found[name][:, 0], leaves[name][:, 0], rtol=1e-5)
    np.testing.assert_allclose(found["router"][..., 0], 1.75 * leaves["router"][..., 0], rtol=1e-5)
    idle = pruning.merging(kept, np.zeros((1, E)), leaves["router"].astype(np.float64))
    np.testing.assert_array_equal(idle, pruning.choosing(kept, E))


def test_the_state_of_an_expert_goes_with_it():
    config = MoEConfig("modality_bias", E, 2, 4)
    state = {"bias": np.arange(2 * 2 * E, dtype=np.float32).reshape(2, 2, E), "other": np.ones(2)}
    kept = np.array([[1, 2], [6, 7]])
    found = pruning.mix_state(state, pruning.choosing(kept, E), config)
    np.testing.assert_array_equal(found["bias"][0], state["bias"][0][:, [1, 2]])
    np.testing.assert_array_equal(found["bias"][1], state["bias"][1][:, [6, 7]])
    np.testing.assert_array_equal(found["other"], state["other"])


@pytest.mark.parametrize("scheme", ["top_k", "loss_free", "top_p"])
def test_a_layer_may_lose_a_share_of_its_experts(scheme: str):
    assert pruning.smaller(MoEConfig(scheme, E, 2, 4), 0.25).num_experts == 6


@pytest.mark.parametrize(
    ("config", "share", "message"),
    [
        (MoEConfig("top_k", E, 4, 4), 0.75, r"share=0.75 leaves 2 of 8 experts; .* top_k=4 at least"),
        (MoEConfig("top_k", E, 4, 4), 0.01, "share=0.01 leaves 8 of 8 experts"),
        (MoEConfig("hash", E, 2, 4), 0.25, "scheme='hash' with 6 of 8 experts does not route as if"),
        (MoEConfig("modality_top_k", E, 2, 4), 0.25, "scheme='modality_top_k' with 6 of 8"),
        (MoEConfig("expert_choice", E, 2, 4), 0.25, "scheme='expert_choice' with 6 of 8"),
        (MoEConfig("noisy_top_k", E, 2, 4), 0.25, "the 16 columns of its router are not one for each"),
        (
            MoEConfig("top_k", E, 2, 4, groups=ExpertGroupsConfig(num=2, top=1)),
            0.25,
            "scheme='top_k' with 6 of 8",
        ),
    ],
)
def test_what_cannot_be_fewer_is_refused_in_one_line(config: MoEConfig, share: float, message: str):
    with pytest.raises(ValueError, match=message) as error:
        pruning.smaller(config, share)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_pruned_run_is_the_run_without_some_experts_and_trains_on(tmp_path: Path, capsys):
    pytest.importorskip("ml_collections")
    pytest.importorskip("grain")
    file = str(tiny.__file__).replace("tiny.py", "tiny_experiment.py")
    run, small, merged = tmp_path / "run", tmp_path / "small", tmp_path / "merged"
    short = ["--config.stages.first.steps=2", "--config.stages.second.steps=1"]
    assert cli.main(["train", f"--config={file}", f"--workdir={run}", *short]) == 0
    prune = ["prune", f"--workdir={run}", "--share=0.25", "--batches=1"]
    assert cli.main([*prune, f"--to={small}"]) == 0
    assert cli.main([*prune, f"--to={merged}", "--merge"]) == 0
    before, after = vl_jax.load_run(run), vl_jax.load_run(small)
    (kept,) = json.loads((small / "pruned.json").read_text())["stacks"]["language"]["kept"]
    table = json.loads((run / "routing.json").read_text())
    assert len(kept) == 3 and set(range(4)) - set(kept) == {int(np.argmin(table["knockout"][0]))}
    one, other = (params_lib.flatten(jax.device_get(r.state.params)) for r in (before, after))
    assert after.experiment.model.moe.num_experts == 3 and one.keys() == other.keys()
    for path, leaf in other.items():
        axis = {"router": -1, "w_in": 1, "w_out": 1}.get(path.rpartition("/")[2])
        whole = one[path]
        if "/moe/" in path and "shared" not in path:
            assert axis is not None, path
            whole = np.take(whole, kept, axis=axis)
        np.testing.assert_array_equal(leaf, whole)
    bias = np.asarray(before.state.routing["language"]["bias"])
    np.testing.assert_array_equal(after.state.routing["language"]["bias"], bias[:, kept])
    assert cli.main(["evaluate", f"--workdir={merged}"]) == 0
    more = [*short[:1], "--config.stages.second.steps=3", "--config.model.moe.num_experts=3"]
    assert cli.main(["train", f"--config={file}", f"--workdir={small}", *more]) == 0
    assert vl_jax.load_run(small).step == 5
    capsys.readouterr()
    assert cli.main([*prune, f"--to={small}"]) == 2
    assert "exists already" in capsys.readouterr().err
