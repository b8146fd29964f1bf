"""A run as a thing one can go on with: what may change, which checkpoints stay, another run begun with it."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from vl_jax import cli, runs, schema
from vl_jax import params as params_lib
from vl_jax.checkpoint import Checkpointer
from vl_jax.config import load
from vl_jax.evaluate.runner import forget_results
from vl_jax.experiment import read_run
from vl_jax.moe.stacks import init_state
from vl_jax.report.run import read_run as read_files
from vl_jax.train import initial, resume
from vl_jax.train.best import BEST_FILE, Best, BestConfig
from vl_jax.train.loop import LoopConfig

CONFIG = {
    "_type": "Experiment",
    "name": "a",
    "seed": 0,
    "model": {
        "_type": "M",
        "width": 8,
        "remat": "none",
        "moe": {"_type": "E", "execution": {"kernel": "auto"}},
    },
    "data": {"_type": "D", "root": "x", "loading": {"_type": "L", "num_workers": 0}, "evaluation": []},
    "mesh": {"_type": "Mesh", "data": -1},
    "loop": {"_type": "Loop", "log_every": 10, "best": {"_type": "BestConfig", "keep": 0}},
    "stages": {"one": {"_type": "Stage", "steps": 5}, "two": {"_type": "Stage", "steps": 7}},
}


def changed(path: str, value) -> dict:
    tree = copy.deepcopy(CONFIG)
    node, (*parents, last) = tree, path.split(".")
    for name in parents:
        node = node[name]
    node[last] = value
    return tree


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("loop.log_every", 1, "config.loop.log_every: 10 before, 1 now"),
        ("loop.best.keep", 2, "config.loop.best.keep: 0 before, 2 now"),
        ("data.root", "/moved", 'config.data.root: "x" before, "/moved" now'),
        ("data.loading.num_workers", 4, "config.data.loading.num_workers: 0 before, 4 now"),
        ("mesh.data", 2, "config.mesh.data: -1 before, 2 now"),
        ("model.remat", "full", 'config.model.remat: "none" before, "full" now'),
        ("stages.two.steps", 8, "config.stages.two.steps: 7 before, 8 now"),
    ],
)
def test_what_the_machine_decides_and_more_steps_may_change(path, value, line):
    assert resume.changes(CONFIG, changed(path, value)) == ([line], [])


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("seed", 1, "config.seed is 0 there and 1 here"),
        ("model.width", 9, "config.model.width is 8 there and 9 here"),
        ("stages.two.steps", 6, "config.stages.two.steps is 7 there and 6 here (it can only grow)"),
        (
            "stages.one.steps",
            6,
            "config.stages.one.steps is 5 there and 6 here (only the last stage can be made longer)",
        ),
    ],
)
def test_what_belongs_to_the_run_may_not(path, value, line):
    assert resume.changes(CONFIG, changed(path, value)) == ([], [line])


def test_stages_in_another_order_are_another_run():
    other = {**CONFIG, "stages": dict(reversed(CONFIG["stages"].items()))}
    assert resume.changes(CONFIG, other)[1] == [
        'config.stages is ["one", "two"] there and ["two", "one"] here'
    ]
    more = changed("stages.three", {"_type": "Stage", "steps": 1})
    assert resume.changes(CONFIG, more)[1][0].endswith('and ["one", "two", "three"] here')
    assert resume.changes(CONFIG, CONFIG) == ([], [])


@pytest.mark.parametrize(("text", "what"), [("", "empty"), ('{"name": "a', "cut or damaged")])
def test_a_damaged_config_is_named_with_the_remedy(tmp_path, text, what):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"^{tmp_path}/config.json: {what}.*; delete it and launch `train`"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match=f"^{tmp_path}/config.json: not valid JSON .*delete it"):
        read_files(tmp_path)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.sampled_from([0.0, 0.5, 1.0, float("nan")])), max_size=8))
def test_the_best_are_those_of_a_sort(tmp_path_factory, found):
    folder = tmp_path_factory.mktemp("run")
    for order, sign in (("highest", 1), ("lowest", -1)):
        config = BestConfig(2, "a/loss", order)  # type: ignore[arg-type]
        (folder / BEST_FILE).unlink(missing_ok=True)
        best = Best(config, folder)
        said = [best.add(step, {"eval/a/loss": value, "loss": 9.0}) for step, value in found]
        last = {step: value for step, value in found}
        ranked = sorted((sign * v, s) for s, v in last.items() if np.isfinite(v))
        assert best.steps() == {step for _, step in ranked[-2:]} == Best(config, folder).steps()
        assert len(said) == len(found) and (not said or said[-1] == (found[-1][0] in best.steps()))


def test_a_score_that_there_is_not_is_named(tmp_path):
    best = Best(BestConfig(1, "val/acc"), tmp_path)
    with pytest.raises(ValueError, match="config.loop.best.score='val/acc': evaluation gives val/loss, b$"):
        best.add(1, {"eval/val/loss": 1.0, "eval/b": 2.0, "loss": 1.0})
    assert not best.add(2, {"loss": 1.0})  # nothing was examined
    assert not Best(BestConfig(), tmp_path).add(1, {}) and not (tmp_path / BEST_FILE).exists()
    (tmp_path / BEST_FILE).write_text('{"score"')
    with pytest.raises(ValueError, match="best.json: cut or damaged .*; delete it"):
        Best(BestConfig(1, "val/acc"), tmp_path)
    with pytest.raises(ValueError, match="score='' must name a score"):
        BestConfig(1)
    with pytest.raises(ValueError, match="best.keep=1 needs evaluate_every > 0"):
        LoopConfig(best=BestConfig(1, "val/acc"))


def test_the_best_steps_stay_beside_the_newest(tmp_path):
    best = Best(BestConfig(1, "val/loss", "lowest"), tmp_path)
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep=1, others=best.steps)
    for step, loss in enumerate((3.0, 1.0, 2.0, 4.0), start=1):
        best.add(step, {"eval/val/loss": loss})
        checkpointer.save(step, params={"a": jnp.ones(2)}, training={"b": jnp.ones(2)}, record={})
    checkpointer.close()
    assert Checkpointer(tmp_path / "checkpoints").steps == [2, 4]


def leaves(**shapes: tuple[int, ...]) -> dict:
    return {name.replace("_", "/"): SimpleNamespace(shape=shape) for name, shape in shapes.items()}


def test_what_is_known_of_later_steps_is_forgotten_when_a_run_goes_on_from_an_earlier_one(tmp_path):
    config = BestConfig(1, "val/loss", "lowest")
    best = Best(config, tmp_path)
    for step, loss in ((100, 3.0), (200, 2.0), (1000, 1.0)):
        best.add(step, {"eval/val/loss": loss})
    best.go_on_from(200)
    assert best.steps() == {200} == Best(config, tmp_path).steps()
    best.go_on_from(0)  # as if its checkpoints had been deleted: the next step is the best so far
    assert best.add(50, {"eval/val/loss": 9.0}) and Best(config, tmp_path).steps() == {50}

    folder = tmp_path / "eval" / "val"
    (folder / "images").mkdir(parents=True)
    names = ("{}.json", "{}.samples.jsonl", "images/{}_0001.png")
    for step in (200, 1000):
        for name in names:
            (folder / name.format(step)).write_text("")
    (folder / "notes.json").write_text("of somebody else")
    forget_results(tmp_path, after=200)
    left = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert left == {name.format(200) for name in names} | {"notes.json"}
    forget_results(tmp_path / "fresh", after=0)


def test_every_difference_of_a_checkpoint_is_a_line():
    have = leaves(
        params_a_x=(2,), params_old_x=(1,), params_old_y_z=(1,), params_b_vocab=(8, 2), routing_s=(4,)
    )
    need = leaves(
        params_a_x=(2,),
        params_a_new_k=(3, 2),
        params_heads_k=(5,),
        params_heads_b=(5,),
        params_b_vocab=(9, 2),
    )
    assert initial.differences(have, need, where="runs/x") == [
        "a/new is not in runs/x: 1 leaves (6 numbers) begin afresh",
        "heads is not in runs/x: 2 leaves (10 numbers) begin afresh",
        "b/vocab is (8, 2) in runs/x and (9, 2) here: it begins afresh",
        "old of runs/x has no place here: 2 leaves are left out",
        "routing/s of runs/x has no place here: 1 leaves are left out",
    ]


def save(folder, model) -> tuple:
    params, routing = tiny.build(model)
    checkpointer = Checkpointer(folder)
    training = {"step": jnp.int32(0), "optimizer": ({"mu": params["adapter"]},), "routing": routing}
    checkpointer.save(5, params=params, training=training, record={"routing_by_stack": True})
    checkpointer.close()
    return params, routing


@pytest.mark.slow
def test_a_run_begins_with_another_s_parameters_and_state(tmp_path, caplog, monkeypatch):
    model = tiny.config()
    params, routing = save(tmp_path / "checkpoints", model)
    layout = tiny.layout_of(model)
    wide = jax.tree.map(lambda x: x, layout.params)
    head = wide["language"]["embedding"]
    wide["language"]["embedding"] = jax.ShapeDtypeStruct((50, 16), head.dtype, sharding=head.sharding)
    other, batch = dataclasses.replace(layout, params=wide), tiny.varied_batch(4)
    fresh = {}
    monkeypatch.setattr(
        initial, "init_leaves", lambda *args: fresh | {p: jnp.zeros((50, 16)) for p in args[-1]}
    )
    assert initial.find(tmp_path / "checkpoints") is not None
    for folder in (tmp_path, tmp_path / "checkpoints/5"):
        origin = initial.find(folder)
        assert origin is not None
        with caplog.at_level(logging.INFO, logger="vl_jax"):
            found = initial.load(origin, other, batch, seed=0, lora_of=lambda _: None)
        flat, expected = params_lib.flatten(found.params), params_lib.flatten(params)
        assert flat.keys() == expected.keys()
        for path, leaf in flat.items():
            if path != "language/embedding":
                np.testing.assert_array_equal(leaf, expected[path])
        assert flat["language/embedding"].shape == (50, 16)
        np.testing.assert_array_equal(found.routing["language"]["bias"], routing["language"]["bias"])
        assert (
            f"init: {len(expected) - 1} of {len(expected)} parameters come from {folder}, step 5"
            in caplog.messages
        )
        line = f"init: language/embedding is (48, 16) in {folder} and (50, 16) here: it begins afresh"
        assert line in caplog.messages
    assert set(init_state(model.stacks)) == set(found.routing)


@pytest.mark.slow
def test_a_checkpoint_of_which_nothing_fits_is_refused(tmp_path):
    save(tmp_path / "checkpoints", tiny.config())
    only = {"x": {"y": jax.ShapeDtypeStruct((1,), jnp.float32)}}
    layout = dataclasses.replace(tiny.layout_of(tiny.config()), params=only)
    origin = initial.find(tmp_path)
    assert origin is not None
    with pytest.raises(ValueError, match="none of its parameters has path and shape of .* the model x/y"):
        initial.load(origin, layout, tiny.varied_batch(4), seed=0, lora_of=lambda _: None)


def test_a_published_folder_is_no_checkpoint_of_ours(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "7").mkdir()
    assert initial.find(tmp_path) is None


def run_folder(folder: Path, init: str) -> Path:
    """A folder with the config of a run that began with ``init``, and a place for checkpoints."""
    (folder / "checkpoints").mkdir(parents=True)
    tree = json.loads(schema.to_json(load(str(Path(__file__).parent / "tiny_experiment.py"))))
    (folder / "config.json").write_text(json.dumps({**tree, "init": init}))
    return folder


def test_an_export_goes_back_to_the_published_checkpoint_that_was_first(tmp_path, capsys):
    pytest.importorskip("ml_collections")
    (tmp_path / "published").mkdir()
    first = run_folder(tmp_path / "first", str(tmp_path / "published"))
    second = run_folder(tmp_path / "second", str(first))
    assert runs._published_origin(second) == tmp_path / "published"
    alone = run_folder(tmp_path / "alone", "")
    third = run_folder(tmp_path / "third", str(alone))
    with pytest.raises(ValueError, match=rf"third: its model .* has no published form: {alone} did not"):
        runs.export(third, tmp_path / "out")
    (alone / "metrics.jsonl").unlink(missing_ok=True)
    for logged in (False, True):  # a run is one from its first moment
        if logged:
            (alone / "metrics.jsonl").write_text("")
        assert cli.main(["convert", f"--from={alone}", f"--to={tmp_path / 'out'}"]) == 2
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1 and "its model (VisionLanguageConfig) has no published form" in shown
        assert "load_run" in shown and not (tmp_path / "out").exists()
    gone = run_folder(tmp_path / "gone", str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="began with .*nothing, which is not there any more"):
        runs.export(gone, tmp_path / "out")
