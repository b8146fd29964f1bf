"""The plan of packed rows: a pure function of lengths, mixture, seed and position.

    window of draws --lengths--> draws of turns --fill rows under the budgets--> rows, in balanced order
                         '--> skipped: the record and why, part of the plan as well

So every host computes the same rows, and a position in the stream is a few whole numbers (``Cursor``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from vl_jax.data.config import PackingConfig
from vl_jax.data.stream import shuffle
from vl_jax.data.stream.lengths import Lengths, Measured, concatenate
from vl_jax.data.stream.mixture import Mixture, stream_key
from vl_jax.data.stream.packing import balanced, fill_rows
from vl_jax.data.text.turns import TurnSampling

_TURN, _GROUP, _BLIND, _ROW, _ITEM = range(5)  # what a random number is for


@dataclass(frozen=True)
class Cursor:
    """Where the next row is: a window, a row in it, and each source's draws before the window and in it."""

    window: int = 0
    row: int = 0
    taken: Mapping[str, int] = field(default_factory=dict)
    drawn: Mapping[str, int] = field(default_factory=dict)  # empty: as the mixture says

    @classmethod
    def from_state(cls, state: Any) -> Cursor:
        """Reads back ``dataclasses.asdict(cursor)``.

        Raises:
          ValueError: this is no such thing.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        if not isinstance(state, Mapping) or sorted(state) != sorted(names):
            raise ValueError(f"cursor={state!r}: expected {', '.join(names)}")
        numbers = [state["window"], state["row"]]
        for name in ("taken", "drawn"):
            if not isinstance(state[name], Mapping):
                raise ValueError(f"cursor.{name}={state[name]!r}: expected a number for each source")
            numbers += state[name].values()
        if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in numbers):
            raise ValueError(f"cursor={state!r}: expected whole numbers from 0")
        return cls(state["window"], state["row"], dict(state["taken"]), dict(state["drawn"]))


class Item(NamedTuple):
    """One draw: a record, the turns it takes in order, and whether its images are withheld."""

    source: str
    record: int
    number: int  # of the draw, counted for its source
    turns: tuple[int, ...]
    blind: bool
    tokens: int
    tiles: int


@dataclass(frozen=True)
class RowPlan:
    """The rows of one window, and the records passed over with the reason of each."""

    rows: tuple[tuple[Item, ...], ...]
    skipped: tuple[tuple[str, int, str], ...]


@dataclass(frozen=True)
class Draw:
    """What a draw takes of a sample's turns, and the limits it has to keep."""

    max_tokens: int
    max_tiles: int
    max_targets: int
    max_turns: int | None = None
    sampling: TurnSampling = "first"
    blind_rate: float = 0.0  # of draws without their images


class Planner:
    """Plans window after window of a stream; holds no position."""

    def __init__(
        self,
        mixture: Mixture,
        seeing: Mapping[str, Measured],
        blind: Mapping[str, Measured],
        draw: Draw,
        config: PackingConfig,
        *,
        seed: int,
    ):
        """Takes the lengths of every source.

        Args:
          blind: lengths without images; not needed where no draw withholds them.
        """
        self.mixture, self.draw, self.config = mixture, draw, config
        self._seeing, self._blind, self._seed = seeing, blind, seed

    def begin(self, cursor: Cursor) -> Cursor:
        """The cursor with the draws of its window filled in.

        A window that was begun keeps the draws it had, even if the weights were changed since.
        """
        if cursor.drawn:
            return cursor
        size = self.config.window
        drawn = self.mixture.quota(cursor.window * size, (cursor.window + 1) * size)
        taken = {name: cursor.taken.get(name, 0) for name in self.mixture.sizes}
        return dataclasses.replace(cursor, taken=taken | dict(cursor.taken), drawn=drawn)

    def advance(self, cursor: Cursor) -> Cursor:
        """The beginning of the window after the cursor's."""
        taken = {name: n + cursor.drawn.get(name, 0) for name, n in cursor.taken.items()}
        return self.begin(Cursor(cursor.window + 1, 0, taken))

    def plan(self, cursor: Cursor) -> RowPlan:
        """The rows of the cursor's window (which ``begin`` has filled in).

        Raises:
          ValueError: the cursor's window draws from a source that there is not.
        """
        unknown = sorted(name for name, n in cursor.drawn.items() if n and name not in self.mixture.sizes)
        if unknown:
            raise ValueError(f"source {unknown[0]!r}: the window that was begun has draws from it; keep it")
        found = [self._look_up(name, cursor.taken[name], n) for name, n in cursor.drawn.items() if n]
        parts = [part for parts in found for part in parts]
        if not parts:
            return RowPlan((), ())
        keys = np.concatenate([part.keys for part in parts])
        drawn = choose(concatenate([part.lengths for part in parts]), keys, self.draw)
        origins = [
            (p.source, record, number, p.blind)
            for p in parts
            for record, number in zip(p.records.tolist(), p.numbers.tolist(), strict=True)
        ]
        skipped = [(*origin[:2], fault) for origin, fault in zip(origins, drawn.faults, strict=True) if fault]
        # Items of one size are taken as they come: in random order, lest a row be all of one source.
        used = np.argsort(shuffle.mix(keys, _ITEM), kind="stable")
        used = used[[not drawn.faults[i] for i in used.tolist()]]
        row = self.config
        limits = np.array((row.max_tokens, row.max_tiles, row.max_answer_tokens or row.max_tokens))
        rows = [used[row] for row in fill_rows(drawn.sizes[used], limits)]
        costs = np.array([self.config.cost(drawn.sizes[row]) for row in rows])
        ranked = balanced(costs, key=shuffle.mix(self._seed, cursor.window, _ROW))
        sizes = drawn.sizes.tolist()

        def item(index: int) -> Item:
            source, record, number, blind = origins[index]
            return Item(source, record, number, drawn.turns[index], blind, *sizes[index][:2])

        return RowPlan(tuple(tuple(map(item, rows[r].tolist())) for r in ranked.tolist()), tuple(skipped))

    def _look_up(self, source: str, first: int, count: int) -> list[_Part]:
        """The draws of one source with their lengths; those without images apart."""
        draws = self.mixture.draws(source, first, count)
        keys = shuffle.mix(self._seed, stream_key(source), draws.numbers)
        withheld = shuffle.uniform(keys, _BLIND) < self.draw.blind_rate
        parts = []
        for blind, known in ((False, self._seeing), (True, self._blind)):
            chosen = withheld == blind
            if chosen.any():
                records = draws.records[chosen]
                lengths = known[source].take(records)
                parts.append(_Part(source, blind, draws.numbers[chosen], records, keys[chosen], lengths))
        return parts


