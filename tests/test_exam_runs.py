"""Exams that are sat: what is kept meanwhile, what a stop leaves, and predictions that are scored alone."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import exam_folders
import flax.linen as nn
import jax.numpy as jnp
import pytest
import tiny

from vl_jax import cli, config, runs
from vl_jax import experiment as experiment_lib
from vl_jax.api import sitting
from vl_jax.data.config import DataConfig, ModelSpec
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sample import BadSample, Sample
from vl_jax.data.sources.build import ExamConfig
from vl_jax.data.stream.held_out_batches import held_out_batches
from vl_jax.evaluate.exams.exam import Exam
from vl_jax.evaluate.exams.predictions import read_predictions
from vl_jax.evaluate.exams.stress import Stress
from vl_jax.evaluate.exams.table import EXAMS
from vl_jax.evaluate.runner import EvaluationConfig, examine, forget_results
from vl_jax.evaluate.task import Examinee
from vl_jax.report.run import write_report
from vl_jax.train.step import TrainState

STEP = 7
SPEC = ModelSpec(tile_tokens_side=2, fusion="prefix", vocab_size=2048)
TINY = str(Path(__file__).with_name("tiny_experiment.py"))
COLOURS = ("red", "green", "blue")


class Stopped(Exception):
    """What ends an evaluation."""


class Looks:
    """Says the colour of the first picture, and notes the ids of what it is asked.

    Args:
      stop_at: the question at which it stops, once.
    """

    def __init__(self, stop_at: str = ""):
        self.asked: list[list[str]] = []
        self._stop_at = stop_at

    def __call__(self, samples: Sequence[Sample], max_new_tokens: int) -> list[str | BadSample]:
        if any(sample.id == self._stop_at for sample in samples):
            raise Stopped
        self.asked.append([sample.id for sample in samples])
        pixels = [sample.images[0]().getpixel((0, 0)) for sample in samples]
        return [COLOURS[max(range(3), key=lambda i: pixel[i])] for pixel in pixels]


@functools.cache
def layout() -> Any:
    return tiny.layout_of(tiny.config())


def sat(
    folder: Path,
    workdir: Path,
    *,
    exam: Exam = EXAMS["docvqa"],
    respond: Any = None,
    batch_size: int = 2,
    weight: float = 1.0,
) -> dict[str, Any]:
    """The result of an exam whose answers are not made by the model, which is there for its checksum."""
    examinee = Examinee(
        *(layout(), {"w": jnp.full(3, weight)}, {}),
        *(
            DataConfig(evaluation=(ExamConfig("mine", exam.layout, str(folder)),)),
            layout().model.config.spec(),
        ),
        source="mine",
        extent=EvaluationConfig(batch_size=batch_size),
        respond=respond or Looks(),
        pictures="as they are",
    )
    return examine(examinee, exam, step=STEP, workdir=workdir)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    exam_folders.written("docvqa", tmp_path / "exam")
    return tmp_path / "exam"


def kept(workdir: Path) -> Path:
    return workdir / "eval" / "mine" / f"{STEP}.predictions.jsonl"


def test_scores_records_and_settings_are_written(folder, tmp_path):
    result = sat(folder, tmp_path / "run")
    assert result["scores"] == {"anls": 1.0, "count": 4, "unanswered": 0}
    assert result["headline"] == "anls" and result["shares"] == ["anls"]
    assert result["intervals"] == {"anls": [1.0, 1.0]}
    settings = result["settings"]
    assert settings["prompt"] == EXAMS["docvqa"].prompt and settings["max_new_tokens"] == 32
    assert settings["decoding"] == "greedy" and settings["images"] == "as they are"
    assert settings["data"]["questions"] == 4 and len(settings["data"]["digest"]) == 64
    assert settings["parser"] == "whole" and settings["metrics"]["anls"]["variant"] == "strict"
    assert {"commit", "jax", "vl_jax", "model"} <= settings.keys()
    assert json.loads((tmp_path / "run" / "eval" / "mine" / f"{STEP}.json").read_text()) == result
    samples = kept(tmp_path / "run").with_name(f"{STEP}.samples.jsonl").read_text().splitlines()
    record = json.loads(samples[2])
    assert (record["id"], record["prediction"], record["scores"]) == ("102", "green", {"anls": 1.0})
    assert record["prompt"].startswith("<image>\nWhich colour is number 2?\nAnswer")
    assert (tmp_path / "run" / "eval" / "mine" / record["image"]).is_file()


@pytest.mark.parametrize("torn", ["", '{"id": "10', '{"id": "102", "prediction": "green"}'])
def test_a_stopped_evaluation_goes_on_and_leaves_the_same_files(folder, tmp_path, torn):
    whole = sat(folder, tmp_path / "whole", batch_size=2)
    with pytest.raises(Stopped):
        sat(folder, tmp_path / "run", respond=Looks("102"))
    file = kept(tmp_path / "run")
    assert len(file.read_text().splitlines()) == 3 and not file.with_name(f"{STEP}.json").exists()
    with file.open("a") as opened:
        opened.write(torn)  # a line that the stop cut off
    respond = Looks()
    assert sat(folder, tmp_path / "run", respond=respond) == whole
    assert respond.asked == [["102", "103"]]
    assert file.read_bytes() == kept(tmp_path / "whole").read_bytes()
    samples = f"{STEP}.samples.jsonl"
    assert file.with_name(samples).read_bytes() == kept(tmp_path / "whole").with_name(samples).read_bytes()
    again = Looks()
    assert sat(folder, tmp_path / "run", respond=again) == whole and not again.asked


def test_a_batch_is_made_of_the_same_questions_wherever_the_stop_was(folder, tmp_path):
    sat(folder, tmp_path / "run", batch_size=3)
    file = kept(tmp_path / "run")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3]) + '{"id": ')  # in the middle of the first batch
    respond = Looks()
    sat(folder, tmp_path / "run", batch_size=3, respond=respond)
    assert respond.asked == [["100", "101", "102"], ["103"]]
    assert file.read_text() == "".join(lines)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"exam": dataclasses.replace(EXAMS["docvqa"], prompt="{question}")}, "asked.prompt: "),
        ({"exam": dataclasses.replace(EXAMS["docvqa"], stress=Stress("blur"))}, "asked.stress: 'None' there"),
        ({"weight": 2.0}, "asked.model: "),
        ({"batch_size": 1}, "asked.batch_size: '2' there, '1' here"),
    ],
)
def test_what_another_evaluation_left_is_moved_aside(folder, tmp_path, caplog, changes, place):
    sat(folder, tmp_path / "run")
    before = kept(tmp_path / "run").read_bytes()
    respond = Looks()
    sat(folder, tmp_path / "run", respond=respond, **changes)
    assert sum(respond.asked, []) == ["100", "101", "102", "103"]
    assert "is of another evaluation" in caplog.text and place in caplog.text
    aside = list(kept(tmp_path / "run").parent.glob("*.aside"))
    assert [file.read_bytes() for file in aside] == [before]


def test_other_data_are_another_evaluation_and_another_metric_is_not(folder, tmp_path):
    sat(folder, tmp_path / "run")
    strict = EXAMS["docvqa"]
    kits = dataclasses.replace(strict, metrics=(dataclasses.replace(strict.metrics[0], variant="lmms_eval"),))
    respond = Looks()
    sat(folder, tmp_path / "run", exam=kits, respond=respond)
    assert not respond.asked  # the same answers are judged otherwise
    file = folder / "val_v1.0.json"
    file.write_text(file.read_text().replace("number 3", "number three"))
    sat(folder, tmp_path / "run", respond=respond)
    assert len(respond.asked) == 2


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: [lines[0], lines[2]], "line 2: id '101', expected id '100'"),
        (lambda lines: [*lines, lines[1]], "line 6: id '100', expected the end of the file"),
        (lambda lines: [lines[0], "nothing\n"], "line 2: not JSON"),
        (lambda lines: lines[1:], "line 1: does not say what was asked"),
    ],
)
def test_a_damaged_file_of_predictions_is_refused(folder, tmp_path, edit, message):
    sat(folder, tmp_path / "run")
    file = kept(tmp_path / "run")
    file.write_text("".join(edit(file.read_text().splitlines(keepends=True))))
    with pytest.raises(ValueError, match=message):
        sat(folder, tmp_path / "run")


def test_what_cannot_be_asked_counts_as_wrong_with_its_reason(folder, tmp_path):
    def respond(samples: Sequence[Sample], most: int) -> list[str | BadSample]:
        return [BadSample("too_long", "too long") if s.id == "101" else "red" for s in samples]

    result = sat(folder, tmp_path / "run", respond=respond)
    assert result["scores"] == {"anls": 0.25, "count": 4, "unanswered": 1}
    records = kept(tmp_path / "run").with_name(f"{STEP}.samples.jsonl").read_text().splitlines()
    assert json.loads(records[1])["problem"] == "too long [too_long]"


def test_a_run_that_begins_anew_forgets_predictions(folder, tmp_path):
    sat(folder, tmp_path / "run")
    forget_results(tmp_path / "run", after=STEP)
    assert kept(tmp_path / "run").exists()
    forget_results(tmp_path / "run", after=STEP - 1)
    assert not [*tmp_path.glob("run/eval/mine/*.json*"), *tmp_path.glob("run/eval/mine/images/*")]


FOREIGN = {
    "ours": '{"task": "docvqa", "asked": {}}\n{"id": "100", "prediction": "red"}\n',
    "lines": '{"questionId": 100, "answer": "red"}\n',
    "list": '[{"question_id": 100, "answer": "red"}]',
    "captions": ' [{"image_id": "100", "caption": "red"}]',
}


@pytest.mark.parametrize("form", FOREIGN)
def test_predictions_are_read_in_the_forms_of_others(tmp_path, form):
    (tmp_path / "p").write_text(FOREIGN[form])
    assert read_predictions(tmp_path / "p", task="docvqa") == {"100": "red"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FOREIGN["ours"], "p has predictions of task 'docvqa', not of 'chartqa'"),
        (2 * FOREIGN["lines"], "line 2: id '100' is there twice"),
        ('{"id": "1"}\n', "line 1: has no prediction or answer or caption; it has id"),
        ('{"id": "1", "prediction": 3}\n', "line 1: prediction 3: expected a text"),
        ('{"id": "1", "prediction": NaN}\n', "line 1: prediction nan: expected a text"),
        ('{"id": null, "prediction": "x"}\n', "line 1: id None: expected a text or a whole number"),
        ("[1]", "item 0: expected an object, found int"),
        ("so", "line 1: not JSON"),
    ],
)
def test_predictions_that_cannot_be_scored_are_refused(tmp_path, text, message):
    (tmp_path / "p").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_predictions(tmp_path / "p", task="chartqa")


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """The status of a command, and its last line of complaint, or else what it printed."""
    try:
        status = cli.main(list(words))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    printed = capsys.readouterr()
    return status, printed.err.strip() if status else printed.out


def test_the_command_scores_a_file_alone(folder, tmp_path, capsys):
    exam = (f"--data={folder}", "--task=docvqa")
    rows = [{"question_id": 100 + i, "answer": a} for i, a in enumerate(("red", "red", "no", "blues"))]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    status, out = said(capsys, "evaluate", *exam, f"--predictions={tmp_path / 'p.json'}")
    assert status == 0
    result = json.loads(out)
    assert result["scores"] == {"anls": pytest.approx((1 + 1 + 0 + 0.8) / 4), "count": 4}
    assert result["task"] == "docvqa" and result["intervals"]["anls"][0] <= result["scores"]["anls"]
    (tmp_path / "p.json").write_text(json.dumps(rows[:3]))
    status, line = said(capsys, "evaluate", *exam, f"--predictions={tmp_path / 'p.json'}")
    assert status == 2 and line.startswith("error: 1 of 4 questions have no prediction, such as id '103'")
    assert "\n" not in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--task=docvq",), "no built-in task.*did you mean 'docvqa'"),
        ((), "--data needs one --task, one of docvqa, chartqa"),
        (("--task=docvqa",), "--data needs --workdir"),
        (("--task=docvqa", "--split=test", "--model=m"), "has no file test_v1.0.json or"),
        (
            ("--task=docvqa", "--stress=blurr", "--model=m"),
            "--stress=blurr: no such kind; did you mean 'blur'",
        ),
        (("--task=docvqa", "--stress=blur", "--strengths=9", "--model=m"), "strength=9: expected 1 to 5"),
        (
            ("--task=docvqa", "--images=one", "--model=m"),
            "--images=one: expected whole numbers such as 1,2,4",
        ),
        (("--task=docvqa", "--config=quickstart", "--model=m"), "leave --config out"),
        (("--task=docvqa", "--predictions=p", "--workdir=w"), "without --model and --workdir"),
    ],
)
def test_the_command_says_what_is_wrong_in_a_line(folder, capsys, words, message):
    status, line = said(capsys, "evaluate", f"--data={folder}", *words)
    assert status == 2 and line.startswith("error: ") and "\n" not in line
    assert re.search(message, line), line


def test_without_data_the_command_asks_for_the_rest(capsys):
    assert "--stress goes with --data" in said(capsys, "evaluate", "--workdir=w", "--stress=all")[1]
    assert "--workdir is required" in said(capsys, "evaluate")[1]
    assert "--model and --config go together" in said(capsys, "evaluate", "--workdir=w", "--model=m")[1]


def test_variants_of_an_exam_have_names_of_their_own(folder):
    chosen = sitting.Sitting("docvqa", folder, "val", stress=("blur",), strengths=(1, 5), counts=(1, 2))
    found = dict(chosen.variants(EXAMS["docvqa"]))
    assert list(found) == ["docvqa_val", "docvqa_val-blur-1", "docvqa_val-blur-5", "docvqa_val-images-2"]
    assert found["docvqa_val-blur-5"].stress == Stress("blur", 5)
    assert found["docvqa_val-images-2"].crowd is not None
    assert sitting.Sitting("refcoco", folder, "../x").name == "refcoco__x"


@pytest.mark.slow
def test_a_model_sits_an_exam_as_it_is_evaluated_in_training(folder, tmp_path):
    pytest.importorskip("ml_collections")
    experiment = config.load(
        TINY, [("model.language.num_layers", "1"), ("model.language.num_dense_layers", "1")]
    )
    exam = dataclasses.replace(EXAMS["docvqa"], max_new_tokens=2)
    data = dataclasses.replace(experiment.data, evaluation=(ExamConfig("mine", "docvqa", str(folder)),))
    evaluation = dataclasses.replace(experiment.evaluation, task=exam, limit=3)
    experiment = dataclasses.replace(experiment, data=data, evaluation=evaluation)
    plan = experiment_lib.plan(experiment)
    begun = experiment_lib.first_weights(experiment, plan)
    state = TrainState(0, begun.params, None, begun.routing)
    result = runs.evaluate_task(experiment, plan, state, tmp_path / "run", "mine", STEP)
    assert result["scores"].keys() == {"anls", "count", "unanswered"} and result["scores"]["count"] == 3
    assert result["settings"]["images"]["tiling"]["tile_size"] == 32
    whole = kept(tmp_path / "run").read_text()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 4 and all(json.loads(line)["prediction"] is not None for line in lines[1:])
    kept(tmp_path / "run").write_text("".join(lines[:2]))  # stopped within the first batch
    assert runs.evaluate_task(experiment, plan, state, tmp_path / "run", "mine", STEP) == result
    assert kept(tmp_path / "run").read_text() == whole
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "95 % interval" in page and "Which colour is number 2?" in page


def test_the_loss_of_a_run_is_computed_on_the_answers_of_an_exam(folder):
    data = DataConfig(
        evaluation=(ExamConfig("mine", "docvqa", str(folder)),),
        tiling=TilingConfig(tile_size=8, views="global"),
    )
    batches = list(held_out_batches(data, SPEC, "mine", targets="answers", batch_size=4))
    assert len(batches) == 1 and (batches[0].loss_weights.sum(axis=1) > 0).all()


def test_what_fits_no_row_is_unanswered_and_what_writes_no_text_is_refused(folder, tmp_path):
    exam, model = EXAMS["docvqa"], layout()
    examinee = Examinee(
        *(model, {"w": jnp.ones(3)}, {}),
        *(DataConfig(evaluation=(ExamConfig("mine", "docvqa", str(folder)),), max_tokens=8), SPEC),
        source="mine",
        extent=EvaluationConfig(batch_size=2),
    )
    result = examine(examinee, exam, step=STEP, workdir=tmp_path)
    assert result["scores"] == {"anls": 0.0, "count": 4, "unanswered": 4}
    silent = dataclasses.replace(model, model=nn.Dense(3))
    with pytest.raises(ValueError, match="the model is a Dense, which writes no text"):
        examine(dataclasses.replace(examinee, layout=silent), exam, step=STEP, workdir=tmp_path)
