"""Segmentation: the class of every pixel, from the maps of a stream.

Stream.maps --decoder--> logits [B u v K] --bilinear--> [B s s K] --> cross-entropy over the pixels of a class
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, UInt8
from PIL import Image as PilImage

from vl_jax.batch import Given
from vl_jax.data.images import palette
from vl_jax.data.sample import BadSample, Sample
from vl_jax.fusion.streams import Streams
from vl_jax.heads import decoder, pixels
from vl_jax.nn.layers import Linear

MISSING = 255  # the class of a pixel that says nothing


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """Which class each pixel is of."""

    classes: tuple[str, ...]
    name: str = "mask"
    stream: str = "image"  # whose maps it reads
    field: str = "mask"  # name in ``Sample.labels``, a ``PixelMap``
    size: int = 128  # pixels on the side of the tile
    stride: int = 4  # pixels on the side of a cell that has logits of its own
    dim: int = 64  # width of the decoder
    class_weights: tuple[float, ...] = ()  # of the loss, one a class; empty: all alike

    def __post_init__(self):
        decoder.check_sizes(self.name, size=self.size, stride=self.stride, dim=self.dim)
        if not 2 <= len(self.classes) <= MISSING or len(set(self.classes)) < len(self.classes):
            raise ValueError(
                f"classes={self.classes} of head {self.name!r}: expected 2 to {MISSING}, all different"
            )
        weights = self.class_weights
        sound = len(weights) == len(self.classes) and all(0 <= w < float("inf") for w in weights)
        if weights and not (sound and any(weights)):
            raise ValueError(
                f"class_weights={weights} of head {self.name!r}: expected {len(self.classes)} numbers >= 0, "
                "one a class, not all 0"
            )

    @property
    def inputs(self) -> tuple[str, ...]:
        """The stream it reads."""
        return (self.stream,)

    @property
    def shape(self) -> tuple[int, ...]:
        """A class for every pixel of the tile."""
        return self.size, self.size

    @property
    def dtype(self) -> str:
        """The index of a class, or 255."""
        return "uint8"

    def check_tile(self, tile_size: int) -> None:
        """Refuses tiles of another size, by ``ValueError``."""
        decoder.check_tile(self.name, self.size, tile_size)

    def read(self, sample: Sample) -> np.ndarray | None:
        """The classes of the tile's pixels, 255 where they are not known; None if no pixel is.

        Raises:
          BadSample: the label is no map, or a pixel is of none of the classes.
        """
        found = pixels.map_of(sample, self.field, self.size)
        if found is None:
            return None
        values, missing = found
        odd = values[~missing & ((values < 0) | (values >= len(self.classes)) | (values != np.floor(values)))]
        if odd.size:
            message = (
                f"sample {sample.id}: {self.field} has {odd.size} pixels of {odd[0]:g}; head {self.name!r} "
                f"has the classes 0 to {len(self.classes) - 1}"
            )
            raise BadSample("unknown_label", message)
        return None if missing.all() else np.where(missing, MISSING, values).astype(np.uint8)

    def build(self) -> nn.Module:
        """The module."""
        return SegmentationHead(self)

    def sums(
        self, prediction: Float[Array, "B s s K"], label: Given
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Weighted cross-entropy in nats and the share of right pixels: means of rows, summed over rows.

        Pixels that say nothing are in none of them.
        """
        target, counted = label.values, label.values != MISSING
        counted = counted & label.present[:, None, None]
        share = counted.astype(jnp.float32)
        share = share / jnp.maximum(jnp.sum(share, axis=(1, 2), keepdims=True), 1.0)
        known = jnp.where(counted, target, jnp.zeros_like(target)).astype(jnp.int32)
        losses = optax.softmax_cross_entropy_with_integer_labels(prediction, known)
        if self.class_weights:
            losses = losses * jnp.asarray(self.class_weights, jnp.float32)[known]
        right = jnp.argmax(prediction, axis=-1) == known
        return jnp.sum(losses * share), {"pixel_accuracy": jnp.sum(jnp.where(right, share, 0.0))}

    def decode(self, prediction: Float[np.ndarray, "s s K"]) -> dict[str, Any]:
        """What ``say`` makes of the likeliest class of every pixel."""
        return self.say(np.argmax(prediction, axis=-1).astype(np.uint8))

    def say(self, found: UInt8[np.ndarray, "s s"]) -> dict[str, Any]:
        """``shares`` of the pixels by class, the largest first, and ``map``, the classes as a PNG picture."""
        counts = np.bincount(found.ravel(), minlength=len(self.classes)) / found.size
        order = [i for i in np.argsort(-counts, kind="stable") if counts[i]]
        shares = {self.classes[i]: round(float(counts[i]), 4) for i in order}
        return {"shares": shares, "map": pixels.as_text(PilImage.fromarray(found))}

    def draw(self, picture: PilImage.Image, said: dict[str, Any]) -> PilImage.Image:
        """The classes laid over the picture of the tile, in colours that a legend explains."""
        found = np.asarray(pixels.from_text(said["map"]))
        colours = palette.colours(len(self.classes))
        shown = PilImage.fromarray(colours[found]).resize(picture.size, PilImage.Resampling.NEAREST)
        mixed = PilImage.blend(picture.convert("RGB"), shown, 0.5)
        names = {name: tuple(map(int, colours[self.classes.index(name)])) for name in said["shares"]}
        return palette.with_legend(mixed, names)


class SegmentationHead(nn.Module):
    """Logits in float32, of the tile's size."""

    config: Segmentation

    @nn.compact
    def __call__(self, streams: Streams) -> Float[Array, "B s s K"]:
        c = self.config
        maps = decoder.maps_of(streams[c.stream], head=c.name, name=c.stream)
        x = decoder.MapDecoder(c.dim, c.size, c.stride, name="decoder")(maps)
        head = Linear(len(c.classes), ("embed", None), use_bias=True, hidden=False, name="classes")
        return decoder.enlarged(head(x).astype(jnp.float32), c.size)
