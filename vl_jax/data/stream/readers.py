"""Tasks of a stream to examples: pure functions, safe to call from many threads and in other processes.

Nothing here needs JAX or Grain, so that a worker process starts quickly and stays small.
"""

from __future__ import annotations

import functools
import logging
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np

from vl_jax.data.config import DataConfig, ModelSpec, open_sources
from vl_jax.data.encode import Encoder, make_encoder, make_row_encoder
from vl_jax.data.example import Example
from vl_jax.data.files.memory_cache import read
from vl_jax.data.images.augment import augment
from vl_jax.data.images.mosaic import can_join, mosaic
from vl_jax.data.sample import BadSample, Sample, Source, each
from vl_jax.data.stream.mixture import stream_key
from vl_jax.data.stream.plan import Item
from vl_jax.data.stream.worker_processes import Processes, Read
from vl_jax.data.stream.workers import Here, Pool, Threads
from vl_jax.data.text.chat import Targets
from vl_jax.data.text.synonyms import with_synonyms
from vl_jax.data.text.turns import vary

Task = TypeVar("Task")
_AUGMENTATION, _MOSAIC, _SYNONYMS = 1, 2, 3  # what random numbers are for, behind those of the draw
_NO_MOSAIC = "not in a mosaic: it has words, other media, not one picture, or no labels that lie in it"
_log = logging.getLogger(__name__)
_MOST_ROOM = 64 << 20  # bytes of shared memory for a worker, unless a single row needs more


class Place(NamedTuple):
    """A place of an unpacked stream, and the record that stands there."""

    index: int
    source: str
    record: int


@dataclass(frozen=True)
class SampleReader:
    """Reads a record, takes what the draw takes of it, and encodes that."""

    sources: Mapping[str, Source]
    encoder: Encoder
    config: DataConfig
    targets: Targets
    seed: int
    told: set[tuple[str, str]] = field(default_factory=set, compare=False)  # of what was left out

    def pool(self, rows: int, stop: threading.Event | None = None) -> Pool[Place, Example | BadSample]:
        """What the config says, this thread, several or processes, to read chunks of so many rows."""
        facts = (self.config, self.encoder.spec, tuple(self.sources), self.targets, self.seed)
        row = self.encoder.row_bytes
        room = max(min(rows * row, _MOST_ROOM), row)
        return _pool(self, functools.partial(_open_samples, *facts), self.config, room, stop)

    def __call__(self, places: Sequence[Place]) -> list[Example | BadSample]:
        """The example of each place, or why its record cannot be used."""
        turns, targets = self.config.conversation.turns, self.targets
        return self.encoder.examples(each(self._draw, places), turns=turns, targets=targets)

    def _draw(self, place: Place) -> Sample:
        config = self.config
        whole = read(self.sources[place.source], place.record, self.encoder.cache, name=place.source)
        _tell(whole, place.source, self.told)
        sample = vary(
            whole,
            rng=np.random.default_rng((self.seed, place.index)),
            max_turns=config.conversation.max_turns,
            sampling=config.conversation.turn_sampling,
            image_dropout_rate=config.image_dropout_rate,
        )
        sample = self._joined(sample, place)
        drawn = _augmented(sample, self.encoder, config, (self.seed, place.index, _AUGMENTATION))
        synonyms = config.conversation.synonyms
        if synonyms is not None:
            rng = random.Random(f"{self.seed}/{place.index}/{_SYNONYMS}")
            drawn = with_synonyms(drawn, synonyms, rng)
        _tell(drawn, place.source, self.told)
        return drawn

    def _joined(self, sample: Sample, place: Place) -> Sample:
        """The sample, or at the rate of the config a mosaic of it and others."""
        config, source = self.config.augmentation, self.sources[place.source]
        if config is None or not config.mosaic:
            return sample
        rng = np.random.default_rng((self.seed, place.index, _MOSAIC))
        if rng.random() >= config.mosaic:
            return sample
        if not can_join(sample):
            if (place.source, _NO_MOSAIC) not in self.told:
                self.told.add((place.source, _NO_MOSAIC))
                _log.warning("source %s, sample %s: %s", place.source, sample.id, _NO_MOSAIC)
            return sample

        def pick(record: int) -> Sample:
            return read(source, record, self.encoder.cache, name=place.source)

        least, cache = config.min_visible, self.encoder.cache
        return mosaic(sample, pick, len(source), rng, min_visible=least, cache=cache)


