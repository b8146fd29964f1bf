"""Metrics that need more than references: ``needs`` names the facts of a question that ``update`` takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from vl_jax.data.text.grounding import GRID
from vl_jax.evaluate.metrics.per_sample import PerSample, references_of
from vl_jax.evaluate.metrics.pixels.boxes import BoxAccuracy, BoxScores, first_box
from vl_jax.evaluate.metrics.text.circular import CircularScores
from vl_jax.evaluate.metrics.text.ocrbench import OCRBenchScores


@dataclasses.dataclass(frozen=True)
class OCRBench:
    """OCRBench's share and number of points, and the mean length of the answers."""

    name: str = "ocrbench"

    @property
    def scores(self) -> tuple[str, ...]:
        """The names of the scores beside points by group."""
        return "ocrbench", "answer_length", "points"

    @property
    def shares(self) -> tuple[str, ...]:
        """The score that is a share of one."""
        return ("ocrbench",)

    @property
    def needs(self) -> tuple[str, ...]:
        """The facts of a question that ``update`` takes."""
        return ("category",)

    def start(self) -> OCRBenchScores:
        """No answers yet."""
        return OCRBenchScores()


@dataclasses.dataclass(frozen=True)
class Circular:
    """MMBench's circular evaluation; see ``metrics.text.circular``."""

    name: str = "circular"
    reading: Literal["vlmevalkit", "strict"] = "vlmevalkit"  # how an answer is read, see ``read_option``

    @property
    def scores(self) -> tuple[str, ...]:
        """The names of all scores."""
        return "circular", "vanilla", "unreadable"

    @property
    def needs(self) -> tuple[str, ...]:
        """The facts of a question that ``update`` takes."""
        return "whole", "options"

    def start(self) -> Rotations:
        """No answers yet."""
        return Rotations(self.reading)


class Rotations:
    """Collects the answers to questions under rotations.

    Args:
      reading: how an answer is read.
    """

    def __init__(self, reading: Literal["vlmevalkit", "strict"] = "vlmevalkit"):
        self._found = CircularScores()
        self._reading: Literal["vlmevalkit", "strict"] = reading

    def update(
        self,
        truth: str | Sequence[str],
        prediction: str,
        *,
        whole: str,
        options: Mapping[str, str],
        cluster: str | None = None,
    ) -> None:
        """Takes one question under one rotation: the letter that is right, and what was answered.

        Args:
          whole: names the question, whatever its rotation.
          options: text by letter, as rotated.
        """
        (letter, *_) = references_of(truth, prediction, 0)
        self._found.update(whole, options, letter, prediction, reading=self._reading, cluster=cluster)

    def samples(self) -> dict[str, PerSample]:
        """See ``CircularScores``."""
        return self._found.samples()

    def compute(self) -> dict[str, float]:
        """See ``CircularScores``."""
        return self._found.compute()


@dataclasses.dataclass(frozen=True)
class PhraseBoxes:
    """RefCOCO's accuracy: the first box of an answer, on the grid of the model, against the true one.

    ``grid``: ``999`` and ``1000``: whole numbers from 0 to that over the picture, ``share``: of its width and
    height, ``pixels``: as the picture is in its file.
    """

    name: str = "box_accuracy"
    threshold: float = 0.5  # of the overlap that is right
    grid: Literal["999", "1000", "share", "pixels"] = "999"  # of the boxes that the model writes

    def __post_init__(self):
        BoxAccuracy(self.name, self.threshold)  # its rules are these

    @property
    def scores(self) -> tuple[str, ...]:
        """The names of all scores."""
        return BoxAccuracy(self.name).scores

    @property
    def needs(self) -> tuple[str, ...]:
        """The facts of a question that ``update`` takes."""
        return "width", "height"

    def start(self) -> WrittenBoxes:
        """No answers yet."""
        return WrittenBoxes(self)


class WrittenBoxes:
    """Collects answers with boxes.

    Args:
      config: of the metric.
    """

    def __init__(self, config: PhraseBoxes):
        self._config, self._found, self._count = config, BoxScores(config.threshold), 0

    def update(
        self,
        truth: str | Sequence[str],
        prediction: str,
        *,
        width: int,
        height: int,
        cluster: str | None = None,
    ) -> None:
        """Takes one phrase.

        Args:
          truth: its box in pixels, as a text with four numbers in brackets.
          prediction: what was answered.
          width, height: of the picture, in pixels.

        Raises:
          ValueError: the truth has no box.
        """
        references = references_of(truth, prediction, self._count)
        true_box, said = first_box(references[0]), first_box(prediction)
        if true_box is None:
            raise ValueError(f"sample {self._count}: reference {references[0]!r}: expected a text with a box")
        most = {"999": float(GRID), "1000": 1000.0, "share": 1.0}.get(self._config.grid)
        if said is not None and most is not None:
            x0, y0, x1, y1 = said
            said = (x0 * width / most, y0 * height / most, x1 * width / most, y1 * height / most)
        self._found.update(true_box, said, cluster=cluster)
        self._count += 1

    def samples(self) -> dict[str, PerSample]:
        """Every score, sample by sample; ValueError without a sample."""
        return self._named(self._found.samples())

    def compute(self) -> dict[str, float]:
        """The scores over all samples; ValueError without a sample."""
        return {name: found.score for name, found in self.samples().items()}

    def _named(self, found: Mapping[str, PerSample]) -> dict[str, PerSample]:
        return dict(zip(self._config.scores, found.values(), strict=True))
