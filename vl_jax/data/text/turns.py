"""What a draw takes from a sample: which questions, and with or without its images."""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np

from vl_jax.data.sample import Sample

TurnSampling = Literal["first", "uniform", "balanced"]


def vary(
    sample: Sample,
    *,
    rng: np.random.Generator,
    max_turns: int | None,
    sampling: TurnSampling,
    image_dropout_rate: float,
) -> Sample:
    """One draw from a sample: ``choose_turns`` of its turns, at the given rate without the images.

    Raises:
      BadSample: an image cannot be used, or turns are to be taken out of order but a later one brings
        its own image.
    """
    chosen = choose_turns([t.answer for t in sample.turns], rng=rng, max_turns=max_turns, sampling=sampling)
    if chosen != list(range(len(sample.turns))):
        sample = sample.select(chosen)
    if image_dropout_rate and rng.random() < image_dropout_rate:
        for image in sample.images:  # A broken image is a bad sample in every draw, not only in most.
            image()
        sample = sample.without_images()
    return sample


def choose_turns(
    answers: list[str], *, rng: np.random.Generator, max_turns: int | None, sampling: TurnSampling
) -> list[int]:
    """Indices of the turns to use, in the order of use.

    ``first`` keeps the order of the conversation, ``uniform`` takes turns at random, ``balanced`` goes
    round the different answers, so that many "yes" and "no" do not drown the one "triangle".
    """
    count = len(answers)
    limit = count if max_turns is None else min(max_turns, count)
    if sampling == "first":
        return list(range(limit))
    order = rng.permutation(count).tolist()
    if sampling == "uniform":
        return order[:limit]
    groups: dict[str, list[int]] = {}
    for index in order:  # A random order inside every group, and of the groups.
        groups.setdefault(answers[index].strip().lower(), []).append(index)
    every = list(groups.values())
    dealt = itertools.zip_longest(*(every[i] for i in rng.permutation(len(every)).tolist()))
    return [index for group in dealt for index in group if index is not None][:limit]
