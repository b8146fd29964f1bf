"""The package from Python: what a notebook does with it, in whatever thread, and errors of one class."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import runpy
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import vl_jax
import vl_jax.api.calls
from vl_jax import cli
from vl_jax.api.predict import _Given, _lacks, ranked
from vl_jax.api.run import Run
from vl_jax.commands.predict import said_lines
from vl_jax.data.config import DataConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.llava import LlavaConfig
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.encoders.vit import ViTConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.experiment import Experiment, first_weights, plan
from vl_jax.heads.classification import Classification
from vl_jax.heads.pairs import Pairs
from vl_jax.joint import Joint, JointConfig, Tower
from vl_jax.model import VisionLanguage, VisionLanguageConfig
from vl_jax.schema import ConfigError
from vl_jax.train.stages import Stage
from vl_jax.train.step import TrainState

TINY = Path(__file__).with_name("tiny_experiment.py")
KINDS = Classification(("red", "green", "blue"), name="kind", stream="image")
VIT = ViTConfig(image_size=16, patch_size=8, embed_dim=16, mlp_dim=16, num_layers=1, num_heads=2)
TEXT = TextEncoderConfig(
    vocab_size=2048,
    max_length=16,
    embed_dim=16,
    mlp_dim=16,
    num_layers=1,
    num_heads=2,
    causal=False,
    projection_dim=0,
)
JOINT = JointConfig((Tower("image", VIT), Tower("text", TEXT, "tokens")), (KINDS, Pairs(dim=4)))


def test_the_package_is_imported_at_once_and_names_what_it_offers():
    code = "import sys, vl_jax; print('jax' in sys.modules, set(vl_jax.__all__) <= set(dir(vl_jax)) or 0)"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert shown.stdout.split()[0] == "False"
    for name in vl_jax.__all__:
        assert callable(getattr(vl_jax, name)), name
    assert (Path(vl_jax.__file__).parent / "py.typed").exists()


def test_what_trains_and_evaluates_is_called_by_the_name_of_its_folder(tmp_path):
    import vl_jax.train.loop as loop

    for room in (vl_jax.train, vl_jax.evaluate):
        assert isinstance(room, ModuleType)
    assert vl_jax.train.loop is loop  # pyright: ignore
    with pytest.raises(vl_jax.UserError, match="holds no run"):
        vl_jax.evaluate(tmp_path)
    with pytest.raises(vl_jax.UserError, match="no such file"):
        vl_jax.train("nowhere.py", tmp_path)


def test_an_experiment_is_loaded_with_values_by_path():
    pytest.importorskip("ml_collections")
    experiment = vl_jax.load_experiment(TINY, {"seed": 3, "loop.churn": False, "model.moe.limit.factor": 1.5})
    assert (experiment.seed, experiment.loop.churn, experiment.model.moe.limit.factor) == (3, False, 1.5)
    assert vl_jax.load_experiment("quickstart").name == "quickstart"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda folder: vl_jax.load_experiment(TINY, {"sed": 1}), "did you mean 'seed'"),
        (
            lambda folder: vl_jax.load_experiment("quickstart", {"seed": "many"}),
            "config.seed=many: expected int",
        ),
        (lambda folder: vl_jax.load_run(folder), "holds no run"),
        (lambda folder: vl_jax.predict(folder, text="x"), "holds no run"),
    ],
)
def test_mistakes_are_raised_as_one_class_and_one_line(tmp_path, call, message):
    pytest.importorskip("ml_collections")
    with pytest.raises(vl_jax.UserError, match=message) as error:
        call(tmp_path)
    assert "\n" not in str(error.value) and issubclass(ConfigError, vl_jax.UserError)


def test_classes_are_said_with_their_shares():
    found = KINDS.probabilities(np.log(np.array([0.2, 0.7, 0.1], np.float32)))
    assert list(found) == ["green", "red", "blue"] and found["green"] == pytest.approx(0.7)
    assert said_lines(found) == [" 70.0%  green", " 20.0%  red", " 10.0%  blue"]
    many = {str(n): 1 / 20 for n in range(20)}
    assert len(said_lines(many)) == 11 and said_lines(many)[-1] == "and 10 classes more"
    assert said_lines("two\nlines") == ["two", "lines"] and said_lines("") == [""]
    assert said_lines([{"text": "a cat", "similarity": 0.5}]) == [" 0.5000  a cat"]
    assert said_lines({"depth": [1, 2]}) == ['{"depth": [1, 2]}']


def test_the_nearest_come_first():
    names = [{"text": name} for name in ("north", "east", "north-east", *"abcd")]
    away = [(-1.0, 0.0)] * 4
    vectors = np.array([(0.0, 1.0), (1.0, 0.0), (0.8, 0.6), *away], np.float32)
    found = ranked(names, vectors, np.array([1.0, 0.0], np.float32))
    assert [entry["text"] for entry in found] == ["east", "north-east", "north", "a", "b"]
    assert [entry["similarity"] for entry in found] == [1.0, 0.8, 0.0, -1.0, -1.0]


def test_a_head_asks_for_what_it_reads_and_a_pair_for_one_side():
    nothing, picture, text = _Given(None, None, ""), _Given(Path("x"), None, ""), _Given(None, None, "x")
    kind, pairs = JOINT.heads
    assert "give --image" in _lacks(JOINT, kind, nothing) and "give --image" in _lacks(JOINT, kind, text)
    assert not _lacks(JOINT, kind, picture)
    assert not _lacks(JOINT, pairs, picture) and not _lacks(JOINT, pairs, text)
    assert "--text" in _lacks(JOINT, pairs, nothing) and "--image" in _lacks(JOINT, pairs, nothing)


def joint_run(folder: Path) -> Run:
    """A joint model as it is initialised, with four held-out pairs."""
    entries = []
    for number, colour in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (20, 16), colour).save(folder / f"{colour}.png")
        turns = [{"from": "human", "value": "<image>\n"}, {"from": "gpt", "value": f"something {colour}"}]
        entries.append({"id": str(number), "image": f"{colour}.png", "conversations": turns})
    (folder / "val.json").write_text(json.dumps(entries))
    source = LlavaConfig("val", "val.json", caption=True)
    experiment = Experiment(
        "joint",
        JOINT,
        DataConfig(
            root=str(folder),
            sources=(source,),
            evaluation=(source,),
            max_tokens=16,
            tiling=TilingConfig(tile_size=16, views="global"),
        ),
        (Stage("first", steps=1, batch_size=8),),
        evaluation=EvaluationConfig(batch_size=8),
    )
    layout = plan(experiment)
    begun = first_weights(experiment, layout)
    state = TrainState(np.zeros((), np.int32), begun.params, None, begun.routing, collections={})
    return Run(folder, experiment, layout, state, 0)


def test_predict_draws_the_boxes_of_an_answer_and_nothing_else(tmp_path, monkeypatch, capsys):
    model: list[Any] = [VisionLanguage(VisionLanguageConfig())]
    tiling = SimpleNamespace(orientation="shown")

    def opened(folder: Path, heads: Any = (), task: str | None = None) -> Any:
        experiment = SimpleNamespace(model=model[0].config, data=SimpleNamespace(tiling=tiling))
        run = object.__new__(Run)  # of its fields only those that the command reads
        vars(run).update(experiment=experiment, layout=SimpleNamespace(model=model[0]))
        return run

    said = {"answer": "<|ref|>it<|/ref|><|det|>[[100, 100, 900, 900]]<|/det|>"}
    monkeypatch.setattr(vl_jax.api.calls, "load_run", opened)
    monkeypatch.setattr(vl_jax.api.predict, "predict", lambda run, **options: said)
    Image.new("RGB", (40, 40), "white").save(tmp_path / "a.png")
    words = ["predict", f"--workdir={tmp_path}", "--text=x", f"--draw={tmp_path}/out.png"]
    given = [*words, f"--image={tmp_path}/a.png"]
    for form in ([], ["--json"]):
        (tmp_path / "out.png").unlink(missing_ok=True)
        assert cli.main([*given, *form]) == 0
        shown = capsys.readouterr()
        assert "boxes drawn: 1, not readable: 0" in shown.err and "[[100, 100, 900, 900]]" in shown.out
        drawing = np.asarray(Image.open(tmp_path / "out.png"))
        assert (drawing[20, 4] != 255).any() and (drawing[20, 20] == 255).all()  # the left edge, the middle
    assert cli.main(words) == 2 and "--draw needs --image" in capsys.readouterr().err
    model[0] = Joint(JOINT)
    assert cli.main(given) == 2
    assert "nothing to draw: no head of" in capsys.readouterr().err


@pytest.mark.slow
def test_every_head_of_a_joint_run_says_something(tmp_path):
    run = joint_run(tmp_path)
    found = vl_jax.predict(run, image=tmp_path / "red.png")
    assert set(found["kind"]) == {"red", "green", "blue"} and sum(found["kind"].values()) == pytest.approx(1)
    assert {entry["text"] for entry in found["pairs"]} == {
        f"something {c}" for c in ("red", "green", "blue", "white")
    }
    near = [entry["similarity"] for entry in found["pairs"]]
    assert near == sorted(near, reverse=True) and json.loads(json.dumps(found)) == found
    chosen = vl_jax.predict(run, image=tmp_path / "red.png", heads="pairs", candidates=["something red"])
    same = next(entry for entry in found["pairs"] if entry["text"] == "something red")
    assert chosen == {
        "pairs": [{"text": "something red", "similarity": pytest.approx(same["similarity"], abs=2e-4)}]
    }
    pictures = vl_jax.predict(run, text="something red")
    assert set(pictures) == {"pairs"} and len(pictures["pairs"]) == 4
    with pytest.raises(vl_jax.UserError, match="head 'kind' reads a picture: give --image"):
        vl_jax.predict(run, text="something", heads="kind")
    with pytest.raises(vl_jax.UserError, match="head 'no': the model has kind, pairs"):
        vl_jax.predict(run, text="something", heads="no")


@pytest.mark.slow
def test_a_notebook_trains_predicts_and_evaluates(tmp_path):
    pytest.importorskip("ml_collections")
    changes = {"stages.first.steps": 2, "stages.second.steps": 2, "loop.churn": False}
    found: dict[str, Any] = {}

    def work() -> None:
        run = vl_jax.train(vl_jax.load_experiment(TINY, changes), tmp_path / "run")
        Image.new("RGB", (64, 48), "red").save(tmp_path / "red.png")
        found["answer"] = vl_jax.predict(run, image=tmp_path / "red.png", text="What?", max_new_tokens=3)
        found["scores"] = vl_jax.evaluate(run, "heldout", {"evaluation.limit": 2})["heldout"]["scores"]
        found["run"] = run

    async def cell() -> None:
        work()

    # Some notebooks run a cell in a thread that is not the first, most where a loop runs already.
    thread = threading.Thread(target=lambda: asyncio.run(cell()))
    thread.start()
    thread.join(600)
    assert found["run"].step == 4 and isinstance(found["answer"]["answer"], str)
    assert found["scores"]["count"] == 2 and found["run"].results["heldout"]["scores"]["count"] == 2
    with pytest.raises(vl_jax.UserError, match="the model answers a question"):
        vl_jax.predict(found["run"])
    with pytest.raises(vl_jax.UserError, match="another configuration"):
        vl_jax.train(dataclasses.replace(found["run"].experiment, seed=9), tmp_path / "run")


def test_a_wheel_holds_every_file_of_the_package_and_the_experiments(monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    root, given = TINY.parent.parent, {}
    monkeypatch.chdir(root)
    monkeypatch.setattr(setuptools, "setup", lambda **options: given.update(options))
    runpy.run_path("setup.py")
    folders = {path.parent for path in (root / "vl_jax").rglob("*.py")}
    packages = {folder.relative_to(root).as_posix().replace("/", ".") for folder in folders}
    rooms = {f"vl_jax.experiments.{file.parent.name}" for file in (root / "experiments").glob("*/*.py")}
    assert "vl_jax.experiments.ablations" in rooms
    assert set(given["packages"]) == {*packages, "vl_jax.experiments", *rooms}
    assert given["package_dir"] == {"vl_jax.experiments": "experiments"}
    others = {
        path for path in (root / "vl_jax").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    held = {path for pattern in given["package_data"]["vl_jax"] for path in (root / "vl_jax").glob(pattern)}
    assert others == held


@pytest.mark.parametrize(("orientation", "size"), [("shown", (2, 4)), ("stored", (4, 2))])
def test_a_picture_is_predicted_from_the_way_up_that_the_run_reads_pictures(tmp_path, orientation, size):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.new("RGB", (4, 2)).save(tmp_path / "a.jpg", exif=exif)
    data = DataConfig(max_tokens=16, tiling=TilingConfig(tile_size=16, orientation=orientation))
    run = object.__new__(Run)
    object.__setattr__(run, "experiment", Experiment("e", JOINT, data, (Stage("s", 1),)))
    (image,) = _Given(tmp_path / "a.jpg", None, "").sample(run).images
    assert image().size == size
