"""The ``Batch``: the one pytree on which data, models, losses and metrics agree.

Shape letters, used in annotations, einsums and comments throughout the package::

    B batch            T query tokens    S key / visual tokens   D model width     F hidden width
    N heads            H head width      R latent rank           L layers          V vocabulary
    E experts          K experts/token   G routing groups        C expert capacity P patches
    M tiles            Q object queries  h w c image grids (lower case)

How pixels meet tokens::

    tiles[b, m] --encoder, adapter--> tile tokens [M * n, D]  --.
    learned newline and separator vectors           [2, D]    --+--> table [M * n + 2, D]
                                                                      |  visual_index[b, s]
                     visual tokens of the row, in reading order  [S, D]
                                                                      |  visual_slot[b, t]
    embed[tokens[b, t]]  where visual_slot < 0, else the visual token there  --> decoder input [T, D]

The layout of tiles, row ends and separators is computed once per image on the host, as integers, so the
device does two gathers with static shapes whatever the images look like.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np
from flax import struct

from vl_jax.params import Leaf

# Modality ids of tokens in the language model; routing statistics are split by them.
TEXT, VISION = 0, 1
MODALITIES = ("text", "vision")

# The inputs that every batch has fields for, and the axes of what is there for each. Media have names of
# their own.
TILES, TOKENS = "tiles", "tokens"
_AXES = {TILES: {"M", "S"}, TOKENS: {"T", "Q"}}


@dataclasses.dataclass(frozen=True)
class Field:
    """One array of a ``Batch``: what stands behind B, of which type, and what fills a place that is not used.

    An axis that is a letter varies from batch to batch; a number is as it is.
    """

    axes: tuple[str | int, ...]
    dtype: str = "int32"
    padding: int = 0


# The arrays that every batch has.
FIELDS = {
    "tokens": Field(("T",)),
    "positions": Field(("T",)),
    "segment_ids": Field(("T",)),
    "branch_ids": Field(("T",)),
    "visual_slot": Field(("T",), padding=-1),
    "target_index": Field(("Q",)),
    "targets": Field(("Q",)),
    "loss_weights": Field(("Q",), "float32"),
    "tiles": Field(("M", "h", "w", "c"), "uint8"),
    "visual_index": Field(("S",), padding=-1),
    "visual_start": Field(("S",)),
    "visual_segment_ids": Field(("S",)),
}


@struct.dataclass
class Given:
    """What some rows of a batch bring and others lack."""

    values: Leaf  # [B ...], zeros where a row has none
    present: Leaf  # bool[B]
    steps: Leaf = None  # i32[B] of an input that varies in length: how many steps of ``values`` are there


@struct.dataclass
class Batch:
    """One training or evaluation batch of rows, padded to static shapes.

    A token may attend to an earlier token of its own segment, if that token is on the trunk
    (``branch_ids`` 0) or on its own branch. Segments are the samples packed in a row; branches are the
    independent questions about one image (they share the trunk, and never see one another).
    """

    tokens: Leaf  # i32[B T] token ids; visual positions hold the image placeholder id
    positions: Leaf  # i32[B T] rotary position, from 0 in every segment
    segment_ids: Leaf  # i32[B T] 1, 2, ... for the packed samples of a row; 0 is padding
    branch_ids: Leaf  # i32[B T] 0 on the trunk; 1, 2, ... on independent branches
    visual_slot: Leaf  # i32[B T] which visual token stands here (prefix fusion), -1 for text
    target_index: Leaf  # i32[B Q] sequence positions to predict from, so that the head runs on these only
    targets: Leaf  # i32[B Q] the id that follows each of them
    loss_weights: Leaf  # f32[B Q] 0 is padding
    tiles: (
        Leaf  # u8[B M h w c] RGB pixels; unused tiles are zero and never referred to. Floats are normalised
    )
    visual_index: Leaf  # i32[B S] source row in the table drawn above; -1 is padding
    visual_start: Leaf  # i32[B S] first sequence index that may see the visual token
    visual_segment_ids: Leaf  # i32[B S] segment of the visual token; 0 is padding
    high_tiles: Leaf = (
        None  # f32[B M h w c] normalised pixels of the tiles for a second, high-resolution tower
    )

    media: dict[str, Given] = struct.field(default_factory=dict)  # further inputs, by name
    labels: dict[str, Given] = struct.field(default_factory=dict)  # what heads are to say, by their names

    @property
    def modality(self) -> Leaf:
        """``TEXT`` or ``VISION`` for every sequence position, i32[B T]."""
        return (self.visual_slot >= 0).astype(np.int32)


def hint_of(head: str) -> str:
    """Under which name in ``Batch.media`` an objective tells a head something beside its streams."""
    return f"{head}/hint"


def without_absent(batch: Batch, inputs: Collection[str]) -> Batch:
    """The batch without room for those of some inputs that no row has; else the batch itself.

    Its shapes are others then, so a compiled function has a further program for it, in which no part that
    looks at such an input stands. That is decided on the host: where other processes hold rows of the batch,
    or a trace does, nothing is known of them, and the batch stays as it is.
    """
    known = (batch.segment_ids, batch.visual_index, *(given.present for given in batch.media.values()))
    if not all(isinstance(x, np.ndarray) or getattr(x, "is_fully_addressable", False) for x in known):
        return batch
    return without(batch, absent(batch) & frozenset(inputs))


def absent(batch: Batch) -> frozenset[str]:
    """The inputs that no row of a host batch has."""
    said = {TILES: batch.visual_index >= 0, TOKENS: batch.segment_ids > 0}
    said |= {name: given.present for name, given in batch.media.items()}
    return frozenset(name for name, here in said.items() if not np.asarray(here).any())


def without(batch: Batch, inputs: Collection[str]) -> Batch:
    """The batch without any room for some inputs, whatever stands there; ``media`` loses their names."""
    if not inputs:
        return batch
    axes = {axis for name in inputs for axis in _AXES.get(name, ())}
    names = [name for name, field in FIELDS.items() if axes & set(field.axes)]
    empty = {name: getattr(batch, name)[:, :0] for name in names}
    high = batch.high_tiles
    if high is not None and TILES in inputs:
        high = high[:, :0]
    media = {name: given for name, given in batch.media.items() if name not in inputs}
    return dataclasses.replace(batch, **empty, high_tiles=high, media=media)


def without_blank_pictures(batch: Batch) -> Batch:
    """The batch without room for pictures, if no row has any; see ``without_absent``."""
    return without_absent(batch, (TILES,))


def without_pictures(batch: Batch) -> Batch:
    """The batch without any room for pictures, whatever stands there."""
    return without(batch, (TILES,))


def blank(sizes: dict[str, int], rows: int) -> Batch:
    """A host batch of which no place is used.

    Args:
      sizes: the length of each axis that is a letter in ``FIELDS``.
    """
    arrays = {}
    for name, field in FIELDS.items():
        shape = (rows, *(axis if isinstance(axis, int) else sizes[axis] for axis in field.axes))
        arrays[name] = np.full(shape, field.padding, field.dtype)
    return Batch(**arrays)
