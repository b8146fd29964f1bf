"""Weights of classes of pixels, so that rare classes count in the loss of a segmentation head.

    frequency of a class = its pixels / pixels of the pictures in which it is
    weight               = median of the frequencies / frequency

Source: Eigen and Fergus 2015, arXiv 1411.4734, section 4.4.2.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int

from vl_jax.data.images.spatial import PixelMap
from vl_jax.data.sample import BadSample, Source

logger = logging.getLogger(__name__)


def pixel_counts(source: Source, field: str, num_classes: int) -> Int[np.ndarray, "N K"]:
    """The pixels of every class in each picture of a source that has a map of classes.

    Args:
      field: name of the map in ``Sample.labels``.

    Raises:
      ValueError: no sample has such a map, or a pixel is of none of the classes.
    """
    counts = []
    for index in range(len(source)):
        sample = source[index]
        if isinstance(sample, BadSample) or sample.labels.get(field) is None:
            continue
        label = sample.labels[field]
        if not isinstance(label, PixelMap):
            raise ValueError(f"sample {sample.id}: {field} is a {type(label).__name__}, no map of pixels")
        values = np.asarray(label.read()).ravel()
        values = values[values != label.missing].astype(np.int64)
        if values.size and not 0 <= values.min() <= values.max() < num_classes:
            odd = values.max() if values.max() >= num_classes else values.min()
            raise ValueError(f"sample {sample.id}: {field} has pixels of {odd}, of {num_classes} classes")
        counts.append(np.bincount(values, minlength=num_classes))
    if not counts:
        raise ValueError(f"no sample has a map of pixels under {field!r}")
    return np.stack(counts)


def median_frequency(
    counts: Int[np.ndarray, "N K"], *, classes: Iterable[str] = ()
) -> Float[np.ndarray, " K"]:
    """The weight of every class; 1 for a class that no picture has, which is logged.

    Args:
      counts: pixels by picture and class.
      classes: their names, for the log.
    """
    sizes = counts.sum(axis=1, keepdims=True)
    total = counts.sum(axis=0)
    there = np.where(counts > 0, sizes, 0).sum(axis=0)
    absent = np.flatnonzero(total == 0)
    if absent.size:
        names = list(classes) or [str(i) for i in range(counts.shape[1])]
        logger.warning("no picture has a pixel of %s", ", ".join(names[i] for i in absent))
    frequency = np.divide(total, there, out=np.ones(len(total)), where=there > 0)
    median = np.median(frequency[total > 0]) if absent.size < len(total) else 1.0
    return np.where(total > 0, median / frequency, 1.0)
