"""Heads that come and go: folders of their own, models that take them, and what stays the same meanwhile."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from pathlib import Path

import jax
import numpy as np
import pytest

import vl_jax
from vl_jax import cli, schema, sharding
from vl_jax import params as params_lib
from vl_jax.batch import Batch, Given
from vl_jax.checkpoint import CHECKPOINTS, Checkpointer
from vl_jax.data.config import DataConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.encoders.vit import ViTConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.experiment import Experiment, plan
from vl_jax.heads.classification import Classification
from vl_jax.heads.depth import Depth
from vl_jax.heads.segmentation import Segmentation
from vl_jax.interop import heads as stored_heads
from vl_jax.joint import JointConfig, Tower
from vl_jax.layout import Variables, init_variables
from vl_jax.moe.routing import MoEConfig
from vl_jax.train import saved
from vl_jax.train.objectives.heads import Heads
from vl_jax.train.program import Program
from vl_jax.train.stages import Stage, held_modules
from vl_jax.train.step import TrainState

SIDE, ROWS = 32, 8
IMAGE = ResNetConfig(
    stem_dim=8,
    stage_dims=(8, 16),
    stage_blocks=(1, 1),
    block="basic",
    image_size=SIDE,
    statistics="moving",
)
EXPERTS = MoEConfig(scheme="loss_free", num_experts=4, top_k=1, expert_dim=8)
PATCHES = ViTConfig(
    image_size=SIDE,
    patch_size=16,
    embed_dim=16,
    mlp_dim=16,
    num_layers=1,
    num_heads=2,
    moe=EXPERTS,
    sparse_layers=(0,),
)
KIND = Classification(("a", "b"), name="kind", stream="patches", field="kind")
MASK = Segmentation(("ground", "car"), size=SIDE, dim=8)
DEPTH = Depth(size=SIDE, dim=8)
MODEL = JointConfig((Tower("image", IMAGE), Tower("patches", PATCHES)), (KIND, MASK))


def experiment(model: JointConfig = MODEL, **changes) -> Experiment:
    fields = {
        "name": "dense",
        "model": model,
        "data": DataConfig(max_tokens=8, tiling=TilingConfig(tile_size=SIDE, views="global")),
        "stages": (Stage("one", steps=1, batch_size=ROWS, objective=Heads(("kind", "mask"))),),
        "evaluation": EvaluationConfig(batch_size=ROWS),
    }
    return Experiment(**{**fields, **changes})


def written(folder: Path, model: JointConfig = MODEL, *, seed: int = 0) -> Path:
    """The folder of a run that has one checkpoint, of fresh parameters."""
    made = experiment(model)
    folder.mkdir()
    (folder / "config.json").write_text(schema.to_json(made))
    layout = plan(made)
    begun = init_variables(layout, batch(model, layout), seed)
    state = Program.of(layout, made.stages[0]).begin(begun, jax.random.key(0))
    training, record = saved.to_saved(state)
    position = dataclasses.asdict(saved.Position(step=1, global_step=1))
    checkpointer = Checkpointer(folder / CHECKPOINTS)
    checkpointer.save(1, params=state.params, training=training, record={**record, "position": position})
    checkpointer.close()
    return folder


def batch(model: JointConfig, layout) -> Batch:
    """Rows with a picture and every label."""
    rows = max(ROWS, sharding.batch_axes(layout.mesh))
    random = np.random.default_rng(0)
    blank = model.smallest_batch(rows)
    there = np.ones(rows, bool)
    values = {
        "kind": random.integers(0, 2, rows).astype(np.int32),
        "mask": random.integers(0, 2, (rows, SIDE, SIDE)).astype(np.uint8),
        "depth": random.uniform(1, 5, (rows, SIDE, SIDE)).astype(np.float32),
    }
    values["far"] = values["depth"]
    return dataclasses.replace(
        blank,
        tiles=random.integers(0, 256, (rows, 1, SIDE, SIDE, 3)).astype(np.uint8),
        visual_index=np.zeros((rows, 1), np.int32),
        labels={head.name: Given(values[head.name], there) for head in model.heads},
    )


@functools.cache
def _applied(model):
    return jax.jit(lambda variables, rows, routing: model.apply(variables, rows, routing).predictions)


def said(run) -> dict[str, np.ndarray]:
    """What the heads of a run say to the same rows."""
    layout = run.layout
    variables = {"params": run.params, **run.state.collections}
    rows = batch(run.experiment.model, layout)
    with sharding.use_mesh(layout.mesh, layout.rules):
        return jax.device_get(_applied(layout.model)(variables, rows, run.state.routing))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return vl_jax.load_run(written(tmp_path_factory.mktemp("run") / "first"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A head of depth from a run of its own."""
    model = dataclasses.replace(MODEL, heads=(DEPTH,), towers=MODEL.towers[:1])
    base = tmp_path_factory.mktemp("head")
    workdir = written(base / "run", model, seed=1)
    assert cli.main(["convert", f"--from={workdir}", f"--to={base / 'depth'}", "--head=depth"]) == 0
    return base / "depth"


