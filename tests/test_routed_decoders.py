"""One model with several decoders: they learn beside one another, and the one that is asked is read alone."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vl_jax
from vl_jax import cli, schema, sharding
from vl_jax import params as params_lib
from vl_jax.batch import Batch, Given
from vl_jax.checkpoint import CHECKPOINTS, Checkpointer
from vl_jax.data.config import DataConfig
from vl_jax.data.files.sound_files import read_header
from vl_jax.data.images.audio import AudioConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.experiment import Experiment, plan
from vl_jax.heads.classification import Classification
from vl_jax.heads.image.picture_flow import PictureFlow
from vl_jax.heads.image.unet import UNetConfig
from vl_jax.heads.speech.speaking import Speaking
from vl_jax.heads.text.writing import Writing
from vl_jax.joint import JointConfig, Tower
from vl_jax.layout import init_variables, plan_layout, put_batch
from vl_jax.sharding import MeshConfig
from vl_jax.train import saved
from vl_jax.train.objectives.denoising import Denoising
from vl_jax.train.objectives.heads import Heads
from vl_jax.train.program import Program
from vl_jax.train.stages import Stage
from vl_jax.train.step import TrainState, gradients

ROWS, T = 8, 4
TEXT = TextEncoderConfig(
    vocab_size=2048,
    max_length=16,
    embed_dim=8,
    mlp_dim=16,
    num_layers=1,
    num_heads=2,
    causal=False,
    projection_dim=0,
)
PICTURE = PictureFlow(size=8, network=UNetConfig(dims=(8, 8), num_heads=2), width=8, steps=2)
AUDIO = AudioConfig(sample_rate=8000, window_ms=32, hop_ms=12, num_bands=8)
SPEECH = Speaking(audio=AUDIO, max_frames=6, steps=4, dim=512, num_layers=4, rounds=2)  # 20 MB
KIND = Classification(("a", "b"), name="kind", stream="text", field="kind")
WORDS = Writing(stream="text", max_length=6, dim=8, num_layers=1, num_heads=2)
TASKS = (("draw", "picture"), ("say", "speech"), ("write", "words"))
MODEL = JointConfig((Tower("text", TEXT, "tokens"),), (PICTURE, SPEECH, WORDS, KIND), tasks=TASKS)
SMALL = dataclasses.replace(
    MODEL, heads=(PICTURE, dataclasses.replace(SPEECH, dim=8, num_layers=1), WORDS, KIND)
)


def random_batch(config: JointConfig) -> Batch:
    """Rows with a text each; some lack a label."""
    random = np.random.default_rng(0)
    batch = jax.tree.map(lambda x: np.repeat(x, ROWS, axis=0), config.smallest_batch(1))
    here = np.arange(T) < random.integers(2, T + 1, ROWS)[:, None]
    sound = random.random((ROWS, *SPEECH.shape)).astype(np.float32)
    sound[:, 4:] = -1
    written = random.integers(0, 256, (ROWS, 6)).astype(np.int32)
    written[:, 3:] = (256, -1, -1)
    labels = {
        "words": Given(written, np.arange(ROWS) != 2),
        "picture": Given(random.integers(0, 256, (ROWS, 8, 8, 3)).astype(np.uint8), np.arange(ROWS) != 3),
        "speech": Given(sound, np.arange(ROWS) != 5),
        "kind": Given(random.integers(0, 2, ROWS).astype(np.int32), np.ones(ROWS, bool)),
    }
    changes = {
        "tokens": random.integers(1, 64, (ROWS, T)).astype(np.int32) * here,
        "segment_ids": here.astype(np.int32),
        "positions": np.tile(np.arange(T, dtype=np.int32), (ROWS, 1)),
        "labels": labels,
    }
    return dataclasses.replace(batch, **changes)


@functools.cache
def results(objective, *, devices: int = 1, accumulation: int = 1, seed: int = 0):
    """Gradients and metrics of the batch, on the host."""
    mesh = sharding.make_mesh(MeshConfig(data=devices), devices=jax.devices()[:devices])
    layout = plan_layout(SMALL, SMALL.smallest_batch(devices), mesh)
    random = np.random.default_rng(1)

    def draw(path, leaf):
        value = 0.3 * random.standard_normal(leaf.shape, np.float32) + np.float32(path.endswith("scale"))
        return jax.device_put(value, leaf.sharding)

    params = params_lib.map_paths(draw, layout.params)
    options = {
        "model": layout.model,
        "trainable": params_lib.select(params, [".*"]),
        "accumulation": accumulation,
        "objective": objective,
        "seed": seed,
    }

    def compute(params, batch):
        state = TrainState(jnp.zeros((), jnp.int32), params, None, {})
        return gradients(state, batch, **options)[:2]

    with sharding.use_mesh(layout.mesh, layout.rules):
        batch = put_batch(random_batch(SMALL), layout)
        return jax.device_get(jax.jit(compute)(params, batch))


def assert_same(found, expected) -> None:
    for name, value in expected[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), found[0], expected[0])


ALL = Denoising(("picture", "speech", "words", "kind"))


@pytest.mark.slow
def test_devices_and_micro_batches_change_nothing_and_the_seed_does():
    expected = results(ALL)
    assert_same(results(ALL, devices=4), expected)
    assert_same(results(ALL, accumulation=4), expected)
    other = results(ALL, seed=1)[1]
    assert other["picture/loss"] != expected[1]["picture/loss"]
    for name in ("speech", "words"):
        assert other[f"{name}/loss"] == expected[1][f"{name}/loss"]


@pytest.mark.slow
def test_a_decoder_learns_the_same_beside_others_as_alone():
    whole, alone = results(ALL), results(Denoising())
    np.testing.assert_allclose(whole[1]["picture/loss"], alone[1]["picture/loss"], rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        whole[0]["picture"],
        alone[0]["picture"],
    )
    assert not any(
        np.any(leaf) for leaf in jax.tree.leaves([alone[0][name] for name in ("speech", "words", "kind")])
    )
    assert "text" in alone[0] and any(np.any(leaf) for leaf in jax.tree.leaves(alone[0]["text"]))


def test_tasks_name_heads():
    assert [MODEL.head_for(task) for task, _ in TASKS] == ["picture", "speech", "words"]
    assert MODEL.only(["speech", "kind"]).tasks == (("say", "speech"),)
    with pytest.raises(ValueError, match="task 'kind': the model does none by name"):
        MODEL.only(["kind"]).head_for("kind")
    with pytest.raises(ValueError, match="task 'draw' is for head 'dance'; the model has picture, speech"):
        dataclasses.replace(MODEL, tasks=(("draw", "dance"),))
    with pytest.raises(ValueError, match="task 'draw': expected a name that no other task has"):
        dataclasses.replace(MODEL, tasks=(("draw", "picture"), ("draw", "speech")))


def test_an_objective_without_noise_is_refused():
    with pytest.raises(ValueError, match=r"heads=\('kind',\): none learns from noise; train them by Heads"):
        Denoising(("kind",))(None, None, random_batch(SMALL), model=SMALL.build(), rngs=None)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """The folder of a run with one checkpoint of fresh parameters."""
    folder = tmp_path_factory.mktemp("run") / "decoders"
    made = Experiment(
        name="decoders",
        model=MODEL,
        data=DataConfig(max_tokens=16, tiling=TilingConfig(tile_size=8)),
        stages=(Stage("one", steps=1, batch_size=8, objective=Heads(("kind",))),),
        evaluation=EvaluationConfig(batch_size=8),
    )
    folder.mkdir()
    (folder / "config.json").write_text(schema.to_json(made))
    layout = plan(made)
    begun = init_variables(layout, MODEL.smallest_batch(sharding.batch_axes(layout.mesh)), 0)
    state = Program.of(layout, made.stages[0]).begin(begun, jax.random.key(0))
    training, record = saved.to_saved(state)
    position = dataclasses.asdict(saved.Position(step=1, global_step=1))
    checkpointer = Checkpointer(folder / CHECKPOINTS)
    checkpointer.save(1, params=state.params, training=training, record={**record, "position": position})
    checkpointer.close()
    return folder


def read_by(function) -> int:
    """The bytes that this process reads from files meanwhile."""

    def so_far() -> int:
        return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])

    before = so_far()
    function()
    return so_far() - before


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="this system does not count what is read")
def test_parameters_of_decoders_that_are_not_asked_are_never_read(workdir):
    vl_jax.load_run(workdir, heads="kind")  # reads programs, too
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(vl_jax.load_run(workdir, heads="speech").params))
    assert size > 10_000_000
    assert read_by(lambda: vl_jax.load_run(workdir, heads="speech")) > 0.8 * size
    for others in ({"heads": "picture"}, {"task": "draw"}, {"task": "write"}):
        assert read_by(lambda others=others: vl_jax.load_run(workdir, **others)) < 0.2 * size
    assert read_by(lambda: vl_jax.load_run(workdir, task="say")) > 0.8 * size
    assert read_by(lambda: vl_jax.predict(workdir, task="write", text="a red circle")) < 0.2 * size


@pytest.mark.slow
def test_the_decoder_that_is_asked_writes_a_file(workdir, tmp_path, capsys):
    drawn = vl_jax.load_run(workdir, heads="picture")
    assert drawn.params.keys() == {"text", "picture"}
    ask = ["predict", f"--workdir={workdir}", "--text=a red circle"]
    for name in ("one", "same"):
        assert cli.main([*ask, "--head=picture", f"--save={tmp_path / name}.png"]) == 0
    assert cli.main([*ask, "--task=draw", f"--save={tmp_path}/by_task.png"]) == 0
    assert (tmp_path / "by_task.png").read_bytes() == (tmp_path / "one.png").read_bytes()
    assert cli.main([*ask, "--head=picture", "--seed=5", f"--save={tmp_path}/other.png"]) == 0
    one, same, other = ((tmp_path / f"{name}.png").read_bytes() for name in ("one", "same", "other"))
    assert one.startswith(b"\x89PNG") and one == same and one != other
    assert cli.main([*ask, "--head=speech", f"--save={tmp_path}/a.wav"]) == 0
    assert read_header(tmp_path / "a.wav", "here").rate == 8000
    assert "seconds" in capsys.readouterr().out
    for wrong, line in (
        (["--task=sing"], "task 'sing': the model does draw, say, write"),
        (["--task=draw", "--head=speech"], "task 'draw' with heads speech: expected one of the two"),
    ):
        assert cli.main([*ask, *wrong]) != 0
        assert line in capsys.readouterr().err
    assert set(vl_jax.predict(workdir, task="write", text="a")) == {"words"}
    assert cli.main([*ask, f"--save={tmp_path}/b.wav"]) != 0
    assert "expected one head that makes a file, found picture, speech" in capsys.readouterr().err
