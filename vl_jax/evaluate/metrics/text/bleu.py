"""BLEU and chrF of all texts together, by sacrebleu: 0 to 100.

Both are ratios of counts over the whole set. They are no means of the scores of single texts, so there
are no values by sample. A BLEU is comparable with another only under one tokenizer: ``13a`` for languages
that write spaces, ``zh`` for Chinese. Source: Papineni et al., "BLEU", 2002; Popović, "chrF", 2015; Post,
"A Call for Clarity in Reporting BLEU Scores", 2018.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from vl_jax.evaluate.metrics.extra import needed
from vl_jax.evaluate.metrics.per_sample import references_of


@dataclasses.dataclass(frozen=True)
class BLEU:
    """BLEU with word groups of 1 to 4 words."""

    name: str = "bleu"
    tokenizer: Literal["13a", "intl", "zh", "char", "none"] = "13a"  # what counts as a word
    lowercase: bool = False  # upper and lower case are one

    @property
    def shares(self) -> tuple[str, ...]:
        """No score is a share of one."""
        return ()

    def start(self) -> CorpusScore:
        """No texts yet; UserError without sacrebleu."""
        sacrebleu = needed("sacrebleu", by="BLEU")
        return CorpusScore(
            self.name, sacrebleu.metrics.BLEU(tokenize=self.tokenizer, lowercase=self.lowercase)
        )


@dataclasses.dataclass(frozen=True)
class ChrF:
    """The F score of groups of 1 to 6 letters, with β = 2; with ``word_order`` 2 it is chrF++."""

    name: str = "chrf"
    word_order: int = 0  # longest group of words that is counted too
    lowercase: bool = False  # upper and lower case are one

    def __post_init__(self):
        if self.word_order < 0:
            raise ValueError(f"word_order={self.word_order} must be >= 0")

    @property
    def shares(self) -> tuple[str, ...]:
        """No score is a share of one."""
        return ()

    def start(self) -> CorpusScore:
        """No texts yet; UserError without sacrebleu."""
        sacrebleu = needed("sacrebleu", by="chrF")
        return CorpusScore(
            self.name, sacrebleu.metrics.CHRF(word_order=self.word_order, lowercase=self.lowercase)
        )


class CorpusScore:
    """Collects texts, and scores them all together.

    Args:
      name: of the score.
      metric: of sacrebleu.
    """

    def __init__(self, name: str, metric: Any):
        self._name, self._metric = name, metric
        self._references: list[tuple[str, ...]] = []
        self._predictions: list[str] = []

    def update(self, truth: str | Sequence[str], prediction: str) -> None:
        """Takes one text: its reference or its references, and what was said; ValueError without one."""
        self._references.append(references_of(truth, prediction, len(self._predictions)))
        self._predictions.append(prediction)

    def compute(self) -> dict[str, float]:
        """The score of all texts; ValueError without one."""
        if not self._predictions:
            raise ValueError(f"{self._name}: no sample to score")
        most = max(map(len, self._references))
        streams = [[r[i] if i < len(r) else None for r in self._references] for i in range(most)]
        return {self._name: self._metric.corpus_score(self._predictions, streams).score}
