"""Instances: the objects of a picture, each with a box and a mask; a detection head that says masks too.

    Stream.maps --decoder--> prototypes [B u v P]      sigmoid(prototypes @ coefficients), cut by the box
                --detector-> boxes, coefficients [B A P] --'   = the mask of a cell's object

The form is that of YOLACT (Bolya et al. 2019, arXiv 1904.02689): prototypes are of the picture, through a
ReLU, and coefficients in -1..1 of an object, so that one prototype can be taken away from another.

The loss of a mask is binary cross-entropy with the share of each cell that the object covers, averaged over
the area of the true box, as there. Each cell that learns an object says a mask of it. What they say is
weighted by their target scores and divided by the sum of these, as the losses of boxes are (see
``detection``). The weight beside them is YOLACT's, 6.125.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, UInt32
from PIL import Image as PilImage

from vl_jax.batch import Given
from vl_jax.data.images import palette
from vl_jax.data.images.spatial import Cut, Instances, in_picture
from vl_jax.data.sample import BadSample, Sample
from vl_jax.fusion.streams import Streams
from vl_jax.heads import decoder, masks
from vl_jax.heads.detection import Detection, Parts, has_area
from vl_jax.heads.detector import Detected, Detector, DetectorConfig, Guesses
from vl_jax.heads.suppression import Detections
from vl_jax.nn.layers import Linear
from vl_jax.params import Leaf

_SHARE = 0.5  # of a mask's colour in a picture that is drawn


@struct.dataclass
class Segmented:
    """What the head gives."""

    detected: Detected
    prototypes: Leaf  # f32[B u v P]
    coefficients: Leaf  # f32[B N P] of the boxes that are said

    @property
    def found(self) -> Detections:
        """The boxes that are said."""
        return self.detected.found


@dataclasses.dataclass(frozen=True)
class InstanceMasks(Detection):
    """Which objects a picture shows, where, and which pixels are theirs.

    All fields of ``Detection`` hold; ``field`` names an ``Instances``.
    """

    name: str = "instances"
    field: str = "instances"  # name in ``Sample.labels``, an ``Instances``
    network: DetectorConfig = DetectorConfig(coefficients=16)  # as many prototypes as coefficients
    mask_stride: int = 4  # pixels on the side of a cell of the prototypes
    mask_dim: int = 32  # width of the decoder that makes them
    mask_gain: float = 6.125  # of the loss of masks

    def __post_init__(self):
        super().__post_init__()
        decoder.check_sizes(self.name, size=self.size, stride=self.mask_stride, dim=self.mask_dim)
        if self.network.coefficients < 1 or self.mask_gain < 0:
            raise ValueError(
                f"network.coefficients={self.network.coefficients} of head {self.name!r} must be >= 1, "
                f"mask_gain={self.mask_gain} >= 0"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Objects, and the numbers that hold one of them with its mask (see ``masks``)."""
        return self.most_objects, masks.label_width(self.size)

    @property
    def dtype(self) -> str:
        """Bits."""
        return "uint32"

    def read(self, sample: Sample) -> np.ndarray | None:
        """The objects of the sample in pixels of the tile; those of which no pixel is seen are left out.

        Raises:
          BadSample: the label is something else, or as of ``Detection``.
        """
        label = sample.labels.get(self.field)
        if label is None:
            return None
        where = f"sample {sample.id}: {self.field}"
        if not isinstance(label, Instances):
            raise BadSample("bad_label", f"{where} is a {type(label).__name__}, expected objects with masks")
        if tuple(label.size) != (self.size, self.size):
            message = f"{where} of a picture of {label.size} pixels, expected {(self.size, self.size)}"
            raise BadSample("bad_label", message)
        found = label.values()
        seen = np.array([mask.any() for mask in found], bool)
        boxes = [box for box, there in zip(label.boxes, seen, strict=True) if there]
        return masks.pack(self.objects_of(boxes, where), found[seen])

    def build(self) -> nn.Module:
        """The module."""
        return InstanceHead(self)

    def sums(self, prediction: Segmented, label: Given) -> tuple[Float[Array, ""], Parts]:
        """The loss and its parts, summed over the rows that have a label: those of boxes, and ``mask``."""
        boxes = Given(masks.objects_in(label.values), label.present)
        loss, metrics = super().sums(prediction.detected, boxes)
        for prefix, (guesses, top_k) in self.branches(prediction.detected).items():
            # As of the maps, a second branch learns from prototypes and does not move them.
            prototypes = jax.lax.stop_gradient(prediction.prototypes) if prefix else prediction.prototypes

            def of_row(*row: Any, k: int = top_k) -> jax.Array:
                return self._masks(*row, top_k=k)

            rows = jax.vmap(of_row)(prediction.detected.cells, guesses, prototypes, label.values)
            part = jnp.sum(jnp.where(label.present, rows, 0.0))
            loss, metrics[f"{prefix}mask"] = loss + self.mask_gain * part, part
        return loss, metrics

    def _masks(
        self,
        cells: Float[Array, "A 4"],
        guesses: Guesses,
        prototypes: Float[Array, "u v P"],
        label: UInt32[Array, "G w"],
        *,
        top_k: int,
    ) -> Float[Array, ""]:
        """The loss of the masks of one picture."""
        objects = masks.objects_in(label)
        found = self.assigned(cells, guesses, objects, top_k=top_k)
        mine = found.assigned[:, None] & (found.object[:, None] == jnp.arange(self.most_objects))
        # An object has ``top_k`` cells at most, so these are all of them.
        scores, chosen = jax.lax.top_k(jnp.where(mine, found.score[:, None], 0.0).T, min(top_k, len(cells)))
        logits = jnp.einsum("uvp,gkp->gkuv", prototypes, guesses.coefficients[chosen])
        grid = (prototypes.shape[0], prototypes.shape[1])
        true = masks.shares(masks.masks_in(label, self.size), grid)
        losses = masks.cross_entropy(logits, true, masks.within(objects[:, 1:], grid, self.size))
        return jnp.sum(scores * losses) / jnp.maximum(jnp.sum(found.score), 1.0)

    def said_masks(self, prediction: Segmented) -> Bool[np.ndarray, "n s s"]:
        """The masks of the boxes that are said of one row, in their order."""
        found, there = prediction.found, np.asarray(prediction.found.scores) > 0
        boxes, of = np.asarray(found.boxes)[there], np.asarray(prediction.coefficients)[there]
        return masks.from_prototypes(np.asarray(prediction.prototypes), of, boxes, self.size)

    def decode(self, prediction: Segmented) -> list[dict[str, Any]]:
        """As ``Detection`` says them, each with its ``mask`` as run lengths in pixels of the tile."""
        said = super().decode(prediction.detected)
        found = self.said_masks(prediction)
        return [{**entry, "mask": masks.run_lengths(mask)} for entry, mask in zip(said, found, strict=True)]

    def decode_in(self, prediction: Segmented, cut: Cut, size: tuple[int, int]) -> list[dict[str, Any]]:
        """The same in pixels of a picture of that size, of which the tile shows ``cut``."""
        boxes = in_picture(cut, np.asarray(prediction.found.boxes), size)
        said = self._listed(prediction.detected, boxes)
        # The tile, seen through the frame of the picture.
        frame = Cut(cut.move((0, 0, *size)), size, cut.mirrored)
        rows, columns, down, across = frame.pixels((self.size, self.size))
        found = [mask[rows][:, columns] & down[:, None] & across for mask in self.said_masks(prediction)]
        return [
            {**entry, "mask": masks.run_lengths(mask)}
            for entry, mask in zip(said, found, strict=True)
            if has_area(entry["box"])
        ]

    def draw(self, picture: PilImage.Image, said: list[dict[str, Any]]) -> PilImage.Image:
        """The picture with what is said of it, a colour an object, from ``shown_score`` on."""
        values = np.asarray(picture.convert("RGB")).astype(np.float32)
        shown = [entry for entry in said if entry["score"] >= self.said.shown_score]
        for entry, colour in zip(shown, palette.colours(len(shown)), strict=True):
            mask = masks.from_run_lengths(entry["mask"])
            values[mask] += _SHARE * (colour - values[mask])
        return super().draw(PilImage.fromarray(np.round(values).astype(np.uint8)), shown)


class InstanceHead(nn.Module):
    """The detector and the prototypes, on the maps of its stream."""

    config: InstanceMasks

    @nn.compact
    def __call__(self, streams: Streams) -> Segmented:
        c = self.config
        maps = decoder.maps_of(streams[c.stream], head=c.name, name=c.stream)
        one_to_one = c.branch == "one_to_one"
        detected = Detector(c.network, c.said, len(c.classes), c.size, one_to_one, name="detector")(maps)
        x = decoder.MapDecoder(c.mask_dim, c.size, c.mask_stride, name="decoder")(maps)
        x = Linear(c.network.coefficients, ("embed", None), use_bias=True, hidden=False, name="prototypes")(x)
        guesses = detected.many if detected.one is None else detected.one
        said = jnp.take_along_axis(guesses.coefficients, detected.found.cells[..., None], axis=1)
        return Segmented(detected, nn.relu(x.astype(jnp.float32)), jax.lax.stop_gradient(said))
