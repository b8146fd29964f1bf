"""Evaluation samples: every sample of a source as one row, for models that answer by a head or a vector."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from vl_jax.batch import Batch
from vl_jax.data.config import DataConfig, ModelSpec
from vl_jax.data.encode import make_encoder
from vl_jax.data.example import Example
from vl_jax.data.sample import BadSample
from vl_jax.data.stream.held_out import full_batch, good_samples
from vl_jax.data.text.written import written

_log = logging.getLogger(__name__)


def evaluation_samples(
    config: DataConfig,
    spec: ModelSpec,
    source_name: str,
    *,
    batch_size: int,
    limit: int = 0,
    with_image: bool = True,
    length_multiple: int = 64,
) -> Iterator[tuple[list[dict[str, Any]], Batch]]:
    """Every sample of a source, as the model reads it where nothing is to be generated.

    Of a model that reads dialogues, that is the prompt of the last turn.

    Args:
      source_name: a source of ``config.evaluation`` or ``config.sources``.
      limit: number of samples in all; 0 takes every one.
      with_image: False withholds images and placeholders, for the blind baseline.
      length_multiple: a batch is as long as its longest row, rounded up to a multiple of this (and at most
        ``max_tokens``), so that there are few different shapes.

    Yields:
      Records with id, question (what was written, see ``written``), kind and language (of the first turn),
      labels (as the source has them), negatives (texts that are wrong of it) and image (the first, a PIL
      picture, or None); and their batch: record i is row i, padding on the right. Where the records run out,
      rows past them repeat the last one.
    """
    encoder = make_encoder(config, spec)
    records: list[dict[str, Any]] = []
    examples: list[Example] = []

    def batch() -> Batch:
        return full_batch(examples, encoder, rows=batch_size, length_multiple=length_multiple, pad_left=False)

    taken = 0
    for sample in good_samples(config, source_name):
        sample = sample if with_image else sample.without_images()
        try:
            examples.append(encoder.prompt(sample))
        except BadSample as error:
            _log.warning("skipped a sample: %s", error)
            continue
        first = sample.turns[0] if sample.turns else None
        records.append(
            {
                "id": sample.id,
                "question": written(sample),
                "kind": first.kind if first else "",
                "language": first.language if first else "",
                "labels": dict(sample.labels),
                "negatives": list(sample.negatives),
                "image": sample.images[0]() if sample.images else None,
            }
        )
        taken += 1
        if len(records) == batch_size:
            yield records, batch()
            records, examples = [], []
        if taken == limit:
            break
    if records:
        yield records, batch()
