"""A domain that is added: what was frozen keeps its bits, and what is said of the other domains stays."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import vl_jax
from vl_jax import cli
from vl_jax import params as params_lib
from vl_jax.moe.specialise.growing import GrowthConfig

FILE = Path(__file__).resolve().parent.parent / "experiments" / "specialise.py"
SMALL = {
    "model.towers.image.encoder": {
        "trunk.stem_dim": 4,
        "trunk.stage_dims": (4, 6, 8),
        "embed_dim": 8,
        "mlp_dim": 12,
        "num_heads": 2,
        "num_layers": 1,
        "sparse_layers": (0,),
        "moe.expert_dim": 6,
        "moe.balance.bias_rate": 0.05,
    },
    "evaluation": {"limit": 8, "batch_size": 8},
    "loop": {"log_every": 2, "routing_every": 2},
}
STAGE = {"steps": 2, "batch_size": 8, "optimizer.method": "adamw"}


def small(root: Path, stage: str, *more: str) -> list[str]:
    given = {f"{at}.{name}": value for at, fields in SMALL.items() for name, value in fields.items()}
    given |= {f"stages.{stage}.{name}": value for name, value in STAGE.items()} | {"data.root": str(root)}
    return [*(f"--config.{name}={value}" for name, value in given.items()), *more]


@pytest.fixture(scope="module")
def runs(shared_data: Path, tmp_path_factory) -> tuple[Path, Path]:
    """The folders of a first run, and of one that adds a domain to it."""
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    train = ["train", f"--config={FILE}", f"--workdir={first}"]
    assert cli.main([*train, *small(shared_data, "train")]) == 0
    train = ["train", f"--config={FILE}:medical", f"--workdir={second}", f"--config.init={first}"]
    assert cli.main([*train, *small(shared_data, "specialise")]) == 0
    return first, second


@functools.cache
def state_of(workdir: Path):
    run = vl_jax.load_run(workdir)
    state = jax.device_get(run.state)
    return {"params": state.params, **state.collections, "routing": state.routing}


def result(workdir: Path, task: str) -> dict:
    return json.loads((workdir / "eval" / task / "2.json").read_text())


@pytest.mark.slow
def test_what_is_frozen_keeps_its_bits(runs: tuple[Path, Path]):
    before, after = (params_lib.flatten(state_of(folder)) for folder in runs)
    longer = {"w_in": 1, "w_out": 1, "router": -1, "bias": -1}
    grown, fresh = [], []
    for path, value in after.items():
        name = path.rpartition("/")[2]
        if path not in before:
            fresh.append(path)
        elif value.shape != before[path].shape:
            grown.append(path)
            old = np.take(value, range(8), axis=longer[name])
            np.testing.assert_array_equal(old.view(np.uint32), before[path].view(np.uint32), err_msg=path)
        else:
            np.testing.assert_array_equal(value.view(np.uint8), before[path].view(np.uint8), err_msg=path)
    assert {path.rpartition("/")[2] for path in grown} == set(longer)
    assert all(path.startswith("params/lungs/") for path in fresh) and fresh


@pytest.mark.slow
def test_what_is_said_of_the_other_domains_stays(runs: tuple[Path, Path]):
    for task in ("industrial", "clothing"):
        before, after = (result(folder, task) for folder in runs)
        assert after["scores"] == before["scores"] and after["groups"] == before["groups"]
        lines = [(folder / "eval" / task / "2.samples.jsonl").read_text() for folder in runs]
        assert lines[0] == lines[1]


@pytest.mark.slow
def test_every_domain_goes_to_its_experts_and_a_page_shows_it(runs: tuple[Path, Path]):
    own = {"industrial": range(4), "clothing": range(4, 8), "medical": range(8, 12)}
    for task, experts in own.items():
        (table,) = [m for m in result(runs[1], task)["matrices"] if m["title"].endswith("by domain")]
        assert table["rows"] == [task] and table["title"] == "Experts of image, layer 0, by domain"
        np.testing.assert_allclose(sum(table["values"][0][e] for e in experts), 1.0)
    page = (runs[1] / "report.html").read_text()
    assert page.count("Experts of image, layer 0, by domain") == 1
    assert all(f"<th>{name}</th>" in page for name in own)


def test_growth_needs_a_run(tmp_path: Path):
    found = vl_jax.load_experiment(str(FILE))
    with pytest.raises(ValueError, match="init_experts needs init, the run whose experts"):
        dataclasses.replace(found, init_experts=GrowthConfig())
