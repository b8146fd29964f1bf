"""Copper on a board, in whole numbers: wires along a grid, pads, wide patches, and what goes wrong."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

_STEPS = ((1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1))
_TRIES = 40  # for a place of a defect


@dataclass(frozen=True)
class Edge:
    """A straight piece of wire from one node of the grid to the next, in pixels."""

    start: tuple[int, int]
    step: tuple[int, int]
    half: int  # the wire is twice that and one wide


@dataclass(frozen=True)
class Board:
    """The net of each pixel (0: no copper), and where wires run."""

    nets: Int[np.ndarray, "h w"]
    pitch: int
    edges: tuple[Edge, ...]
    nodes: tuple[tuple[int, int, int], ...]  # x, y and half the width of the copper there


@dataclass(frozen=True)
class Defect:
    """What a defect changes, in a window of the board, and its box."""

    kind: str
    rows: slice
    columns: slice
    changed: Bool[np.ndarray, "h w"]
    corners: tuple[float, float, float, float]


def make_board(size: int, pitch: int, rng: random.Random) -> Board:
    """Draws wires from free node to free node until most of the grid is taken."""
    nets = np.zeros((size, size), np.int32)
    offset = rng.randrange(pitch), rng.randrange(pitch)
    columns, rows = ((size - o - 1) // pitch + 1 for o in offset)
    taken: set[tuple[int, int]] = set()
    crossed: set[tuple[int, int]] = set()
    edges, nodes = [], []
    half = rng.randint(2, max(pitch // 5, 2))
    order = [(i, j) for i in range(columns) for j in range(rows)]
    rng.shuffle(order)
    for net, start in enumerate(order[: max(2 * len(order) // 3, 1)], 1):
        if start in taken:
            continue
        at, heading = start, rng.randrange(8)
        path = [at]
        taken.add(at)
        for _ in range(rng.choice((0, 2, 5, 9))):
            heading = (heading + rng.choice((0, 0, 0, 1, -1))) % 8
            dx, dy = _STEPS[heading]
            after = (at[0] + dx, at[1] + dy)
            cell = (min(at[0], after[0]), min(at[1], after[1]))
            blocked = after in taken or (dx and dy and cell in crossed)
            if blocked or not (0 <= after[0] < columns and 0 <= after[1] < rows):
                break
            if dx and dy:
                crossed.add(cell)
            x, y = (o + pitch * a for o, a in zip(offset, at, strict=True))
            edges.append(Edge((x, y), (dx, dy), half))
            _draw_wire(nets, edges[-1], pitch, net)
            taken.add(after)
            path.append(after)
            at = after
        widest = max(2 * pitch // 5 - 1, half)
        for i, (a, b) in enumerate(path):
            wide = rng.randint(half, widest) if i in (0, len(path) - 1) else half
            x, y = offset[0] + pitch * a, offset[1] + pitch * b
            nodes.append((x, y, wide))
            square = rng.random() < 0.25 and wide > half
            _stamp(nets, x, y, np.ones((2 * wide + 1, 2 * wide + 1), bool) if square else _disc(wide), net)
    return Board(nets, pitch, tuple(edges), tuple(nodes))


def make_defects(board: Board, kinds: Sequence[str], margin: int, rng: random.Random) -> tuple[Defect, ...]:
    """A defect of each kind for which a place is found; boxes do not overlap.

    Args:
      margin: pixels between a defect and the sides of its box.
    """
    made: list[Defect] = []
    for kind in kinds:
        for _ in range(_TRIES):
            found = _propose(board, kind, margin, rng)
            if found is not None and not any(_meet(found.corners, d.corners) for d in made):
                made.append(found)
                break
    return tuple(made)


def _meet(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two boxes overlap or touch."""
    return one[0] <= other[2] and other[0] <= one[2] and one[1] <= other[3] and other[1] <= one[3]


def _propose(board: Board, kind: str, margin: int, rng: random.Random) -> Defect | None:
    """A defect at a random place; None where it would be another kind of defect, or none."""
    pitch, size = board.pitch, len(board.nets)
    if kind == "spurious copper":
        spot = rng.randrange(size), rng.randrange(size)
    elif kind == "pin hole":
        x, y, wide = rng.choice(board.nodes)
        spot = x + rng.randint(-wide, wide) // 2, y + rng.randint(-wide, wide) // 2
    elif not board.edges:
        return None
    else:
        edge = rng.choice(board.edges)
        along = pitch // 2 + rng.randint(-pitch // 6, pitch // 6)
        spot = edge.start[0] + edge.step[0] * along, edge.start[1] + edge.step[1] * along
        if kind in ("mouse bite", "spur"):
            side = rng.choice((-1, 1)) * (edge.half + (kind == "spur"))
            if edge.step[0] and edge.step[1]:
                side = side * 3 // 4
            spot = spot[0] - edge.step[1] * side, spot[1] + edge.step[0] * side
    reach = pitch
    x, y = spot
    if not (reach < x < size - reach - 1 and reach < y < size - reach - 1):
        return None
    rows, columns = slice(y - reach, y + reach + 1), slice(x - reach, x + reach + 1)
    nets = board.nets[rows, columns]
    mark = np.zeros(nets.shape, bool)
    half = board.edges[0].half if board.edges else 2
    if kind == "open circuit":
        _stamp(mark, reach, reach, _disc(half + rng.randint(1, 2)), True)
        changed = mark & (nets > 0)
    elif kind == "short circuit":
        dx, dy = rng.choice(((1, 0), (0, 1)))
        _draw_wire(
            mark, Edge((reach - dx * reach, reach - dy * reach), (dx, dy), rng.randint(1, half)), reach, True
        )
        _draw_wire(mark, Edge((reach, reach), (dx, dy), 1), reach, True)
        changed = _between(mark, nets, reach, (dx, dy))
    else:
        large = max(half if kind == "spurious copper" else half - 1, 1)
        _stamp_blob(mark, reach, rng.randint(1, large), rng)
        changed = mark & ((nets > 0) == (kind in ("mouse bite", "pin hole")))
    if changed.sum() < 5 or not _is(kind, changed, mark, nets):
        return None
    down, right = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    corners = (
        float(max(x - reach + right[0] - margin, 0)),
        float(max(y - reach + down[0] - margin, 0)),
        float(min(x - reach + right[-1] + 1 + margin, size)),
        float(min(y - reach + down[-1] + 1 + margin, size)),
    )
    return Defect(kind, rows, columns, changed, corners)


