"""Detection: boxes with classes, from the maps of a stream, without anchors and in one stage.

Stream.maps --detector--> one guess a cell --assignment--> loss = 7.5 box + 0.5 class + 1.5 distance

Which cells learn an object follows from what they say (see ``assignment``). The three losses of a picture are
``1 - CIoU`` weighted by target scores, cross-entropy of every class of every cell, and the distribution focal
loss, or with ``reg_max=1`` the distance between sides as a share of the object's (see ``boxes``).

Each picture's losses are divided by the sum of *its* target scores, 1 at least, and then averaged over
pictures. Published detectors divide by the sum over the whole batch. That sum follows from what the model
says of all rows, which no part of a batch knows: so accumulated and whole batches would differ. By pictures,
the loss is a sum of terms that each follow from one row: sharded, accumulated and whole are the same. The
scale is alike (a batch of equal pictures has the same loss); a crowded picture counts as an empty one does.

With the branch ``one_to_one``, a second pair of towers learns from the same maps, held fixed, with one cell
an object (Wang et al. 2024, YOLOv10, arXiv 2405.14458). What it says needs no suppression of copies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from PIL import Image as PilImage

from vl_jax.batch import Given
from vl_jax.data.images.spatial import Boxes, Cut, in_picture
from vl_jax.data.sample import BadSample, Box, Sample
from vl_jax.data.text import grounding
from vl_jax.fusion.streams import Streams
from vl_jax.heads import decoder
from vl_jax.heads.assignment import Assignment, assign, inside
from vl_jax.heads.boxes import ciou, distribution_focal, sigmoid_focal, to_distances
from vl_jax.heads.detector import Detected, Detector, DetectorConfig, Guesses, SaidConfig

PARTS = ("box", "cls", "dfl")
Parts = dict[str, Float[Array, ""]]
_NOTHING = -1  # class of a place for an object that is not used


@dataclasses.dataclass(frozen=True)
class AssignmentConfig:
    """How cells and objects find one another, see ``assignment``."""

    top_k: int = 10  # cells of an object at most, where many cells learn it
    alpha: float = 0.5  # exponent of the score
    beta: float = 6.0  # exponent of the overlap

    def __post_init__(self):
        if self.top_k < 1 or self.alpha < 0 or self.beta < 0:
            raise ValueError(f"top_k={self.top_k} must be >= 1, alpha={self.alpha} and beta={self.beta} >= 0")


@dataclasses.dataclass(frozen=True)
class Detection:
    """Which objects a picture shows, and where."""

    classes: tuple[str, ...]
    name: str = "boxes"
    stream: str = "image"  # whose maps it reads
    field: str = "boxes"  # name in ``Sample.labels``, a ``Boxes``
    size: int = 320  # pixels on the side of the tile
    network: DetectorConfig = DetectorConfig()
    branch: Literal["nms", "one_to_one"] = "nms"  # whose guesses are said, see above
    most_objects: int = 64  # of a picture; one with more is left out, and counted
    assignment: AssignmentConfig = AssignmentConfig()
    gains: tuple[float, float, float] = (7.5, 0.5, 1.5)  # of the losses of boxes, classes and distances
    focal_gamma: float = 0.0  # of the loss of classes; 0: plain cross-entropy
    said: SaidConfig = SaidConfig()

    def __post_init__(self):
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise ValueError(
                f"classes={self.classes} of head {self.name!r}: expected one or more, all different"
            )
        if self.size < 1 or self.most_objects < 1:
            raise ValueError(
                f"size={self.size}, most_objects={self.most_objects} of head {self.name!r}: must be >= 1"
            )
        if min(self.gains) < 0 or self.focal_gamma < 0:
            raise ValueError(
                f"gains={self.gains}, focal_gamma={self.focal_gamma} of head {self.name!r}: must be >= 0"
            )

    @property
    def inputs(self) -> tuple[str, ...]:
        """The stream it reads."""
        return (self.stream,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Class, x0, y0, x1, y1 of every object."""
        return self.most_objects, 5

    @property
    def dtype(self) -> str:
        """Pixels, and classes as numbers; -1 where there is no object."""
        return "float32"

    def check_tile(self, tile_size: int) -> None:
        """Refuses tiles of another size, by ``ValueError``."""
        decoder.check_tile(self.name, self.size, tile_size)

    def read(self, sample: Sample) -> np.ndarray | None:
        """The objects of the sample in pixels of the tile; a picture without any has an empty label.

        Raises:
          BadSample: the label is something else, has more than ``most_objects`` boxes, a box of no known
            class, or one that is no finite rectangle with an area.
        """
        label = sample.labels.get(self.field)
        if label is None:
            return None
        where = f"sample {sample.id}: {self.field}"
        if not isinstance(label, Boxes):
            raise BadSample("bad_label", f"{where} is a {type(label).__name__}, expected boxes")
        if tuple(label.size) != (self.size, self.size):
            message = f"{where} of a picture of {label.size} pixels, expected {(self.size, self.size)}"
            raise BadSample("bad_label", message)
        return self.objects_of(label.boxes, where)

    def objects_of(self, boxes: Sequence[Box], where: str) -> Float[np.ndarray, "G 5"]:
        """Class, x0, y0, x1, y1 of every box; raises as ``read``, whose message begins with ``where``."""
        if len(boxes) > self.most_objects:
            message = f"{where}: {len(boxes)} boxes, most_objects={self.most_objects} of head"
            raise BadSample("too_many_boxes", f"{message} {self.name!r}")
        result = np.zeros((self.most_objects, 5), np.float32)
        result[:, 0] = _NOTHING
        result[: len(boxes)] = self.objects(boxes, where)
        return result

    def objects(self, boxes: Sequence[Box], where: str) -> Float[np.ndarray, "n 5"]:
        """Class and corners of every box, in pixels of whatever the boxes lie in.

        Raises:
          BadSample: a box is of no known class, or is no finite rectangle with an area.
        """
        result = np.zeros((len(boxes), 5))
        for row, box in zip(result, boxes, strict=True):
            if box.label not in self.classes:
                message = f"{where}: {box.label!r} is none of the classes of head {self.name!r}"
                raise BadSample("unknown_label", message)
            x0, y0, x1, y1 = box.corners
            if not np.isfinite(box.corners).all() or x0 >= x1 or y0 >= y1:
                raise BadSample("bad_box", f"{where}: box {box.corners}: expected x0 < x1 and y0 < y1")
            row[:] = self.classes.index(box.label), x0, y0, x1, y1
        return result

    def build(self) -> nn.Module:
        """The module."""
        return DetectionHead(self)

    def sums(self, prediction: Detected, label: Given) -> tuple[Float[Array, ""], Parts]:
        """The loss, and its parts without their gains; summed over the rows that have a label.

        Metrics are ``box``, ``cls`` and ``dfl`` of the branch of many cells; ``one_box``, ... of the other.
        """
        loss, metrics = jnp.zeros(()), {}
        for prefix, (guesses, top_k) in self.branches(prediction).items():

            def of_row(cells: jax.Array, guesses: Guesses, objects: jax.Array, k: int = top_k) -> Any:
                return self._row(cells, guesses, objects, top_k=k)

            rows = jax.vmap(of_row)(prediction.cells, guesses, label.values)
            for name, gain in zip(PARTS, self.gains, strict=True):
                part = jnp.sum(jnp.where(label.present, rows[name], 0.0))
                loss, metrics[prefix + name] = loss + gain * part, part
        return loss, metrics

    def branches(self, prediction: Detected) -> dict[str, tuple[Guesses, int]]:
        """Guesses, and how many cells learn an object at most, by what their metrics begin with."""
        found = {"": (prediction.many, self.assignment.top_k)}
        return found if prediction.one is None else {**found, "one_": (prediction.one, 1)}

    def assigned(
        self, cells: Float[Array, "A 4"], guesses: Guesses, objects: Float[Array, "G 5"], *, top_k: int
    ) -> Assignment:
        """Which object of a picture each cell learns."""
        there, classes, true = objects[:, 0] >= 0.0, objects[:, 0].astype(jnp.int32), objects[:, 1:]
        return assign(
            jax.nn.sigmoid(guesses.logits),
            guesses.boxes(cells),
            self._candidates(cells, true, there),
            true,
            jnp.maximum(classes, 0),
            top_k=top_k,
            alpha=self.assignment.alpha,
            beta=self.assignment.beta,
        )

    def _row(
        self, cells: Float[Array, "A 4"], guesses: Guesses, objects: Float[Array, "G 5"], *, top_k: int
    ) -> Parts:
        """The parts of one picture, each over the sum of its target scores."""
        boxes = guesses.boxes(cells)
        classes, true = objects[:, 0].astype(jnp.int32), objects[:, 1:]
        found = self.assigned(cells, guesses, objects, top_k=top_k)
        total = jnp.maximum(jnp.sum(found.score), 1.0)
        # A cell without an object is given a box of its own size, so that every term is a number.
        around = jnp.concatenate([cells[:, :2] - cells[:, 2:], cells[:, :2] + cells[:, 2:]], axis=1)
        target = jnp.where(found.assigned[:, None], true[found.object], around)
        kind = jax.nn.one_hot(jnp.take(classes, found.object), len(self.classes))
        losses = sigmoid_focal(
            guesses.logits, kind * found.score[:, None], alpha=-1.0, gamma=self.focal_gamma
        )
        return {
            "box": jnp.sum(found.score * (1.0 - ciou(boxes, target))) / total,
            "cls": jnp.sum(losses) / total,
            "dfl": jnp.sum(found.score * self._sides(cells, guesses, boxes, target)) / total,
        }

    def _candidates(
        self, cells: Float[Array, "A 4"], true: Float[Array, "G 4"], there: Bool[Array, " G"]
    ) -> Bool[Array, "A G"]:
        """Cells whose centre lies inside; an object smaller than the finest cell counts as large as that."""
        return inside(cells[:, :2], true, smallest=jnp.min(cells[:, 2:], axis=0)) & there[None]

    def _sides(
        self,
        cells: Float[Array, "A 4"],
        guesses: Guesses,
        boxes: Float[Array, "A 4"],
        target: Float[Array, "A 4"],
    ) -> Float[Array, " A"]:
        """How far off the four sides are, their mean: as distributions, or as a share of its side."""
        if self.network.reg_max > 1:
            return jnp.mean(distribution_focal(guesses.distances, to_distances(cells, target)), axis=-1)
        side = jnp.mean(target[:, 2:] - target[:, :2], axis=-1)
        return jnp.mean(jnp.abs(boxes - target), axis=-1) / side

    def decode(self, prediction: Detected) -> list[dict[str, Any]]:
        """The boxes of one row, the most certain first, with corners in pixels of the tile."""
        return self._listed(prediction, np.asarray(prediction.found.boxes))

    def decode_in(self, prediction: Detected, cut: Cut, size: tuple[int, int]) -> list[dict[str, Any]]:
        """The same with corners in pixels of a picture of that size, of which the tile shows ``cut``.

        Boxes that lie in the margin around the picture are left out.
        """
        boxes = in_picture(cut, np.asarray(prediction.found.boxes), size)
        return [said for said in self._listed(prediction, boxes) if has_area(said["box"])]

    def _listed(self, prediction: Detected, boxes: Float[np.ndarray, "n 4"]) -> list[dict[str, Any]]:
        found = prediction.found
        return [
            {
                "label": self.classes[int(kind)],
                "score": round(float(score), 4),
                "box": [round(float(x), 2) for x in box],
            }
            for box, score, kind in zip(boxes, found.scores, found.classes, strict=True)
            if score > 0
        ]

    def draw(self, picture: PilImage.Image, said: list[dict[str, Any]]) -> PilImage.Image:
        """The picture with the boxes of ``shown_score`` and more, each with its label and score."""
        shown = [entry for entry in said if entry["score"] >= self.said.shown_score]
        boxes = [Box(entry["label"], tuple(entry["box"])) for entry in shown]
        captions = [f"{entry['label']} {entry['score']:.2f}" for entry in shown]
        return grounding.draw(picture, boxes, captions).picture


def has_area(corners: Sequence[float]) -> bool:
    """Whether a box is more than a line or a point."""
    return corners[0] < corners[2] and corners[1] < corners[3]


class DetectionHead(nn.Module):
    """The detector on the maps of its stream."""

    config: Detection

    @nn.compact
    def __call__(self, streams: Streams) -> Detected:
        c = self.config
        maps = decoder.maps_of(streams[c.stream], head=c.name, name=c.stream)
        one_to_one = c.branch == "one_to_one"
        return Detector(c.network, c.said, len(c.classes), c.size, one_to_one, name="detector")(maps)
