"""The first stage of the hybrid encoder: its mixture, and a few steps of its miniature."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from vl_jax import cli, config
from vl_jax.data.stream.pipeline import _order

SPEC = "hybrid_contrastive"


@pytest.mark.parametrize("name", ["full", "miniature"])
def test_three_of_four_samples_are_natural(name: str):
    found = config.load(f"{SPEC}:{name}")
    (stage,) = found.stages
    weights = dict(zip(stage.sources, stage.weights, strict=True))
    draw = _order({"photographs": 6230, "drawings": 2396, "scenes": 100_000}, weights, 0)
    drawn = Counter(draw(index)[0] for index in range(400))
    assert abs(drawn["scenes"] - 100) <= 1 and abs(drawn["drawings"] - 100) <= 1


def test_the_full_model_is_small():
    """Small enough for two cores: the encoder of the experiment ``hybrid`` and a text tower."""
    full, hybrid = (config.load(spec) for spec in (SPEC, "hybrid"))
    assert full.model.towers[0] == hybrid.model.towers[0]


@pytest.mark.slow
def test_the_miniature_runs(shared_data: Path, tmp_path: Path):
    arguments = {
        "data.root": shared_data,
        "stages.pairs.steps": 3,
        "stages.pairs.batch_size": 8,
        "loop.log_every": 1,
        "evaluation.limit": 24,
        "evaluation.batch_size": 24,
    }
    options = [f"--config.{name}={value}" for name, value in arguments.items()]
    assert cli.main(["train", f"--config={SPEC}:miniature", f"--workdir={tmp_path}", *options]) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= line["pairs/with_wrong_text"] <= 1 for line in lines if "pairs/loss" in line)
    for source in ("held_out_photographs", "held_out_drawings", "held_out_scenes"):
        result = json.loads((tmp_path / f"eval/{source}/3.json").read_text())
        scores, (table, *_) = result["scores"], result["matrices"]
        assert scores["wrong_texts"] + scores["texts_without_wrong"] >= 24
        assert scores["blind_text_to_image_recall_at_1"] == scores["chance_text_to_image_recall_at_1"]
        assert table["columns"] == ["model", "chance", "blind"]
        assert f"pool {scores['text_to_image_pool']}" in table["rows"][0]
    scores = json.loads((tmp_path / "eval/held_out_scenes/3.json").read_text())["scores"]
    assert scores["wrong_texts"] == 24 and 0.2 < scores["blind_told_apart"] < 0.8
    records = (tmp_path / "eval/held_out_scenes/3.samples.jsonl").read_text().splitlines()
    first = json.loads(records[0])
    assert len(first["negatives"]) == len(first["told_apart"]) == 1