@dataclass(frozen=True)
class _Part:
    """Draws of one source, with the images or without."""

    source: str
    blind: bool
    numbers: np.ndarray
    records: np.ndarray
    keys: np.ndarray
    lengths: Lengths


@dataclass(frozen=True)
class Drawn:
    """What each draw takes."""

    turns: list[tuple[int, ...]]
    sizes: np.ndarray  # i64[n 3] tokens, tiles, predicted tokens
    faults: list[str]  # why a draw cannot be used; empty where it can


def choose(lengths: Lengths, keys: np.ndarray, draw: Draw) -> Drawn:
    """The turns that each draw takes; those from the first one that does not fit are left out.

    The meaning of ``sampling`` is that of ``turns.choose_turns``; the random numbers come from the keys.

    Args:
      keys: u64[n] one for each draw.
    """
    counts = np.diff(lengths.offsets)
    sample = np.repeat(np.arange(len(lengths)), counts)
    turn = np.arange(lengths.offsets[-1]) - lengths.offsets[sample]
    by_key = np.arange(len(turn))
    if draw.sampling != "first":
        chance = shuffle.mix(keys[sample], _TURN, turn)
        by_key = np.lexsort((chance, sample))
    if draw.sampling == "balanced":
        # The place of a turn among those of the same answer is the round in which it is dealt.
        group = np.lexsort((chance, lengths.answers, sample))
        begins = np.ones(len(group), bool)
        begins[1:] = (np.diff(sample[group]) != 0) | (np.diff(lengths.answers[group].astype(np.int64)) != 0)
        first = np.maximum.accumulate(np.where(begins, np.arange(len(group)), 0))
        rounds = np.empty(len(group), np.int64)
        rounds[group] = np.arange(len(group)) - first
        by_key = np.lexsort((shuffle.mix(keys[sample], _GROUP, lengths.answers), rounds, sample))
    rank = np.arange(len(turn)) - lengths.offsets[sample]  # ``sample`` is sorted whatever the sampling
    tokens = np.cumsum(lengths.turns[by_key].astype(np.int64))
    before = np.concatenate([np.zeros(1, np.int64), tokens])[lengths.offsets[:-1]]
    room = draw.max_tokens - lengths.trunk + before
    keep = tokens <= room[sample]
    if draw.max_turns is not None:
        keep &= rank < draw.max_turns
    taken = np.bincount(sample[keep], minlength=len(lengths))
    sizes = np.stack([lengths.trunk, lengths.tiles, lengths.trunk_targets], 1).astype(np.int64)
    for column, per_turn in ((0, lengths.turns), (2, lengths.targets)):
        added = np.bincount(sample[keep], weights=per_turn[by_key][keep], minlength=len(lengths))
        sizes[:, column] += added.astype(np.int64)
    faults = [lengths.reasons[code - 1] if code else "" for code in lengths.fault]
    for reason, wrong in (
        ("too_many_tiles", sizes[:, 1] > draw.max_tiles),
        ("too_long", taken == 0),
        ("too_many_targets", sizes[:, 2] > draw.max_targets),
    ):
        for i in np.flatnonzero(wrong):
            faults[i] = faults[i] or reason
    chosen = turn[by_key]
    turns = [tuple(chosen[s : s + n].tolist()) for s, n in zip(lengths.offsets, taken, strict=False)]
    return Drawn(turns, sizes, faults)
