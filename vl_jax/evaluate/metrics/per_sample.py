"""The value of every sample, and which samples hang together: what an interval of a score stands on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass(frozen=True)
class PerSample:
    """One score, sample by sample. The score is ``sum(sums) / sum(sizes)``.

    A mean has sizes of one. A rate, such as errors per word, has the words of each sample as sizes.
    Samples of one cluster, such as the questions about one picture, are not independent of one another:
    an interval draws whole clusters.
    """

    sums: Float[np.ndarray, " N"]
    sizes: Float[np.ndarray, " N"]
    clusters: tuple[str, ...]

    @property
    def score(self) -> float:
        """The score over all samples; 0 where the sizes are, such as a precision when nothing was said."""
        size = float(self.sizes.sum())
        return float(self.sums.sum()) / size if size else 0.0

    @property
    def values(self) -> Float[np.ndarray, " N"]:
        """The score of each sample by itself; 0 where its size is."""
        return np.divide(self.sums, self.sizes, out=np.zeros_like(self.sums), where=self.sizes != 0)

    def by_cluster(self) -> tuple[Float[np.ndarray, " C"], Float[np.ndarray, " C"]]:
        """The sums and the sizes added up within each cluster, in the order in which clusters appear."""
        place = {name: number for number, name in enumerate(dict.fromkeys(self.clusters))}
        rows = np.array([place[name] for name in self.clusters], np.int64)
        return (
            np.bincount(rows, self.sums, minlength=len(place)),
            np.bincount(rows, self.sizes, minlength=len(place)),
        )


class SampleList:
    """Collects the samples of one or more scores, one after another.

    Args:
      names: of the scores.
    """

    def __init__(self, names: Sequence[str]):
        self._rows: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        self._clusters: list[str] = []

    def __len__(self) -> int:
        return len(self._clusters)

    def add(self, found: Mapping[str, float | tuple[float, float]], cluster: str | None = None) -> None:
        """Takes one sample: of every score its value, or its sum and its size.

        Args:
          cluster: its samples hang together; None: a sample that hangs together with no other.

        Raises:
          ValueError: a value is not finite, or a size is negative.
        """
        number = len(self)
        pairs = {k: v if isinstance(v, tuple) else (float(v), 1.0) for k, v in found.items()}
        for name, (total, size) in pairs.items():
            if not (math.isfinite(total) and math.isfinite(size) and size >= 0):
                raise ValueError(f"sample {number}: {name} is {total:g} of {size:g}; expected finite numbers")
        for name, rows in self._rows.items():
            rows.append(pairs[name])
        self._clusters.append(f"sample {number}" if cluster is None else str(cluster))

    def samples(self) -> dict[str, PerSample]:
        """Every score, sample by sample.

        Raises:
          ValueError: there is no sample.
        """
        if not len(self):
            raise ValueError(f"{', '.join(self._rows)}: no sample to score")
        return {
            name: PerSample(*np.array(rows, np.float64).T, clusters=tuple(self._clusters))
            for name, rows in self._rows.items()
        }

    def compute(self) -> dict[str, float]:
        """The scores over all samples; raises as ``samples``."""
        return {name: found.score for name, found in self.samples().items()}


class TextScores:
    """A metric of texts that scores each answer by itself.

    Args:
      names: of the scores.
      score: of one answer, from its references and what was said: ``{name: value}``, or
        ``{name: (sum, size)}``.
    """

    def __init__(
        self,
        names: Sequence[str],
        score: Callable[[Sequence[str], str], Mapping[str, float | tuple[float, float]]],
    ):
        self._found, self._score = SampleList(names), score

    def update(self, truth: str | Sequence[str], prediction: str, *, cluster: str | None = None) -> None:
        """Takes one question: its reference or its references, and what was answered.

        Raises:
          ValueError: there is no reference, or something is no text; the sample is named by its number.
        """
        references = references_of(truth, prediction, len(self._found))
        try:
            found = self._score(references, prediction)
        except ValueError as error:
            raise ValueError(f"sample {len(self._found)}: {error}") from None
        self._found.add(found, cluster)

    def samples(self) -> dict[str, PerSample]:
        """Every score, sample by sample; ValueError without a sample."""
        return self._found.samples()

    def compute(self) -> dict[str, float]:
        """The scores over all samples; ValueError without a sample."""
        return self._found.compute()


def references_of(truth: Any, prediction: Any, number: int) -> tuple[str, ...]:
    """The references of sample ``number``, at least one; ValueError if one or the prediction is no text."""
    references = (truth,) if isinstance(truth, str) else tuple(truth)
    if not references:
        raise ValueError(f"sample {number}: no reference; expected at least one text")
    for what, text in (("prediction", prediction), *(("reference", r) for r in references)):
        if not isinstance(text, str):
            raise ValueError(f"sample {number}: {what} is {type(text).__name__}, expected a text")
    return references
