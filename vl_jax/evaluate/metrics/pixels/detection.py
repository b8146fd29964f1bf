"""Mean average precision of detected boxes, as COCO measures it, by faster-coco-eval.

    AP of a class: the mean of the best precision at 101 recalls; mean over overlaps of 0.5 to 0.95, and
    classes

At most the 100 most certain boxes of a picture count, and crowds are neither right nor wrong. Boxes read
from a text have no certainty: give the mean log probability of their tokens, or one constant, and say
which. VOC's 11-point AP is another number. As precision is over all pictures, there are no values by
sample. Source: Lin et al., "Microsoft COCO", 2014.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from vl_jax.evaluate.metrics.extra import needed

# In the order of the package's figures; those of a size that no true box has are left out.
_NAMES = (
    *("map", "map_50", "map_75", "map_small", "map_medium", "map_large"),
    *("recall_1", "recall_10", "recall_100", "recall_small", "recall_medium", "recall_large"),
)


class DetectionScores:
    """Collects the true and the detected boxes of pictures, and scores them together."""

    def __init__(self):
        needed("faster_coco_eval", by="mAP")
        self._images = 0
        self._truths: list[dict[str, Any]] = []
        self._detections: list[dict[str, Any]] = []

    def update(
        self,
        boxes: Float[np.ndarray, "N 4"],
        labels: Int[np.ndarray, " L"],
        said_boxes: Float[np.ndarray, "M 4"],
        said_labels: Int[np.ndarray, " K"],
        said_scores: Float[np.ndarray, " S"],
        *,
        crowd: Bool[np.ndarray, " C"] | None = None,
    ) -> None:
        """Takes one picture; N, L and C are one number, and so are M, K and S.

        Args:
          boxes: true corners x0, y0, x1, y1 in pixels. The size of a box, small or large, is its area.
          labels: their classes, from 0.
          said_boxes: detected, of the same form.
          said_labels: their classes.
          said_scores: how certain each is; only their order counts.
          crowd: true boxes that stand for many objects.

        Raises:
          ValueError: lengths differ, a number is not finite, or a box is inside out; the picture is named.
        """
        crowds = np.zeros(len(boxes), bool) if crowd is None else crowd
        lengths = (
            (len(boxes), len(labels), len(crowds)),
            (len(said_boxes), len(said_labels), len(said_scores)),
        )
        if any(len(set(of_side)) > 1 for of_side in lengths):
            raise ValueError(f"picture {self._images}: boxes, labels and scores differ in length: {lengths}")
        for what, corners in (("true", boxes), ("detected", said_boxes)):
            wrong = ~np.isfinite(corners).all(axis=1) | (corners[:, 2:] < corners[:, :2]).any(axis=1)
            if wrong.any():
                box = corners[np.argmax(wrong)].tolist()
                raise ValueError(f"picture {self._images}: {what} box {box}: expected x0 <= x1 and y0 <= y1")
        if not np.isfinite(said_scores).all():
            raise ValueError(f"picture {self._images}: a score is not finite")
        for box, label, many in zip(boxes, labels, crowds, strict=True):
            entry = self._entry(box, int(label)) | {"id": len(self._truths) + 1, "iscrowd": int(many)}
            self._truths.append(entry)
        for box, label, score in zip(said_boxes, said_labels, said_scores, strict=True):
            self._detections.append(self._entry(box, int(label)) | {"score": float(score)})
        self._images += 1

    def _entry(self, box: np.ndarray, label: int) -> dict[str, Any]:
        x0, y0, x1, y1 = map(float, box)
        size = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
        return {"image_id": self._images + 1, "category_id": label, **size}

    def compute(self) -> dict[str, float]:
        """``map``, ``map_50``, ``map_75``, by size, and mean recalls of the 1, 10 and 100 most certain boxes.

        Raises:
          ValueError: no picture has a true box that is no crowd.
        """
        found = self._evaluated()
        found.summarize()
        return {name: float(value) for name, value in zip(_NAMES, found.stats, strict=False) if value > -1}

    def at(self, overlap: float) -> float:
        """The mean average precision where a box is right that overlaps the true one by ``overlap`` alone.

        Raises:
          ValueError: no picture has a true box that is no crowd.
        """
        return _mean(self._evaluated((overlap,)).eval["precision"][..., 0, -1])

    def by_class(self) -> dict[int, dict[str, float]]:
        """``map`` and ``map_50`` of every class that has a true box that is no crowd; raises as ``at``."""
        found = self._evaluated()
        precision = found.eval["precision"][..., 0, -1]  # [overlaps recalls classes]
        values = {
            int(label): {"map": _mean(precision[..., k]), "map_50": _mean(precision[0, :, k])}
            for k, label in enumerate(found.params.catIds)
        }
        return {label: scores for label, scores in values.items() if scores["map"] > -1}

    def _evaluated(self, overlaps: Sequence[float] = ()) -> Any:
        """All boxes compared, at COCO's overlaps or at these."""
        if all(truth["iscrowd"] for truth in self._truths):
            raise ValueError(f"mAP: no true box in {self._images} picture(s)")
        coco: Any = needed("faster_coco_eval", by="mAP")
        known = {t["category_id"] for t in self._truths}  # a class without a true box has no precision
        shared = {
            "images": [{"id": number + 1} for number in range(self._images)],
            "categories": [{"id": label} for label in sorted(known)],
        }
        truth = coco.COCO({**shared, "annotations": self._truths})
        detections = [d for d in self._detections if d["category_id"] in known]
        said = truth.loadRes(detections) if detections else coco.COCO({**shared, "annotations": []})
        found = coco.COCOeval_faster(truth, said, "bbox", print_function=lambda *_: None)
        if overlaps:
            found.params.iouThrs = np.array(overlaps)
        found.evaluate()
        found.accumulate()
        return found


def _mean(precision: Float[np.ndarray, "..."]) -> float:
    """Over what is known; -1 if nothing is."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else -1.0
