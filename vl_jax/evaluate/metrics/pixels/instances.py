"""Mean average precision of masks of objects, as COCO measures it: as of boxes, but masks overlap.

The size of an object, small or large, is the number of its pixels. See ``detection``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from vl_jax.evaluate.metrics.extra import needed
from vl_jax.evaluate.metrics.pixels.detection import AveragePrecision


class InstanceScores(AveragePrecision):
    """Scores of masks."""

    def __init__(self):
        super().__init__("segm")

    def update(
        self,
        masks: Bool[np.ndarray, "N h w"],
        labels: Int[np.ndarray, " L"],
        said_masks: Bool[np.ndarray, "M y x"],
        said_labels: Int[np.ndarray, " K"],
        said_scores: Float[np.ndarray, " S"],
        *,
        crowd: Bool[np.ndarray, " C"] | None = None,
    ) -> None:
        """Takes one picture; N, L and C are one number, and so are M, K and S.

        Args:
          masks: of the true objects.
          labels: their classes, from 0.
          said_masks: detected, of the same size.
          said_labels: their classes.
          said_scores: how certain each is; only their order counts.
          crowd: true masks that stand for many objects.

        Raises:
          ValueError: lengths or sizes differ, or a score is not finite; the picture is named.
        """
        if masks.shape[1:] != said_masks.shape[1:]:
            sizes = f"{list(masks.shape[1:])} and {list(said_masks.shape[1:])}"
            raise ValueError(f"picture {self._images}: true and detected masks differ in size: {sizes}")
        true = [_coded(mask) | {"area": int(mask.sum())} for mask in masks]
        said = [_coded(mask) for mask in said_masks]
        picture = {"height": masks.shape[1], "width": masks.shape[2]}
        self.take(true, labels, said, said_labels, said_scores, crowd, picture)


def _coded(mask: Bool[np.ndarray, "h w"]) -> dict[str, Any]:
    """A mask as the package holds it."""
    codec: Any = needed("faster_coco_eval.core.mask", by="mAP")
    return {"segmentation": codec.encode(np.asfortranarray(mask, np.uint8))}


def mask_iou(one: Bool[np.ndarray, "N h w"], other: Bool[np.ndarray, "M h w"]) -> Float[np.ndarray, "N M"]:
    """Share of the common pixels among those of either; 0 of two masks without any."""
    a, b = (
        masks.reshape(len(masks), math.prod(masks.shape[1:])).astype(np.float32) for masks in (one, other)
    )
    common = a @ b.T
    union = a.sum(axis=1)[:, None] + b.sum(axis=1)[None] - common
    return common / np.maximum(union, 1.0)
