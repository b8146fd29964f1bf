"""What a stage computes: shared where it is the same, wrapped where a stage says so, with hooks around it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vl_jax.batch import Batch
from vl_jax.config import load, view
from vl_jax.layout import Variables, put_batch
from vl_jax.schema import ConfigError, from_json, rebuild, to_json
from vl_jax.train.hooks import Moment
from vl_jax.train.loop import LoopConfig
from vl_jax.train.lora import LoraConfig
from vl_jax.train.objectives.objective import Sums
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.program import Program, programs
from vl_jax.train.stages import Stage
from vl_jax.train.step import Metrics, StepWrapper, TrainState

MODEL = tiny.config("top_k")
LAYOUT = tiny.layout_of(MODEL)
TINY = str(tiny.__file__).replace("tiny.py", "tiny_experiment.py")
OWN = """
import dataclasses
import jax
import jax.numpy as jnp

@dataclasses.dataclass(frozen=True)
class Flipped:
    factor: float = 2.0

    def __call__(self, step):
        def flipped(state, batch, learning_rate):
            batch = jax.tree.map(lambda x: jnp.flip(x, axis=0), batch)
            state, metrics = step(state, batch, learning_rate)
            return state, {**metrics, "scaled": self.factor * metrics["loss"], "first": batch.tokens[0]}
        return flipped

@dataclasses.dataclass(frozen=True)
class Careless:
    factor: float = 1.0