@pytest.mark.slow
def test_a_head_comes_and_goes_and_the_others_say_the_same_to_the_bit(run, folder, caplog):
    with caplog.at_level(logging.WARNING):
        larger = vl_jax.add_head(run, "far", checkpoint=folder)
    assert "head 'far'" in caplog.text and "trained on other weights of image" in caplog.text
    before, after = said(run), said(larger)
    assert after.keys() == {"kind", "mask", "far"}
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, strict=True)
    stored = vl_jax.read_head(folder).variables()["params"]
    jax.tree.map(np.testing.assert_array_equal, larger.params["far"], stored)
    smaller = vl_jax.remove_head(larger, "mask")
    assert "mask" not in smaller.params
    for name, value in said(smaller).items():
        np.testing.assert_array_equal(value, after[name], strict=True)


def test_parameters_alone_take_a_head(run, folder):
    params = vl_jax.add_head(run.params, "depth", checkpoint=folder)
    assert params.keys() == {*run.params, "depth"} and params["image"] is run.params["image"]
    with pytest.raises(vl_jax.UserError, match="head 'mask': the model has something of that name"):
        vl_jax.add_head(run.params, "mask", checkpoint=folder)


@pytest.mark.slow
def test_a_head_without_a_checkpoint_is_created(run):
    larger = vl_jax.add_head(run, dataclasses.replace(DEPTH, name="fresh"))
    assert larger.params["fresh"]["decoder"] and "fresh" not in run.params
    with pytest.raises(vl_jax.UserError, match="task='depth': without a checkpoint, expected the config"):
        vl_jax.add_head(run, "depth")


@pytest.mark.slow
def test_some_heads_of_a_run_are_read_alone(run):
    part = vl_jax.load_run(run.workdir, heads="kind")
    assert part.params.keys() == {"patches", "kind"} and part.state.routing.keys() == {"patches"}
    np.testing.assert_array_equal(said(part)["kind"], said(run)["kind"])
    with pytest.raises(vl_jax.UserError, match="head 'nose': the model has kind, mask"):
        vl_jax.load_run(run.workdir, heads="nose")


def test_nothing_else_of_a_checkpoint_is_read(run):
    checkpointer = Checkpointer(run.workdir / CHECKPOINTS, lazy=True)
    try:
        found = checkpointer.restore_stored(("routing",), chosen=lambda path: path.startswith("kind/"))
    finally:
        checkpointer.close()
    assert found is not None and found[1].keys() == {"kind"} and found[2].keys() == {"routing"}


def spoilt(folder: Path, target: Path, **changes) -> Path:
    """A copy of a head's folder with another description."""
    target.mkdir()
    (target / stored_heads.TENSORS).write_bytes((folder / stored_heads.TENSORS).read_bytes())
    found = json.loads((folder / stored_heads.DESCRIPTION).read_text())
    (target / stored_heads.DESCRIPTION).write_text(json.dumps({**found, **changes}))
    return target


