"""What a model is examined on: the samples of a source in order, and rows of a few different lengths."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence

from PIL import Image as PilImage

from vl_jax.batch import Batch
from vl_jax.data.config import DataConfig, find_source, opened
from vl_jax.data.encode import Encoder
from vl_jax.data.example import Example
from vl_jax.data.sample import BadSample, Sample

_log = logging.getLogger(__name__)


def good_samples(config: DataConfig, source_name: str) -> Iterator[Sample]:
    """The samples of a source with their images loaded; a bad one is logged and passed over."""
    source = opened(config, find_source(config, source_name))
    for index in range(len(source)):
        try:
            sample = source[index]
            pictures = [image() for image in sample.images]
        except BadSample as error:
            _log.warning("skipped %s/%d: %s", source_name, index, error)
            continue
        yield dataclasses.replace(sample, images=tuple(_Loaded(p) for p in pictures))


def full_batch(
    examples: Sequence[Example], encoder: Encoder, *, rows: int, length_multiple: int, pad_left: bool
) -> Batch:
    """A row for each example; rows past them repeat the last one.

    Args:
      length_multiple: the batch is as long as its longest example, rounded up to a multiple of this (and at
        most as long as the encoder's rows).
    """
    longest = max(len(e.tokens) for e in examples)
    length = min(-(-longest // length_multiple) * length_multiple, encoder.max_tokens)
    repeated = [*examples, *[examples[-1]] * (rows - len(examples))]
    return encoder.collate([[e] for e in repeated], length=length, pad_left=pad_left)


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """An image that is in memory already."""

    picture: PilImage.Image

    def __call__(self) -> PilImage.Image:
        return self.picture
