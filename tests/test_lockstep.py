"""Runs that take their steps as one program read, log, guard, save and end as each does alone."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vl_jax import params as params_lib
from vl_jax import runs
from vl_jax.ablation import workers
from vl_jax.ablation.workers import Job
from vl_jax.batch import Batch
from vl_jax.config import load
from vl_jax.layout import Variables
from vl_jax.metrics import METRICS_FILE, TIMING_KEYS, read_metrics
from vl_jax.moe.config import GateConfig
from vl_jax.train import lockstep, loop
from vl_jax.train.loop import LoopConfig, Stopped
from vl_jax.train.objectives.objective import Sums
from vl_jax.train.program import programs
from vl_jax.train.stages import Stage

PLAIN = tiny.config("top_k")
NOISY = dataclasses.replace(PLAIN.moe, scheme="gshard", gates=GateConfig(normalize=True))
MODEL = dataclasses.replace(PLAIN, moe=NOISY)
LAYOUT = tiny.layout_of(MODEL)
TINY = str(Path(tiny.__file__).with_name("tiny_experiment.py"))
SEEDS = (3, 5, 8)


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far one parameter is from what the batch and the noise say."""

    couples_rows = False
    weights = {"distance": 1.0}  # noqa: RUF012

    def total(self, batch: Batch) -> dict[str, jax.Array]:
        return {"distance": jnp.float32(1.0)}

    def __call__(self, params: Any, state: Any, batch: Batch, *, model: Any, rngs: Any) -> Sums:
        newline = params["adapter"]["newline"]
        wanted = jnp.mean(batch.tokens.astype(jnp.float32)) + jax.random.uniform(
            rngs["routing"], newline.shape
        )
        return Sums({"distance": jnp.sum((newline - wanted) ** 2)}, {}, jnp.zeros(()))


class Numbers:
    """Batches that tell run and step; ends with an error if it is told to."""

    skipped: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, seed: int, fail_at: int | None = None, nan_at: int | None = None):
        self._seed, self._at, self._fail_at = seed, 0, fail_at

    def __next__(self) -> Batch:
        self._at += 1
        if self._at == self._fail_at:
            raise OSError("the disk is gone")
        batch = tiny.varied_batch(4)
        return dataclasses.replace(batch, tokens=(batch.tokens + self._seed * self._at) % tiny.VOCAB)

    def get_state(self) -> dict[str, Any]:
        return {"at": self._at}

    def set_state(self, state: dict[str, Any]) -> None:
        self._at = state["at"]

    def close(self) -> None:
        pass


STAGES = tuple(
    Stage(name, steps=steps, batch_size=4, objective=Distance(), trainable=("adapter/newline",))
    for name, steps in (("one", 3), ("two", 2))
)


def course(folder: Path, seed: int, made: Any, stop: Any, **stream: Any) -> loop.Course:
    def begin() -> Variables:
        params, routing = jax.tree.map(jnp.copy, tiny.build(MODEL))
        params["adapter"]["newline"] = params["adapter"]["newline"] + seed
        return Variables(params, routing)

    return loop.course(
        LAYOUT,
        made,
        lambda stage: Numbers(seed, **stream),
        begin=begin,
        workdir=folder / str(seed),
        config=LoopConfig(log_every=1, checkpoint_every=2, keep_checkpoints=9),
        seed=seed,
        stop=stop,
        quiet=True,
    )


def together(folder: Path, *, stop: Any = lambda: None, fail_at: dict[int, int] | None = None) -> list[Any]:
    made = programs(LAYOUT, STAGES)
    courses = [
        functools.partial(course, folder, seed, made, fail_at=(fail_at or {}).get(seed)) for seed in SEEDS
    ]
    return lockstep.drive(courses, layout=LAYOUT, seeds=SEEDS, stop=stop)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, dict[int, Any]]:
    folder = tmp_path_factory.mktemp("alone")
    states = {
        seed: loop.drive(course(folder, seed, programs(LAYOUT, STAGES, seed=seed), lambda: None))
        for seed in SEEDS
    }
    return folder, states


def assert_same_log(found: Path, expected: Path) -> None:
    lines, others = read_metrics(found / METRICS_FILE), read_metrics(expected / METRICS_FILE)
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        for name in [name for name in line if name not in TIMING_KEYS]:
            if isinstance(other[name], str):
                assert line[name] == other[name]
            else:
                np.testing.assert_allclose(line[name], other[name], rtol=1e-5, atol=1e-6, err_msg=name)


def assert_ended_alike(folder: Path, states: Any, alone: tuple[Path, dict[int, Any]], seeds: Any) -> None:
    for seed in seeds:
        if isinstance(states[seed], Exception):
            raise states[seed]
        assert_same_log(folder / str(seed), alone[0] / str(seed))
        found, expected = states[seed], alone[1][seed]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)


