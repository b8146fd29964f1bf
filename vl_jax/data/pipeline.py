"""The data pipeline: sources, a mixture, encoding and batching, with a position that can be saved.

    stream index --grain: shuffle, repeat, mix--> (source, record) --threads: read, choose turns, encode-->
    examples, bad ones skipped --> rows --> Batch --queue--> ``TrainIterator``

Everything about a batch follows from the seed and the stream index, so the whole state is one number and
the account of what was skipped.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from vl_jax.data.background import BadRuns
from vl_jax.data.chat import Targets
from vl_jax.data.collate import Example
from vl_jax.data.encode import DataConfig, Encoder, ModelSpec, make_encoder, open_sources
from vl_jax.data.sample import BadSample
from vl_jax.data.sources import Source
from vl_jax.data.stream import BatchStream, Made
from vl_jax.data.turns import vary


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
        super().__init__(0, prefetch=config.prefetch)
        opened, weights = open_sources(config, sources)
        seed = config.seed if seed is None else seed
        self._reader = _Reader(
            opened, weights, config, make_encoder(config, spec, targets=targets), targets, seed
        )
        self._batch_size = batch_size

    def _make(self, start: int) -> Callable[[threading.Event], Iterator[Made[int]]]:
        return functools.partial(_produce, self._reader, start, self._batch_size)

    def _save(self, position: int) -> dict[str, Any]:
        return {"next_index": position}

    def _load(self, state: Mapping[str, Any]) -> int:
        index = state.get("next_index")
        if not isinstance(index, int) or index < 0:
            raise ValueError(f"state={dict(state)}: expected next_index and skipped, as get_state gives")
        return index


@dataclass(frozen=True)
class _Read:
    """What became of one stream index."""

    source: str
    record: str
    result: Example | BadSample


class _Reader:
    """Maps a stream index to an example: a pure function, safe to call from many threads."""

    def __init__(
        self,
        sources: Mapping[str, Source],
        weights: Mapping[str, float],
        config: DataConfig,
        encoder: Encoder,
        targets: Targets,
        seed: int,
    ):
        self.sources, self.config, self.encoder = sources, config, encoder
        self._targets: Targets = targets
        self._seed = seed
        self._order = _order({name: len(s) for name, s in sources.items()}, weights, seed)

    def __call__(self, index: int) -> _Read:
        name, record = self._order(index)
        rng = np.random.default_rng((self._seed, index))
        config = self.config
        try:
            sample = vary(
                self.sources[name][record],
                rng=rng,
                max_turns=config.max_turns,
                sampling=config.turn_sampling,
                image_dropout_rate=config.image_dropout_rate,
            )
            result = self.encoder.example(sample, turns=config.turns, targets=self._targets)
        except BadSample as error:
            result = error
        return _Read(name, f"{name}/{record}", result)


def _order(
    sizes: Mapping[str, int], weights: Mapping[str, float], seed: int
) -> Callable[[int], tuple[str, int]]:
    """The endless shuffled mixture: from stream index to source and record."""
    import grain

    for name, size in sizes.items():
        if size == 0:
            raise ValueError(f"source {name!r}: has no records")
    streams = []
    for number, (name, size) in enumerate(sizes.items()):
        records = grain.MapDataset.range(size).map(lambda record, name=name: (name, int(record)))
        streams.append(records.shuffle(seed=(seed * 1009 + number) % 2**32).repeat())
    total = sum(weights.values())
    mixed = streams[0]
    if len(streams) > 1:
        mixed = grain.MapDataset.mix(streams, weights=[weights[name] / total for name in sizes])

    def look_up(index: int) -> tuple[str, int]:
        found = mixed[index]
        assert found is not None  # Nothing filters this stream.
        return found

    return look_up


def _produce(reader: _Reader, index: int, batch_size: int, stop: threading.Event) -> Iterator[Made[int]]:
    """Batches in stream order, read by threads, until told to stop."""
    pending: deque[Future[_Read]] = deque()
    with ThreadPoolExecutor(reader.config.num_threads, thread_name_prefix="data") as pool:
        try:
            submitted = index
            guard = BadRuns({name: len(s) for name, s in reader.sources.items()})
            while not stop.is_set():
                rows: list[list[Example]] = []
                skipped: dict[str, tuple[str, str]] = {}
                while len(rows) < batch_size and not stop.is_set():
                    while len(pending) < 2 * reader.config.num_threads + batch_size:
                        pending.append(pool.submit(reader, submitted))
                        submitted += 1
                    read = pending.popleft().result()
                    index += 1
                    if isinstance(read.result, BadSample):
                        guard.bad(read.source, read.result.reason, str(read.result))
                        skipped[read.record] = (read.result.reason, str(read.result))
                    else:
                        guard.good(read.source)
                        rows.append([read.result])
                if len(rows) == batch_size:
                    ids = [[e.id for e in row] for row in rows]
                    yield Made(reader.encoder.collate(rows), ids, index, skipped)
        finally:
            for future in pending:
                future.cancel()
