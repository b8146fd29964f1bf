"""Objectives: what a stage minimises is a value, several may share a batch, and one's own is one file."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from vl_jax import params as params_lib
from vl_jax.config import load, view
from vl_jax.model import VisionLanguage
from vl_jax.schema import ConfigError, from_json, rebuild, to_json
from vl_jax.train.objectives.next_token import NextToken
from vl_jax.train.objectives.objective import Objective
from vl_jax.train.objectives.together import Part, Together
from vl_jax.train.stages import Stage
from vl_jax.train.step import TrainState, gradients, make_train_step

MODEL = tiny.config("top_k")
OWN = """
import dataclasses
import jax.numpy as jnp
from vl_jax.train.objectives.objective import Sums

@dataclasses.dataclass(frozen=True)
class Shrink:
    power: int = 2
    couples_rows = True
    weights = {"size": 0.5}

    def total(self, batch):
        return {"size": jnp.float32(len(batch.tokens)), "rows": jnp.float32(1)}

    def __call__(self, params, state, batch, *, model, rngs):
        hidden = model.apply({"params": params}, batch, state.routing).hidden
        rows = jnp.float32(len(batch.tokens))
        return Sums({"size": jnp.sum(hidden**self.power)}, {"rows": rows}, jnp.zeros(()))

class Careless:
    pass
"""


@functools.cache
def found(objective: Any, accumulation: int = 1) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    params, routing = tiny.build(MODEL)
    batch = jax.tree.map(jnp.asarray, tiny.varied_batch(4))
    options = {"model": VisionLanguage(MODEL), "trainable": {"adapter/newline", "language/norm/scale"}}

    @jax.jit
    def compute(params: Any, routing: Any, batch: Any) -> Any:
        state = TrainState(jnp.zeros((), jnp.int32), params, None, routing)
        return gradients(state, batch, **options, accumulation=accumulation, objective=objective)[:2]

    grads, metrics = jax.device_get(compute(params, routing, batch))
    return params_lib.flatten(grads), metrics


@pytest.fixture
def own(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return file


@pytest.mark.slow
def test_two_objectives_add_up_by_their_weights_and_are_logged_by_name():
    alone, both = found(NextToken()), found(Together((Part("a", weight=0.5), Part("b", weight=2.0))))
    for path, grad in alone[0].items():
        np.testing.assert_allclose(both[0][path], 2.5 * grad, rtol=1e-5, atol=1e-7)
    loss = alone[1]["loss"]
    np.testing.assert_allclose(both[1]["loss"], 2.5 * loss, rtol=1e-6)
    assert both[1]["a/loss"] == both[1]["b/loss"] == pytest.approx(loss)
    assert both[1]["a/accuracy"] == alone[1]["accuracy"]


@pytest.mark.slow
def test_micro_batches_change_no_objective():
    both = Together((Part("a", weight=0.5), Part("b", weight=2.0)))
    for path, grad in found(both)[0].items():
        np.testing.assert_allclose(found(both, 2)[0][path], grad, rtol=1e-4, atol=1e-6)


def test_rows_that_act_on_one_another_are_never_parted(own):
    pytest.importorskip("ml_collections")
    stage = rebuild({"name": "own", "steps": 1, "objective": {"_type": f"{own}:Shrink"}}, Stage)
    assert isinstance(stage.objective, Objective)
    with pytest.raises(ValueError, match="accumulation=2: rows act on one another under Shrink"):
        dataclasses.replace(stage, accumulation=2)
    with pytest.raises(ValueError, match="accumulation=2: rows act on one another under Shrink"):
        options = {"trainable": set(), "accumulation": 2, "objective": stage.objective}
        make_train_step(VisionLanguage(MODEL), optax.sgd(1.0), **options)


@pytest.mark.slow
def test_an_objective_of_ones_own_file_trains_and_survives_json_and_view(own):
    pytest.importorskip("ml_collections")
    stage = rebuild({"name": "own", "steps": 1, "objective": {"_type": f"{own}:Shrink", "power": 4}}, Stage)
    assert stage.objective.power == 4 and rebuild(view(stage)) == stage
    assert from_json(to_json(stage), Stage) == stage
    grads, metrics = found(stage.objective)
    assert metrics["loss"] == pytest.approx(0.5 * metrics["size"]) and metrics["rows"] == 4
    assert np.abs(grads["language/norm/scale"]).max() > 0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Nothing", "expected a class, found nothing of that name"),
        ("Careless", "expected a frozen dataclass, found type"),
        ("Sums", "Sums is no objective: it has no couples_rows"),
    ],
)
def test_what_is_no_objective_is_refused_in_one_line(own, name, message):
    with pytest.raises(ConfigError) as error:
        rebuild({"name": "own", "steps": 1, "objective": {"_type": f"{own}:{name}"}}, Stage)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_parts_have_different_names_and_count():
    with pytest.raises(ValueError, match="must be at least one, with different names"):
        Together((Part("a"), Part("a")))
    with pytest.raises(ValueError, match="weight=0 of objective 'a' must be > 0"):
        Part("a", weight=0)


def test_the_command_line_exchanges_the_objective_of_a_stage_by_name(own):
    pytest.importorskip("ml_collections")
    experiment = str(tiny.__file__).replace("tiny.py", "tiny_experiment.py")
    by_file = [("stages.second.objective", f"{own}:Shrink"), ("stages.second.objective.power", "3")]
    stages = load(experiment, by_file).stages
    assert stages[0].objective == NextToken() and stages[1].objective.power == 3
    named = load(experiment, [("stages.first.objective", "Together")]).stages[0].objective
    assert named == Together()
    with pytest.raises(ConfigError, match="stages.first.objective is a group"):
        load(experiment, [("stages.first.objective", "NextTokens")])