"""
TRACES: list[str] = []


@dataclasses.dataclass(frozen=True)
class Size:
    """The square of one parameter; notes when it is traced."""

    name: str = "a"
    couples_rows = False
    weights = {"size": 1.0}  # noqa: RUF012

    def total(self, batch: Batch) -> dict[str, jax.Array]:
        return {"size": jnp.float32(1.0)}

    def __call__(self, params: Any, state: Any, batch: Batch, *, model: Any, rngs: Any) -> Sums:
        TRACES.append(self.name)
        return Sums({"size": jnp.sum(params["adapter"]["newline"] ** 2)}, {}, jnp.zeros(()))


def stage(name: str = "one", **changes: Any) -> Stage:
    return dataclasses.replace(
        Stage(name, steps=2, batch_size=4, objective=Size(), trainable=("adapter/newline",)), **changes
    )


def begun(program: Program) -> TrainState:
    return program.begin(Variables(*jax.tree.map(jnp.copy, tiny.build(MODEL))), jax.random.key(0))


def stepped(program: Program) -> tuple[TrainState, Metrics]:
    return program.step(begun(program), put_batch(tiny.varied_batch(4), LAYOUT), np.float32(0.1))


@pytest.mark.slow
def test_stages_that_differ_in_schedule_and_data_only_compile_once():
    slow = OptimizerConfig(learning_rate=1e-5, schedule="constant", warmup_steps=3, final_fraction=0.0)
    others = {"sources": ("b",), "weights": (2.0,), "targets": "all", "batch_size": 8}
    first, second, third = programs(
        LAYOUT, (stage(), stage("two", steps=9, optimizer=slow, **others), stage("three"))
    )
    assert first.step is second.step is third.step
    assert second.stage.steps == 9 and second.stage.optimizer == slow
    TRACES.clear()
    stepped(first)
    once = len(TRACES)
    stepped(second), stepped(third)
    assert once > 0 and len(TRACES) == once


@pytest.mark.parametrize(
    "change",
    [
        {"objective": Size("b")},
        {"trainable": ("adapter/.*",)},
        {"lora": LoraConfig()},
        {"accumulation": 2},
        {"optimizer": OptimizerConfig(clip_norm=2.0)},
        {"optimizer": OptimizerConfig(method="muon")},
    ],
    ids=str,
)
def test_stages_that_compute_something_else_do_not_share(change):
    first, second = programs(LAYOUT, (stage(), stage("two", **change)))
    assert first.step is not second.step


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def test_a_wrapper_of_ones_own_file_changes_the_step_and_survives_json_and_view(own):
    pytest.importorskip("ml_collections")
    tree = {"name": "own", "steps": 1, "wrap": [{"_type": f"{own}:Flipped", "factor": 3.0}]}
    wrapped = rebuild(tree, Stage)
    (wrapper,) = wrapped.wrap
    assert isinstance(wrapper, StepWrapper) and wrapper.factor == 3.0  # type: ignore[attr-defined]
    assert rebuild(view(wrapped)) == wrapped and from_json(to_json(wrapped), Stage) == wrapped
    plain, other = programs(LAYOUT, (stage(), stage("two", wrap=(wrapper,))))
    assert plain.step is not other.step
    (_, before), (state, metrics) = stepped(plain), stepped(other)
    assert "scaled" not in before and int(state.step) == 1
    assert float(metrics["scaled"]) == pytest.approx(3 * float(before["loss"]))
    np.testing.assert_array_equal(metrics["first"], tiny.varied_batch(4).tokens[-1])


def test_the_first_wrapper_is_the_innermost(own):
    tree = [{"_type": f"{own}:Flipped", "factor": factor} for factor in (2.0, 5.0)]
    wrap = rebuild({"name": "own", "steps": 1, "wrap": tree}, Stage).wrap
    _, metrics = stepped(Program.of(LAYOUT, stage(wrap=wrap)))
    assert float(metrics["scaled"]) == pytest.approx(5 * float(metrics["loss"]))


def test_the_command_line_wraps_a_step_by_the_name_of_a_file(own):
    pytest.importorskip("ml_collections")
    overrides = [("stages.first.wrap", f"{own}:Flipped"), ("stages.first.wrap.0.factor", "4")]
    first, second = load(TINY, overrides).stages
    assert [wrapper.factor for wrapper in first.wrap] == [4.0] and second.wrap == ()
    with pytest.raises(ConfigError, match="Careless is no step wrapper: it has no __call__"):
        load(TINY, [("stages.first.wrap", f"{own}:Careless")])


class Batches:
    """A stream of one batch again and again."""

    skipped: dict[str, int] = {}  # noqa: RUF012

    def __next__(self) -> Batch:
        return tiny.varied_batch(4)

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class Watch:
    """A hook that notes what it is called with, and adds a metric."""

    def __init__(self):
        self.seen: list[tuple[str, str, int, int]] = []

    def note(self, when: str, state: TrainState, moment: Moment) -> None:
        self.seen.append((when, moment.stage.name, moment.global_step, int(state.step)))

    def before_step(self, state: TrainState, moment: Moment) -> None:
        self.note("before", state, moment)

    def after_step(self, state: TrainState, metrics: Metrics, moment: Moment) -> Metrics:
        self.note("after", state, moment)
        return metrics | {"watched": jnp.float32(moment.global_step)}


@pytest.mark.slow
def test_hooks_see_the_state_before_and_after_every_step_and_add_to_the_log(tmp_path):
    from vl_jax.metrics import METRICS_FILE, read_metrics

    watch = Watch()
    tiny.train(
        LAYOUT,
        (stage(), stage("two", steps=1)),
        lambda _: Batches(),
        begin=lambda: Variables(*jax.tree.map(jnp.copy, tiny.build(MODEL))),
        workdir=tmp_path,
        config=LoopConfig(log_every=1),
        seed=0,
        hooks=(watch,),
    )
    assert watch.seen == [
        ("before", "one", 1, 0),
        ("after", "one", 1, 1),
        ("before", "one", 2, 1),
        ("after", "one", 2, 2),
        ("before", "two", 3, 0),
        ("after", "two", 3, 1),
    ]
    assert [line["watched"] for line in read_metrics(tmp_path / METRICS_FILE)] == [1, 2, 3]


def test_a_moment_is_due_at_multiples_and_as_the_stage_ends():
    due = [n for n in range(1, 8) if Moment(stage(steps=7), n, n).is_due(3)]
    assert due == [3, 6, 7]
