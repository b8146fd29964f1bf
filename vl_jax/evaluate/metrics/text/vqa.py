"""VQA soft accuracy: an answer is as right as many of ten people gave it.

    of the ten sets that leave one person out: the mean of min(1, matches among the other nine / 3)

With n of ten people in agreement that is 0, 0.3, 0.6, 0.9 and 1 for n = 0, 1, 2, 3 and more. The short
form ``min(1, n / 3)`` is another number. Source: Antol et al., "VQA: Visual Question Answering", 2015,
section 3.3; Goyal et al. 2017 for the leave-one-out form; the variants are what the scripts do (see
``vqa_text``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from vl_jax.evaluate.metrics.per_sample import TextScores
from vl_jax.evaluate.metrics.text.vqa_text import (
    digit_form,
    evalai_again,
    evalai_form,
    spaced,
    vqa_form,
)

Variant = Literal["official", "evalai", "lmms_eval", "vlmevalkit", "vlmevalkit_2026"]
_FEWEST = 4  # with fewer answers, even the answer that all gave would score below 1


def vqa_accuracy(references: Sequence[str], prediction: str, *, variant: Variant = "official") -> float:
    """The soft accuracy of one answer.

    Args:
      references: what people answered, ten as a rule; an answer given twice stands there twice.
      variant: ``official``: the script of VQAv2; where all people agree, nothing but spaces is normalised.
        ``evalai``: TextVQA's server, and lmms-eval for TextVQA. ``lmms_eval``: lmms-eval 0.7.3 for VQAv2.
        ``vlmevalkit``: VLMEvalKit for both; since spring 2026 it leaves a full stop behind a digit alone,
        which ``vlmevalkit_2026`` does.

    Raises:
      ValueError: fewer than 4 references.
    """
    if len(references) < _FEWEST:
        raise ValueError(
            f"VQA accuracy counts how many people agree: {len(references)} reference(s), needs at least "
            f"{_FEWEST} (ten as a rule)"
        )
    said, people = _forms(references, prediction, variant)
    matches = sum(answer == said for answer in people)
    # Whoever gave this answer is left out of the nine that he is compared with.
    scores = [min(1.0, (matches - (answer == said)) / 3) for answer in people]
    return sum(scores) / len(scores)


def _forms(references: Sequence[str], prediction: str, variant: Variant) -> tuple[str, list[str]]:
    """What was said and what people answered, as they are compared."""
    if variant == "evalai":
        return evalai_form(prediction), [evalai_form(answer) for answer in references]
    if variant == "lmms_eval":
        return evalai_again(spaced(prediction)), [evalai_again(spaced(answer)) for answer in references]
    if variant == "vlmevalkit_2026":
        return digit_form(prediction), [digit_form(answer) for answer in references]
    people = [spaced(answer) for answer in references]
    if variant == "official" and len(set(people)) == 1:
        return spaced(prediction), people
    return vqa_form(prediction), [vqa_form(answer) for answer in people]


@dataclasses.dataclass(frozen=True)
class VQAAccuracy:
    """The mean soft accuracy."""

    name: str = "vqa_accuracy"
    variant: Variant = "official"  # how both sides are normalised, see ``vqa_accuracy``

    def start(self) -> TextScores:
        """No answers yet."""
        return TextScores((self.name,), self._score)

    def _score(self, references: Sequence[str], prediction: str) -> dict[str, float]:
        return {self.name: vqa_accuracy(references, prediction, variant=self.variant)}
