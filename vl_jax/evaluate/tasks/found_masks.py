"""Found masks: what a head of instances says of every picture, against its true masks and boxes.

Both are compared in pixels of the tile that the model sees. Overlaps in pixels of the picture differ by what
is lost at the edges of masks, where the tile has fewer pixels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from PIL import Image as PilImage

from vl_jax.batch import Batch
from vl_jax.evaluate.metrics.pixels.detection import DetectionScores
from vl_jax.evaluate.metrics.pixels.instances import InstanceScores, mask_iou
from vl_jax.evaluate.task import Examinee, Findings, Record
from vl_jax.evaluate.tasks.found_boxes import counted
from vl_jax.heads import masks
from vl_jax.heads.detector import Detected, Guesses
from vl_jax.heads.instances import Segmented
from vl_jax.moe.stacks import RoutingState

_SHARES = tuple(f"{of}_{name}" for of in ("mask", "box") for name in ("map_50", "map", "map_75"))


@dataclasses.dataclass(frozen=True)
class FoundMasks:
    """Mean average precision of masks and of boxes: at overlaps of 0.5, 0.5 to 0.95, 0.75, and by class."""

    head: str = "instances"
    headline: str = "mask_map_50"

    def __post_init__(self):
        if self.headline not in _SHARES:
            raise ValueError(f"headline={self.headline!r}: expected one of {', '.join(_SHARES)}")

    def run(self, examinee: Examinee) -> Generator[Record, None, Findings]:
        """Goes through the source once; samples without a label are left out.

        Raises:
          ValueError: the model has no such head, or no picture has a true mask.
        """
        model = examinee.layout.model
        head = model.config.head(self.head)
        scores, boxes, count = InstanceScores(), DetectionScores(), 0
        for records, batch in examinee.samples():
            found = examinee.apply(_compiled(model, self.head), batch)
            label = batch.labels[self.head]
            for row, record in enumerate(records):
                if not label.present[row]:
                    continue
                objects = np.asarray(masks.objects_in(label.values[row]), np.float64)
                there = objects[:, 0] >= 0
                objects, kinds = objects[there, 1:], objects[there, 0].astype(int)
                true = np.asarray(masks.masks_in(label.values[row], head.size))[there]
                prediction = jax.tree.map(lambda of, row=row: np.asarray(of[row]), found)
                said, of = head.said_masks(prediction), prediction.found
                used = of.scores > 0
                classes, certain = of.classes[used], of.scores[used]
                scores.update(true, kinds, said, classes, certain)
                boxes.update(objects, kinds, of.boxes[used].astype(np.float64), classes, certain)
                count += 1
                yield self._record(record, head, (true, kinds), prediction, said, batch.tiles[row, 0])
        values, by_class = {}, {name: {} for name in head.classes}
        for of, each in (("mask", scores), ("box", boxes)):
            values |= {f"{of}_{name}": value for name, value in each.compute().items()}
            for kind, found in each.by_class().items():
                by_class[head.classes[kind]] |= {f"{of}_{name}": value for name, value in found.items()}
        by_class = {name: found for name, found in by_class.items() if found}
        shares = tuple(name for name in values if "recall" not in name)
        return Findings(values | {"count": count}, groups={"class": by_class}, shares=shares)

    def _record(
        self, record: Record, head: Any, truth: Any, prediction: Segmented, said: np.ndarray, tile: Any
    ) -> Record:
        """What a picture shows, and what is said of it from ``shown_score`` on."""
        true, kinds = truth
        found = prediction.found
        shown = found.scores[found.scores > 0] >= head.said.shown_score
        classes = found.classes[found.scores > 0][shown]
        right = (mask_iou(true, said[shown]) >= 0.5) & (kinds[:, None] == classes[None])
        return {
            "id": record["id"],
            "question": record["question"],
            "answer": counted([head.classes[k] for k in kinds]),
            "prediction": counted([head.classes[k] for k in classes]),
            "found": int(right.any(axis=1).sum()),
            "image": head.draw(PilImage.fromarray(tile), head.decode(prediction)),
        }


@functools.cache
def _compiled(model: nn.Module, head: str) -> Any:
    """What is said of every row, without what no one reads of it."""

    def run(variables: Any, state: RoutingState, batch: Batch) -> Segmented:
        output: Any = model.apply(variables, batch, state)
        said = output.predictions[head]
        found = Detected(None, Guesses(None, None), None, said.found)
        return said.replace(detected=found)

    return jax.jit(run)
