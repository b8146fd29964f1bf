"""A question of an exam: what a prompt is made of, and what an answer is judged by."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping, Sequence
from typing import Any

from vl_jax.data.sample import IMAGE_PLACEHOLDER, Image, Sample, Source

PROMPT_FIELDS = ("question", "hint", "options")  # what a prompt may hold, in braces


@dataclasses.dataclass(frozen=True)
class Question:
    """One question; ``facts`` are what prompt and metric need beside it, by name."""

    id: str
    text: str
    references: tuple[str, ...]
    cluster: str  # questions of one cluster hang together: those about one picture
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    groups: Mapping[str, str] = dataclasses.field(default_factory=dict)  # group by kind of group
    images: tuple[Image, ...] = ()


def question_of(sample: Sample) -> Question:
    """The question of a sample with one turn; see ``ExamConfig`` for its labels, which another source lacks.

    Raises:
      ValueError: the sample has several turns, or no reference.
    """
    if len(sample.turns) != 1:
        raise ValueError(f"sample {sample.id}: {len(sample.turns)} turns; a question of an exam has one")
    (turn,), labels = sample.turns, sample.labels
    references = tuple(labels.get("references") or ((turn.answer,) if turn.answer else ()))
    if not references:
        raise ValueError(f"sample {sample.id}: no reference to judge an answer by")
    groups = {"kind": turn.kind, "language": turn.language}
    return Question(
        id=sample.id,
        text=turn.question.replace(f"{IMAGE_PLACEHOLDER}\n", "").replace(IMAGE_PLACEHOLDER, "").strip(),
        references=references,
        cluster=str(labels.get("cluster", sample.id)),
        facts=labels.get("facts", {}),
        groups=labels.get("groups", {kind: name for kind, name in groups.items() if name}),
        images=sample.images,
    )


def questions_of(source: Source, *, limit: int = 0) -> list[Question]:
    """The questions of a source, in its order.

    Args:
      limit: the first so many; the last one of them with all its rotations (see ``mmbench``). 0: all.

    Raises:
      ValueError: as ``question_of``, a sample cannot be read, or two questions have one id.
    """
    found: dict[str, Question] = {}
    last = None
    for index in range(len(source)):
        question = question_of(source[index])
        whole = question.facts.get("whole")
        if limit and len(found) >= limit and (whole is None or whole != last):
            break
        if question.id in found:
            raise ValueError(f"sample {question.id}: two questions have this id")
        found[question.id], last = question, whole
    return list(found.values())


def check_prompt(prompt: str) -> None:
    """Makes sure that a prompt has the question in it, and nothing else that is not known.

    Raises:
      ValueError: which name is not known, or what is missing.
    """
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None]
    except ValueError as error:
        raise ValueError(f"prompt={prompt!r}: {error}") from None
    unknown = [name for name in fields if name not in PROMPT_FIELDS]
    if unknown:
        known = ", ".join(f"{{{name}}}" for name in PROMPT_FIELDS)
        raise ValueError(f"prompt={prompt!r}: {{{unknown[0]}}} is not known; there are {known}")
    if IMAGE_PLACEHOLDER in prompt:
        raise ValueError(f"prompt={prompt!r}: pictures are put in front of it, without {IMAGE_PLACEHOLDER}")


def written(prompt: str, question: Question) -> str:
    """A prompt with a question in it; options are lines such as ``A. a cat``, a hint is a line before."""
    options = question.facts.get("options", {})
    hint = question.facts.get("hint", "")
    return prompt.format(
        question=question.text,
        hint=f"{hint}\n" if hint else "",
        options="\n".join(f"{letter}. {text}" for letter, text in options.items()),
    )


def by_group(questions: Sequence[Question]) -> dict[str, dict[str, list[Question]]]:
    """Questions by kind of group and group; groups in alphabetical order."""
    found: dict[str, dict[str, list[Question]]] = {}
    for question in questions:
        for kind, name in question.groups.items():
            if name:
                found.setdefault(kind, {}).setdefault(name, []).append(question)
    return {kind: dict(sorted(groups.items())) for kind, groups in found.items()}
