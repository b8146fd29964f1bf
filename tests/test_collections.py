"""Collections beside the parameters, such as running statistics: created, moved by steps, saved, restored."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vl_jax import params as params_lib
from vl_jax.batch import Batch
from vl_jax.checkpoint import Checkpointer
from vl_jax.encoders.resnet import BatchNorm
from vl_jax.evaluate.routes import routes
from vl_jax.layout import Layout, Variables, init_variables, put_batch
from vl_jax.model import VisionLanguage, VisionLanguageConfig
from vl_jax.moe.stacks import init_state
from vl_jax.sharding import MeshConfig
from vl_jax.train import saved
from vl_jax.train.loop import LoopConfig
from vl_jax.train.objectives.next_token import NextToken
from vl_jax.train.program import Program
from vl_jax.train.saved import Position
from vl_jax.train.stages import Stage
from vl_jax.train.step import TrainState, gradients


class Normed(VisionLanguage):
    """Batch normalisation between the embedding and the decoder."""

    def setup(self):
        super().setup()
        self.between = BatchNorm(frozen=False)

    def embed(self, batch: Batch, vision: Any) -> Any:
        return self.between(super().embed(batch, vision)[:, None])[:, 0]


@dataclasses.dataclass(frozen=True)
class NormedConfig(VisionLanguageConfig):
    def build(self) -> VisionLanguage:
        return Normed(self)


BASE = tiny.config("loss_free")
MODEL = NormedConfig(**{f.name: getattr(BASE, f.name) for f in dataclasses.fields(BASE)})
STAGES = (Stage("one", steps=3, batch_size=4), Stage("two", steps=1, batch_size=4))


def begun(layout: Layout) -> Variables:
    return init_variables(layout, tiny.varied_batch(8), seed=0)


@pytest.fixture(scope="module")
def layout() -> Layout:
    return tiny.layout_of(MODEL)


@pytest.mark.slow
def test_collections_are_created_with_the_parameters_and_are_none_of_them(layout):
    found = params_lib.flatten(layout.collections)
    assert found.keys() == {"batch_stats/between/mean", "batch_stats/between/variance"}
    assert not found.keys() & layout.placements.keys()
    variables = begun(layout)
    np.testing.assert_array_equal(variables.collections["batch_stats"]["between"]["variance"], np.ones(16))
    assert tiny.layout_of(BASE).collections == {} and begun(tiny.layout_of(BASE)).collections == {}


@pytest.mark.slow
def test_they_are_whole_on_every_device():
    sharded = tiny.layout_of(MODEL, MeshConfig(data=2, fsdp=2), devices=4)
    for leaf in jax.tree.leaves(begun(sharded).collections):
        assert leaf.sharding.is_fully_replicated and len(leaf.devices()) == 4


@pytest.mark.slow
def test_a_step_moves_them_and_micro_batches_move_them_to_the_mean(layout):
    variables, batch = begun(layout), tiny.varied_batch(4)

    def moved(accumulation: int, rows: Any = slice(None)) -> Any:
        @jax.jit
        def compute(variables: Variables, batch: Batch) -> Any:
            state = TrainState(
                jnp.zeros((), jnp.int32),
                variables.params,
                None,
                variables.routing,
                collections=dict(variables.collections),
            )
            options = {"trainable": {"between/scale"}, "objective": NextToken()}
            return gradients(state, batch, model=layout.model, accumulation=accumulation, **options)[2]

        part = jax.tree.map(lambda x: jnp.asarray(x[rows]), batch)
        return jax.device_get(compute(variables, part).collections["batch_stats"]["between"])

    whole, two = moved(1), moved(2)
    assert np.any(whole["mean"] != 0) and np.any(whole["variance"] != 1)
    halves = [moved(1, slice(i, None, 2)) for i in range(2)]
    for name in ("mean", "variance"):
        np.testing.assert_allclose(two[name], (halves[0][name] + halves[1][name]) / 2, rtol=1e-5, atol=1e-7)


class Batches:
    """A stream of batches, which may fail before one of them."""

    skipped: dict[str, int] = {}

    def __init__(self, fail_at: int = 0):
        self.position, self.fail_at = 0, fail_at

    def __next__(self) -> Batch:
        self.position += 1
        if self.position == self.fail_at:
            raise KeyError
        return tiny.varied_batch(4, seed=self.position)

    def get_state(self) -> dict[str, Any]:
        return {"position": self.position}

    def set_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def close(self) -> None:
        pass


def train(layout: Layout, workdir: Path, fail_at: int = 0) -> TrainState:
    return tiny.train(
        layout,
        STAGES,
        lambda _: Batches(fail_at),
        begin=lambda: begun(layout),
        workdir=workdir,
        config=LoopConfig(log_every=1, checkpoint_every=2, keep_checkpoints=9),
        seed=0,
    )


@pytest.mark.slow
def test_a_run_saves_them_hands_them_on_and_resumes_with_the_same_bits(layout, tmp_path):
    whole = train(layout, tmp_path / "whole")
    with pytest.raises(KeyError):
        train(layout, tmp_path / "run", fail_at=3)
    resumed = train(layout, tmp_path / "run")
    for found, expected in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert np.any(np.asarray(whole.collections["batch_stats"]["between"]["mean"]))
    batch = put_batch(tiny.varied_batch(4), layout)
    chosen = routes(whole.params, whole.routing, batch, model=layout.model, collections=whole.collections)
    assert chosen["language"].shape == (2, 4, 24, 2)


@pytest.mark.parametrize(
    "recorded", [pytest.param(True, marks=pytest.mark.slow), False], ids=["with load", "without"]
)
@pytest.mark.slow
def test_a_checkpoint_from_before_there_were_stacks_is_restored(tmp_path, recorded):
    """Its routing state was bare, its running load a list, and there were no collections."""
    layout, stages = tiny.layout_of(BASE), (STAGES[0],)
    begun_with = Variables(*jax.tree.map(jnp.copy, tiny.build(BASE)))
    program = Program.of(layout, stages[0])
    state = program.begin(begun_with, jax.random.key(0))
    load = [[0.5, 0.25, 0.125, 0.125], [0.1, 0.2, 0.3, 0.4]]
    position = {"stage": 0, "step": 2, "global_step": 2, "data": {"position": 2}}
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    checkpointer.save(
        2,
        params=state.params,
        training={
            "step": state.step + 2,
            "optimizer": state.optimizer,
            "routing": state.routing["language"],
        },
        record={"position": position, **({"load": load} if recorded else {})},
    )
    checkpointer.wait()
    found = saved.restore(checkpointer, layout, stages)
    checkpointer.close()
    assert found is not None and found[1] == Position(**position)
    restored = found[0]
    jax.tree.map(np.testing.assert_array_equal, restored.routing, state.routing)
    jax.tree.map(np.testing.assert_array_equal, restored.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, restored.optimizer, state.optimizer)
    assert restored.load.keys() == {"language"} and int(restored.step) == 2
    np.testing.assert_allclose(restored.load["language"], load if recorded else np.zeros((2, 4)))
    assert restored.collections == {} and restored.adapters == {}
    # What is written of it now is of the new form, and the run goes on from it.
    training, record = saved.to_saved(restored)
    assert training["routing"].keys() == init_state(BASE.stacks).keys() == record["load"].keys()
    state, metrics = program.step(restored, put_batch(tiny.varied_batch(4), layout), np.float32(0.1))
    assert np.isfinite(float(metrics["loss"])) and int(state.step) == 3
