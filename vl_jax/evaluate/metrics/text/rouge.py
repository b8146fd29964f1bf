"""ROUGE-L: the longest sequence of words that a text and its reference have in common, gaps allowed.

    precision = common / words said;   recall = common / words of the reference

``coco`` takes the best precision and the best recall of the references, each by itself, and weighs recall
more: ``(1 + β²) P R / (R + β² P)`` with β = 1.2; words are those of the Penn Treebank. ``f1`` is that of
summaries: the best of the references' harmonic means, of words without any punctuation. Source: Lin,
"ROUGE", 2004, section 3; pycocoevalcap and rouge_score (without its stemmer).
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from vl_jax.evaluate.metrics.per_sample import TextScores
from vl_jax.evaluate.metrics.text.ptb import ptb_words

Variant = Literal["coco", "f1"]
_BETA = 1.2


def longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence, by one addition of long integers for each word.

    Source: Hyyrö, "Bit-parallel LCS-length computation revisited", 2004.
    """
    places: dict[str, int] = defaultdict(int)
    for place, word in enumerate(one):
        places[word] |= 1 << place
    everywhere = (1 << len(one)) - 1
    free = everywhere  # the bits that are 0 mark words that end a longer common sequence
    for word in other:
        met = free & places.get(word, 0)
        free = ((free + met) | (free - met)) & everywhere
    return len(one) - free.bit_count()


def rouge_l(
    references: Sequence[Sequence[str]], prediction: Sequence[str], *, variant: Variant = "coco"
) -> float:
    """ROUGE-L of one text, from its words and those of its references; without any word it is 0."""
    common = [longest_common(reference, prediction) for reference in references]
    precisions = [n / len(prediction) if prediction else 0.0 for n in common]
    recalls = [n / len(r) if r else 0.0 for n, r in zip(common, references, strict=True)]
    if variant == "f1":
        return max(2 * p * r / (p + r) if p + r else 0.0 for p, r in zip(precisions, recalls, strict=True))
    precision, recall = max(precisions), max(recalls)
    if not precision * recall:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def _letters_only(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


@dataclasses.dataclass(frozen=True)
class RougeL:
    """The mean ROUGE-L."""

    name: str = "rouge_l"
    variant: Variant = "coco"  # of captions, or "f1" of summaries

    def start(self) -> TextScores:
        """No texts yet."""
        return TextScores((self.name,), self._score)

    def _score(self, references: Sequence[str], prediction: str) -> dict[str, float]:
        words = ptb_words if self.variant == "coco" else _letters_only
        score = rouge_l([words(text) for text in references], words(prediction), variant=self.variant)
        return {self.name: score}
