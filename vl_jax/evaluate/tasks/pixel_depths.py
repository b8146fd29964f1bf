"""Depths of pixels: how far a depth head says that every pixel is, against how far it is."""

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
from vl_jax.evaluate.metrics.pixels.depth import Alignment, DepthScores
from vl_jax.evaluate.task import Examinee, Findings, Record
from vl_jax.moe.stacks import RoutingState

_FLOOR = 1e-3  # the smallest true depth that counts


@dataclasses.dataclass(frozen=True)
class PixelDepths:
    """Errors of depth in pixels of the tiles; names of scores say what counts (see ``DepthScores``)."""

    head: str = "depth"
    cap: float = 10.0  # the largest true depth that counts
    alignment: Alignment = "none"  # what is done to each prediction first
    pooled: bool = False  # all pixels of the source count alike, not all pictures

    def __post_init__(self):
        self._scores()  # which checks the limits

    @property
    def headline(self) -> str:
        """The mean relative error."""
        return f"abs_rel{self._scores().suffix}"

    def run(self, examinee: Examinee) -> Generator[Record, None, Findings]:
        """Goes through the source once; samples without a pixel that counts are left out.

        Raises:
          ValueError: the model has no such head, or no sample has a depth that counts.
        """
        model, scores, count = examinee.layout.model, self._scores(), 0
        head = model.config.head(self.head)
        for records, batch in examinee.samples():
            found = examinee.apply(_compiled(model, self.head), batch)
            label = batch.labels[self.head]
            for row, record in enumerate(records):
                truth, depth = label.values[row], 1 / found[row]
                counted = (truth >= _FLOOR) & (truth <= self.cap)
                if not label.present[row] or not counted.any():
                    continue
                scores.update(truth, depth)
                count += 1
                yield {
                    "id": record["id"],
                    "question": record["question"],
                    "answer": _told(truth[counted]),
                    "prediction": _told(depth[counted]),
                    "image": head.draw(PilImage.fromarray(batch.tiles[row, 0]), head.decode(found[row])),
                }
        if not count:
            raise ValueError(
                f"{examinee.source}: no sample has a depth up to cap={self.cap:g} for head {self.head!r}"
            )
        shares = tuple(f"delta_{k}{scores.suffix}" for k in (1, 2, 3))
        return Findings(scores.compute() | {"count": count}, shares=shares)

    def _scores(self) -> DepthScores:
        return DepthScores(cap=self.cap, floor=_FLOOR, alignment=self.alignment, pooled=self.pooled)


def _told(depth: np.ndarray) -> str:
    return f"{depth.min():.3g} to {depth.max():.3g}, median {np.median(depth):.3g}"


@functools.cache
def _compiled(model: nn.Module, head: str) -> Any:
    """The disparity of every pixel, f32[B s s]."""

    def run(variables: Any, state: RoutingState, batch: Batch) -> jax.Array:
        output: Any = model.apply(variables, batch, state)
        return output.predictions[head]

    return jax.jit(run)
