"""CIDEr-D: how much of what people say of a picture a caption says, where rare word groups weigh more.

    vector of a caption, for groups of n = 1..4 words:  count · (log images - log images that have the group)
    10 · mean over n, and over the references, of  min(caption, reference) · reference / (norms)
                                                   · exp(-(difference in length)² / 2 σ²),  σ = 6

Weights come from the references of the pictures that are scored. So scores on a part of a set cannot be
compared with those on the whole, unless ``corpus`` gives the references of the whole, and of one picture
alone all weights are 0. The score is 10 at most; it is no share. Source: Vedantam et al., "CIDEr", 2015,
equations 1 to 6; pycocoevalcap's class "Cider" is CIDEr-D, and counts a caption's length in pairs of
words.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float

from vl_jax.evaluate.metrics.per_sample import PerSample, SampleList, references_of
from vl_jax.evaluate.metrics.text.ptb import ptb_words

Words = Sequence[str]
_ORDERS = 4  # word groups of 1 to 4 words
_SIGMA = 6.0  # of the penalty on another length
_Groups = list[Counter[tuple[str, ...]]]  # by length of the group


def cider_d(
    references: Sequence[Sequence[Words]],
    predictions: Sequence[Words],
    *,
    corpus: Sequence[Sequence[Words]] | None = None,
) -> Float[np.ndarray, " N"]:
    """The score of the caption of each picture, from its words and those of its references.

    Args:
      corpus: references by picture that the weights are counted in; None: ``references``.

    Raises:
      ValueError: the lengths differ, a picture has no reference, or the corpus has fewer than 2 pictures.
    """
    if len(references) != len(predictions):
        raise ValueError(f"{len(references)} lists of references for {len(predictions)} captions")
    missing = next((number for number, texts in enumerate(references) if not texts), None)
    if missing is not None:
        raise ValueError(f"sample {missing}: no reference; expected at least one text")
    images = references if corpus is None else corpus
    if len(images) < 2:
        raise ValueError(
            f"CIDEr-D weighs words by {len(images)} picture(s); with fewer than 2 all scores are 0"
        )
    frequency = Counter(group for texts in images for group in _different(texts))
    weigh = _Weigher(frequency, len(images))
    return np.array([weigh.score(r, p) for r, p in zip(references, predictions, strict=True)], np.float64)


def _different(texts: Iterable[Words]) -> set[tuple[str, ...]]:
    return {group for words in texts for groups in _groups(words) for group in groups}


def _groups(words: Words) -> _Groups:
    starts = [range(len(words) - n + 1) for n in range(1, _ORDERS + 1)]
    return [Counter(tuple(words[i : i + n]) for i in s) for n, s in enumerate(starts, start=1)]


class _Weigher:
    """Scores captions by the weights of one corpus."""

    def __init__(self, frequency: Counter[tuple[str, ...]], images: int):
        self._frequency, self._log_images = frequency, math.log(images)

    def _vectors(self, words: Words) -> list[dict[tuple[str, ...], float]]:
        return [
            {
                group: count * (self._log_images - math.log(max(1, self._frequency[group])))
                for group, count in groups.items()
            }
            for groups in _groups(words)
        ]

    def score(self, references: Sequence[Words], prediction: Words) -> float:
        said, total = self._vectors(prediction), 0.0
        for reference in references:
            apart = _pairs(prediction) - _pairs(reference)
            penalty = math.exp(-(apart**2) / (2 * _SIGMA**2))
            total += penalty * sum(map(_likeness, said, self._vectors(reference)))
        return 10 * total / (_ORDERS * len(references))


def _pairs(words: Words) -> int:
    return max(0, len(words) - 1)


def _likeness(said: dict[tuple[str, ...], float], reference: dict[tuple[str, ...], float]) -> float:
    """The cosine of two vectors, where a group said too often counts as often as the reference has it."""
    norms = math.sqrt(sum(v * v for v in said.values()) * sum(v * v for v in reference.values()))
    common = sum(min(v, reference[g]) * reference[g] for g, v in said.items() if g in reference)
    return common / norms if norms else 0.0


@dataclasses.dataclass(frozen=True)
class CIDErD:
    """The mean CIDEr-D of captions, by Penn Treebank words (see ``ptb``)."""

    name: str = "cider_d"

    @property
    def shares(self) -> tuple[str, ...]:
        """No score is a share of one."""
        return ()

    def start(self) -> Captions:
        """No captions yet."""
        return Captions(self.name)


class Captions:
    """Collects captions, and scores them when the references of all are known.

    Args:
      name: of the score.
    """

    def __init__(self, name: str = "cider_d"):
        self._name = name
        self._references: list[list[list[str]]] = []
        self._predictions: list[list[str]] = []
        self._clusters: list[str | None] = []

    def update(self, truth: str | Sequence[str], prediction: str, *, cluster: str | None = None) -> None:
        """Takes one picture: its reference or its references, and its caption; ValueError without one."""
        references = references_of(truth, prediction, len(self._predictions))
        self._references.append([ptb_words(text) for text in references])
        self._predictions.append(ptb_words(prediction))
        self._clusters.append(cluster)

    def samples(self) -> dict[str, PerSample]:
        """The score of each picture; ValueError with fewer than 2 pictures."""
        found = SampleList((self._name,))
        for score, cluster in zip(cider_d(self._references, self._predictions), self._clusters, strict=True):
            found.add({self._name: float(score)}, cluster)
        return found.samples()

    def compute(self) -> dict[str, float]:
        """The mean over all pictures; not a number for one alone, ValueError without any."""
        if len(self._predictions) == 1:  # such as the only one of its language
            return {self._name: math.nan}
        return {name: found.score for name, found in self.samples().items()}
