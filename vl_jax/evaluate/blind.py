"""What a text says of itself: a model of words alone, counted in the training texts.

    p(word | the word before) = 0.7 of what followed that word + 0.3 of how frequent the word is, plus one

A benchmark whose true and wrong texts it tells apart says nothing of pictures (SugarCrepe, arXiv 2306.14610).
It is small on purpose: what it finds, any model of language finds.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator

from vl_jax.data.config import DataConfig, opened
from vl_jax.data.sample import BadSample
from vl_jax.data.text.written import written

_PAIRS = 0.7  # the share of pairs of words
_WORDS = re.compile(r"[a-z0-9']+|[^\sa-z0-9']")  # of alphabets; a Chinese character is a word
_EDGE = ""  # before the first word and behind the last one


class NGrams:
    """Counts of words and of pairs of them."""

    def __init__(self, texts: Iterable[str]):
        self._words: Counter[str] = Counter()
        self._before: Counter[str] = Counter()
        self._pairs: Counter[tuple[str, str]] = Counter()
        for text in texts:
            for pair in itertools.pairwise(_split(text)):
                self._pairs[pair] += 1
                self._before[pair[0]] += 1
                self._words[pair[1]] += 1
        self._total = self._words.total() + len(self._words) + 1  # with one for all words that were not seen

    def __bool__(self) -> bool:
        """Whether it has seen any text."""
        return bool(self._words)

    def log_likelihood(self, text: str) -> float:
        """Of the whole text, its end included."""
        return math.fsum(math.log(self._share(*pair)) for pair in itertools.pairwise(_split(text)))

    def mean_log_likelihood(self, text: str) -> float:
        """Of a word of it, so that texts of different lengths can be compared."""
        return self.log_likelihood(text) / (len(_split(text)) - 1)

    def _share(self, before: str, word: str) -> float:
        single = (self._words[word] + 1) / self._total
        seen = self._before[before]
        follows = self._pairs[before, word] / seen if seen else single
        return _PAIRS * follows + (1 - _PAIRS) * single


def _split(text: str) -> list[str]:
    return [_EDGE, *_WORDS.findall(text.lower()), _EDGE]


def training_texts(data: DataConfig, count: int) -> Iterator[str]:
    """What is written in the first samples of every training source."""
    for config in data.sources:
        source = opened(data, config)
        for index in range(min(len(source), count)):
            try:
                yield written(source[index])
            except BadSample:
                continue  # counted and logged where it is trained on
