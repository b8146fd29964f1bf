"""Found boxes: what a detection head says of every picture, against its true boxes.

Boxes are compared in pixels of the picture, as its file has them: what is found on the tile is moved back and
clipped to the picture. So scores are those of other tools, whatever the size and the fit of the tile: objects
that a tile cut from the middle does not show count as missed, and small, medium and large go by sizes in the
picture.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Generator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Float

from vl_jax.batch import Batch
from vl_jax.data.images.spatial import Cut, in_picture, whole
from vl_jax.data.images.tiling import shown
from vl_jax.data.sample import BadSample
from vl_jax.evaluate.metrics.pixels.boxes import box_iou
from vl_jax.evaluate.metrics.pixels.detection import DetectionScores
from vl_jax.evaluate.task import Examinee, Findings, Record
from vl_jax.heads.suppression import Detections
from vl_jax.moe.stacks import RoutingState

_log = logging.getLogger(__name__)
_WIDE = "map_33"  # where a third is enough, as the authors of DeepPCB measure it
_SHARES = ("map_50", "map", "map_75", _WIDE)
DIFFERENCE = "difference"  # the baseline below, before its scores


@dataclasses.dataclass(frozen=True)
class FoundBoxes:
    """Mean average precision at an overlap of 0.5, at 0.5 to 0.95, at 0.33, and of every class.

    With ``difference`` there is a baseline that learns nothing: what the last channel of the tile, the
    difference from a template, shows in patches of bright pixels. It knows no classes, so what it finds is
    compared with the true boxes without their classes, and so is the model: ``located_map_50`` and others.
    """

    head: str = "boxes"
    headline: str = "map_50"
    difference: int = 0  # grey level from which a pixel of the last channel differs; 0: no such baseline
    margin: int = 4  # pixels by which the baseline widens a patch on each side; those that then meet are one

    def __post_init__(self):
        if self.headline not in _SHARES:
            raise ValueError(f"headline={self.headline!r}: expected one of {', '.join(_SHARES)}")
        if not 0 <= self.difference <= 255 or self.margin < 0:
            raise ValueError(f"difference={self.difference} must be in 0..255, margin={self.margin} >= 0")

    def run(self, examinee: Examinee) -> Generator[Record, None, Findings]:
        """Goes through the source once; samples without a label are left out.

        Raises:
          ValueError: the model has no such head, or no picture has a true box.
        """
        model = examinee.layout.model
        head = model.config.head(self.head)
        scores, located, baseline, count = DetectionScores(), DetectionScores(), DetectionScores(), 0
        for records, batch in examinee.samples():
            found = examinee.apply(_compiled(model, self.head), batch)
            label = batch.labels[self.head]
            for row, record in enumerate(records):
                if not label.present[row]:
                    continue
                size = record["image"].size
                cut = shown(size, examinee.data.tiling)
                try:
                    objects = _truth(head, record)
                except BadSample as error:  # beyond the edge of the tile, or it would not be here
                    _log.warning("skipped a sample: %s", error)
                    continue
                said = _moved(_row(found, row), cut, size)
                _update(scores, objects[:, 1:], objects[:, 0], said, said.classes)
                if self.difference:
                    nothing = np.zeros(len(objects))
                    _update(located, objects[:, 1:], nothing, said, np.zeros(len(said.scores)))
                    patches = patches_of(batch.tiles[row, 0, ..., -1], self.difference, self.margin)
                    patches = _moved(patches, cut, size)
                    _update(baseline, objects[:, 1:], nothing, patches, patches.classes)
                count += 1
                yield self._record(record, head, objects, said)
        by_class = {head.classes[k]: values for k, values in scores.by_class().items()}
        values = _scores(scores)
        if self.difference:
            of = {"located": located, f"{DIFFERENCE}_located": baseline}
            values |= {f"{name}_{key}": v for name, s in of.items() for key, v in _scores(s).items()}
        shares = tuple(name for name in values if not name.startswith("recall"))
        return Findings(values | {"count": count}, groups={"class": by_class}, shares=shares)

    def _record(self, record: Record, head: Any, objects: Any, said: Detections) -> Record:
        """What a picture shows, and what is said of it from ``shown_score`` on."""
        truth = [head.classes[int(k)] for k in objects[:, 0]]
        listed = [
            {"label": head.classes[int(k)], "score": float(s), "box": b.tolist()}
            for b, s, k in zip(said.boxes, said.scores, said.classes, strict=True)
        ]
        shown = [entry for entry in listed if entry["score"] >= head.said.shown_score]
        overlaps = box_iou(objects[:, 1:], np.array([e["box"] for e in shown]).reshape(-1, 4))
        alike = np.array([[k == e["label"] for e in shown] for k in truth], bool).reshape(overlaps.shape)
        return {
            "id": record["id"],
            "question": record["question"],
            "answer": counted(truth),
            "prediction": counted([entry["label"] for entry in shown]),
            "found": int(((overlaps >= 0.5) & alike).any(axis=1).sum()),
            "image": head.draw(record["image"], listed),
        }


def patches_of(level: Float[np.ndarray, "h w"] | np.ndarray, threshold: int, margin: int) -> Detections:
    """Boxes around patches of pixels that are bright, with those beside them; the largest is the surest.

    Args:
      level: grey levels.
      threshold: of a pixel that is bright.
      margin: pixels by which each box is wider on each side, up to the edge. Boxes that then meet become one.
    """
    height, width = level.shape
    boxes = [
        [max(x0 - margin, 0), max(y0 - margin, 0), min(x1 + margin, width), min(y1 + margin, height)]
        for x0, y0, x1, y1 in _runs(level >= threshold)
    ]
    joined: list[list[int]] = []
    while boxes:
        box = boxes.pop()
        meets = [b for b in joined if b[0] <= box[2] and box[0] <= b[2] and b[1] <= box[3] and box[1] <= b[3]]
        if not meets:
            joined.append(box)
            continue
        joined = [b for b in joined if b not in meets]
        x0, y0, x1, y1 = zip(box, *meets, strict=True)
        boxes.append([min(x0), min(y0), max(x1), max(y1)])
    corners = np.array(sorted(joined), np.float64).reshape(-1, 4)
    areas = np.prod(corners[:, 2:] - corners[:, :2], axis=1)
    return Detections(corners, areas / (height * width), np.zeros(len(corners)))


def _runs(bright: np.ndarray) -> list[tuple[int, int, int, int]]:
    """A box for each run of bright pixels in a row."""
    steps = np.diff(np.pad(bright, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(steps == 1)
    ends = np.nonzero(steps == -1)[1]
    return [(int(x0), int(y), int(x1), int(y) + 1) for y, x0, x1 in zip(rows, starts, ends, strict=True)]


def _row(found: Detections, row: int) -> Detections:
    """The boxes of one row, without places that hold none."""
    there = np.asarray(found.scores[row]) > 0
    boxes, scores, classes = (np.asarray(x)[row][there] for x in (found.boxes, found.scores, found.classes))
    return Detections(boxes.astype(np.float64), scores, classes)


def _truth(head: Any, record: Record) -> Float[np.ndarray, "n 5"]:
    """Classes and corners of the objects of a sample, in pixels of its picture.

    Raises:
      BadSample: one is of no class that the head knows.
    """
    return head.objects(whole(record["labels"][head.field]).boxes, f"sample {record['id']}: {head.field}")


def _moved(found: Detections, cut: Cut, size: tuple[int, int]) -> Detections:
    """What was found on the tile, in pixels of the picture."""
    return Detections(in_picture(cut, found.boxes, size), found.scores, found.classes)


def _update(scores: DetectionScores, true: Any, labels: Any, said: Detections, said_labels: Any) -> None:
    scores.update(true, labels.astype(int), said.boxes, said_labels.astype(int), said.scores)


def _scores(scores: DetectionScores) -> dict[str, float]:
    return scores.compute() | {_WIDE: scores.at(0.33)}


def counted(names: list[str]) -> str:
    """How many there are of each, in alphabetical order."""
    return ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names))) or "nothing"


@functools.cache
def _compiled(model: nn.Module, head: str) -> Any:
    """What is said of every row."""

    def run(variables: Any, state: RoutingState, batch: Batch) -> Detections:
        output: Any = model.apply(variables, batch, state)
        return output.predictions[head].found

    return jax.jit(run)
