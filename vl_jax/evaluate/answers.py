"""Scoring short answers: exact match after normalising, by kind of question, against two blind baselines.

*blind*: the same model with the image withheld. *prior*: the most frequent training answer to the same
question (or kind of question). What a model knows beyond both, it saw.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from vl_jax.data.text.normalize import normalize


@dataclasses.dataclass(frozen=True)
class Answer:
    """One question, its truth, and what was answered with and without the image."""

    id: str
    question: str
    answer: str
    kind: str
    language: str
    prediction: str
    blind_prediction: str
    prior_prediction: str


class Prior:
    """The most frequent answer to a question in the training data; ties go to the one seen first."""

    def __init__(self, turns: Iterable[tuple[str, str, str]]):
        """Counts (question, kind, answer) triples."""
        self._by_question: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self._by_kind: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for question, kind, answer in turns:
            self._by_question[normalize(question)][answer] += 1
            self._by_kind[kind][answer] += 1

    def predict(self, question: str, kind: str) -> str:
        counts = self._by_question.get(normalize(question)) or self._by_kind.get(kind)
        return counts.most_common(1)[0][0] if counts else ""


def scores(answers: Sequence[Answer]) -> dict[str, Any]:
    """Count and share of exact matches of the model, the blind model and the prior."""

    def share(field: str) -> float:
        right = sum(normalize(getattr(a, field)) == normalize(a.answer) for a in answers)
        return right / max(1, len(answers))

    return {
        "count": len(answers),
        "exact_match": share("prediction"),
        "blind_exact_match": share("blind_prediction"),
        "prior_exact_match": share("prior_prediction"),
    }


def summarize(answers: Sequence[Answer]) -> dict[str, Any]:
    """Scores overall, by kind of question and by language."""

    def grouped(field: str) -> dict[str, Any]:
        groups: dict[str, list[Answer]] = collections.defaultdict(list)
        for answer in answers:
            groups[getattr(answer, field)].append(answer)
        return {name: scores(groups[name]) for name in sorted(groups) if name}

    overall = scores(answers)
    overall["num_questions"] = overall.pop("count")
    return {**overall, "by_kind": grouped("kind"), "by_language": grouped("language")}
