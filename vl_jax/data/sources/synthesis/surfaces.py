"""Outlines and textures of things, as functions of a place on the thing.

A place is (u, v), the thing reaching from about -1 to 1 each way. Textures have no jumps, so that a picture
that has moved by part of a pixel looks the same after it is moved back.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from vl_jax.data.sources.synthesis.camera import direction

Colour = tuple[float, float, float]
Pattern = Literal["flat", "gradient", "stripes", "checker", "noise"]
PATTERNS: tuple[Pattern, ...] = ("flat", "gradient", "stripes", "checker", "noise")
_LATTICE = 16  # random numbers each way of a noise, which repeats after them
_EDGE = np.float32(3.0)  # how steeply stripes rise: from one colour to the other in a third of their width


@dataclass(frozen=True)
class Surface:
    """Two colours, and how they change over into one another."""

    colours: tuple[Colour, Colour]
    pattern: Pattern
    turn: tuple[float, float]  # cosine and sine of the pattern's angle
    waves: float  # per unit of the place
    lattice: bytes  # of a noise

    def __call__(
        self, u: Float[np.ndarray, "h w"], v: Float[np.ndarray, "h w"]
    ) -> Float[np.ndarray, "h w 3"]:
        """Grey levels of three colours at places, float32."""
        first, second = (np.array(c, np.float32) for c in self.colours)
        share = self._share(u, v)
        return first + (second - first) * share[..., None]

    def _share(self, u: Float[np.ndarray, "h w"], v: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
        if self.pattern == "flat":
            return np.zeros(np.broadcast_shapes(u.shape, v.shape), np.float32)
        cosine, sine, waves = (np.float32(x) for x in (*self.turn, self.waves))
        along = u * cosine + v * sine
        if self.pattern == "gradient":
            return (along * np.float32(0.5) + np.float32(0.5)).clip(0, 1)
        across = v * cosine - u * sine
        if self.pattern == "stripes":
            return _stripes(along * waves)
        if self.pattern == "checker":
            one, other = _stripes(along * waves), _stripes(across * waves)
            return one + other - 2 * one * other
        return _noise(along * waves, across * waves, self.lattice)


def choose_surface(
    colour: Colour, contrast: float, rng: random.Random, waves: tuple[float, float] = (0.8, 2.2)
) -> Surface:
    """A surface of about that colour; ``contrast`` is the share by which its second one may differ."""
    amount = contrast * rng.uniform(0.3, 1)
    goal = rng.choice((0, 255))
    red, green, blue = (c + (goal - c) * amount for c in colour)
    pattern = rng.choice(PATTERNS) if contrast else "flat"
    lattice = rng.randbytes(_LATTICE * _LATTICE)
    return Surface((colour, (red, green, blue)), pattern, direction(rng), rng.uniform(*waves), lattice)


def inside(shape: str, u: Float[np.ndarray, "h w"], v: Float[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Which places lie on a thing of that shape."""
    if shape == "circle":
        return u * u + v * v <= 0.9
    across, down = np.abs(u), np.abs(v)
    if shape == "square":
        return np.maximum(across, down) <= 0.82
    if shape == "diamond":
        return across * np.float32(1.6) + down <= 1.0
    if shape == "cross":
        return (np.minimum(across, down) <= 0.32) & (np.maximum(across, down) <= 0.98)
    if shape == "triangle":
        return (v <= 0.75) & (across * np.float32(1.75) <= v + np.float32(0.95))
    # A star of five points: a place is in it if it lies on the inner side of four of its five lines.
    sides = sum((u * x + v * y <= np.float32(0.38)).astype(np.int8) for x, y in _STAR)
    return np.asarray(sides >= 4)


# Normals of the five lines of a star that stands on two points.
_STAR = tuple(
    (np.float32(x), np.float32(y))
    for x, y in (
        (0.0, 1.0),
        (0.95106, 0.30902),
        (0.58779, -0.80902),
        (-0.58779, -0.80902),
        (-0.95106, 0.30902),
    )
)


def _stripes(place: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    wave = np.abs(2 * (place - np.floor(place)) - 1)
    return ((wave - np.float32(0.5)) * _EDGE + np.float32(0.5)).clip(0, 1)


def _noise(
    x: Float[np.ndarray, "h w"], y: Float[np.ndarray, "h w"], lattice: bytes
) -> Float[np.ndarray, "h w"]:
    """Random numbers on a lattice, and between them what lies between them."""
    numbers = np.frombuffer(lattice, np.uint8).astype(np.float32) / np.float32(255)
    x, y = x * 3, y * 3
    column, row = np.floor(x), np.floor(y)
    right, down = x - column, y - row
    column, row = column.astype(np.int32) % _LATTICE, row.astype(np.int32) % _LATTICE
    after, below = (column + 1) % _LATTICE, (row + 1) % _LATTICE * _LATTICE
    row = row * _LATTICE
    upper = numbers[row + column] * (1 - right) + numbers[row + after] * right
    lower = numbers[below + column] * (1 - right) + numbers[below + after] * right
    return upper * (1 - down) + lower * down