@dataclass(frozen=True)
class ItemReader:
    """Reads and encodes what a plan of packed rows has chosen."""

    sources: Mapping[str, Source]
    encoder: Encoder  # of rows
    config: DataConfig
    targets: Targets
    seed: int
    told: set[tuple[str, str]] = field(default_factory=set, compare=False)  # of what was left out

    def pool(self, stop: threading.Event | None = None) -> Pool[Item, Example | BadSample]:
        """What the config says, this thread, several or processes, to read the items of a row."""
        facts = (self.config, self.encoder.spec, tuple(self.sources), self.targets, self.seed)
        room = self.encoder.row_bytes
        return _pool(self, functools.partial(_open_items, *facts), self.config, room, stop)

    def __call__(self, items: Sequence[Item]) -> list[Example | BadSample]:
        """The encoded draws, or why a record cannot be used after all.

        Raises:
          ValueError: a record has another length than the plan says.
        """
        turns, targets = self.config.conversation.turns, self.targets
        samples, chosen = each(self._sample, items), [item.turns for item in items]
        examples = self.encoder.draws(samples, chosen, turns=turns, targets=targets)
        for item, example in zip(items, examples, strict=True):
            if isinstance(example, BadSample):
                continue
            found, planned = (len(example.tokens), len(example.tiles)), (item.tokens, item.tiles)
            if found != planned:
                raise self._changed(item, f"{found} tokens and tiles", str(planned))
        return examples

    def _sample(self, item: Item) -> Sample:
        sample = read(self.sources[item.source], item.record, self.encoder.cache, name=item.source)
        _tell(sample, item.source, self.told)
        if item.blind:
            for image in sample.images:  # A broken image is a bad sample in every draw, not only in most.
                image()
            sample = sample.without_images()
        if max(item.turns) >= len(sample.turns):
            raise self._changed(item, f"{len(sample.turns)} turns", str(item.turns))
        key = (self.seed, stream_key(item.source), item.number, _AUGMENTATION)
        return _augmented(sample, self.encoder, self.config, key)

    def _changed(self, item: Item, found: str, planned: str) -> ValueError:
        return ValueError(
            f"{item.source}/{item.record}: {found} where its index says {planned}; its files have changed, "
            f"delete the index {getattr(self.config.packing, 'index', '')!r}"
        )


def _tell(sample: Sample, source: str, told: set[tuple[str, str]]) -> None:
    """Says what is left out of a sample: once for each source and reason; ``inspect data`` counts."""
    for note in sample.notes:
        if (source, note.reason) not in told:
            told.add((source, note.reason))
            _log.warning("source %s: a part of a record is left out: %s (once for all of them)", source, note)


def _augmented(sample: Sample, encoder: Encoder, config: DataConfig, key: tuple[int, ...]) -> Sample:
    if config.augmentation is None:
        return sample
    rng, length = np.random.default_rng(key), encoder.text_length
    return augment(sample, config.augmentation, rng, length=length, cache=encoder.cache)


def _open_samples(
    config: DataConfig, spec: ModelSpec, names: Sequence[str], targets: Targets, seed: int
) -> SampleReader:
    sources, _ = open_sources(config, dict.fromkeys(names, 1.0))
    return SampleReader(sources, make_encoder(config, spec, targets=targets), config, targets, seed)


def _open_items(
    config: DataConfig, spec: ModelSpec, names: Sequence[str], targets: Targets, seed: int
) -> ItemReader:
    sources, _ = open_sources(config, dict.fromkeys(names, 1.0))
    return ItemReader(sources, make_row_encoder(config, spec, targets=targets), config, targets, seed)


def _pool(
    read: Read[Task],
    make: Callable[[], Read[Task]],
    config: DataConfig,
    room: int,
    stop: threading.Event | None,
) -> Pool[Task, Example | BadSample]:
    loading = config.loading
    if loading.num_workers:
        return Processes(make, loading.num_workers, room=room, stop=stop)
    return Threads(read, loading.num_threads) if loading.num_threads > 1 else Here(read)
