"""The network of a detection head: maps of a stream in, boxes out, one guess a cell.

    maps --pyramid--> levels --convolutions--> distances to the four sides [A 4 R], coefficients [A P]
                            '--convolutions--> logits of classes           [A K]

A cell says which classes the object around its centre has, and how far the sides are, in cells. The towers of
convolutions are shared by all levels, as distances in cells are alike on each. Coefficients are for heads
that say more of an object than its box (see ``instances``).
"""

from __future__ import annotations

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from vl_jax.heads.boxes import expected, from_distances
from vl_jax.heads.pyramid import GROUPS, MapBlock, Pyramid
from vl_jax.heads.suppression import Detections, strongest, without_copies
from vl_jax.nn.layers import Linear
from vl_jax.params import Leaf

PRIOR = 0.01  # of a class in a cell at the beginning: most cells have none


@dataclasses.dataclass(frozen=True)
class DetectorConfig:
    """How large the network is."""

    levels: tuple[int, ...] = ()  # maps of the stream that are read, from the finest, 0; empty: all
    width: int = 64  # of the pyramid and of the convolutions
    depth: int = 2  # convolutions before classes, and before distances
    bottom_up: bool = False  # the pyramid goes back from the finest map to the coarsest
    reg_max: int = 16  # bins of a distance, in cells; 1: a plain number, without distributions
    coefficients: int = 0  # that a cell says besides, each in -1..1

    def __post_init__(self):
        if self.width < GROUPS or self.width % GROUPS:
            raise ValueError(f"width={self.width} of a detector must be a multiple of {GROUPS}")
        if self.depth < 0 or self.reg_max < 1 or self.coefficients < 0:
            raise ValueError(
                f"depth={self.depth} and coefficients={self.coefficients} of a detector must be >= 0, "
                f"reg_max={self.reg_max} >= 1"
            )
        if min(self.levels, default=0) < 0 or list(self.levels) != sorted(set(self.levels)):
            raise ValueError(f"levels={self.levels} of a detector must rise, from 0")

    def chosen(self, maps: tuple[Leaf, ...]) -> tuple[Leaf, ...]:
        """The maps that are read; ValueError if there are not so many."""
        if max(self.levels, default=0) >= len(maps):
            raise ValueError(f"levels={self.levels} of a detector: the stream has {len(maps)} maps")
        return tuple(maps[level] for level in self.levels) if self.levels else maps


@dataclasses.dataclass(frozen=True)
class SaidConfig:
    """Which of its guesses a detector says."""

    most: int = 100  # boxes of a picture
    least_score: float = 0.001  # of a box that counts at all, as in the measurement of precision
    shown_score: float = 0.25  # of a box that is drawn
    overlap: float = 0.7  # that two boxes of a class may have; more: the less certain one goes
    candidates: int = 300  # the most certain guesses, which are compared with one another

    def __post_init__(self):
        if not 1 <= self.most <= self.candidates:
            raise ValueError(
                f"most={self.most}, candidates={self.candidates}: expected most in 1..candidates"
            )
        shares = {"least_score": self.least_score, "shown_score": self.shown_score, "overlap": self.overlap}
        for name, share in shares.items():
            if not 0 < share <= 1:
                raise ValueError(f"{name}={share} of a detector must be in (0, 1]")


@struct.dataclass
class Guesses:
    """What every cell says."""

    logits: Leaf  # f32[B A K]
    distances: Leaf  # f32[B A 4 R] logits of distances in cells
    coefficients: Leaf = None  # f32[B A P], if the network has any

    def boxes(self, cells: Float[Array, "*rows A 4"]) -> Float[Array, "*rows A 4"]:
        """Corners in pixels of the tile, of all rows or of one."""
        return from_distances(cells, expected(self.distances))


@struct.dataclass
class Detected:
    """What the head gives."""

    cells: Leaf  # f32[B A 4] centre and sides of each, in pixels of the tile; alike in all rows
    many: Guesses  # many cells learn an object
    one: Guesses | None  # one cell learns it, so nothing is suppressed; None without that branch
    found: Detections  # [B N ...]


