"""A task and a metric in a file of one's own, chosen through the config; and what the runner refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vl_jax import config, runs, schema
from vl_jax.evaluate.task import Task
from vl_jax.evaluate.tasks.answers import Answers
from vl_jax.experiment import Experiment, first_weights, plan
from vl_jax.report.comparison import row
from vl_jax.report.results import summary
from vl_jax.report.run import read_run, write_report
from vl_jax.schema import ConfigError
from vl_jax.train.step import TrainState

pytest.importorskip("ml_collections")

TINY = str(Path(__file__).with_name("tiny_experiment.py"))
OWN = """
import dataclasses
import numpy as np
from vl_jax.evaluate.task import Findings, Grouped

class MeanLength:
    def __init__(self):
        self.lengths = []
    def update(self, length):
        self.lengths.append(length)
    def compute(self):
        return {"mean_length": np.float32(np.mean(self.lengths)), "twice": np.float64("nan")}

@dataclasses.dataclass(frozen=True)
class Lengths:
    headline: str = "mean_length"
    factor: int = 2
    def run(self, examinee):
        lengths = Grouped(MeanLength, ("language",))
        for records, batch in examinee.prompts():
            for record, tokens in zip(records, batch.segment_ids):
                length = self.factor * int((tokens > 0).sum())
                lengths.update(record, length)
                yield {"id": record["id"], "language": record["language"], "length": length}
        return lengths.findings()

@dataclasses.dataclass(frozen=True)
class Silent:
    headline: str = "x"
    def run(self, examinee):
        yield {"id": "1"}

@dataclasses.dataclass(frozen=True)
class NoRun:
    headline: str = "x"
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def evaluated(experiment: Experiment, workdir: Path) -> dict:
    layout = plan(experiment)
    params, routing, _ = first_weights(experiment, layout)
    state = TrainState(0, params, None, routing)
    return runs.evaluate_task(experiment, layout, state, workdir, "heldout", 0)


def test_a_task_in_a_file_is_run_written_and_shown(own, tmp_path):
    overrides = [("evaluation.task", f"{own}:Lengths"), ("evaluation.task.factor", "3")]
    experiment = config.load(TINY, overrides)
    assert schema.from_json(schema.to_json(experiment), Experiment) == experiment
    result = evaluated(experiment, tmp_path / "run")
    folder = tmp_path / "run" / "eval" / "heldout"
    assert json.loads((folder / "0.json").read_text()) == result
    records = [json.loads(line) for line in (folder / "0.samples.jsonl").read_text().splitlines()]
    lengths = [record["length"] for record in records]
    assert len(lengths) == 8 and all(n > 0 and n % 3 == 0 for n in lengths)
    assert result["headline"] == "mean_length"
    assert result["scores"] == {"mean_length": pytest.approx(sum(lengths) / 8), "twice": None}
    assert result["groups"]["language"].keys() == {record["language"] for record in records}
    assert summary(result).startswith("mean length ")
    assert row(read_run(tmp_path / "run"))["heldout: mean_length"] == result["scores"]["mean_length"]
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert all(word in page for word in ("mean length", records[0]["id"], f">{lengths[0]}<"))


def test_a_config_that_names_no_task_asks_for_answers(own):
    tree = json.loads(schema.to_json(config.load(TINY)))
    del tree["evaluation"]["task"]
    assert schema.rebuild(tree, Experiment).evaluation.task == Answers()
    assert isinstance(Answers(), Task)


def test_what_is_no_task_is_refused_as_the_config_is_read(own):
    with pytest.raises(ConfigError, match="config.evaluation.task: NoRun is no task: it has no run"):
        config.load(TINY, [("evaluation.task", f"{own}:NoRun")])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("evaluation.task", "Silent")], r"task Silent: run\(\) returned NoneType, not Findings"),
        (
            [("evaluation.task", "Lengths"), ("evaluation.task.headline", "width")],
            "task Lengths: headline='width' is no score; there are: mean_length, twice",
        ),
    ],
)
def test_a_task_without_its_headline_writes_nothing(own, tmp_path, overrides, message):
    (field, name), *rest = overrides
    experiment = config.load(TINY, [(field, f"{own}:{name}"), *rest])
    with pytest.raises(ValueError, match=message):
        evaluated(experiment, tmp_path / "run")
    assert not (tmp_path / "run").exists()
