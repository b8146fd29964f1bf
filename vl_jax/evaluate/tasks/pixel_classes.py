"""Classes of pixels: what a segmentation head says of every picture, against its map of classes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image as PilImage

from vl_jax.batch import Batch
from vl_jax.evaluate.metrics.pixels.segmentation import SegmentationScores
from vl_jax.evaluate.task import Examinee, Findings, Matrix, Record
from vl_jax.moe.stacks import RoutingState

_SHARES = ("mean_iou", "pixel_accuracy")


@dataclasses.dataclass(frozen=True)
class PixelClasses:
    """The mean IoU over classes, and the IoU of each, in pixels of the tiles that the model sees."""

    head: str = "mask"
    headline: str = "mean_iou"

    def __post_init__(self):
        if self.headline not in _SHARES:
            raise ValueError(f"headline={self.headline!r}: expected one of {', '.join(_SHARES)}")

    def run(self, examinee: Examinee) -> Generator[Record, None, Findings]:
        """Goes through the source once; samples without a map are left out, and so are pixels of 255.

        Raises:
          ValueError: the model has no such head, or no sample has a map.
        """
        model = examinee.layout.model
        head = model.config.head(self.head)
        classes, scores, count = head.classes, SegmentationScores(len(head.classes)), 0
        for records, batch in examinee.samples():
            found = examinee.apply(_compiled(model, self.head), batch)
            label = batch.labels[self.head]
            for row, record in enumerate(records):
                if not label.present[row]:
                    continue
                truth, said = label.values[row], found[row]
                scores.update(truth, said)
                count += 1
                counted = truth != 255
                yield {
                    "id": record["id"],
                    "question": record["question"],
                    "answer": _listed(truth[counted], classes),
                    "prediction": _listed(said[counted], classes),
                    "pixel_accuracy": round(float(np.mean(truth[counted] == said[counted])), 4),
                    "image": head.draw(PilImage.fromarray(batch.tiles[row, 0]), head.say(said)),
                }
        if not count:
            raise ValueError(f"{examinee.source}: no sample has a map of classes for head {self.head!r}")
        confusion = scores.confusion / np.maximum(scores.confusion.sum(axis=1, keepdims=True), 1)
        by_class = dict(zip(classes, scores.by_class().tolist(), strict=True))
        return Findings(
            scores.compute() | {"count": count},
            groups={"class": {name: {"iou": value} for name, value in by_class.items()}},
            shares=(*_SHARES, "iou"),
            matrices=(Matrix("Confusion", classes, classes, confusion.tolist(), "class", "called"),),
        )


def _listed(found: np.ndarray, classes: tuple[str, ...]) -> str:
    """The classes that pixels are of, the most frequent first."""
    counts = np.bincount(found, minlength=len(classes))
    return ", ".join(classes[i] for i in np.argsort(-counts, kind="stable") if counts[i])


@functools.cache
def _compiled(model: nn.Module, head: str) -> Any:
    """The class of every pixel, u8[B s s]."""

    def run(variables: Any, state: RoutingState, batch: Batch) -> jax.Array:
        output: Any = model.apply(variables, batch, state)
        return jnp.argmax(output.predictions[head], axis=-1).astype(jnp.uint8)

    return jax.jit(run)
