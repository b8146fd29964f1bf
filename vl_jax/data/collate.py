"""Examples to rows of static shape; a row may hold several examples, one segment each.

    tokens  [ segment 1 | segment 2 | ... | padding ]   tiles  [ of segment 1 | of segment 2 | ... | unused ]

Tiles stand close together, so the encoder's only idle work is on the unused ones at the end of a row.
Read row by row, the places in use hold the examples one behind the other; so a field is filled at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vl_jax.batch import FIELDS, Batch, Given
from vl_jax.data.config import RowField
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
    labels: tuple[RowField, ...] = ()
    media: tuple[RowField, ...] = ()


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
    shape = (len(rows), sizes.tiles, sizes.tile_size, sizes.tile_size, 3)
    tiles = np.full(shape, FIELDS["tiles"].padding, FIELDS["tiles"].dtype)
    for row, tile, example in zip(row_of, before[:, 1], examples, strict=True):
        tiles[row, tile : tile + len(example.tiles)] = example.tiles
    of_text = {
        "tokens": _joined(examples, "tokens"),
        "positions": _joined(examples, "positions"),
        "segment_ids": np.repeat(segments, lengths[:, 0]),
        "branch_ids": _joined(examples, "branch_ids"),
        "visual_slot": slots,
    }
    of_pictures = {
        "visual_index": index,
        "visual_start": visible_from,
        "visual_segment_ids": np.repeat(segments, lengths[:, 2]),
    }
    # What fills a place follows from the table of fields, but for these. Nothing ever sees visual padding.
    padding = {"tokens": padding_id, "visual_start": sizes.tokens}
    return Batch(
        **_spread(of_text, here, padding),
        **_spread(_predictions(here, _joined(examples, "targets"), weights), _first(predicted, sizes), {}),
        tiles=tiles,
        **_spread(of_pictures, there, padding),
        labels={field.name: _given(rows, "labels", field) for field in sizes.labels},
        media={field.name: _given(rows, "media", field) for field in sizes.media},
    )


def _given(rows: Sequence[Sequence[Example]], kind: str, field: RowField) -> Given:
    """A label or medium of every row, which has one sample; zeros where a row has none."""
    values = np.zeros((len(rows), *field.shape), field.dtype)
    present = np.zeros(len(rows), np.bool_)
    steps = np.zeros(len(rows), np.int32) if getattr(field, "varies", False) else None
    for row, examples in enumerate(rows):
        for example in examples:
            found = getattr(example, kind).get(field.name)
            if found is None:
                continue
            present[row] = True
            if steps is None:
                values[row] = found
            else:
                values[row, : len(found)], steps[row] = found, len(found)
    return Given(values, present, steps)


def _joined(examples: Sequence[Example], name: str) -> np.ndarray:
    """A field of all examples, one behind the other."""
    return np.concatenate([_NOTHING, *(getattr(example, name) for example in examples)])


def _between(start: np.ndarray | int, stop: np.ndarray, width: int) -> np.ndarray:
    """Which places of each row are in use: ``bool[B width]``, from starts and stops ``[B 1]``."""
    places = np.arange(width)
    return (places >= start) & (places < stop)


def _first(counts: np.ndarray, sizes: RowSizes) -> np.ndarray:
    """The first so many places of each row: ``bool[B Q]``."""
    return _between(0, counts.astype(int)[:, None], sizes.targets)


def _spread(
    fields: Mapping[str, np.ndarray], places: np.ndarray, padding: Mapping[str, int]
) -> dict[str, Any]:
    """The fields at the places that are in use, row by row: ``[B width]`` each.

    Args:
      fields: the values of each, those of all rows one behind the other.
      padding: what fills the other places of a field, if it is not what the table of fields says.
    """
    result = {}
    for name, values in fields.items():
        field = FIELDS[name]
        result[name] = np.full(places.shape, padding.get(name, field.padding), field.dtype)
        result[name][places] = values
    return result


def _predictions(here: np.ndarray, following: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """What a batch says of its targets, those of all rows one behind the other."""
    used = np.flatnonzero(weights)
    return {
        "target_index": np.nonzero(here)[1][used],
        "targets": following[used],
        "loss_weights": weights[used],
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
    if sizes.labels or sizes.media:
        for row in rows:
            if len(row) > 1:
                names = ", ".join(e.id for e in row)
                raise ValueError(f"row of {names}: {len(row)} samples, labels and media are those of one")
