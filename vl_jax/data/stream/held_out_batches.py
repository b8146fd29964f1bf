"""Held-out batches: every sample of a source once, in order, as a stage would train on it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import numpy as np

from vl_jax.batch import Batch
from vl_jax.data.config import DataConfig, ModelSpec
from vl_jax.data.encode import make_encoder
from vl_jax.data.example import Example
from vl_jax.data.sample import BadSample, Sample
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
    options = {"targets": targets, "batch_size": batch_size, "limit": limit}
    for _, batch in held_out_groups(config, spec, source_name, group_of=lambda sample: "", **options):
        yield batch


def held_out_groups(
    config: DataConfig,
    spec: ModelSpec,
    source_name: str,
    *,
    group_of: Callable[[Sample], str],
    targets: Targets,
    batch_size: int,
    limit: int = 0,
) -> Iterator[tuple[str, Batch]]:
    """The same with the samples of every group in batches of their own, each with the name of its group."""
    encoder = make_encoder(config, spec, targets=targets)
    chosen, rows, taken = config.conversation, dict[str, list[list[Example]]](), 0
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
            row = [encoder.example(varied, turns=chosen.turns, targets=targets)]
        except BadSample as error:
            _log.warning("skipped a sample of %s: %s", source_name, error)
            continue
        taken += 1
        group = group_of(sample)
        waiting = rows.setdefault(group, [])
        waiting.append(row)
        if len(waiting) == batch_size:
            yield group, encoder.collate(waiting)
            rows[group] = []
    for group, waiting in rows.items():
        if waiting:
            yield group, encoder.collate([*waiting, *[[] for _ in range(batch_size - len(waiting))]])
