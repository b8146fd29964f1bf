"""Mean average precision of detected boxes, as COCO measures it, by faster-coco-eval.

    AP of a class: the mean of the best precision at 101 recalls; mean over overlaps of 0.5 to 0.95, and
    classes

At most the 100 most certain boxes of a picture count, and crowds are neither right nor wrong. Boxes read
from a text have no certainty: give the mean log probability of their tokens, or one constant, and say
which. VOC's 11-point AP is another number. As precision is over all pictures, there are no values by
sample. Of masks, see ``instances``. Source: Lin et al., "Microsoft COCO", 2014.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from vl_jax.evaluate.metrics.extra import needed

# In the order of the package's figures; those of a size that no true box has are left out.
_NAMES = (
    *("map", "map_50", "map_75", "map_small", "map_medium", "map_large"),
    *("recall_1", "recall_10", "recall_100", "recall_small", "recall_medium", "recall_large"),
)


class AveragePrecision:
    """Collects the true and the detected objects of pictures, and scores them together.

    Args:
      kind: what of them is compared, as COCO names it.
    """

    def __init__(self, kind: Literal["bbox", "segm"]):
        needed("faster_coco_eval", by="mAP")
        self._kind = kind
        self._what = {"bbox": "box", "segm": "mask"}[kind]
        self._images = 0
        self._pictures: list[dict[str, Any]] = []
        self._truths: list[dict[str, Any]] = []
        self._detections: list[dict[str, Any]] = []

    def take(
        self,
        true: Sequence[Mapping[str, Any]],
        labels: Int[np.ndarray, " L"],
        said: Sequence[Mapping[str, Any]],
        said_labels: Int[np.ndarray, " K"],
        said_scores: Float[np.ndarray, " S"],
        crowd: Bool[np.ndarray, " C"] | None,
        picture: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Takes one picture; COCO's fields are given of it and of its objects. See ``DetectionScores``."""
        crowds = np.zeros(len(true), bool) if crowd is None else crowd
        lengths = (
            (len(true), len(labels), len(crowds)),
            (len(said), len(said_labels), len(said_scores)),
        )
        if any(len(set(of_side)) > 1 for of_side in lengths):
            what = "boxes" if self._kind == "bbox" else "masks"
            raise ValueError(f"picture {self._images}: {what}, labels and scores differ in length: {lengths}")
        if not np.isfinite(said_scores).all():
            raise ValueError(f"picture {self._images}: a score is not finite")
        for of, label, many in zip(true, labels, crowds, strict=True):
            entry = {"id": len(self._truths) + 1, "iscrowd": int(many)}
            self._truths.append({**of, **self._whose(label), **entry})
        for of, label, score in zip(said, said_labels, said_scores, strict=True):
            self._detections.append({**of, **self._whose(label), "score": float(score)})
        self._images += 1
        self._pictures.append({**picture, "id": self._images})

    def _whose(self, label: Any) -> dict[str, int]:
        return {"image_id": self._images + 1, "category_id": int(label)}

    def compute(self) -> dict[str, float]:
        """``map``, ``map_50``, ``map_75``, by size, and mean recalls of the 1, 10 and 100 most certain boxes.

        Raises:
          ValueError: no picture has a true object that is no crowd.
        """
        found = self._evaluated()
        found.summarize()
        return {name: float(value) for name, value in zip(_NAMES, found.stats, strict=False) if value > -1}

    def at(self, overlap: float) -> float:
        """The mean average precision where one is right that overlaps the true one by ``overlap`` alone.

        Raises:
          ValueError: no picture has a true object that is no crowd.
        """
        return _mean(self._evaluated((overlap,)).eval["precision"][..., 0, -1])

    def by_class(self) -> dict[int, dict[str, float]]:
        """``map`` and ``map_50`` of every class that has a true object that is no crowd; raises as ``at``."""
        found = self._evaluated()
        precision = found.eval["precision"][..., 0, -1]  # [overlaps recalls classes]
        values = {
            int(label): {"map": _mean(precision[..., k]), "map_50": _mean(precision[0, :, k])}
            for k, label in enumerate(found.params.catIds)
        }
        return {label: scores for label, scores in values.items() if scores["map"] > -1}

    def _evaluated(self, overlaps: Sequence[float] = ()) -> Any:
        """All objects compared, at COCO's overlaps or at these."""
        if all(truth["iscrowd"] for truth in self._truths):
            raise ValueError(f"mAP: no true {self._what} in {self._images} picture(s)")
        coco: Any = needed("faster_coco_eval", by="mAP")
        known = {t["category_id"] for t in self._truths}  # a class without a true object has no precision
        shared = {
            "images": self._pictures,
            "categories": [{"id": label} for label in sorted(known)],
        }
        truth = coco.COCO({**shared, "annotations": self._truths})
        # Copies, as the package adds fields that it reads itself when it is asked again.
        detections = [dict(d) for d in self._detections if d["category_id"] in known]
        said = truth.loadRes(detections) if detections else coco.COCO({**shared, "annotations": []})
        found = coco.COCOeval_faster(truth, said, self._kind, print_function=lambda *_: None)
        if overlaps:
            found.params.iouThrs = np.array(overlaps)
        found.evaluate()
        found.accumulate()
        return found


class DetectionScores(AveragePrecision):
    """Scores of boxes."""

    def __init__(self):
        super().__init__("bbox")

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
        for what, corners in (("true", boxes), ("detected", said_boxes)):
            wrong = ~np.isfinite(corners).all(axis=1) | (corners[:, 2:] < corners[:, :2]).any(axis=1)
            if wrong.any():
                box = corners[np.argmax(wrong)].tolist()
                raise ValueError(f"picture {self._images}: {what} box {box}: expected x0 <= x1 and y0 <= y1")
        true, said = [_size(box) for box in boxes], [_size(box) for box in said_boxes]
        self.take(true, labels, said, said_labels, said_scores, crowd)


def _size(box: Float[np.ndarray, "4"]) -> dict[str, Any]:
    x0, y0, x1, y1 = map(float, box)
    return {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}


def _mean(precision: Float[np.ndarray, "..."]) -> float:
    """Over what is known; -1 if nothing is."""
    known = precision[precision > -1]
    return float(known.mean()) if known.size else -1.0
