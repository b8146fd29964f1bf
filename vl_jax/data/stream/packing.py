"""Packed rows: several samples in a row, as many as fit its budgets.

A row has three budgets, tokens, tiles and predicted tokens, and an item takes some of each. Which draws of
the stream share a row is decided before anything is read: see ``plan``.
"""

from __future__ import annotations

import math

import numpy as np

from vl_jax.data.stream import shuffle

_SPARE = 1.01  # rows opened, over those that would do if everything fitted perfectly
_EPSILON = 1e-9


def fill_rows(sizes: np.ndarray, limits: np.ndarray) -> list[np.ndarray]:
    """Distributes items over rows so that no budget is exceeded and few rows are needed.

    Just as many rows are opened as the scarcest budget asks for. Items go from large to small, each into the
    row with most room in the item's direction (dot product, as in Panigrahy et al., Heuristics for Vector Bin
    Packing, 2011), so that all budgets run low together; what finds no room begins rows of its own.

    Args:
      sizes: i64[n k], no item above the limits.
      limits: i64[k].

    Returns:
      The items of each row, by their index.
    """
    share, rest, rows = sizes / np.maximum(limits, 1), np.arange(len(sizes)), []
    while len(rest):
        row_of = _spread(share[rest])
        placed = np.flatnonzero(row_of >= 0)
        by_row = placed[np.argsort(row_of[placed], kind="stable")]
        rows += np.split(rest[by_row], np.flatnonzero(np.diff(row_of[by_row])) + 1)
        rest = rest[row_of < 0]
    return rows


def _spread(share: np.ndarray) -> np.ndarray:
    """The row of each item, -1 for those that found no room; sizes are shares of the budgets: f64[n k]."""
    demand = share.sum(0)
    weights = demand / demand.max()  # a budget that all items together hardly touch directs nothing
    num_rows = max(1, math.ceil(demand.max() * _SPARE))
    room = np.full((share.shape[1], num_rows), 1 + _EPSILON)
    row_of = np.full(len(share), -1)
    scalar, ranked = share @ weights, np.argsort(-(share * weights).max(1), kind="stable")
    split = len(ranked) // 2
    for start in range(0, split, num_rows):  # The large ones, as many at once as there are rows.
        items = ranked[start : min(start + num_rows, split)]
        items = items[np.argsort(-scalar[items], kind="stable")]
        targets = np.argsort(-(weights @ room), kind="stable")[: len(items)]
        fits = (share[items] <= room[:, targets].T).all(1)
        room[:, targets[fits]] -= share[items[fits]].T
        row_of[items[fits]] = targets[fits]
    directed = share * weights
    for item in ranked[row_of[ranked] < 0].tolist():  # The small ones even out what the large ones left.
        fits = np.logical_and.reduce(room >= share[item][:, None])
        row = int((directed[item] @ room * fits).argmax())
        if fits[row]:
            room[:, row] -= share[item]
            row_of[item] = row
    return row_of


def balanced(costs: np.ndarray, *, key: np.ndarray) -> np.ndarray:
    """An order in which every run of neighbours has about its share of cheap and of dear rows.

    Rows ranked by cost are dealt along the golden ratio sequence, from a random place on.
    """
    ranked = np.argsort(costs, kind="stable")
    golden = (np.arange(len(costs)) * ((5**0.5 - 1) / 2) + shuffle.uniform(key)) % 1.0
    return ranked[np.argsort(np.argsort(golden, kind="stable"), kind="stable")]
