"""Wrong texts beside the text of a row, as tokens: one array a row, which ``Batch.media`` brings along.

[[4, 17, 8, 30, 2, pad ...],      a wrong text: how many tokens it has, and they, as a text alone has them
 [0, pad ...            ]]        none
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vl_jax.data.sample import Sample
from vl_jax.data.text.tokenizer import Tokenizer
from vl_jax.data.text.written import alone, written

NEGATIVES = "negatives"  # the name in ``Batch.media``


@dataclass(frozen=True)
class NegativeTexts:
    """The first so many of ``Sample.negatives``; one that the cut makes equal to the text itself is none."""

    tokenizer: Tokenizer
    count: int
    max_tokens: int
    name: str = NEGATIVES
    dtype: str = "int32"

    @property
    def shape(self) -> tuple[int, ...]:
        """By text: its length, then its tokens."""
        return self.count, 1 + self.max_tokens

    def read(self, sample: Sample) -> np.ndarray | None:
        """The array of a sample, if it has any wrong text."""
        if not sample.negatives:
            return None
        found = np.full(self.shape, self.tokenizer.pad, self.dtype)
        found[:, 0] = 0
        own = alone(written(sample), self.tokenizer, max_tokens=self.max_tokens)
        for row, text in zip(found, sample.negatives[: self.count], strict=False):
            ids = alone(text, self.tokenizer, max_tokens=self.max_tokens)
            if ids != own:
                row[0], row[1 : 1 + len(ids)] = len(ids), ids
        return found if found[:, 0].any() else None
