"""Held-out batches: every sample of a source once, in order, as a stage would train on it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np

from vl_jax.batch import Batch
from vl_jax.data.config import DataConfig, ModelSpec
from vl_jax.data.encode import make_encoder
from vl_jax.data.example import Example
from vl_jax.data.sample import BadSample
from vl_jax.data.stream.held_out import good_samples
from vl_jax.data.text.chat import Targets
from vl_jax.data.text.turns import vary

_log = logging.getLogger(__name__)


def held_out_batches(
    config: DataConfig,
    spec: ModelSpec,
    source_name: str,
    *,
    targets: Targets,
    batch_size: int,
    limit: int = 0,
) -> Iterator[Batch]:
    """Batches of one shape, a sample a row; the last one ends with empty rows.

    Turns are chosen as in training, the same ones in every call. Pictures are neither withheld nor augmented.

    Args:
      source_name: a source of ``config.evaluation`` or ``config.sources``.
      limit: number of samples in all; 0 takes every one.
    """
    encoder = make_encoder(config, spec, targets=targets)
    chosen, rows, taken = config.conversation, list[list[Example]](), 0
    for number, sample in enumerate(good_samples(config, source_name)):
        if limit and taken == limit:
            break
        try:
            varied = vary(
                sample,
                rng=np.random.default_rng(number),
                max_turns=chosen.max_turns,
                sampling=chosen.turn_sampling,
                image_dropout_rate=0.0,
            )
            rows.append([encoder.example(varied, turns=chosen.turns, targets=targets)])
        except BadSample as error:
            _log.warning("skipped a sample of %s: %s", source_name, error)
            continue
        taken += 1
        if len(rows) == batch_size:
            yield encoder.collate(rows)
            rows = []
    if rows:
        yield encoder.collate([*rows, *[[] for _ in range(batch_size - len(rows))]])
