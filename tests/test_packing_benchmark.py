"""The benchmark of packed rows: both ways train on as many samples a step."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from vl_jax import packing_benchmark
from vl_jax.config import load

pytest.importorskip("ml_collections")  # experiment files return its ConfigDict

PACKED = str(Path(__file__).with_name("tiny_experiment.py:packed"))


@pytest.mark.slow
def test_both_ways_take_as_many_samples(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        packing_benchmark.allocator, "keep_freed_memory", lambda: None
    )  # this process goes on
    file = tmp_path / "packing.json"
    result = packing_benchmark.run(load(PACKED), repeats=1, json_file=file)
    packed, unpacked = result["ways"].values()
    assert abs(packed["samples"] - unpacked["samples"]) <= 0.5
    assert unpacked["samples"] == unpacked["rows"] > packed["rows"]
    assert packed["used"] > unpacked["used"]
    assert result["ratio"]["median"] > 0
    assert "packed / one sample a row" in capsys.readouterr().out
    assert file.exists()


def test_an_experiment_that_does_not_pack_is_refused():
    experiment = load(PACKED)
    unpacked = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, packing=None))
    with pytest.raises(ValueError, match="config.data.packing=None"):
        packing_benchmark.run(unpacked)
    with pytest.raises(ValueError, match="repeats=0"):
        packing_benchmark.run(experiment, repeats=0)
