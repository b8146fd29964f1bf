"""Examples to rows of static shape; a row may hold several examples, one segment each.

    tokens  [ segment 1 | segment 2 | ... | padding ]   tiles  [ of segment 1 | of segment 2 | ... | unused ]

Tiles stand close together, so the encoder's only idle work is on the unused ones at the end of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vl_jax.batch import Batch
from vl_jax.data.example import Example


@dataclass(frozen=True)
class RowSizes:
    """The static sizes of a row."""

    tokens: int  # T
    tiles: int  # M
    tile_size: int  # h, w
    tile_tokens: int  # tokens that a tile becomes
    visual: int  # S
    targets: int  # Q


def collate(
    rows: Sequence[Sequence[Example]], sizes: RowSizes, *, padding_id: int, pad_left: bool = False
) -> Batch:
    """Lays rows of examples out as a batch.

    Args:
      rows: the examples of each row; they become segments 1, 2, ...
      pad_left: padding before the row (for generation) instead of after it.

    Raises:
      ValueError: a row does not fit.
    """
    batch = _empty_batch(len(rows), sizes, padding_id)
    for index, row in enumerate(rows):
        _fill_row(batch, index, row, sizes, pad_left)
    return batch


def _fill_row(batch: Batch, row: int, examples: Sequence[Example], sizes: RowSizes, pad_left: bool) -> None:
    used = sum(len(e.tokens) for e in examples)
    tiles = sum(len(e.tiles) for e in examples)
    visual = sum(len(e.visual_index) for e in examples)
    predicted = sum(np.count_nonzero(e.loss_weights) for e in examples)
    found = (used, tiles, visual, predicted)
    limits = (sizes.tokens, sizes.tiles, sizes.visual, sizes.targets)
    if any(f > limit for f, limit in zip(found, limits, strict=True)):
        names = ", ".join(e.id for e in examples)
        raise ValueError(
            f"row of {names}: tokens, tiles, visual tokens, targets {found} exceed the limits {limits}"
        )
    start, tile, slot, target = sizes.tokens - used if pad_left else 0, 0, 0, 0
    for segment, e in enumerate(examples, start=1):
        here, there = slice(start, start + len(e.tokens)), slice(slot, slot + len(e.visual_index))
        for name in ("tokens", "positions", "branch_ids"):
            getattr(batch, name)[row, here] = getattr(e, name)
        predicted = np.flatnonzero(e.loss_weights)
        wanted = slice(target, target + len(predicted))
        batch.target_index[row, wanted] = predicted + start
        batch.targets[row, wanted] = e.targets[predicted]
        batch.loss_weights[row, wanted] = e.loss_weights[predicted]
        batch.segment_ids[row, here] = segment
        batch.visual_slot[row, here] = np.where(e.visual_slot < 0, -1, e.visual_slot + slot)
        batch.tiles[row, tile : tile + len(e.tiles)] = e.tiles
        # Newline and separator have one place in the table for the whole row; tile tokens move.
        of_tile = e.visual_index < sizes.tiles * sizes.tile_tokens
        batch.visual_index[row, there] = e.visual_index + of_tile * np.int32(tile * sizes.tile_tokens)
        batch.visual_start[row, there] = e.visual_start + start
        batch.visual_segment_ids[row, there] = segment
        start, tile, slot, target = here.stop, tile + len(e.tiles), there.stop, wanted.stop


def _empty_batch(rows: int, sizes: RowSizes, padding_id: int) -> Batch:
    def full(value: int, *shape: int) -> np.ndarray:
        return np.full((rows, *shape), value, np.int32)

    return Batch(
        tokens=full(padding_id, sizes.tokens),
        target_index=full(0, sizes.targets),
        targets=full(0, sizes.targets),
        loss_weights=np.zeros((rows, sizes.targets), np.float32),
        positions=full(0, sizes.tokens),
        segment_ids=full(0, sizes.tokens),
        branch_ids=full(0, sizes.tokens),
        visual_slot=full(-1, sizes.tokens),
        tiles=np.zeros((rows, sizes.tiles, sizes.tile_size, sizes.tile_size, 3), np.uint8),
        visual_index=full(-1, sizes.visual),
        visual_start=full(sizes.tokens, sizes.visual),  # past the end: nothing ever sees padding
        visual_segment_ids=full(0, sizes.visual),
    )
