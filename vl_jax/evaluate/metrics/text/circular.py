"""MMBench's circular evaluation: a question is right only if it is right under every rotation of its options.

A model that guesses one letter has 1 / 4 in the plain form and nothing here; independent guesses have
4^-4. The share of questions that are right as they stand (``vanilla``) is reported beside it. Source: Liu
et al., "MMBench", 2023, section 4. VLMEvalKit numbers rotation r of question q ``q + r * 10^6``: ``index
% 10**6`` is the question.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Literal

from vl_jax.evaluate.metrics.per_sample import PerSample, SampleList

_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST = 5  # a letter further from the end was hardly meant as the answer
Reading = Literal["vlmevalkit", "lmms_eval", "strict"]
# By these VLMEvalKit knows that a model refused; "Z" alone is how it writes that no option is right.
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
# What lmms-eval lets stand before and behind a letter, in the order in which it tries.
_AROUND = (
    *(("", ""), ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ").")),
    *((":", ""), (":", ","), (":", "."), (":", ")"), (":", ").")),
)
_QUANTIFIER = 3  # words, beyond which lmms-eval takes an "A" for an article


def read_option(text: str, options: Mapping[str, str], *, reading: Reading = "vlmevalkit") -> str | None:
    """The letter of the option that an answer names; None if it names none, or more than one.

    Args:
      options: text by letter.
      reading: ``vlmevalkit``: the one letter among the words, if it is among the last five or so; else
        the one option whose text the answer holds, if it is no longer than all options twice over. A
        language model, as the kit can ask where that fails, is not asked. A refusal names none.
        ``lmms_eval``: the one letter that stands by itself, perhaps with a mark or in brackets, A only in an
        answer of three words; else the one option whose text it holds. ``strict``: the answer is the letter,
        or the option's text.
    """
    if reading == "lmms_eval":
        return _read_by_marks(text, options)
    words = text.translate(_MARKS).split()
    if reading == "strict":
        plain = " ".join(words)
        named = [k for k, v in options.items() if plain in (k, " ".join(v.translate(_MARKS).split()))]
        return named[0] if len(named) == 1 else None
    if any(refusal in text for refusal in _REFUSALS):
        return None
    letters = [letter for letter in options if letter in words]
    if not letters and "Z" in words:
        return None
    if len(letters) == 1 and words.index(letters[0]) > len(words) - _LAST:
        return letters[0]
    if len(text.lower()) > 2 * sum(map(len, options.values())):
        return None
    return _held(text, options)


def _held(text: str, options: Mapping[str, str]) -> str | None:
    """The one option whose text an answer holds."""
    held = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return held[0] if len(held) == 1 else None


def _read_by_marks(text: str, options: Mapping[str, str]) -> str | None:
    words = text.split()
    for before, behind in _AROUND:
        letters = [letter for letter in "ABCDE" if f"{before}{letter}{behind}" in words]
        article = not before + behind and "A" in words and len(words) > _QUANTIFIER
        if len(letters) == 1 and not article:
            return letters[0] if letters[0] in options else None
    return _held(text, options)


class CircularScores:
    """The share of questions that are right under all rotations."""

    def __init__(self):
        self._questions: dict[str, dict[str, bool]] = {}  # right, by rotation
        self._rotations: dict[str, int] = {}  # that there are
        self._clusters: dict[str, str] = {}
        self._unreadable, self._asked = 0, 0

    def update(
        self,
        question: str,
        options: Mapping[str, str],
        truth: str,
        prediction: str,
        *,
        reading: Reading = "vlmevalkit",
        cluster: str | None = None,
    ) -> None:
        """Takes one question under one rotation.

        Args:
          question: names the question, whatever its rotation. The first rotation given is the question as it
            stands.
          options: text by letter, as rotated.
          truth: letter of the right option, as rotated.

        Raises:
          ValueError: the right option is not among the options, or the rotation was given before.
        """
        if truth not in options or not set(options) <= set(string.ascii_uppercase):
            raise ValueError(f"question {question!r}: truth={truth!r}: expected one of {', '.join(options)}")
        rotations = self._questions.setdefault(question, {})
        order = "\n".join(f"{letter} {text}" for letter, text in sorted(options.items()))
        if order in rotations:
            raise ValueError(f"question {question!r}: a rotation of its options was given twice")
        said = read_option(prediction, options, reading=reading)
        rotations[order] = said == truth
        self._rotations[question] = len(options)
        self._clusters.setdefault(question, question if cluster is None else str(cluster))
        self._asked, self._unreadable = self._asked + 1, self._unreadable + (said is None)

    def samples(self) -> dict[str, PerSample]:
        """``circular`` and ``vanilla``, question by question.

        Raises:
          ValueError: there is no question, or one lacks a rotation.
        """
        found = SampleList(("circular", "vanilla"))
        for question, right in self._questions.items():
            if len(right) != self._rotations[question]:
                raise ValueError(
                    f"question {question!r}: {len(right)} of {self._rotations[question]} rotations, needs all"
                )
            values = list(right.values())
            found.add({"circular": all(values), "vanilla": values[0]}, self._clusters[question])
        return found.samples()

    def compute(self) -> dict[str, float]:
        """``circular``, ``vanilla``, and ``unreadable``, the share of answers that name no option."""
        scores = {name: found.score for name, found in self.samples().items()}
        return {**scores, "unreadable": self._unreadable / self._asked}
