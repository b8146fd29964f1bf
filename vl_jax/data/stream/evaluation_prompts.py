"""Evaluation prompts: every question of a source by itself, batched and padded on the left."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from vl_jax.batch import Batch
from vl_jax.data.config import DataConfig, ModelSpec
from vl_jax.data.encode import make_encoder
from vl_jax.data.example import Example
from vl_jax.data.sample import BadSample, Sample, standalone_questions
from vl_jax.data.stream.held_out import full_batch, good_samples

_log = logging.getLogger(__name__)

Record = dict[str, Any]


def evaluation_prompts(
    config: DataConfig,
    spec: ModelSpec,
    source_name: str,
    *,
    batch_size: int,
    limit: int = 0,
    per_sample: int = 0,
    with_image: bool = True,
    length_multiple: int = 64,
) -> Iterator[tuple[list[Record], Batch]]:
    """Every question of a source as its own conversation, ready for generation.

    Args:
      source_name: a source of ``config.evaluation`` or ``config.sources``.
      limit: number of questions in all; 0 takes every one.
      per_sample: questions taken from each sample, the first ones; 0 takes every one.
      with_image: False withholds images and placeholders, for the blind baseline.
      length_multiple: a batch is as long as its longest prompt, rounded up to a multiple of this (and at
        most ``max_tokens``), so that there are few different shapes.

    Yields:
      Records with id, question, answer, kind, language, boxes and image (a PIL picture or None), and the
      batch of their prompts. Padding is on the left with segment 0; positions count from 0 at the first
      real token. Where the records run out, rows past ``len(records)`` repeat the last one.
    """
    encoder = make_encoder(config, spec)
    records: list[Record] = []
    examples: list[Example] = []

    def batch() -> Batch:
        return full_batch(examples, encoder, rows=batch_size, length_multiple=length_multiple, pad_left=True)

    taken = 0
    for sample in good_samples(config, source_name):
        try:
            questions = standalone_questions(sample)
        except BadSample as error:
            _log.warning("skipped a sample of %s: %s", source_name, error)
            continue
        for record, question in _questions(sample, questions, per_sample, with_image):
            if limit and taken == limit:
                break
            try:
                examples.append(encoder.prompt(question))
            except BadSample as error:
                _log.warning("skipped a question: %s", error)
                continue
            records.append(record)
            taken += 1
            if len(records) == batch_size:
                yield records, batch()
                records, examples = [], []
        if limit and taken == limit:
            break
    if records:
        yield records, batch()


def _questions(
    sample: Sample, questions: Sequence[str], per_sample: int, with_image: bool
) -> Iterator[tuple[Record, Sample]]:
    """Each question of a sample, as it reads when asked alone, as a record and a conversation of its own."""
    count = min(per_sample, len(sample.turns)) if per_sample else len(sample.turns)
    blind = sample.without_images()
    for index, question in enumerate(questions[:count]):
        turn = sample.turns[index]
        record = {
            "id": f"{sample.id}/{index}",
            "question": blind.turns[index].question,
            "answer": turn.answer,
            "kind": turn.kind,
            "language": turn.language,
            "boxes": turn.boxes,
            "image": sample.images[0]() if sample.images and with_image else None,
        }
        if with_image:
            yield record, dataclasses.replace(sample, turns=(dataclasses.replace(turn, question=question),))
        else:
            yield record, dataclasses.replace(blind, turns=(blind.turns[index],))
