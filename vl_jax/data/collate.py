"""Examples to rows of static shape; a row may hold several examples, one segment each.

    tokens  [ segment 1 | segment 2 | ... | padding ]   tiles  [ of segment 1 | of segment 2 | ... | unused ]

Tiles stand close together, so the encoder's only idle work is on the unused ones at the end of a row.
Read row by row, the places in use hold the examples one behind the other; so a field is filled at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vl_jax.batch import Batch
from vl_jax.data.example import Example

_NOTHING = np.zeros(0, np.bool_)  # takes the type of whatever it is joined with


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
    examples = [example for row in rows for example in row]
    row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    segments = [segment for row in rows for segment in range(1, 1 + len(row))]
    sizes_of = [(len(e.tokens), len(e.tiles), len(e.visual_index)) for e in examples]
    lengths = np.array(sizes_of, np.int32).reshape(-1, 3)
    used = np.zeros((len(rows), 3), np.int32)
    np.add.at(used, row_of, lengths)
    weights = _joined(examples, "loss_weights")
    predicted = np.bincount(np.repeat(row_of, lengths[:, 0]), weights != 0, minlength=len(rows))
    _check(rows, used, predicted, sizes)

    # What lies before each example in its row: tokens, tiles and visual tokens.
    before = np.cumsum(lengths, axis=0) - lengths - (np.cumsum(used, axis=0) - used)[row_of]
    first = sizes.tokens - used[:, :1] if pad_left else np.zeros_like(used[:, :1])
    starts = before[:, 0] + first[row_of, 0]
    here = _between(first, first + used[:, :1], sizes.tokens)
    there = _between(0, used[:, 2:], sizes.visual)
    slots, index = _joined(examples, "visual_slot"), _joined(examples, "visual_index")
    slots = np.where(slots < 0, -1, slots + np.repeat(before[:, 2], lengths[:, 0]))
    # Newline and separator have one place in the table for the whole row; tile tokens move.
    of_tile = index < sizes.tiles * sizes.tile_tokens
    index = index + of_tile * np.repeat(before[:, 1] * sizes.tile_tokens, lengths[:, 2])
    visible_from = _joined(examples, "visual_start") + np.repeat(starts, lengths[:, 2])
    tiles = np.zeros((len(rows), sizes.tiles, sizes.tile_size, sizes.tile_size, 3), np.uint8)
    for row, tile, example in zip(row_of, before[:, 1], examples, strict=True):
        tiles[row, tile : tile + len(example.tiles)] = example.tiles
    return Batch(
        tokens=_spread(_joined(examples, "tokens"), here, padding_id),
        positions=_spread(_joined(examples, "positions"), here, 0),
        segment_ids=_spread(np.repeat(segments, lengths[:, 0]), here, 0),
        branch_ids=_spread(_joined(examples, "branch_ids"), here, 0),
        visual_slot=_spread(slots, here, -1),
        **_predictions(here, _joined(examples, "targets"), weights, sizes.targets),
        tiles=tiles,
        visual_index=_spread(index, there, -1),
        visual_start=_spread(visible_from, there, sizes.tokens),  # past the end: nothing ever sees padding
        visual_segment_ids=_spread(np.repeat(segments, lengths[:, 2]), there, 0),
    )


def _joined(examples: Sequence[Example], name: str) -> np.ndarray:
    """A field of all examples, one behind the other."""
    return np.concatenate([_NOTHING, *(getattr(example, name) for example in examples)])


def _between(start: np.ndarray | int, stop: np.ndarray, width: int) -> np.ndarray:
    """Which places of each row are in use: ``bool[B width]``, from starts and stops ``[B 1]``."""
    places = np.arange(width)
    return (places >= start) & (places < stop)


def _spread(values: np.ndarray, places: np.ndarray, padding: int) -> np.ndarray:
    """Values at the places that are in use, row by row: ``i32[B width]``."""
    result = np.full(places.shape, padding, np.int32)
    result[places] = values
    return result


def _predictions(
    here: np.ndarray, following: np.ndarray, weights: np.ndarray, most: int
) -> dict[str, np.ndarray]:
    """What a batch says of its targets, those of a row one behind the other: ``[B most]`` each."""
    used = np.flatnonzero(weights)
    rows, places = (axis[used] for axis in np.nonzero(here))
    count = np.bincount(rows, minlength=len(here))
    wanted = _between(0, count[:, None], most)
    loss_weights = np.zeros(wanted.shape, np.float32)
    loss_weights[wanted] = weights[used]
    return {
        "target_index": _spread(places, wanted, 0),
        "targets": _spread(following[used], wanted, 0),
        "loss_weights": loss_weights,
    }


def _check(
    rows: Sequence[Sequence[Example]], used: np.ndarray, predicted: np.ndarray, sizes: RowSizes
) -> None:
    limits = (sizes.tokens, sizes.tiles, sizes.visual, sizes.targets)
    found = np.column_stack([used, predicted]).astype(int)
    for row in np.flatnonzero((found > limits).any(axis=1)).tolist():
        names = ", ".join(e.id for e in rows[row])
        raise ValueError(
            f"row of {names}: tokens, tiles, visual tokens, targets {tuple(found[row].tolist())} exceed the "
            f"limits {limits}"
        )
