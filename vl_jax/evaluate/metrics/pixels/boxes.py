"""One box for one phrase, as in RefCOCO: right if the box overlaps the true one by half.

    IoU = area of both / area of either;   right if IoU >= 0.5

Overlap does not change when both boxes are stretched along the same axis. So boxes may be in pixels, in
shares of the picture or on the grid of 0..999, as long as both are, and of the same picture: a box on a
padded canvas is another box. An answer without a readable box is wrong, and is counted as malformed.
RefCOCO reports val, testA and testB apart. Source: Yu et al., "Modeling Context in Referring
Expressions", 2016.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from vl_jax.data.text import grounding
from vl_jax.data.text.tokenizer import GROUNDING
from vl_jax.evaluate.metrics.per_sample import PerSample, SampleList, TextScores

_FLOAT = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BRACKET = re.compile(rf"\[{_FLOAT},{_FLOAT},{_FLOAT},{_FLOAT}\]")
# Of lmms-eval: no space before a comma.
_TIGHT = re.compile(r"\[\s*" + r",\s*".join([r"(-?\d+(?:\.\d+)?)"] * 4) + r"\s*\]")
Reading = Literal["first", "lmms_eval"]


def box_iou(one: Float[np.ndarray, "N 4"], other: Float[np.ndarray, "M 4"]) -> Float[np.ndarray, "N M"]:
    """The overlap of every box with every other; two boxes without area have 0.

    Args:
      one: corners x0, y0, x1, y1.
      other: of the same form.
    """
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    common = np.prod(np.clip(high - low, 0, None), axis=-1)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1) for boxes in (one, other)]
    union = areas[0][:, None] + areas[1] - common
    return np.divide(common, union, out=np.zeros_like(common), where=union > 0)


def first_box(text: str, *, reading: Reading = "first") -> tuple[float, float, float, float] | None:
    """The first box of a text, x0, y0, x1, y1; None if there is none whose corners are in order.

    It is looked for between the marks of grounded answers (``grounding.parse``), and where there are no
    marks, in the first brackets with four numbers.

    Args:
      reading: ``lmms_eval``: marks are nothing special, and no space may stand before a comma.
    """
    if reading == "first" and any(mark in text for mark in GROUNDING):
        regions = grounding.parse(text).regions
        return next((box for region in regions for box in region.boxes), None)
    match = (_BRACKET if reading == "first" else _TIGHT).search(text)
    if match is None:
        return None
    x0, y0, x1, y1 = map(float, match.groups())
    return (x0, y0, x1, y1) if x0 <= x1 and y0 <= y1 else None


@dataclasses.dataclass(frozen=True)
class BoxAccuracy:
    """The share of answers whose first box is right, the mean overlap, and the share without a box."""

    name: str = "box_accuracy"
    threshold: float = 0.5  # of the overlap that is right
    reading: Reading = "first"  # how a box is found in an answer, see ``first_box``

    def __post_init__(self):
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}: expected a share above 0 and up to 1")

    @property
    def scores(self) -> tuple[str, ...]:
        """The names of all scores."""
        return self.name, f"{self.name}_iou", f"{self.name}_malformed"

    def start(self) -> TextScores:
        """No answers yet."""
        return TextScores(self.scores, self._score)

    def _score(self, references: Sequence[str], prediction: str) -> dict[str, float]:
        if len(references) != 1 or (truth := first_box(references[0])) is None:
            raise ValueError(f"reference {' / '.join(references)!r}: expected one text with a box")
        said = first_box(prediction, reading=self.reading)
        values = overlap(truth, said, self.threshold)
        return dict(zip(self.scores, values, strict=True))


def overlap(
    truth: Sequence[float], prediction: Sequence[float] | None, threshold: float
) -> tuple[float, float, float]:
    """Whether a box is right, its overlap, and whether it is malformed, which None and a box inside out are.

    Raises:
      ValueError: the true box has no area, or is not four finite numbers.
    """
    true_box = np.asarray(truth, np.float64)
    if true_box.shape != (4,) or not np.isfinite(true_box).all() or not (true_box[2:] > true_box[:2]).all():
        raise ValueError(f"true box {tuple(truth)}: expected x0 < x1 and y0 < y1")
    said = None if prediction is None else np.asarray(prediction, np.float64)
    if said is None or said.shape != (4,) or not np.isfinite(said).all() or (said[2:] < said[:2]).any():
        return 0.0, 0.0, 1.0
    share = float(box_iou(true_box[None], said[None])[0, 0])
    return float(share >= threshold), share, 0.0


class BoxScores:
    """``BoxAccuracy`` of boxes that are numbers, not texts.

    Args:
      threshold: of the overlap that is right.
    """

    def __init__(self, threshold: float = 0.5):
        self._metric = BoxAccuracy(threshold=threshold)
        self._found = SampleList(self._metric.scores)

    def update(
        self, truth: Sequence[float], prediction: Sequence[float] | None, *, cluster: str | None = None
    ) -> None:
        """Takes one phrase: its box x0, y0, x1, y1 and what was said, None for no readable box."""
        try:
            values = overlap(truth, prediction, self._metric.threshold)
        except ValueError as error:
            raise ValueError(f"sample {len(self._found)}: {error}") from None
        self._found.add(dict(zip(self._metric.scores, values, strict=True)), cluster)

    def samples(self) -> dict[str, PerSample]:
        """Every score, sample by sample; ValueError without a sample."""
        return self._found.samples()

    def compute(self) -> dict[str, float]:
        """The scores over all samples; ValueError without a sample."""
        return self._found.compute()