def test_a_folder_that_is_damaged_or_none_ends_in_one_line(run, folder, tmp_path):
    raw = bytearray((folder / stored_heads.TENSORS).read_bytes())
    raw[-5] ^= 1
    flipped = spoilt(folder, tmp_path / "flipped")
    (flipped / stored_heads.TENSORS).write_bytes(raw)
    cut = spoilt(folder, tmp_path / "cut")
    (cut / stored_heads.TENSORS).write_bytes(raw[:-100])
    lacking = spoilt(folder, tmp_path / "lacking")
    (lacking / stored_heads.TENSORS).unlink()
    torn = spoilt(folder, tmp_path / "torn")
    (torn / stored_heads.DESCRIPTION).write_text('{"version": 1, "head"')
    (tmp_path / "empty").mkdir()
    cases = {
        flipped: r"damaged: the checksum of params/.* differs",
        cut: r"head.safetensors",
        lacking: "no head.safetensors; export the head again",
        torn: "head.json: damaged",
        tmp_path / "empty": "holds no head",
        spoilt(folder, tmp_path / "later", version=2): "version 2, this vl_jax reads 1",
        spoilt(folder, tmp_path / "bare", head={"_type": "Depth", "nose": 1}): "has no field 'nose'",
        spoilt(folder, tmp_path / "half", parameters={"params/x": {}}): r"damaged \(no 'shape'\)",
    }
    for path, line in cases.items():
        with pytest.raises(vl_jax.UserError, match=line) as error:
            vl_jax.add_head(run, "depth", checkpoint=path)
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_head_of_another_stream_or_width_is_refused(run, folder, tmp_path):
    found = json.loads((folder / stored_heads.DESCRIPTION).read_text())
    elsewhere = {"camera": found["streams"]["image"]}
    with pytest.raises(vl_jax.UserError, match="the head reads stream 'camera'; .* has image, patches"):
        vl_jax.add_head(run, "depth", checkpoint=spoilt(folder, tmp_path / "stream", streams=elsewhere))
    wider = {"image": {**found["streams"]["image"], "maps": [8, 32]}}
    line = r"stream 'image' of .* has .* maps of \[8, 16\], the head needs .* maps of \[8, 32\]"
    with pytest.raises(vl_jax.UserError, match=line):
        vl_jax.add_head(run, "depth", checkpoint=spoilt(folder, tmp_path / "width", streams=wider))
    other = {**found["head"], "dim": 16}
    with pytest.raises(vl_jax.UserError, match=r"params/decoder/level0/.* is \(.*\), the model needs \(.*\)"):
        vl_jax.add_head(run, "depth", checkpoint=spoilt(folder, tmp_path / "shape", head=other))


def test_a_head_is_written_once(run, folder):
    with pytest.raises(vl_jax.UserError, match="exists already; choose another folder"):
        vl_jax.export_head(run, "mask", folder)
    with pytest.raises(vl_jax.UserError, match="head 'nose': the model has kind, mask"):
        vl_jax.export_head(run, "nose", folder.parent / "nose")


@pytest.mark.slow
def test_training_a_new_head_leaves_all_else_as_it_is_to_the_bit(run):
    """``Stage.hold`` keeps the biases of routing too, which move without a gradient."""
    larger = vl_jax.add_head(run, DEPTH)
    layout = larger.layout
    stage = Stage(
        "depth", 1, batch_size=ROWS, trainable=("depth/.*",), hold=True, objective=Heads(("depth",))
    )
    assert held_modules(stage, layout.params) == {"image", "patches", "kind", "mask"}
    program = Program.of(layout, stage)
    begun = larger.state
    before = jax.device_get((begun.params, begun.routing, begun.collections))
    state = program.begin(_variables(begun), jax.random.key(0))
    rows = batch(larger.experiment.model, layout)
    with sharding.use_mesh(layout.mesh, layout.rules):
        for _ in range(2):
            state, _ = program.step(state, rows, np.float32(0.01), np.float32(np.inf))
    after = jax.device_get((state.params, state.routing, state.collections))
    moved = {
        path
        for path, leaf in params_lib.flatten(after[0]).items()
        if not np.array_equal(leaf, params_lib.flatten(before[0])[path])
    }
    assert moved and all(path.startswith("depth/") for path in moved)
    jax.tree.map(np.testing.assert_array_equal, after[1:], before[1:])
    told = said(dataclasses.replace(larger, state=state))
    for name, value in said(run).items():
        np.testing.assert_array_equal(told[name], value, strict=True)


def _variables(state: TrainState) -> Variables:
    copied = jax.tree.map(lambda x: x.copy(), (state.params, state.routing, state.collections))
    return Variables(*copied)
