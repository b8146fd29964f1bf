"""The loader's benchmark: both sides read the same folder, and work done ahead is counted."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from PIL import Image as PilImage

from vl_jax import cli
from vl_jax.benchmarks import loader as loader_benchmark
from vl_jax.data.config import DataConfig, ModelSpec
from vl_jax.data.encode import make_encoder
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.build import LlavaConfig, ScenesConfig, open_source

pytest.importorskip("grain")

FILE = """
import dataclasses
from pathlib import Path
from vl_jax import config
from vl_jax.data.config import DataConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.build import LlavaConfig

QUICKSTART = config.load(r"{quickstart}")

def get_config():
    data = DataConfig(sources=(LlavaConfig("train", "train.json"),), tiling=TilingConfig(64, views="global"))
    stage = dataclasses.replace(QUICKSTART.stages[-1], batch_size=4, sources=(), weights=())
    return config.view(dataclasses.replace(QUICKSTART, data=data, stages=(stage,)))
"""


def write(folder) -> DataConfig:
    """Eight records of one conversation about a picture."""
    PilImage.linear_gradient("L").resize((70, 50)).save(folder / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Nothing."}]
    (folder / "train.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}] * 8))
    tiling = TilingConfig(64, views="global")
    return DataConfig(root=str(folder), sources=(LlavaConfig("train", "train.json"),), tiling=tiling)


@pytest.mark.slow
def test_it_measures_an_experiment_and_says_why_there_is_no_rival(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loader_benchmark, "BATCHES", 2)
    monkeypatch.setattr(loader_benchmark.importlib.util, "find_spec", lambda name: None)
    write(tmp_path)
    quickstart = cli.__file__.replace("vl_jax/cli.py", "experiments/quickstart.py")
    (tmp_path / "file.py").write_text(FILE.format(quickstart=quickstart))
    arguments = [f"--config={tmp_path / 'file.py'}", f"--config.data.root={tmp_path}", "--repeats=2"]
    assert cli.main(["benchmark", "loader", *arguments, f"--json={tmp_path / 'out.json'}"]) == 0
    printed = capsys.readouterr().out
    assert "torch cannot be imported: only our side is measured" in printed and "ours, 1 thread " in printed
    assert "read 8 of 8 records before: pictures come from its cache of 128 MiB" in printed
    warm, cold = json.loads((tmp_path / "out.json").read_text())["measured"].values()
    assert warm["cpu"]["median"] > 0 and warm["ratio"]["median"] == cold["ratio_without_cache"]["median"] == 1
    assert cli.main(["benchmark", "loader", *arguments, "--config.data.loading.cache_mb=0"]) == 0
    assert "cache" not in capsys.readouterr().out


def test_a_turn_ends_when_everything_rests():
    def work(_: int) -> int:
        begun = time.process_time()
        while time.process_time() - begun < 0.05:
            pass
        return 10

    figures = loader_benchmark.measure({"a": work, "b": work}, 2)
    assert figures["a"]["cpu"]["median"] == pytest.approx(10 / 0.05, rel=0.3)
    assert figures["b"]["ratio"]["median"] == pytest.approx(1, rel=0.3)


def test_the_rival_reads_conversation_files_alone(monkeypatch):
    monkeypatch.setattr(loader_benchmark.importlib.util, "find_spec", lambda name: name)
    data = DataConfig(sources=(LlavaConfig("a", "a.json"), ScenesConfig("b")))
    assert loader_benchmark._no_rival(data) == "source 'b' is not a conversation file in JSON"


def test_the_rival_makes_the_same_tiles_and_ids(tmp_path):
    torch = pytest.importorskip("torch")
    config = write(tmp_path)
    tiles, ids = loader_benchmark.Records(config)[0]
    encoder = make_encoder(config, ModelSpec(2, "prefix", 2048))
    example = encoder.example(open_source(config.sources[0], root=str(tmp_path))[0])
    np.testing.assert_array_equal(tiles, example.tiles.transpose(0, 3, 1, 2))
    ours = example.tokens[example.visual_slot < 0].tolist()
    assert [t for t in ids.tolist() if t != encoder.tokenizer.image] == ours[1:]  # BOS
    assert ids.dtype == torch.int64