@pytest.mark.slow
def test_their_logs_and_states_are_those_of_single_runs(tmp_path, alone):
    states = dict(zip(SEEDS, together(tmp_path), strict=True))
    assert_ended_alike(tmp_path, states, alone, SEEDS)
    losses = {read_metrics(tmp_path / str(seed) / METRICS_FILE)[0]["loss"] for seed in SEEDS}
    assert len(losses) == len(SEEDS)


@pytest.mark.slow
def test_one_that_fails_leaves_the_others_as_they_are(tmp_path, alone):
    states = dict(zip(SEEDS, together(tmp_path, fail_at={5: 2}), strict=True))
    assert isinstance(states[5], OSError)
    assert_ended_alike(tmp_path, states, alone, (3, 8))


@pytest.mark.parametrize("lost", [(), (8,)], ids=["at one step", "at other steps"])
@pytest.mark.slow
def test_they_stop_after_the_same_step_and_go_on_with_the_same_figures(tmp_path, alone, lost):
    asked = iter([None, None, None, 15, 15, 15])  # while it takes step 4
    with pytest.raises(Stopped, match="at step 4"):
        together(tmp_path, stop=lambda: next(asked))
    for seed in SEEDS:
        folder = tmp_path / str(seed) / "checkpoints"
        assert max(int(path.name) for path in folder.iterdir()) == 4
    for seed in lost:  # as a crash leaves it: an earlier stage
        newest = tmp_path / str(seed) / "checkpoints"
        for step in (4, 3):
            (newest / str(step)).rename(tmp_path / f"lost{seed}.{step}")
    states = dict(zip(SEEDS, together(tmp_path), strict=True))
    assert_ended_alike(tmp_path, states, alone, SEEDS)


def test_runs_are_grouped_by_what_differs_and_by_their_step(tmp_path):
    first, other = (
        load(TINY),
        load(TINY, [("stages.first.steps", "3")]),
    )
    jobs = [
        Job(tmp_path / f"{name}{seed}", dataclasses.replace(experiment, seed=seed), "", ())
        for seed in range(3)
        for name, experiment in (("a", first), ("b", other))
    ]
    (tmp_path / "a1" / "checkpoints" / "4").mkdir(parents=True)

    def names(together: int) -> list[list[str]]:
        return [[job.folder.name for job in group] for group in workers._groups(jobs, together)]

    assert names(0) == [["a0", "a2"], ["b0", "b1", "b2"], ["a1"]]
    assert names(2) == [["a0", "a2"], ["b0", "b1"], ["b2"], ["a1"]]
    assert names(1) == [["a0"], ["a2"], ["b0"], ["b1"], ["b2"], ["a1"]]


def test_what_does_not_fit_together_runs_in_halves_and_failures_are_noted(tmp_path, monkeypatch):
    experiment, tried = load(TINY), []

    def run_together(experiments, folders):
        tried.append(len(folders))
        if len(folders) > 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return [ValueError("it is odd") if folder.name == "s2" else None for folder in folders]

    monkeypatch.setattr(runs, "run_together", run_together)
    jobs = [Job(tmp_path / f"s{n}", dataclasses.replace(experiment, seed=n), "", ()) for n in range(4)]
    assert workers.run(jobs, together=0) == ["s2"] and tried == [4, 2, 2]
    assert json.loads((tmp_path / "s2" / "failed.json").read_text())["reason"] == "it is odd"


@pytest.mark.slow
def test_whole_runs_of_an_experiment_are_those_of_single_runs(tmp_path):
    overrides = [("stages.first.steps", "4"), ("stages.second.steps", "2")]
    experiments = [dataclasses.replace(load(TINY, overrides), seed=s) for s in (0, 1)]
    for number, experiment in enumerate(experiments):
        runs.run(experiment, tmp_path / "alone" / str(number))
    folders = [tmp_path / "together" / str(number) for number in range(2)]
    assert runs.run_together(experiments, folders) == [None, None]
    for number, folder in enumerate(folders):
        expected = tmp_path / "alone" / str(number)
        assert_same_log(folder, expected)
        assert json.loads((folder / "run.json").read_text())["runs_together"] == 2
        assert (folder / "report.html").is_file()
        for path in (expected / "eval").rglob("*.json"):
            found = (folder / "eval" / path.relative_to(expected / "eval")).read_text()
            assert json.loads(found)["scores"] == pytest.approx(
                json.loads(path.read_text())["scores"], abs=1e-4
            )
    with pytest.raises(ValueError, match="may differ in their seed and in nothing else"):
        runs.run_together([experiments[0], dataclasses.replace(experiments[1], name="x")], folders)
    assert params_lib.flatten(runs.restore(folders[0])[2].params)
