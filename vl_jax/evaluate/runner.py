"""Evaluating a model on a held-out source: runs a task, and writes what it found."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Annotated, Any

import jax
from PIL import Image as PilImage

from vl_jax.data.config import DataConfig, ModelSpec
from vl_jax.evaluate.exams.exam import Exam
from vl_jax.evaluate.task import Examinee, Extent, Findings, Record, Scores, Task
from vl_jax.evaluate.tasks.answers import Answers
from vl_jax.evaluate.tasks.creations import Creations
from vl_jax.evaluate.tasks.few_shot import FewShot
from vl_jax.evaluate.tasks.found_boxes import FoundBoxes
from vl_jax.evaluate.tasks.found_masks import FoundMasks
from vl_jax.evaluate.tasks.held_out_loss import HeldOutLoss
from vl_jax.evaluate.tasks.labels import Labels
from vl_jax.evaluate.tasks.pixel_classes import PixelClasses
from vl_jax.evaluate.tasks.pixel_depths import PixelDepths
from vl_jax.evaluate.tasks.retrieval import Retrieval
from vl_jax.evaluate.tasks.transcripts import Transcripts
from vl_jax.layout import NO_COLLECTIONS, Layout
from vl_jax.runtime import disk
from vl_jax.schema import Open

# Samples whose image is kept beside the predictions, for the report and for a person to look at.
NUM_PICTURES = 120
PREDICTIONS = ".predictions.jsonl"  # how the name of a file ends in which a task keeps what it has so far


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Extent):
    """What is asked of a trained model about every held-out source, and how much of it."""

    task: Annotated[
        Answers
        | Labels
        | FewShot
        | FoundBoxes
        | FoundMasks
        | PixelClasses
        | PixelDepths
        | Creations
        | Retrieval
        | Transcripts
        | HeldOutLoss
        | Exam
        | Task,
        Open("task", needs=("headline", "run")),
    ] = Answers()
    average: bool = False  # looks at the average that ``optimizer.average`` of the stage keeps


def evaluate(
    layout: Layout,
    params: Any,
    routing_state: Any,
    *,
    collections: Mapping[str, Any] = NO_COLLECTIONS,
    data: DataConfig,
    spec: ModelSpec,
    config: EvaluationConfig,
    task: str,
    step: int,
    workdir: Path,
    alive: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Runs ``config.task`` on a held-out source; writes ``eval/<task>/<step>.json`` with its records.

    Args:
      task: name of the source, which is that of the results.
      alive: called before every batch.

    Returns:
      The content of the JSON file: ``task``, ``step``, and what ``Findings`` holds, with its headline.

    Raises:
      ValueError: the task gave no findings, or its headline is not among the scores.
      OSError: they cannot be written, such as on a full disk.
    """
    alive()
    examinee = Examinee(
        *(layout, params, routing_state, data, spec),
        source=task,
        extent=config,
        collections=collections,
        alive=alive,
    )
    return examine(examinee, config.task, step=step, workdir=workdir)


def examine(examinee: Examinee, task: Task, *, step: int, workdir: Path) -> dict[str, Any]:
    """``evaluate`` of an examinee that is put together already; raises the same."""
    folder = workdir / "eval" / examinee.source
    examinee = dataclasses.replace(examinee, kept=folder / f"{step}{PREDICTIONS}")
    records, findings = _collect(task, examinee)
    result = {"task": examinee.source, "step": step, **as_result(task, findings)}
    if jax.process_index() == 0:
        _write(folder, step, result, records)
    return result


def forget_results(workdir: Path, *, after: int) -> None:
    """Deletes the results of later steps than one, with their predictions, records and pictures.

    A run that goes on from an earlier step, or begins anew, has not taken those steps yet.
    """
    for folder in (workdir / "eval").glob("*"):
        for file in [*folder.glob("*.json*"), *folder.glob("images/*.png")]:
            step = file.name.partition(".")[0].partition("_")[0]
            if step.isdecimal() and int(step) > after:
                file.unlink()


def _collect(task: Task, examinee: Examinee) -> tuple[list[Record], Findings]:
    """All records of a task, of which the first keep their pictures, and what it returns."""
    records: list[Record] = []
    running = task.run(examinee)
    while True:
        try:
            record = next(running)
        except StopIteration as end:
            if not isinstance(end.value, Findings):
                found = type(end.value).__name__
                raise ValueError(
                    f"task {type(task).__name__}: run() returned {found}, not Findings"
                ) from None
            return records, end.value
        records.append(record if len(records) < NUM_PICTURES else {**record, "image": None})


def as_result(task: Task, findings: Findings) -> dict[str, Any]:
    """The findings as JSON values; a score that is not finite is null."""
    if task.headline not in findings.scores:
        known = ", ".join(findings.scores)
        raise ValueError(
            f"task {type(task).__name__}: headline={task.headline!r} is no score; there are: {known}"
        )

    def plain(scores: Scores) -> dict[str, float | None]:
        values = {k: int(v) if isinstance(v, Integral) else float(v) for k, v in scores.items()}
        return {k: v if math.isfinite(v) else None for k, v in values.items()}

    return {
        "headline": task.headline,
        "scores": plain(findings.scores),
        "groups": {kind: {k: plain(v) for k, v in found.items()} for kind, found in findings.groups.items()},
        "shares": list(findings.shares),
        "matrices": [dataclasses.asdict(matrix) for matrix in findings.matrices],
        **({"intervals": _ends(findings.intervals)} if findings.intervals else {}),
        **({"settings": dict(findings.settings)} if findings.settings else {}),
    }


def _ends(intervals: Mapping[str, tuple[float, float]]) -> dict[str, list[float | None]]:
    """The ends of intervals as JSON values; one that is not finite is null."""
    return {
        name: [float(end) if math.isfinite(end) else None for end in ends] for name, ends in intervals.items()
    }


def _write(folder: Path, step: int, result: dict[str, Any], records: list[Record]) -> None:
    """Writes records and pictures first and the result last, so that a result is never without them."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, record in enumerate(records):
        name, picture = None, record.get("image")
        if isinstance(picture, PilImage.Image):
            name = f"images/{step}_{number:04d}.png"
            encoded = io.BytesIO()
            picture.save(encoded, "PNG")
            content = encoded.getvalue()
            with disk.naming(folder / name, needed=len(content)):
                (folder / name).write_bytes(content)
        lines.append(json.dumps({**record, "image": name}, ensure_ascii=False) + "\n")
    disk.write_text(folder / f"{step}.samples.jsonl", "".join(lines))
    disk.write_text(folder / f"{step}.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
