"""Scoring predictions that are there already, whoever made them: no model is needed.

metrics, questions, {id: prediction} --score--> scores, intervals, groups, and values by question
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Literal

from vl_jax.evaluate.exams.question import Question, by_group
from vl_jax.evaluate.metrics.per_sample import PerSample
from vl_jax.evaluate.statistics import rate_interval
from vl_jax.evaluate.task import AnswerMetric, Metric, SampledMetric, shares_of

# What of a prediction is the answer: all of it; its first or last line that is not blank; what follows the
# last "answer:", or all of it where there is none. Blanks at the ends are no part of an answer.
Parser = Literal["whole", "first_line", "last_line", "after_answer"]


@dataclasses.dataclass(frozen=True)
class Scored:
    """What the answers to an exam are worth.

    Attributes:
      scores: over all questions, and ``count``.
      intervals: low and high end by score, of those made of values by question; questions about one picture
        are drawn together. Infinite where there is one picture only.
      groups: scores by kind of group and group.
      answers: what of each prediction was judged, by id.
      values: of every score with a value for each question, these values by id.
      shares: names of the scores that are shares of one.
    """

    scores: Mapping[str, int | float]
    intervals: Mapping[str, tuple[float, float]]
    groups: Mapping[str, Mapping[str, Mapping[str, int | float]]]
    answers: Mapping[str, str]
    values: Mapping[str, Mapping[str, float]]
    shares: tuple[str, ...]


def read_answer(prediction: str, parser: Parser = "whole") -> str:
    """What of a prediction is the answer; see ``Parser``."""
    text = prediction.strip()
    lines = text.splitlines() or [""]
    if parser == "first_line":
        return lines[0].strip()
    if parser == "last_line":
        return lines[-1].strip()
    if parser == "after_answer":
        return re.split(r"answer\s*:", text, flags=re.IGNORECASE)[-1].strip()
    return text


def score(
    metrics: Sequence[AnswerMetric],
    questions: Sequence[Question],
    predictions: Mapping[str, str],
    *,
    parser: Parser = "whole",
    seed: int = 0,
) -> Scored:
    """Judges one prediction for each question.

    Args:
      predictions: texts by id of the question, as models wrote them.
      parser: what of them is the answer.
      seed: of the resamples of the intervals.

    Raises:
      ValueError: a question has no prediction, a prediction no question, a question lacks what a metric
        needs, or a score is not finite; names the question or the score.
    """
    if not questions:
        raise ValueError("no question to score")
    _check_ids(questions, predictions)
    answers = {q.id: read_answer(predictions[q.id], parser) for q in questions}
    metric = _filled(metrics, questions, answers)
    scores = _finite({name: v for m in metric for name, v in m.compute().items()})
    samples = {n: s for m in metric if isinstance(m, SampledMetric) for n, s in m.samples().items()}
    groups = {}
    for kind, members in by_group(questions).items():
        groups[kind] = {
            name: {
                **{n: v for m in _filled(metrics, some, answers) for n, v in _finite(m.compute()).items()},
                "count": len(some),
            }
            for name, some in members.items()
        }
    by_question = {n: s for n, s in samples.items() if len(s.sums) == len(questions)}
    return Scored(
        scores={**scores, "count": len(questions)},
        intervals={name: _interval(sample, seed) for name, sample in samples.items()},
        groups=groups,
        answers=answers,
        values={
            name: {q.id: float(v) for q, v in zip(questions, sample.values, strict=True)}
            for name, sample in by_question.items()
        },
        shares=tuple(name for m in metrics for name in shares_of(m)),
    )


def _check_ids(questions: Sequence[Question], predictions: Mapping[str, str]) -> None:
    ids = dict.fromkeys(question.id for question in questions)
    if len(ids) < len(questions):
        raise ValueError(f"{len(questions)} questions have {len(ids)} ids: every question needs its own")
    missing = [name for name in ids if name not in predictions]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(ids)} questions have no prediction, such as id {missing[0]!r}"
        )
    stray = [name for name in predictions if name not in ids]
    if stray:
        raise ValueError(f"{len(stray)} predictions belong to no question, such as id {stray[0]!r}")


def _filled(
    metrics: Sequence[AnswerMetric], questions: Sequence[Question], answers: Mapping[str, str]
) -> list[Metric]:
    """Metrics that have taken every question."""
    started = [(metric.start(), _needs(metric)) for metric in metrics]
    for question in questions:
        for metric, needs in started:
            lacking = [name for name in needs if name not in question.facts]
            if lacking:
                raise ValueError(f"question {question.id!r} has no {lacking[0]!r}, which its metric needs")
            facts: dict[str, Any] = {name: question.facts[name] for name in needs}
            if isinstance(metric, SampledMetric):
                facts["cluster"] = question.cluster
            try:
                metric.update(question.references, answers[question.id], **facts)
            except ValueError as error:
                raise ValueError(f"question {question.id!r}: {error}") from None
    return [metric for metric, _ in started]


def _needs(metric: AnswerMetric) -> tuple[str, ...]:
    """The facts of a question that a metric takes; see ``exams.metrics``."""
    return tuple(getattr(metric, "needs", ()))


def _finite(scores: Mapping[str, Any]) -> dict[str, int | float]:
    plain = {n: int(v) if isinstance(v, Integral) else float(v) for n, v in scores.items()}
    for name, value in plain.items():
        if not math.isfinite(value):
            raise ValueError(
                f"score {name} is {value}: expected a finite number; are there too few questions?"
            )
    return plain


def _interval(sample: PerSample, seed: int) -> tuple[float, float]:
    found = rate_interval(sample.sums, sample.sizes, clusters=sample.clusters, seed=seed)
    return found.low, found.high
