"""Experiments of heads that look at places: on the pictures they are for, they run and are evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vl_jax.config import load
from vl_jax.data.config import open_sources
from vl_jax.runs import run

pytest.importorskip("ml_collections")  # experiment files return its ConfigDict

EXPERIMENTS = Path(__file__).resolve().parent.parent / "experiments"
# The source whose results are looked at, and what they begin with.
CHOICES = {
    "instances.py:pennfudan": ("pennfudan", "val", ("mask_map_50", "box_map_50")),
    "depth.py:rgbd_demo": ("rgbd_demo", "fifth_frame", ("abs_rel_cap10",)),
}


def loaded(spec: str, shared_data: Path, *overrides: tuple[str, str]):
    root = shared_data / CHOICES[spec][0]
    if not root.is_dir():
        pytest.skip(f"{root} is absent")
    return load(str(EXPERIMENTS / spec), [("data.root", str(root)), *overrides])


@pytest.mark.slow
@pytest.mark.parametrize("spec", CHOICES)
def test_every_kind_of_picture_has_a_label(spec, shared_data):
    experiment = loaded(spec, shared_data)
    (head,) = experiment.model.heads
    for name, source in open_sources(experiment.data, None)[0].items():
        for index in range(0, len(source), max(1, len(source) // 4)):
            label = source[index].labels[head.field]
            assert label.size[0] >= 64 and np.asarray(label.values()).any(), (name, index)


@pytest.mark.slow
@pytest.mark.parametrize("spec", CHOICES)
def test_two_steps_are_a_run(spec, shared_data, tmp_path):
    _, source, scores = CHOICES[spec]
    stage = loaded(spec, shared_data).stages[0].name
    few = ((f"stages.{stage}.steps", "2"), ("loop.log_every", "1"), ("evaluation.limit", "8"))
    run(loaded(spec, shared_data, *few), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and np.isfinite(losses).all()
    (found,) = (tmp_path / "run" / "eval" / source).glob("2.json")
    said = json.loads(found.read_text())
    assert all(np.isfinite(said["scores"][name]) for name in scores) and said["scores"]["count"] >= 1
