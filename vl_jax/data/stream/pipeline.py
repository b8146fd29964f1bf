"""The data pipeline: sources, a mixture, encoding and batching, with a position that can be saved.

    stream index --grain: shuffle, repeat, mix--> (source, record) --threads: read, choose turns, encode-->
    examples, bad ones skipped --> rows --> Batch --queue--> ``TrainIterator``

Everything about a batch follows from the seed and the stream index, so the whole state is one number and
the account of what was skipped.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vl_jax.batch import absent
from vl_jax.data.config import DataConfig, ModelSpec, open_sources
from vl_jax.data.encode import make_encoder
from vl_jax.data.example import Example
from vl_jax.data.sample import BadSample
from vl_jax.data.stream.background import BadRuns
from vl_jax.data.stream.batches import BatchStream, Made
from vl_jax.data.stream.readers import Place, SampleReader
from vl_jax.data.stream.workers import in_order
from vl_jax.data.text.chat import Targets

_MOST_IN_CHUNK = 32  # samples handed to a thread at once


class TrainIterator(BatchStream[int]):
    """An endless iterator of training batches whose position can be saved and restored exactly.

    Example::

        batches = TrainIterator(config, spec, sources={"scenes": 1.0}, batch_size=8)
        batch = next(batches)
        state = batches.get_state()   # JSON-able; another iterator goes on from here with set_state
    """

    def __init__(
        self,
        config: DataConfig,
        spec: ModelSpec,
        *,
        batch_size: int,
        sources: Mapping[str, float] | None = None,
        targets: Targets = "answers",
        seed: int | None = None,
    ):
        """Opens the sources; batches are made in the background.

        Args:
          sources: names from ``config.sources`` and their relative weights; None takes all alike.
          seed: of order, turn choice and image dropout; None takes ``config.seed``.

        Raises:
          ValueError: a source is unknown or unreadable, or a weight or size is out of range.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        super().__init__(0, prefetch=config.loading.prefetch)
        opened, weights = open_sources(config, sources)
        seed = config.seed if seed is None else seed
        order = _order({name: len(source) for name, source in opened.items()}, weights, seed)
        encoder = make_encoder(config, spec, targets=targets)
        self._work = _SampleWork(SampleReader(opened, encoder, config, targets, seed), order, batch_size)

    def _make(self, start: int) -> Callable[[threading.Event], Iterator[Made[int]]]:
        return functools.partial(self._work.batches, start)

    def _save(self, position: int) -> dict[str, Any]:
        return {"next_index": position}

    def _load(self, state: Mapping[str, Any]) -> int:
        index = state.get("next_index")
        if not isinstance(index, int) or index < 0:
            raise ValueError(f"state={dict(state)}: expected next_index and skipped, as get_state gives")
        return index


def _order(
    sizes: Mapping[str, int], weights: Mapping[str, float], seed: int
) -> Callable[[int], tuple[str, int]]:
    """The endless shuffled mixture: from stream index to source and record."""
    import grain

    for name, size in sizes.items():
        if size == 0:
            raise ValueError(f"source {name!r}: has no records")
    ends = np.cumsum(list(sizes.values())).tolist()
    streams = []
    for number, (size, end) in enumerate(zip(sizes.values(), ends, strict=True)):
        records = grain.MapDataset.range(end - size, end)  # of all sources, one behind the other
        streams.append(records.shuffle(seed=(seed * 1009 + number) % 2**32).repeat())
    total, names = sum(weights.values()), list(sizes)
    mixed = streams[0]
    if len(streams) > 1:
        mixed = grain.MapDataset.mix(streams, weights=[weights[name] / total for name in sizes])

    def look_up(index: int) -> tuple[str, int]:
        found = mixed[index]
        assert found is not None  # Nothing filters this stream.
        number = bisect.bisect_right(ends, found)
        return names[number], int(found) - ends[number] + sizes[names[number]]

    return look_up


@dataclass(frozen=True)
class _SampleWork:
    """What a background thread does."""

    reader: SampleReader
    order: Callable[[int], tuple[str, int]]
    batch_size: int

    def batches(self, start: int, stop: threading.Event) -> Iterator[Made[int]]:
        """Batches from a stream index on, until told to stop."""
        guard = BadRuns({name: len(s) for name, s in self.reader.sources.items()})
        rows: list[list[Example]] = []
        skipped: dict[str, tuple[str, str]] = {}
        for place, result in self._results(start, stop):
            if stop.is_set():
                return
            if isinstance(result, BadSample):
                guard.bad(place.source, result.reason, str(result))
                skipped[f"{place.source}/{place.record}"] = (result.reason, str(result))
                continue
            guard.good(place.source)
            rows.append([result])
            if len(rows) == self.batch_size:
                ids = [[e.id for e in row] for row in rows]
                batch = self.reader.encoder.collate(rows)
                yield Made(batch, ids, place.index + 1, skipped, absent(batch))
                rows, skipped = [], {}

    def _results(self, start: int, stop: threading.Event) -> Iterator[tuple[Place, Example | BadSample]]:
        width = self.reader.config.loading.parallel
        # One chunk of a batch for each thread: work that goes stage by stage is quicker in large chunks.
        size = min(max(self.batch_size // width, 1), _MOST_IN_CHUNK)
        pool, ahead = self.reader.pool(size, stop), 2 * width + -(-self.batch_size // size)
        for places, results in in_order(pool, self._chunks(start, size), ahead=ahead):
            yield from zip(places, results, strict=True)

    def _chunks(self, start: int, size: int) -> Iterator[tuple[list[Place], list[Place]]]:
        for first in itertools.count(start, size):
            places = [Place(index, *self.order(index)) for index in range(first, first + size)]
            yield places, places
