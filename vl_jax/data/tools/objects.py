"""What is odd about labels that lie in pictures: found sample by sample, and counted by ``examination``.

sample --> labels without an object, objects that the tile does not show, objects that augmentation cuts off
all of them --> classes of a head that no sample has
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from vl_jax.data.config import DataConfig
from vl_jax.data.encode import Encoder
from vl_jax.data.images.augment import augment
from vl_jax.data.images.augmented import Geometry
from vl_jax.data.images.spatial import Boxes, Instances, PixelMap, cut_labels, is_spatial, lost_objects
from vl_jax.data.images.tiling import shown
from vl_jax.data.sample import Sample, image_size

NO_OBJECT = "label without any object"
NO_PIXEL = "object of which the mask has no pixel"
NOT_IN_TILE = "object that the tile does not show (see data.tiling.fit)"
CUT_OFF = "object that a draw of augmentation cuts off (see data.augmentation.min_visible)"


class Oddity(NamedTuple):
    """Something odd, how often, and where."""

    what: str
    count: int
    example: str


@dataclass
class PlacedLabels:
    """Looks at samples one after another, and remembers the classes that they have."""

    config: DataConfig
    encoder: Encoder
    seen: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # classes, by head

    def look(self, sample: Sample, number: int) -> Iterator[Oddity]:
        """What is odd about the labels of a sample.

        Args:
          number: of the sample, which a draw of augmentation follows from.

        Raises:
          BadSample: a label cannot be used.
        """
        for head in self.encoder.spec.labels:
            classes, label = _classes(head), sample.labels.get(getattr(head, "field", ""))
            if classes and label is not None:
                self.seen[head.name] |= _named(label, classes)
        if not sample.images or not is_spatial(sample.labels):
            return
        for name, label in sample.labels.items():
            if isinstance(label, Boxes | Instances) and not label.boxes:
                yield Oddity(NO_OBJECT, 1, f"{sample.id}: {name}")
        size = image_size(sample.images[0])
        labels = cut_labels(sample.labels, Geometry().cut(*size), size)
        lost, count = lost_objects([sample.labels], [labels])
        if lost:
            yield Oddity(NO_PIXEL, lost, f"{sample.id}: {lost} of {count}")
        lost, count = lost_objects([labels], [cut_labels(labels, shown(size, self.encoder.tiling), size)])
        if lost:
            yield Oddity(NOT_IN_TILE, lost, f"{sample.id}: {lost} of {count}")
        if self.config.augmentation is not None:
            rng, length = np.random.default_rng((self.config.seed, number)), self.encoder.text_length
            sample = replace(sample, labels=labels)
            drawn = augment(sample, self.config.augmentation, rng, length=length)
            lost, count = lost_objects([labels], [drawn.labels])
            if lost:
                yield Oddity(CUT_OFF, lost, f"{sample.id}: {lost} of {count}")

    def classes(self) -> Iterator[Oddity]:
        """The classes of heads that no sample has, of those heads that a sample has a label of."""
        for head in self.encoder.spec.labels:
            if head.name in self.seen:
                lacking = [name for name in _classes(head) if name not in self.seen[head.name]]
                what = f"class of head {head.name!r} that no record examined has"
                yield from (Oddity(what, 1, name) for name in lacking)


def _classes(head: Any) -> tuple[str, ...]:
    return tuple(getattr(head, "classes", ()))


def _named(label: Any, classes: tuple[str, ...]) -> set[str]:
    """The classes that a label has."""
    if isinstance(label, Boxes | Instances):
        return {box.label for box in label.boxes}
    if isinstance(label, PixelMap):
        levels = np.unique(label.values()).tolist()
        return {
            classes[int(level)] for level in levels if level != label.missing and 0 <= level < len(classes)
        }
    return {str(label)}
