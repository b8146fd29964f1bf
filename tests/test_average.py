"""The moving average of what trains: its value, where it lives, and that it survives."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vl_jax import params as params_lib
from vl_jax.batch import Batch
from vl_jax.checkpoint import Checkpointer
from vl_jax.layout import Variables, put_batch
from vl_jax.sharding import MeshConfig
from vl_jax.train import saved
from vl_jax.train.lora import LoraConfig
from vl_jax.train.objectives.objective import Sums
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.program import Program
from vl_jax.train.stages import Stage
from vl_jax.train.updates.average import averaged

MODEL, DECAY = tiny.config("top_k"), 0.8
PATH = "adapter/newline"


@dataclasses.dataclass(frozen=True)
class Towards:
    """Pulls the vector of line ends towards one; not a number if the first token of a batch is negative."""

    couples_rows: ClassVar[bool] = False
    weights: ClassVar[dict[str, float]] = {"far": 1.0}

    def total(self, batch: Batch) -> dict[str, jax.Array]:
        return {"far": jnp.float32(1.0)}

    def __call__(self, params: Any, state: Any, batch: Batch, *, model: Any, rngs: Any) -> Sums:
        far = jnp.sum((params["adapter"]["newline"] - 1) ** 2)
        far += sum(jnp.sum(x**2) for x in jax.tree.leaves(params.get("language", {})) if x.ndim == 2)
        bad = jnp.where(batch.tokens[0, 0] < 0, jnp.nan, 0.0)
        return Sums({"far": far + bad}, {}, jnp.zeros(()))


def stage(**changes: Any) -> Stage:
    optimizer = OptimizerConfig(learning_rate=0.1, average=DECAY)
    fixed = {
        "steps": 9,
        "batch_size": 8,
        "trainable": (PATH,),
        "objective": Towards(),
        "optimizer": optimizer,
    }
    return Stage("one", **(fixed | changes))


def program_on(devices: int = 1, **changes: Any) -> Program:
    mesh = MeshConfig(data=1, fsdp=devices, expert=1, tensor=1)
    return Program.of(tiny.layout_of(MODEL, mesh, devices=devices), stage(**changes))


def begun(program: Program) -> Any:
    place = jax.tree.map(lambda leaf: leaf.sharding, program.layout.params)
    params, routing = jax.tree.map(jnp.copy, tiny.build(MODEL))
    return program.begin(Variables(jax.device_put(params, place), routing), jax.random.key(0))


def stepped(program: Program, state: Any, *, bad: bool = False) -> Any:
    batch = tiny.varied_batch(8)
    if bad:
        batch.tokens[0, 0] = -1
    return program.step(state, put_batch(batch, program.layout), np.float32(0.1), np.float32(np.inf))[0]


def value(state: Any) -> np.ndarray:
    return np.asarray(params_lib.flatten(state.params)[PATH])


@pytest.mark.parametrize("devices", [1, 8])
def test_the_average_is_that_of_the_steps_by_their_weights(devices):
    program, seen = program_on(devices), []
    state = begun(program)
    np.testing.assert_array_equal(value(averaged(state, DECAY)), value(state))  # of no step yet
    for _ in range(4):
        state = stepped(program, state)
        seen.append(value(state))
    weights = DECAY ** np.arange(3, -1, -1)
    expected = np.tensordot(weights / weights.sum(), np.stack(seen), 1)
    found = averaged(state, DECAY)
    np.testing.assert_allclose(value(found), expected, rtol=1e-6)
    assert not np.allclose(value(found), value(state), rtol=1e-3)
    for path, leaf in params_lib.flatten(found.params).items():  # what does not train is as it is
        if path != PATH:
            assert leaf is params_lib.flatten(state.params)[path]
    kept = params_lib.flatten(state.averages.ema)[PATH]
    assert kept.sharding.is_equivalent_to(params_lib.flatten(program.layout.params)[PATH].sharding, kept.ndim)
    assert kept.dtype == jnp.float32


def test_an_update_that_is_skipped_does_not_move_it():
    program = program_on()
    state = stepped(program, begun(program))
    before = jax.tree.map(np.asarray, state.averages)
    state = stepped(program, state, bad=True)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, state.averages))
    assert np.isfinite(value(averaged(state, DECAY))).all()


def test_it_goes_on_bit_for_bit_from_a_checkpoint(tmp_path):
    program = program_on(8)
    state = stepped(program, stepped(program, begun(program)))
    training, record = saved.to_saved(state)
    position = saved.Position(stage=0, step=2, global_step=2)
    checkpointer = Checkpointer(tmp_path)
    record |= {"position": dataclasses.asdict(position)}
    checkpointer.save(2, params=state.params, training=training, record=record)
    checkpointer.close()
    found = saved.restore(Checkpointer(tmp_path, read_only=True), program.layout, (program.stage,))
    assert found is not None
    whole, again = (averaged(stepped(program, one), DECAY) for one in (state, found[0]))
    np.testing.assert_array_equal(value(whole), value(again))


def test_a_stage_that_keeps_none_says_so():
    program = program_on(optimizer=OptimizerConfig())
    state = begun(program)
    assert state.averages == {} and program.abstract_averages == {}
    with pytest.raises(ValueError, match="there is no average of the parameters: config.stages"):
        program.merge(state, averaged=True)


@pytest.mark.slow
def test_adapters_are_averaged_before_they_are_merged():
    program = program_on(lora=LoraConfig(rank=2), trainable=())
    state = stepped(program, stepped(program, begun(program)))
    factors = averaged(state, DECAY).adapters
    assert jax.tree.leaves(factors) and jax.tree.structure(factors) == jax.tree.structure(state.adapters)
    expected = program.merge(dataclasses.replace(jax.tree.map(jnp.copy, state), adapters=factors))
    found = program.merge(state, averaged=True)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert found.adapters == {}


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match=f"average={decay} must be in 0..1"):
        OptimizerConfig(average=decay)
