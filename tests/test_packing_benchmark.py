"""The benchmark of packed rows: its rivals train on as many samples, or questions, a step."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from vl_jax.benchmarks import packing as packing_benchmark
from vl_jax.config import load

pytest.importorskip("ml_collections")  # experiment files return its ConfigDict

PACKED = str(Path(__file__).with_name("tiny_experiment.py:packed"))


@pytest.mark.slow
def test_all_ways_take_as_many_samples_or_questions(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        packing_benchmark.allocator, "keep_freed_memory", lambda: None
    )  # this process goes on
    file = tmp_path / "packing.json"
    result = packing_benchmark.run(load(PACKED), repeats=1, json_file=file)
    packed, unpacked, asked = result["ways"].values()
    assert abs(packed["samples"] - unpacked["samples"]) <= 0.5
    assert unpacked["samples"] == unpacked["rows"] > packed["rows"]
    assert packed["used"] > unpacked["used"] > asked["used"]
    assert packed["questions"] == 2 * packed["samples"]  # ``max_turns``; scenes have more
    assert abs(packed["questions"] - asked["questions"]) <= 0.5
    assert asked["questions"] == asked["samples"] == asked["rows"]
    assert result["ratios"].keys() == {"one sample a row", "one question a row"}
    assert all(ratio["median"] > 0 for each in result["ratios"].values() for ratio in each.values())
    assert "packed / one question a row, tokens: " in capsys.readouterr().out
    assert json.loads(file.read_text()) == result


def test_an_experiment_that_does_not_pack_is_refused():
    experiment = load(PACKED)
    unpacked = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, packing=None))
    with pytest.raises(ValueError, match="config.data.packing=None"):
        packing_benchmark.run(unpacked)
    with pytest.raises(ValueError, match="repeats=0"):
        packing_benchmark.run(experiment, repeats=0)
