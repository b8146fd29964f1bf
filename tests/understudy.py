"""Stands in for what computes with a model, and leaves all else as it is.

A stand-in asks for the same files as the part it plays, and leaves the same files behind.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vl_jax import ask, config, runs
from vl_jax.api import calls, heads, predict, pruning, sitting
from vl_jax.api.run import Run
from vl_jax.benchmarks import loader
from vl_jax.data.config import DataConfig, opened
from vl_jax.evaluate.exams.table import find_exam
from vl_jax.experiment import Experiment, read_run
from vl_jax.interop import pretrained
from vl_jax.moe import comparisons, conformance
from vl_jax.report import routing
from vl_jax.train import loop

SAID = "<|ref|>it<|/ref|><|det|>[[100, 100, 900, 900]]<|/det|>"
# What a run logs, by the pages that show it.
LOGGED = dict.fromkeys(
    "accuracy auxiliary_loss grad_norm loss learning_rate skipped tokens_per_second samples_per_second "
    "data_wait_ms step_ms".split(),
    0.5,
)
ROUTED = {"routing/dead": [0, 0], "routing/maxvio": [0.1, 0.2], "routing/maxvio_mean": 0.15}


@contextlib.contextmanager
def everything() -> Iterator[None]:
    """All stand-ins are on the stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "plan", lambda experiment: None)
        patch.setattr(runs._Launched, "_hooks", lambda launched: ())
        patch.setattr(runs, "_facts", lambda layout: {"parameters": 1, "devices": "1 x cpu (cpu)"})
        patch.setattr(
            runs, "first_weights", lambda *_: SimpleNamespace(params={}, routing={}, collections={})
        )
        patch.setattr(runs, "TrainState", lambda *arguments, **named: None)
        patch.setattr(runs, "evaluate_task", _evaluate)
        patch.setattr(runs, "evaluate_all", _evaluate_all)
        patch.setattr(runs, "restore", _restore)
        patch.setattr(runs, "programs", lambda layout, stages, **_: stages)
        patch.setattr(loop, "course", _course)
        patch.setattr(sitting, "take_by_model", _take_by_model)
        patch.setattr(pretrained, "write_published", lambda to, p, s, of: shutil.copytree(of.folder, to))
        patch.setattr(pretrained, "from_pretrained", _from_pretrained)
        patch.setattr(ask, "of_run", lambda folder: _restore(folder) and Talker())
        patch.setattr(ask, "of_published", lambda folder: pretrained.read_published(folder) and Talker())
        patch.setattr(calls, "load_run", _load_run)
        patch.setattr(predict, "predict", _predict)
        patch.setattr(heads, "export_head", _export_head)
        patch.setattr(
            heads, "add_head", lambda run, task, **_: run if isinstance(run, Run) else _load_run(run)
        )
        patch.setattr(routing, "write_routing", _write_routing)
        patch.setattr(pruning, "prune", _prune)
        patch.setattr(conformance, "PROPERTIES", ())
        patch.setattr(comparisons, "COMPARISONS", ())
        patch.setattr(loader, "run", _load)
        yield


class Talker:
    """A model that says the same of everything it can open."""

    orientation = "shown"

    def stream(self, prompt: Any, *, image: Path | None = None, **options: Any) -> Iterator[str]:
        """Of a prompt, or of a conversation whose messages name pictures."""
        assert prompt and set(options) <= {"audio", "max_new_tokens", "temperature", "top_p", "key"}
        named = [] if isinstance(prompt, str) else [f for m in prompt for f in m.get("images", ())]
        for file in [*named, *([image] if image else [])]:
            assert Path(file).is_file(), file
        yield SAID

    def generate(self, conversation: Sequence[dict[str, Any]], **options: Any) -> str:
        """The whole of it."""
        return "".join(self.stream(conversation, **options))


def _course(layout: Any, stages: Any, stream_of: Any, *, workdir: Path, **named: Any) -> Iterator[Any]:
    """Takes no step; leaves a log, and a checkpoint of the last step in which nothing is."""
    step = sum(stage.steps for stage in stages)
    lines = [{"step": n, "stage": stages[-1].name, **LOGGED, **ROUTED} for n in (1, step)]
    (workdir / runs.CHECKPOINTS / str(step)).mkdir(parents=True, exist_ok=True)
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    yield from ()


