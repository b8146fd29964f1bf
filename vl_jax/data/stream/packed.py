"""Batches of packed rows, with a position that can be saved and restored on any number of hosts.

    Planner: windows of rows --> items of the next batch --threads: read, encode--> examples --> Batch

What is in a row follows from the plan alone. A sample that turns out to be broken only now leaves its place
in the row empty, is counted, and changes nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vl_jax.batch import TILES
from vl_jax.data.config import DataConfig, ModelSpec, open_sources
from vl_jax.data.encode import make_row_encoder
from vl_jax.data.example import Example
from vl_jax.data.sample import BadSample, Source
from vl_jax.data.sources.build import SourceConfig, stamp_of
from vl_jax.data.stream.background import BadRuns
from vl_jax.data.stream.batches import BatchStream, Made
from vl_jax.data.stream.lengths import Measure, Measured, Measuring, open_index
from vl_jax.data.stream.mixture import Mixture
from vl_jax.data.stream.plan import Cursor, Draw, Item, Planner, RowPlan
from vl_jax.data.stream.readers import ItemReader
from vl_jax.data.stream.workers import in_order
from vl_jax.data.text.chat import Targets

_MAX_EMPTY_WINDOWS = 1000


class PackedIterator(BatchStream[Cursor]):
    """An endless iterator of batches of packed rows; ``TrainIterator`` is the one of unpacked rows.

    What the lengths do not show, a record that breaks later, is skipped and known on the host that reads it.

    Example::

        batches = PackedIterator(config, spec, batch_size=8)   # config.packing is set
        batch = next(batches)
        state = batches.get_state()   # JSON-able; on any number of hosts another one goes on from here
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
        rows: Sequence[int] | None = None,
    ):
        """Opens the sources; makes their indices where the config names a folder for them.

        Args:
          batch_size: rows of the global batch.
          sources: names from ``config.sources`` and their relative weights; None takes all alike.
          seed: of order, turn choice and image dropout; None takes ``config.seed``.
          rows: of a batch, those this host needs; the others are neither read nor decoded. None: all.

        Raises:
          ValueError: a source is unknown or unreadable, or a weight or size is out of range.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        super().__init__(Cursor(), prefetch=config.loading.prefetch)
        own = frozenset(range(batch_size) if rows is None else rows)
        if not own <= set(range(batch_size)):
            raise ValueError(f"rows={rows}: must be from 0 to {batch_size - 1}, the rows of a batch")
        planner, reader = open_planner(config, spec, sources=sources, targets=targets, seed=seed)
        self._work = _PackedWork(reader, planner, batch_size, own)

    def _make(self, start: Cursor) -> Callable[[threading.Event], Iterator[Made[Cursor]]]:
        return functools.partial(self._work.batches, start)

    def _save(self, position: Cursor) -> dict[str, Any]:
        return {"cursor": dataclasses.asdict(position)}

    def _load(self, state: Mapping[str, Any]) -> Cursor:
        if "cursor" not in state:
            raise ValueError(f"state={dict(state)}: expected cursor and skipped, as packed batches give")
        return Cursor.from_state(state["cursor"])


def open_planner(
    config: DataConfig,
    spec: ModelSpec,
    *,
    sources: Mapping[str, float] | None = None,
    targets: Targets = "answers",
    seed: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Planner, ItemReader]:
    """The planner of a packed stream and the reader of its items; arguments as for ``PackedIterator``.

    Args:
      progress: called, while an index is made, with the number of records measured and of all.

    Raises:
      ValueError: there is no ``config.packing``; or as ``PackedIterator``.
    """
    if config.packing is None:
        raise ValueError("packing=None: needs a PackingConfig")
    row = config.packing
    if targets != "answers":
        row = dataclasses.replace(row, max_answer_tokens=None)
    opened, weights = open_sources(config, sources)
    seed = config.seed if seed is None else seed
    encoder = make_row_encoder(config, spec, targets=targets)
    mixture = Mixture({name: len(s) for name, s in opened.items()}, weights, seed=seed, warmup=row.warmup)

    known = {s.name: s for s in config.sources}

    def lengths(blind: bool) -> dict[str, Measured]:
        measure = Measure(encoder, config.conversation.turns, targets, blind=blind, verify=bool(row.index))
        return {
            name: _lengths(known[name], source, measure, config, progress) for name, source in opened.items()
        }

    answers = config.max_answer_tokens if targets == "answers" else None
    draw = Draw(
        max_tokens=config.max_tokens,
        max_tiles=config.max_tiles,
        max_targets=min(answers or config.max_tokens, config.max_tokens),
        max_turns=config.conversation.max_turns,
        sampling=config.conversation.turn_sampling,
        blind_rate=config.image_dropout_rate,
    )
    blind = lengths(True) if draw.blind_rate else {}
    planner = Planner(mixture, lengths(False), blind, draw, row, seed=seed)
    return planner, ItemReader(opened, encoder, config, targets, seed)


def _lengths(
    config: SourceConfig,
    source: Source,
    measure: Measure,
    data: DataConfig,
    progress: Callable[[int, int], None],
) -> Measured:
    assert data.packing is not None
    if not data.packing.index:
        return Measuring(source, measure)
    return open_index(
        Path(data.packing.index),
        config,
        source,
        measure,
        stamp=stamp_of(source),
        num_threads=data.loading.num_threads,
        progress=progress,
    )


@dataclass(frozen=True)
class _Row:
    """A planned row on its way, and the position behind it; ``skipped`` is that of a window it begins."""

    items: tuple[Item, ...]
    cursor: Cursor
    skipped: tuple[tuple[str, int, str], ...]


@dataclass(frozen=True)
class _PackedWork:
    """What a background thread does."""

    reader: ItemReader
    planner: Planner
    batch_size: int
    own: frozenset[int]  # the rows of a batch that this host fills

    def batches(self, cursor: Cursor, stop: threading.Event) -> Iterator[Made[Cursor]]:
        """Batches from a position on, until told to stop."""
        with ThreadPoolExecutor(1) as planning:
            rows, read = self._rows(cursor, planning), []
            ahead = self.batch_size + self.reader.config.loading.parallel
            for row, results in in_order(self.reader.pool(stop), rows, ahead=ahead):
                if stop.is_set():
                    return
                read.append((row, results))
                if len(read) == self.batch_size:
                    yield self._batch(read)
                    read = []

    def _rows(self, cursor: Cursor, pool: ThreadPoolExecutor) -> Iterator[tuple[_Row, Sequence[Item]]]:
        """Rows, and what is to be read of them here."""
        for place, row in enumerate(_rows_from(self.planner, cursor, pool)):
            yield row, row.items if place % self.batch_size in self.own else ()

    def _batch(self, rows: list[tuple[_Row, list[Example | BadSample]]]) -> Made[Cursor]:
        examples: list[list[Example]] = []
        skipped: dict[str, tuple[str, str]] = {}
        for row, results in rows:
            for source, record, reason in row.skipped:
                skipped[f"{source}/{record}"] = (reason, f"{reason}, as found when it was measured")
            examples.append([])
            for item, result in zip(row.items, results, strict=False):
                if isinstance(result, BadSample):
                    skipped[f"{item.source}/{item.record}"] = (result.reason, str(result))
                else:
                    examples[-1].append(result)
        ids, batch = [[e.id for e in row] for row in examples], self.reader.encoder.collate(examples)
        for place in set(range(self.batch_size)) - self.own:  # Every host counts the tokens of all of them.
            lengths = [item.tokens for item in rows[place][0].items]
            segments = np.repeat(np.arange(1, 1 + len(lengths), dtype=np.int32), lengths)
            batch.segment_ids[place, : len(segments)] = segments
        # By the plan, which is the same everywhere: whether a record is broken is known to one host alone.
        pictures = any(item.tiles for row, _ in rows for item in row.items)
        absent = frozenset() if pictures else frozenset({TILES})
        return Made(batch, ids, rows[-1][0].cursor, skipped, absent)


def _rows_from(planner: Planner, cursor: Cursor, pool: ThreadPoolExecutor) -> Iterator[_Row]:
    """Rows from a position on, without end; the next window is planned while one is read."""
    guard, empty, skipped = BadRuns(planner.mixture.sizes), 0, ()
    cursor = planner.begin(cursor)
    plan = planner.plan(cursor)
    while True:
        following = planner.advance(cursor)
        next_plan = pool.submit(planner.plan, following)
        skipped += plan.skipped if cursor.row == 0 else ()
        _watch(guard, plan)
        empty = 0 if plan.rows else empty + 1
        if empty > _MAX_EMPTY_WINDOWS:
            raise ValueError(f"mixture: nothing is drawn from any source in {empty} windows of the stream")
        for index in range(cursor.row, len(plan.rows)):
            yield _Row(plan.rows[index], dataclasses.replace(cursor, row=index + 1), skipped)
            skipped = ()
        cursor, plan = following, next_plan.result()


def _watch(guard: BadRuns, plan: RowPlan) -> None:
    """Tells the guard of the sources that have something to read in a window, or nothing but bad samples."""
    good = {item.source for row in plan.rows for item in row}
    for source in good:
        guard.good(source)
    for source, record, reason in plan.skipped:
        if source not in good:
            guard.bad(source, reason, f"record {record}: {reason}")