class Detector(nn.Module):
    """All guesses, and what of them is said."""

    config: DetectorConfig
    said: SaidConfig
    num_classes: int
    size: int  # pixels on the side of the tile
    one_to_one: bool

    @nn.compact
    def __call__(self, maps: tuple[Leaf, ...]) -> Detected:
        c = self.config
        levels = Pyramid(c.width, c.bottom_up, name="pyramid")(c.chosen(maps))
        cells = np.concatenate([cells_of(level.shape[1], level.shape[2], self.size) for level in levels])
        cells = jnp.broadcast_to(jnp.asarray(cells), (levels[0].shape[0], *cells.shape))
        many = Branch(c, self.num_classes, name="many")(levels)
        one = None
        if self.one_to_one:
            one = Branch(c, self.num_classes, name="one")(jax.lax.stop_gradient(levels))
        found = self._found(jax.lax.stop_gradient(many if one is None else one), cells)
        return Detected(cells, many, one, found)

    def _found(self, guesses: Guesses, cells: Float[Array, "B A 4"]) -> Detections:
        """Which guesses are said; in training nothing reads it, so nothing computes it."""
        s = self.said

        def of_row(boxes: jax.Array, scores: jax.Array) -> Detections:
            if self.one_to_one:
                return strongest(boxes, scores, most=s.most, least_score=s.least_score)
            found = strongest(boxes, scores, most=s.candidates, least_score=s.least_score)
            return without_copies(found, threshold=s.overlap, most=s.most)

        boxes = jnp.clip(guesses.boxes(cells), 0.0, float(self.size))
        return jax.vmap(of_row)(boxes, jax.nn.sigmoid(guesses.logits))


class Branch(nn.Module):
    """Two towers of convolutions, shared by all levels; what they say is in float32."""

    config: DetectorConfig
    num_classes: int

    @nn.compact
    def __call__(self, levels: tuple[jax.Array, ...]) -> Guesses:
        c = self.config
        towers = {
            of: [MapBlock(c.width, name=f"{of}{i}") for i in range(c.depth)] for of in ("class", "distance")
        }
        to_classes = Linear(self.num_classes, ("embed", None), use_bias=True, hidden=False, name="classes")
        to_sides = Linear(4 * c.reg_max, ("embed", None), use_bias=True, hidden=False, name="sides")
        to_coefficients = None
        if c.coefficients:
            to_coefficients = Linear(
                c.coefficients, ("embed", None), use_bias=True, hidden=False, name="coefficients"
            )
        logits, distances, coefficients = [], [], []
        for x in levels:
            y = z = x
            for of_class, of_distance in zip(towers["class"], towers["distance"], strict=True):
                y, z = of_class(y), of_distance(z)
            rows, count = x.shape[0], x.shape[1] * x.shape[2]
            said = to_classes(y).astype(jnp.float32) - math.log((1 - PRIOR) / PRIOR)
            logits.append(said.reshape(rows, count, self.num_classes))
            distances.append(to_sides(z).astype(jnp.float32).reshape(rows, count, 4, c.reg_max))
            if to_coefficients is not None:
                said = jnp.tanh(to_coefficients(z).astype(jnp.float32))
                coefficients.append(said.reshape(rows, count, c.coefficients))
        joined = [jnp.concatenate(of, axis=1) for of in (logits, distances, coefficients) if of]
        return Guesses(*joined)


def cells_of(height: int, width: int, size: int) -> Float[np.ndarray, "a 4"]:
    """Centre x, y and sides of the cells of a map over a square tile, row by row, in pixels."""
    side_y, side_x = size / height, size / width
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    sides = np.broadcast_to(np.array([side_x, side_y]), (height * width, 2))
    centres = np.stack([(x.reshape(-1) + 0.5) * side_x, (y.reshape(-1) + 0.5) * side_y], axis=1)
    return np.concatenate([centres, sides], axis=1).astype(np.float32)