def _evaluate(experiment: Experiment, layout: Any, state: Any, workdir: Path, task: str, step: int, **_: Any):
    """Leaves a result, after the source was opened and has something in it."""
    (source,) = (s for s in experiment.data.evaluation if s.name == task)
    assert len(opened(experiment.data, source))
    headline = getattr(experiment.evaluation.task, "headline", "") or "accuracy"
    result = {"task": task, "step": step, "headline": headline, "scores": {headline: 0.5, "count": 2}}
    result |= {"groups": {}, "shares": [headline], "matrices": [], "intervals": {headline: [0.4, 0.6]}}
    folder = workdir / "eval" / task
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{step}.samples.jsonl").write_text("")
    (folder / f"{step}.json").write_text(json.dumps(result))
    return result


def _evaluate_all(experiment: Experiment, layout: Any, state: Any, workdir: Path, **_: Any) -> dict[str, Any]:
    step = sum(stage.steps for stage in experiment.stages)
    return {
        s.name: _evaluate(experiment, None, None, workdir, s.name, step) for s in experiment.data.evaluation
    }


def _take_by_model(
    chosen: sitting.Sitting, folder: Path, workdir: Path, overrides: Sequence[tuple[str, str]]
):
    """Opens the model's folder and the exam, and says nothing of them."""
    assert pretrained.read_published(folder).config is not None
    assert len(opened(DataConfig(), chosen.source(find_exam(chosen.task))))
    return {chosen.name: {}}


def _restore(
    workdir: Path,
    overrides: Sequence[tuple[str, str]] = (),
    *,
    before: int | None = None,
    change: Any = lambda experiment: experiment,
    averaged: bool | None = None,
) -> Any:
    experiment = config.replace(change(read_run(workdir)), overrides)
    steps = [int(folder.name) for folder in (workdir / runs.CHECKPOINTS).iterdir() if folder.name.isdigit()]
    return experiment, None, SimpleNamespace(params={}, routing={}, collections={}), max(steps)


def _load_run(workdir: str | Path, heads: object = (), task: str = "") -> Run:
    experiment, layout, state, step = _restore(Path(workdir))
    run = object.__new__(Run)
    fields = {
        "workdir": Path(workdir),
        "experiment": experiment,
        "layout": layout,
        "state": state,
        "step": step,
    }
    for name, value in fields.items():
        object.__setattr__(run, name, value)
    return run


def _opened(run: Run | str | Path) -> Run:
    return run if isinstance(run, Run) else _load_run(run)


def _export_head(run: Run | str | Path, head: str, folder: str | Path) -> Path:
    assert _opened(run).experiment.model.head(head)
    Path(folder).mkdir(parents=True)
    return Path(folder)


def _predict(run: Run | str, *, image: Any = None, audio: Any = None, text: str = "", **options: Any) -> Any:
    opened_run = _opened(run)
    for file in filter(None, (image, audio)):
        assert Path(file).is_file(), file
    heads = getattr(opened_run.experiment.model, "heads", ())
    assert heads or text  # a question
    return {head.name: {"cat": 0.75, "dog": 0.25} for head in heads} or {predict.ANSWER: SAID}


def _prune(workdir: Path, target: Path, *, share: float, **options: Any) -> Path:
    assert 0 < share < 1 and set(options) <= {"merge", "random", "num_batches"}
    _restore(workdir)
    return Path(shutil.copytree(workdir, target))


def _write_routing(
    workdir: Path,
    *,
    num_batches: int,
    overrides: Sequence[tuple[str, str]] = (),
    capacity: bool = False,
) -> Path:
    _restore(workdir, overrides)
    return workdir / "routing.html"


def _from_pretrained(folder: str | Path, *, dtype: str = "float32", **options: Any) -> Talker:
    assert dtype in ("float32", "bfloat16")
    pretrained.read_published(folder)
    return Talker()


def _load(experiment: Experiment, **options: Any) -> None:
    for source in experiment.data.sources:
        assert len(opened(experiment.data, source))