def _between(
    mark: Bool[np.ndarray, "h w"], nets: Int[np.ndarray, "h w"], reach: int, step: tuple[int, int]
) -> Bool[np.ndarray, "h w"]:
    """The part of a line from the middle, on copper, to the next copper along a direction; maybe nothing."""
    line = nets[reach, reach:] if step[0] else nets[reach:, reach]
    own = line[0]
    free = np.flatnonzero(line == 0)
    if not own or not len(free):
        return np.zeros_like(mark)
    other = np.flatnonzero((line > 0) & (np.arange(len(line)) > free[0]))
    if not len(other) or line[other[0]] == own or other[0] - free[0] < 2:
        return np.zeros_like(mark)
    changed = mark & (nets == 0)
    for axis, first, last in ((1, step[0] * free[0], other[0]), (0, step[1] * free[0], other[0])):
        if step[1 - axis]:
            place = np.arange(len(mark)) - reach
            keep = (place >= first) & (place < last)
            changed = changed & (keep[None, :] if axis else keep[:, None])
    return changed


def _is(
    kind: str, changed: Bool[np.ndarray, "h w"], mark: Bool[np.ndarray, "h w"], nets: Int[np.ndarray, "h w"]
) -> bool:
    """Whether what has changed is a defect of that kind."""
    near = _grown(changed)
    touched = set(np.unique(nets[near]).tolist())
    copper = touched - {0}
    if kind == "spurious copper":
        return not copper
    if kind == "pin hole":
        return 0 not in touched and len(copper) == 1
    if kind == "short circuit":
        return len(copper) == 2
    if len(copper) != 1 or 0 not in touched:
        return False
    if kind == "spur":
        return True
    # What is left of the net around the place: a bite leaves it in one piece, an open circuit does not.
    left = (nets == copper.pop()) & ~changed
    pieces = _pieces(left, near & left)
    return pieces == 1 if kind == "mouse bite" else pieces >= 2


def _pieces(area: Bool[np.ndarray, "h w"], seeds: Bool[np.ndarray, "h w"]) -> int:
    """In how many pieces of an area the seeds lie."""
    count = 0
    while seeds.any():
        count += 1
        row, column = np.argwhere(seeds)[0]
        piece = np.zeros_like(area)
        piece[row, column] = True
        size = 0
        while (grown := int(piece.sum())) != size:
            size = grown
            piece = _grown(piece) & area
        seeds = seeds & ~piece
    return count


def _grown(mark: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """The pixels, and their neighbours in eight directions."""
    wide = mark.copy()
    wide[1:] |= mark[:-1]
    wide[:-1] |= mark[1:]
    full = wide.copy()
    full[:, 1:] |= wide[:, :-1]
    full[:, :-1] |= wide[:, 1:]
    return full


def _stamp_blob(mark: Bool[np.ndarray, "h w"], centre: int, radius: int, rng: random.Random) -> None:
    """Three discs at random about the middle of a window."""
    for _ in range(3):
        x, y = (centre + rng.randint(-radius, radius) // 2 for _ in range(2))
        _stamp(mark, x, y, _disc(radius), True)


def _draw_wire(area: np.ndarray, edge: Edge, length: int, value: int) -> None:
    """Draws a wire that reaches ``length`` pixels along a step, with round ends."""
    (x, y), (dx, dy), half = edge.start, edge.step, edge.half
    for i in range(0, length + 1, max(half // 2, 1)):
        _stamp(area, x + dx * i, y + dy * i, _disc(half), value)
    _stamp(area, x + dx * length, y + dy * length, _disc(half), value)


def _stamp(area: np.ndarray, x: int, y: int, mask: Bool[np.ndarray, "n n"], value: int) -> None:
    """Sets the pixels of a mask around a point, as far as they lie inside."""
    height, width = area.shape
    half = len(mask) // 2
    top, left = max(half - y, 0), max(half - x, 0)
    bottom, right = min(height - y + half, len(mask)), min(width - x + half, len(mask))
    if top < bottom and left < right:
        window = area[y - half + top : y - half + bottom, x - half + left : x - half + right]
        window[mask[top:bottom, left:right]] = value


@functools.cache
def _disc(radius: int) -> Bool[np.ndarray, "n n"]:
    """A disc of that radius."""
    side = np.arange(-radius, radius + 1)
    return side[:, None] ** 2 + side[None, :] ** 2 <= radius * radius + radius // 2
