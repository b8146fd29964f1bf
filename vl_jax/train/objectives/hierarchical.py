"""Hierarchical alignment: pictures with texts, regions with phrases, and tokens with words.

    level      what is compared                                head             loss
    whole      the vectors of a picture and of a text          Pairs            softmax over the batch
    regions    the mean over a box and that over its phrase    PhraseRegions    softmax over all phrases of it
    words      every token with the nearest word, and back     TokenPairs       softmax over the batch

The model runs once. A level whose weight is 0 is not computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vl_jax.batch import Batch, Given
from vl_jax.heads.levels.regions import RegionVectors, box_means, span_means
from vl_jax.heads.levels.tokens import unit
from vl_jax.train.objectives.contrastive_losses import PairSums, softmax_sums
from vl_jax.train.objectives.objective import Sums, apply, beside
from vl_jax.train.objectives.word_pairs import nearness, word_sums

_SPAN, _NUMBER = slice(4, 6), 6  # of a phrase's label


@dataclasses.dataclass(frozen=True)
class Level:
    """One level: its head, and how much its loss counts."""

    head: str
    weight: float = 1.0

    def __post_init__(self):
        if not self.weight >= 0:
            raise ValueError(f"weight={self.weight} of level {self.head!r} must be >= 0")


@dataclasses.dataclass(frozen=True)
class Hierarchical:
    """The weighted sum of contrastive losses on three levels; each is a group of its own."""

    whole: Level = Level("pairs")
    regions: Level = Level("regions")
    words: Level = Level("words")
    chunk: int = 1024  # texts or phrases that are compared at once, at most
    word_chunk: int = 16  # texts whose every word is compared at once, at most

    def __post_init__(self):
        if self.chunk < 1 or self.word_chunk < 1:
            raise ValueError(f"chunk={self.chunk} and word_chunk={self.word_chunk} must be >= 1")
        if not self._levels:
            raise ValueError("whole, regions and words all have the weight 0; one must be above it")

    @property
    def _levels(self) -> tuple[Level, ...]:
        return tuple(level for level in (self.whole, self.regions, self.words) if level.weight)

    @property
    def couples_rows(self) -> bool:
        """Every row is compared with all others."""
        return True

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of each level's loss."""
        return {f"{level.head}/loss": level.weight for level in self._levels}

    def total(self, batch: Batch) -> dict[str, jax.Array]:
        """The rows that have a picture; of regions, the phrases."""
        counts = {}
        for level in self._levels:
            label = batch.labels[level.head]
            there = numbers(label) >= 0 if level is self.regions else label.present
            counts[level.head] = jnp.maximum(jnp.sum(there), 1).astype(jnp.float32)
        return counts

    def __call__(
        self, params: Any, state: Any, batch: Batch, *, model: nn.Module, rngs: dict[str, jax.Array] | None
    ) -> Sums:
        """The losses, and on each level how many find what belongs to them first."""
        output, collections = apply(params, state, batch, model=model, rngs=rngs)
        losses, metrics = {}, {}
        for level in self._levels:
            name = level.head
            sums = self._sums(level, output.predictions[name], batch.labels[name])
            losses[f"{name}/loss"] = sums.loss
            metrics |= {
                f"{name}/image_to_text": sums.images_right,
                f"{name}/text_to_image": sums.texts_right,
            }
        auxiliary, stats, gates = beside(output)
        return Sums(losses, metrics, auxiliary, stats, collections, gates)

    def _sums(self, level: Level, said: Any, label: Given) -> PairSums:
        if level is self.regions:
            return region_sums(said, label, chunk=self.chunk)
        ids = jnp.where(label.present, label.values, -1)
        if level is self.whole:
            options = {"image_ids": ids, "text_ids": ids, "chunk": self.chunk}
            return softmax_sums(said.image, said.text, said.scale, **options)
        sides = said.image, said.image_mask, said.text, said.text_mask
        both = nearness(*sides, chunk=self.word_chunk)
        return word_sums(*both, said.scale, image_ids=ids, text_ids=ids)


def numbers(label: Given) -> jax.Array:
    """What each phrase is, i32[B N]; negative where there is none."""
    found = label.values[..., _NUMBER].astype(jnp.int32)
    return jnp.where(label.present[:, None], found, -1)


def region_sums(said: RegionVectors, label: Given, *, chunk: int) -> PairSums:
    """Every region among all phrases of the batch, and back; those of one wording belong to all its regions.

    Args:
      chunk: phrases that are compared at once, at most.
    """
    starts, stops = jnp.moveaxis(label.values[..., _SPAN], -1, 0)
    regions = unit(box_means(said.image, label.values[..., :4]))
    phrases = unit(span_means(said.text, starts, stops))
    ids = numbers(label).reshape(-1)
    regions, phrases = (x.reshape(-1, x.shape[-1]) for x in (regions, phrases))
    return softmax_sums(regions, phrases, said.scale, image_ids=ids, text_ids=ids, chunk=chunk)
