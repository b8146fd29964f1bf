"""A task and a metric in a file of one's own, chosen through the config; and what the runner refuses."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest

from vl_jax import config, runs, schema
from vl_jax.evaluate.runner import EvaluationConfig, evaluate
from vl_jax.evaluate.task import Examinee, Extent, Findings, Task
from vl_jax.evaluate.tasks import held_out_loss
from vl_jax.evaluate.tasks.answers import Answers
from vl_jax.evaluate.tasks.held_out_loss import HeldOutLoss
from vl_jax.experiment import Experiment, first_weights, model_spec, plan
from vl_jax.layout import Layout
from vl_jax.report.comparison import row
from vl_jax.report.results import read_records, summary
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


@pytest.mark.slow
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


def test_a_held_out_loss_is_of_targets_and_told_by_modality(monkeypatch):
    """The mean over targets, not over batches: 15 in 12 of them; no record, and one group is none."""
    sums = [({"loss": s}, {"loss": n}) for s, n in ((6.0, 2.0), (1.0, 6.0), (8.0, 4.0))]
    asked = object.__new__(Examinee)  # one without a model
    fields = {"data": None, "spec": None, "params": {}, "routing_state": {}}
    fields |= {"source": "heldout", "extent": Extent(batch_size=2, limit=5), "collections": {}}
    fields |= {"layout": types.SimpleNamespace(model=None), "alive": lambda: None}
    for name, value in fields.items():
        object.__setattr__(asked, name, value)
    monkeypatch.setattr(Examinee, "apply", lambda _, compiled, batch: sums[batch])
    given, options = [("image", 0), ("text", 1), ("image", 2)], {}

    def groups(*_, **chosen):
        options.update(chosen)
        return iter(given)

    def findings():
        with pytest.raises(StopIteration) as end:
            next(HeldOutLoss().run(asked))
        return end.value.value

    monkeypatch.setattr(held_out_loss, "held_out_groups", groups)
    monkeypatch.setattr(held_out_loss, "_compiled", lambda objective, model: None)
    monkeypatch.setattr(held_out_loss, "_gates", lambda examinee: ())
    found = findings()
    assert found.scores == {"loss": 15 / 12}
    assert found.groups == {"modality": {"image": {"loss": 14 / 6}, "text": {"loss": 1 / 6}}}
    assert (options["targets"], options["batch_size"], options["limit"]) == ("answers", 2, 5)
    given[:] = [("text", 1)]
    assert findings().groups == {}
    sums[1] = ({"loss": 0.0}, {"loss": 0.0})
    with pytest.raises(ValueError, match="'heldout': nothing in it has a target"):
        next(HeldOutLoss().run(asked))


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
@pytest.mark.slow
def test_a_task_without_its_headline_writes_nothing(own, tmp_path, overrides, message):
    (field, name), *rest = overrides
    experiment = config.load(TINY, [(field, f"{own}:{name}"), *rest])
    with pytest.raises(ValueError, match=message):
        evaluated(experiment, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Recordless:
    """A task as ``HeldOutLoss``, which gives a score and no record."""

    headline = "loss"

    def run(self, examinee):
        yield from ()
        return Findings({"loss": 0.5}, {})


def test_a_task_without_records_leaves_results_that_can_be_read(tmp_path):
    experiment = config.load(TINY)
    evaluate(
        *(object.__new__(Layout), None, None),  # the task looks at no model
        data=experiment.data,
        spec=model_spec(experiment),
        config=EvaluationConfig(task=Recordless()),
        task="heldout",
        step=3,
        workdir=tmp_path,
    )
    written = tmp_path / "eval" / "heldout" / "3.json"
    assert json.loads(written.read_text())["scores"] == {"loss": 0.5}
    assert read_records(written) == []
