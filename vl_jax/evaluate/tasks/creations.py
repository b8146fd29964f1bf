"""Creations: are the pictures and sounds that a head makes taken for what was asked for, and are they new?

    text of a sample --head that makes--> picture --head of classes--> class, which should be the sample's
                                             '--nearest training picture--> distance

The judge is a head of classes of the same model, on a tower that sees the tile. What it says of the samples'
own pictures stands beside as ``real_...``, for a judge that errs on real pictures limits what can be reached.
Distances are those of ``nearest_distances``; those of the samples' own pictures, which training has not seen,
show how near two different pictures come.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Generator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image as PilImage

from vl_jax.batch import Batch
from vl_jax.data.encode import Encoder, make_encoder
from vl_jax.data.sample import IMAGE_PLACEHOLDER, TEXT, Sample, Turn
from vl_jax.evaluate.metrics.classification import LabelScores
from vl_jax.evaluate.metrics.copies import nearest_distances
from vl_jax.evaluate.task import Examinee, Findings, Matrix, Record
from vl_jax.heads.image.flow import NOISE
from vl_jax.moe.stacks import RoutingState

_SHARES = ("balanced_accuracy", "accuracy")


@dataclasses.dataclass(frozen=True)
class Creations:
    """What is made for every sample that has a class and a picture, judged by a head of classes.

    The head that makes says ``shown(prediction of a row) -> picture``: what the judge sees.
    """

    head: str = "picture"  # that makes
    judge: str = "label"  # the head of classes, which reads tiles
    copy: float | None = 0.05  # pictures nearer to a training picture are copies; None: nothing is compared
    seed: int = 0  # of the noise

    @property
    def headline(self) -> str:
        """The mean over the classes of the share that is taken for what was asked for."""
        return "balanced_accuracy"

    def run(self, examinee: Examinee) -> Generator[Record, None, Findings]:
        """Goes through the source once.

        Raises:
          ValueError: the model has no such head, or no sample has a class and a picture.
        """
        config: Any = examinee.layout.model.config
        head, classes = config.head(self.head), config.head(self.judge).classes
        encoder = make_encoder(examinee.data, examinee.spec)
        made, real = (_Judged(classes) for _ in range(2))
        for number, (records, batch) in enumerate(examinee.samples()):
            said = self._make(examinee, batch, self.seed + number)
            pictures = [head.shown(_row(said, row)) for row in range(len(records))]
            judged = self._judge(examinee, _instead(batch, pictures, encoder))
            judged_real, label = self._judge(examinee, batch), batch.labels[self.judge]
            for row, record in enumerate(records):
                if not label.present[row] or record["image"] is None:
                    continue
                truth = int(label.values[row])
                made.update(pictures[row], truth, int(judged[row]))
                own = record["image"].resize(pictures[row].size, PilImage.Resampling.BOX)
                real.update(own, truth, int(judged_real[row]))
                yield {
                    "id": record["id"],
                    "question": record["question"],
                    "answer": classes[truth],
                    "prediction": classes[int(judged[row])],
                    "correct": bool(truth == judged[row]),
                    "image": pictures[row],
                }
        if not made.pictures:
            raise ValueError(
                f"{examinee.source}: no sample has a class for head {self.judge!r} and a picture"
            )
        matrix = Matrix("Made", classes, classes, made.confusion.tolist(), "asked for", "taken for")
        scores = made.scores() | {f"real_{name}": value for name, value in real.scores().items()}
        shares = (*_SHARES, *(f"real_{name}" for name in _SHARES))
        if self.copy is not None:
            known = self._known(examinee)
            scores |= made.copies(known, self.copy)
            scores |= {f"real_{name}": value for name, value in real.copies(known, self.copy).items()}
            shares = (*shares, "copy_rate", "real_copy_rate")
        return Findings(scores | {"count": len(made.pictures)}, shares=shares, matrices=(matrix,))

    def _make(self, examinee: Examinee, batch: Batch, seed: int) -> Any:
        make = _making(examinee.layout.model, self.head)
        return examinee.apply(functools.partial(make, np.uint32(seed)), batch)

    def _judge(self, examinee: Examinee, batch: Batch) -> np.ndarray:
        """The class that the judge sees on every row's tile."""
        return np.argmax(examinee.apply(_judging(examinee.layout.model, self.judge), batch), axis=-1)

    def _known(self, examinee: Examinee) -> UInt8[np.ndarray, "N s s c"]:
        """The pictures of the training sources, as the head reads them."""
        found = []
        extent = dataclasses.replace(examinee.extent, limit=0)
        for source in examinee.data.sources:
            of_source = dataclasses.replace(examinee, source=source.name, extent=extent)
            for records, batch in of_source.samples():
                label = batch.labels[self.head]
                found += [label.values[row] for row in range(len(records)) if label.present[row]]
        return np.stack(found)


class _Judged:
    """Pictures, what they should be, and what they are taken for."""

    def __init__(self, classes: tuple[str, ...]):
        self._labels, self.pictures = LabelScores(classes), list[PilImage.Image]()

    def update(self, picture: PilImage.Image, truth: int, said: int) -> None:
        """Counts one picture."""
        self.pictures.append(picture)
        self._labels.update(truth, said)

    @property
    def confusion(self) -> np.ndarray:
        """Shares of each class, in rows."""
        counts = self._labels.confusion
        return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)

    def scores(self) -> dict[str, float]:
        """How often they are taken for what they should be."""
        found = self._labels.compute()
        return {name: found[name] for name in _SHARES}

    def copies(self, known: UInt8[np.ndarray, "N s s c"], copy: float) -> dict[str, float]:
        """How near they come to known pictures."""
        distances = nearest_distances(np.stack([np.asarray(picture) for picture in self.pictures]), known)
        return {
            "copy_rate": float(np.mean(distances < copy)),
            "nearest_distance": float(np.mean(distances)),
        }


def _instead(batch: Batch, pictures: list[PilImage.Image], encoder: Encoder) -> Batch:
    """The batch with pictures in place of the first tiles of its first rows, read as files are."""
    tiles = np.array(batch.tiles)
    for row, picture in enumerate(pictures):
        turn = Turn(IMAGE_PLACEHOLDER, "", kind=TEXT)
        tiles[row, 0] = encoder.example(Sample("made", (turn,), (lambda shown=picture: shown,))).tiles[0]
    return dataclasses.replace(batch, tiles=tiles)


def _row(said: Any, row: int) -> Any:
    return jax.tree.map(lambda x: x[row], said)


@functools.cache
def _judging(model: nn.Module, head: str) -> Any:
    """The scores of the classes, f32[B K]."""

    def run(variables: Any, state: RoutingState, batch: Batch) -> jax.Array:
        output: Any = model.apply(variables, batch, state)
        return output.predictions[head]

    return jax.jit(run)


@functools.cache
def _making(model: nn.Module, head: str) -> Any:
    """What a head makes of every row, from the noise of a seed."""

    def run(seed: jax.Array, variables: Any, state: RoutingState, batch: Batch) -> Any:
        output: Any = model.apply(variables, batch, state, rngs={NOISE: jax.random.key(seed)})
        return output.predictions[head]

    return jax.jit(run)
