"""A published exam, sat by a run or by a published model: once, with worse pictures, or with more of them.

    Sitting --take--> eval/NAME/STEP.json of every variant, and what they say together
    Sitting --score_file--> the scores of predictions that somebody else made

What is made goes on where it was stopped; see ``evaluate/exams/predictions.py``.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from vl_jax import config as config_lib
from vl_jax import runs, sharding
from vl_jax.batch import Batch
from vl_jax.data.config import DataConfig, ModelSpec, opened
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.published.request import Request
from vl_jax.data.published.text_processor import TextProcessor
from vl_jax.data.sample import BadSample, Sample
from vl_jax.data.sources.exams.questions import ExamConfig
from vl_jax.evaluate.exams.crowd import Crowd
from vl_jax.evaluate.exams.exam import Exam
from vl_jax.evaluate.exams.predictions import read_predictions
from vl_jax.evaluate.exams.question import questions_of
from vl_jax.evaluate.exams.stress import STRENGTHS, Kind, Stress
from vl_jax.evaluate.exams.table import find_exam
from vl_jax.evaluate.runner import EvaluationConfig, as_result, examine
from vl_jax.evaluate.task import Examinee, Findings
from vl_jax.experiment import Experiment
from vl_jax.interop import pretrained
from vl_jax.interop.pretrained import Pretrained
from vl_jax.report.run import write_report
from vl_jax.runtime import disk
from vl_jax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class Sitting:
    """Which exam is sat, and in which variants."""

    task: str  # a name, or path/to/file.py:NAME of an ``Exam``
    folder: Path  # of the exam's files
    split: str = ""  # empty: the one that is reported as a rule
    stress: tuple[Kind, ...] = ()  # what is done to the pictures, one after another
    strengths: tuple[int, ...] = STRENGTHS  # how much of it
    counts: tuple[int, ...] = ()  # of pictures in a prompt

    def __post_init__(self):
        for kind in self.stress:
            for strength in self.strengths:
                Stress(kind, strength)
        if any(count < 1 for count in self.counts):
            raise ValueError(f"--images={','.join(map(str, self.counts))}: expected 1 or more")

    @property
    def name(self) -> str:
        """Of the folder of the results: the task, and the split if one is named."""
        task = self.task.rpartition(":")[2].lower()
        return re.sub(r"[^\w+]+", "_", f"{task}_{self.split}" if self.split else task)

    def source(self, exam: Exam) -> ExamConfig:
        """Where the questions come from."""
        return ExamConfig(self.name, exam.layout, str(self.folder.resolve()), self.split)

    def variants(self, exam: Exam) -> Iterator[tuple[str, Exam]]:
        """The exam as it is, and under every stress and number of pictures, each with its name."""
        yield self.name, exam
        for kind in self.stress:
            for strength in self.strengths:
                changed = dataclasses.replace(exam, stress=Stress(kind, strength))
                yield f"{self.name}-{kind}-{strength}", changed
        for count in self.counts:
            if count > 1:  # one picture is the exam as it is
                lead = (exam.crowd or Crowd()).lead
                changed = dataclasses.replace(exam, crowd=Crowd(count, lead))
                yield f"{self.name}-images-{count}", changed


@dataclasses.dataclass(frozen=True)
class ModelExam:
    """What may be set when a published model sits an exam."""

    evaluation: EvaluationConfig
    mesh: MeshConfig = MeshConfig(data=1, fsdp=-1)
    dtype: Literal["float32", "bfloat16"] = "float32"  # of parameters and activations


def take_by_run(sitting: Sitting, workdir: Path, overrides: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    """The newest checkpoint of a run sits an exam, and its report is written anew.

    Args:
      overrides: changes to the run's ``evaluation``, whose task is the exam, and its ``data``.

    Returns:
      What ``_together`` gives.

    Raises:
      ValueError: there is no such task, run, or file of the exam, or an override concerns what was trained.
    """
    runs.check_overrides(overrides)
    exam = find_exam(sitting.task)

    def change(experiment: Experiment) -> Experiment:
        data = dataclasses.replace(experiment.data, evaluation=(sitting.source(exam),))
        # What the run left out of its own evaluation is no part of an exam.
        evaluation = dataclasses.replace(experiment.evaluation, task=exam, limit=0)
        return dataclasses.replace(experiment, data=data, evaluation=evaluation)

    experiment = change(runs.read_run(workdir))
    opened(experiment.data, experiment.data.evaluation[0])  # before weights are read
    experiment, layout, state, step = runs.restore(workdir, overrides, change=change)
    exam, results = _exam_of(experiment.evaluation), {}
    for name, variant in sitting.variants(exam):
        source = dataclasses.replace(sitting.source(exam), name=name)
        asked = dataclasses.replace(
            experiment,
            data=dataclasses.replace(experiment.data, evaluation=(source,)),
            evaluation=dataclasses.replace(experiment.evaluation, task=variant),
        )
        results[name] = runs.evaluate_task(asked, layout, state, workdir, name, step)
    found = _together(sitting, results, workdir, step)
    if jax.process_index() == 0:
        write_report(workdir)
    return found


def take_by_model(
    sitting: Sitting, folder: Path, workdir: Path, overrides: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """A published model sits an exam, asked through its own processor; results are those of step 0.

    Args:
      folder: of the model.
      workdir: folder for the results.
      overrides: changes to the fields of ``ModelExam``.

    Returns:
      What ``_together`` gives.

    Raises:
      ValueError: there is no such task, or file of the exam; the model sees no pictures; see
        ``from_pretrained``.
    """
    chosen = ModelExam(EvaluationConfig(batch_size=8, task=find_exam(sitting.task)))
    if overrides:
        chosen = config_lib.replace(chosen, overrides)
    exam, size = _exam_of(chosen.evaluation), chosen.evaluation.batch_size
    opened(DataConfig(), sitting.source(exam))  # before weights are read
    mesh = sharding.make_mesh(chosen.mesh)
    if size % sharding.batch_axes(mesh):
        raise ValueError(
            f"config.evaluation.batch_size={size}: must divide by the {sharding.batch_axes(mesh)} batch "
            f"shards of the mesh ({chosen.mesh.describe()})"
        )
    model = pretrained.from_pretrained(folder, mesh=mesh, dtype=chosen.dtype)
    processor = model.processor
    if processor is None or isinstance(processor, TextProcessor):
        raise ValueError(f"{folder}: the model reads text alone, it cannot be asked about pictures")
    # Rows are made by the processor, not from the spec.
    unused, results = ModelSpec(1, "prefix", model.model.config.language.vocab_size), {}
    for name, variant in sitting.variants(exam):
        source = dataclasses.replace(sitting.source(exam), name=name)
        data = DataConfig(
            evaluation=(source,),
            max_tokens=processor.max_tokens,
            tiling=TilingConfig(orientation=processor.orientation),
        )
        examinee = Examinee(
            *(model.layout, model.params, model.routing_state, data, unused, name),
            extent=chosen.evaluation,
            respond=lambda samples, most: _said(model, samples, rows=size, max_new_tokens=most),
            pictures=processor.pictures,
        )
        results[name] = examine(examinee, variant, step=0, workdir=workdir)
    return _together(sitting, results, workdir, 0)


def score_file(
    sitting: Sitting, predictions: Path, overrides: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """The result of predictions that are in a file, whoever made them; nothing is written.

    Args:
      overrides: changes to ``evaluation``, such as its ``limit`` and ``task``.

    Raises:
      ValueError: the file is malformed or of another task, or its ids are not those of the questions.
    """
    chosen = ModelExam(EvaluationConfig(task=find_exam(sitting.task)))
    if overrides:
        chosen = config_lib.replace(chosen, overrides)
    exam = _exam_of(chosen.evaluation)
    questions = questions_of(opened(DataConfig(), sitting.source(exam)), limit=chosen.evaluation.limit)
    scored = exam.score(questions, read_predictions(predictions, task=exam.layout))
    findings = Findings(scored.scores, scored.groups, scored.shares, intervals=scored.intervals)
    return {"task": sitting.name, "predictions": str(predictions), **as_result(exam, findings)}


def _exam_of(evaluation: EvaluationConfig) -> Exam:
    if not isinstance(evaluation.task, Exam):
        kind = type(evaluation.task).__name__
        raise ValueError(f"config.evaluation.task={kind}: with --data it is an Exam, chosen by --task")
    return evaluation.task


def _said(
    model: Pretrained, samples: Sequence[Sample], *, rows: int, max_new_tokens: int
) -> list[str | BadSample]:
    """What a published model says to each sample, or why it could not be asked."""
    found = [_request(sample) for sample in samples]
    try:
        prompts = _prompts(model, found, rows)
    except ValueError:  # of one of them no prompt can be made
        found = [_checked(model, request, s.id) for request, s in zip(found, samples, strict=True)]
        prompts = _prompts(model, found, rows)
    said = iter(model.answers(prompts, max_new_tokens=max_new_tokens) if prompts is not None else ())
    return [bad if isinstance(bad, BadSample) else next(said) for bad in found]


def _prompts(model: Pretrained, found: Sequence[Request | BadSample], rows: int) -> Batch | None:
    """The prompts of all that can be asked; None if nothing can."""
    good = [request for request in found if isinstance(request, Request)]
    return model.prompts(good, rows=rows) if good else None


def _checked(model: Pretrained, request: Request | BadSample, name: str) -> Request | BadSample:
    """A request of which a prompt can be made, or why not."""
    if isinstance(request, Request):
        try:
            model.prompts([request], rows=1)
        except ValueError as error:
            return BadSample("not_asked", f"sample {name}: {error}")
    return request


def _request(sample: Sample) -> Request | BadSample:
    """A sample as a conversation with open pictures; the reason where a picture cannot be read."""
    try:
        pictures = [image() for image in sample.images]
    except BadSample as error:
        return error
    (turn,) = sample.turns
    messages = ({"role": "user", "content": turn.question}, {"role": "assistant", "content": ""})
    return Request(messages, images=pictures)


def _together(
    sitting: Sitting, results: dict[str, dict[str, Any]], workdir: Path, step: int
) -> dict[str, Any]:
    """The results of all variants by name; of several, their headlines against what was changed too.

    With several variants that is also in ``eval/NAME/STEP.variants.json``.
    """
    if len(results) == 1:
        return results
    headline = results[sitting.name]["headline"]

    def shown(name: str) -> dict[str, Any]:
        found = results[name]
        return {headline: found["scores"][headline], "interval": found.get("intervals", {}).get(headline)}

    curves: dict[str, Any] = {"headline": headline, "clean": shown(sitting.name)}
    for kind in sitting.stress:
        curves[kind] = {str(s): shown(f"{sitting.name}-{kind}-{s}") for s in sitting.strengths}
    if sitting.counts:
        names = {c: sitting.name if c == 1 else f"{sitting.name}-images-{c}" for c in sitting.counts}
        curves["images"] = {str(count): shown(name) for count, name in names.items()}
    if jax.process_index() == 0:
        path = workdir / "eval" / sitting.name / f"{step}.variants.json"
        disk.write_text(path, json.dumps(curves, indent=2, ensure_ascii=False) + "\n")
    return {**results, "variants": curves}
