"""Fine-tuning of a published checkpoint, as experiments/finetune_deepseek_vl2.py does it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from vl_jax import params as params_lib
from vl_jax import runs
from vl_jax.cli import main
from vl_jax.config import load
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.experiment import Experiment, resolve
from vl_jax.interop import pretrained
from vl_jax.interop.run_as import MOE_SETTINGS
from vl_jax.schema import ConfigError, from_json, to_json
from vl_jax.train import lora

pytest.importorskip("ml_collections")  # experiment files return its ConfigDict
pytest.importorskip("grain")

FILE = str(Path(__file__).resolve().parent.parent / "experiments" / "finetune_deepseek_vl2.py")
# Small rows and few steps; on a CPU bfloat16 only takes longer.
SMALL = {
    "model.dtype": "float32",
    "model.language.remat": "none",
    "model.moe.balance.bias_rate": "0.01",
    "data.max_tokens": "96",
    "data.max_tiles": "2",
    "stages.sft.steps": "2",
    "stages.sft.batch_size": "2",
    "stages.sft.lora.rank": "2",
    "evaluation.batch_size": "2",
    "evaluation.max_new_tokens": "2",
}


@pytest.fixture(scope="module")
def published(oracles, tmp_path_factory) -> Path:
    """A checkpoint of two vision and three language layers, with tokenizer and processor, as one folder."""
    folder = tmp_path_factory.mktemp("published") / "tiny"
    shutil.copytree(oracles / "deepseek_vl2" / "processor" / "tokenizer", folder)
    shutil.copy(oracles / "deepseek_vl2" / "processor" / "processor_config.json", folder)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(oracles / "deepseek_vl2" / "models" / "mla_noaux_sigmoid" / name, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Four questions about pictures of one colour."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for number, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (40, 40), colour).save(folder / f"{colour}.png")
        question = {"from": "human", "value": "<image>\nWhat colour is it?"}
        records.append(
            {
                "id": str(number),
                "image": f"{colour}.png",
                "conversations": [question, {"from": "gpt", "value": colour}],
            }
        )
    for name in ("train", "val"):
        (folder / f"{name}.json").write_text(json.dumps(records))
    return folder


def experiment(published: Path, data: Path, *, what: str = "", **overrides: str) -> Experiment:
    settings = {"init": str(published), "data.root": str(data), **SMALL, **overrides}
    if what == ":full":
        del settings["stages.sft.lora.rank"]
    return load(FILE + what, tuple(settings.items()))


def test_the_model_is_the_published_one_but_for_how_it_runs_and_trains(published, data):
    given = experiment(published, data)
    found, expected = resolve(given), pretrained.read_published(published).config
    assert found.model.encoder == expected.encoder and found.model.adapter == expected.adapter
    assert found.model.moe != expected.moe and found.model.moe.balance.bias_rate == 0.01
    moe = {name: getattr(expected.moe, name) for name in MOE_SETTINGS}
    assert dataclasses.replace(found.model.moe, **moe) == expected.moe
    assert found.stages == given.stages
    assert found.data.tokenizer == str(published)
    assert found.data.tiling.tile_size == expected.encoder.image_size == 76
    assert found.data.tiling.orientation == "shown"  # what one chooses oneself stays, the rest is filled in
    stored = dataclasses.replace(given.data, tiling=TilingConfig(orientation="stored"))
    tiling = resolve(dataclasses.replace(given, data=stored)).data.tiling
    assert tiling == dataclasses.replace(found.data.tiling, orientation="stored")
    assert resolve(found) == found and from_json(to_json(found), Experiment) == found


def test_without_a_folder_nothing_is_filled_in(published, data):
    given = dataclasses.replace(experiment(published, data), init="")
    assert resolve(given) is given


def test_a_tiling_of_ones_own_stays_and_has_to_fit(published, data):
    given = experiment(published, data)
    own = TilingConfig(tile_size=76, views="global")
    changed = dataclasses.replace(given, data=dataclasses.replace(given.data, tiling=own))
    assert resolve(changed).data.tiling == own
    other = dataclasses.replace(own, tile_size=64)
    changed = dataclasses.replace(given, data=dataclasses.replace(given.data, tiling=other))
    with pytest.raises(ValueError, match="data.tiling.tile_size=64 differs from .*, 76 x 76"):
        resolve(changed)


def test_a_folder_that_is_not_there_is_named(data, tmp_path):
    with pytest.raises(ValueError, match=f"config.init={tmp_path}/nothing: no such folder"):
        resolve(experiment(tmp_path / "nothing", data))


def test_an_unknown_way_to_train_is_refused():
    with pytest.raises(ConfigError, match="ValueError: 'half' is not one of lora, full"):
        load(f"{FILE}:half")


def scores(capsys, *argv: str) -> dict:
    """What ``evaluate`` prints."""
    capsys.readouterr()
    assert main(["evaluate", *argv]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["", ":full"])
def test_a_published_checkpoint_is_tuned_and_published_again(
    published, data, tmp_path, monkeypatch, capsys, what
):
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    given = experiment(published, data, what=what)
    results = runs.run(given, tmp_path / "run")
    assert results["val"]["scores"]["count"] == 4
    resolved, layout, state, _ = runs.restore(tmp_path / "run")
    assert resolved == resolve(given)
    before, routing = pretrained.load_params(published, layout)
    before, after = params_lib.flatten(before), params_lib.flatten(state.params)
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    config = given.stages[0].lora
    assert moved == (set(before) if config is None else set(lora.select(config, layout.params, layout.roles)))
    steps = np.asarray(state.routing["language"]["bias"] - routing["language"]["bias"]) / 0.01
    assert np.any(np.round(steps)) and np.all(np.abs(steps - np.round(steps)) < 1e-3)
    assert main(["convert", f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'out'}"]) == 0
    again, bias = pretrained.load_params(tmp_path / "out", layout)
    for path, leaf in params_lib.flatten(again).items():
        np.testing.assert_array_equal(leaf, after[path], err_msg=path)
    np.testing.assert_array_equal(bias["language"]["bias"], state.routing["language"]["bias"])

    if what:  # however it was trained, it is evaluated the same
        return
    # The run, evaluated anew on fewer questions; and what was published, on all of them.
    run, again = f"--workdir={tmp_path / 'run'}", f"--workdir={tmp_path / 'again'}"
    assert scores(capsys, run, "--config.evaluation.limit=2")["val"]["scores"]["count"] == 2
    assert main(["evaluate", run, "--config.seed=1"]) == 2
    assert "--config.seed: of a finished run only" in capsys.readouterr().err
    assert main(["evaluate", run, "--task=test"]) == 2
    assert "--task=test: config.data.evaluation has val" in capsys.readouterr().err
    settings = {"data.root": str(data), **SMALL}
    settings = [f"--config.{path}={value}" for path, value in settings.items()]
    model = f"--model={tmp_path / 'out'}"
    found = scores(capsys, again, model, f"--config={FILE}", "--task=val", *settings)["val"]
    assert found["scores"] == results["val"]["scores"] and found["scores"]["count"] == 4
    said = [next((tmp_path / name / "eval/val").glob("*.samples.jsonl")) for name in ("run", "again")]
    first, second = (
        [json.loads(line)["prediction"] for line in path.read_text().splitlines()] for path in said
    )
    assert first == second[: len(first)]
