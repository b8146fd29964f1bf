"""What must not be in the program of a step: logits of all positions, and state that is spread no more.

The compiler may keep a whole copy of what the rules cut, and nobody sees it before memory ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import jax

from vl_jax import losses, sharding
from vl_jax import params as params_lib
from vl_jax.layout import Layout
from vl_jax.runtime.checkpoint_record import plain

Whole = tuple[str, int]  # what it is about, and bytes on one device


def whole_logits(
    arrays: Collection[tuple[str, tuple[int, ...]]],
    layout: Layout,
    *,
    rows: int,
    positions: int,
    size_of: Callable[..., int],
) -> list[Whole]:
    """Logits of every position of a device's rows, where the loss could look at some at a time.

    Args:
      arrays: type and shape of what the instructions of a program give.
      rows: of a micro-batch, on all devices.
      positions: of a row, that are predicted.
      size_of: bytes of arrays.
    """
    parts = sharding.batch_axes(layout.mesh)
    mine, found = max(rows // parts, 1), []
    for path, leaf in params_lib.flatten(layout.params).items():
        names = layout.placements[path].names
        if "vocab" not in names or leaf.ndim != 2:
            continue
        whole = leaf.shape[names.index("vocab")]
        chunk = max(losses.CHUNK_ROWS, losses.CHUNK_LOGITS // whole)
        cut = leaf.sharding.shard_shape(leaf.shape)[names.index("vocab")]
        if positions <= chunk:  # a row is one chunk
            continue
        sides = {tuple(sorted((v, *of))) for v in {whole, cut} for of in _positions(mine, rows, positions)}
        large = [(t, shape) for t, shape in arrays if tuple(sorted(n for n in shape if n > 1)) in sides]
        if large:
            found.append((path, max(size_of([array]) for array in large)))
    return found


def _positions(mine: int, rows: int, positions: int) -> list[tuple[int, ...]]:
    """The ways in which all positions of a device's rows, or of all rows, stand in an array."""
    ways = {(n, positions) for n in (mine, rows)} | {(n * positions,) for n in (mine, rows)}
    return [tuple(n for n in way if n > 1) for way in ways]


def misplaced(given: Any, wanted: Any, *, least: int) -> list[Whole]:
    """The arrays of a state that a step gives back with more of them on a device than where they lay.

    Args:
      given: shardings of the state after the step.
      wanted: the abstract state before it.
      least: bytes on one device, of what is told.
    """
    places, found = jax.tree.leaves(given), []
    leaves, _ = jax.tree_util.tree_flatten_with_path(wanted)
    for (path, leaf), place in zip(leaves, places, strict=True):
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            continue
        before, after = (math.prod(s.shard_shape(leaf.shape)) for s in (leaf.sharding, place))
        if after > before and after * leaf.dtype.itemsize >= least:
            found.append((plain(jax.tree_util.keystr(path)), after * leaf.dtype.itemsize))
    return found
