"""How much of the static rows would be padding, with packing and without: looked up, nothing is encoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vl_jax.data.config import DataConfig
from vl_jax.data.reasons import summary
from vl_jax.data.sample import BadSample, Source
from vl_jax.data.stream.lengths import read
from vl_jax.data.stream.plan import Cursor, Planner


@dataclass(frozen=True)
class Waste:
    """Shares of the room in rows that nothing fills."""

    tokens: float
    tiles: float


@dataclass(frozen=True)
class WasteReport:
    """What some windows of a packed stream hold."""

    num_samples: int
    num_rows: int
    packed: Waste
    unpacked: Waste  # the same samples, one in a row of the data config's limits
    tiles_per_row: float  # in rows full of tokens: what ``packing.max_tiles`` should be little above
    skipped: dict[str, int]  # draws, by reason

    def __str__(self) -> str:
        skipped = ", ".join(f"{n} {reason}" for reason, n in self.skipped.items()) or "none"
        return (
            f"{self.num_samples} samples in {self.num_rows} packed rows, skipped: {skipped}\n"
            f"padding with packing: {self.packed.tokens:.1%} of tokens, {self.packed.tiles:.1%} of tiles; "
            f"without: {self.unpacked.tokens:.1%} of tokens, {self.unpacked.tiles:.1%} of tiles\n"
            f"a row full of tokens has {self.tiles_per_row:.1f} tiles"
        )


def predict(
    planner: Planner, config: DataConfig, *, windows: int = 1, sources: Mapping[str, Source] | None = None
) -> WasteReport:
    """Plans the first windows of a stream and counts.

    Args:
      sources: those that the planner draws from; a message about records says then what is wrong with one.

    Raises:
      ValueError: no sample of them can be used.
    """
    row, cursor = planner.config, planner.begin(Cursor())
    samples = rows = tokens = tiles = 0
    skipped: Counter[str] = Counter()
    faults: list[tuple[str, int, str]] = []
    for _ in range(windows):
        plan = planner.plan(cursor)
        rows += len(plan.rows)
        for item in (item for items in plan.rows for item in items):
            samples, tokens, tiles = samples + 1, tokens + item.tokens, tiles + item.tiles
        skipped.update(reason for _, _, reason in plan.skipped)
        faults += plan.skipped[:1]
        cursor = planner.advance(cursor)
    if not samples:
        raise ValueError(_nothing(skipped, faults, sources or {}))

    def waste(count: int, max_tokens: int, max_tiles: int) -> Waste:
        return Waste(1 - tokens / (count * max_tokens), 1 - tiles / (count * max_tiles))

    return WasteReport(
        num_samples=samples,
        num_rows=rows,
        packed=waste(rows, row.max_tokens, row.max_tiles),
        unpacked=waste(samples, config.max_tokens, config.max_tiles),
        tiles_per_row=tiles * row.max_tokens / tokens,
        skipped=dict(skipped),
    )


def _nothing(
    skipped: Counter[str], faults: Sequence[tuple[str, int, str]], sources: Mapping[str, Source]
) -> str:
    """What to say where no record can be used: why, for example which, and what to do."""
    if not faults:
        return "nothing was drawn from any source: they have no records, or all weights are 0"
    source, record, _ = faults[0]
    found = read(sources[source], record) if source in sources else None
    example = f"record {record} of source {source!r}"
    if isinstance(found, BadSample):
        example += f": {found}"
    elif found is not None:
        example += f", id {found.id!r}"
    return f"none of {skipped.total():,} records can be used: {summary(skipped)}; for example {example}"
