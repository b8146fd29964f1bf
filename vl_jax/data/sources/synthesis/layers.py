"""Draws things that lie one behind the other on a sloped ground, now and a moment later, with exact labels.

The ground is a plane seen from above: one over its depth grows evenly from the top of the picture to the
bottom. A thing stands upright at the depth of the ground at its foot. A camera that moves to a side shifts
each point by an amount that goes with one over its depth; things move and turn by themselves as well. So all
motion is affine in the picture, and a pixel's flow follows from what it shows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from vl_jax.data.sources.synthesis.surfaces import Surface, inside

_REACH = 1.3  # units of a place that an outline may reach


@dataclass(frozen=True)
class Affine:
    """Takes a point (x, y) to (a x + b y + c, d x + e y + f)."""

    a: float
    b: float
    c: float
    d: float
    e: float
    f: float

    def after(self, first: Affine) -> Affine:
        """This map behind another one."""
        return Affine(
            self.a * first.a + self.b * first.d,
            self.a * first.b + self.b * first.e,
            self.a * first.c + self.b * first.f + self.c,
            self.d * first.a + self.e * first.d,
            self.d * first.b + self.e * first.e,
            self.d * first.c + self.e * first.f + self.f,
        )

    def inverse(self) -> Affine:
        """The way back."""
        det = self.a * self.e - self.b * self.d
        a, b, d, e = self.e / det, -self.b / det, -self.d / det, self.a / det
        return Affine(a, b, -a * self.c - b * self.f, d, e, -d * self.c - e * self.f)

    def __call__(
        self, x: Float[np.ndarray, "#h w"], y: Float[np.ndarray, "h #w"]
    ) -> tuple[Float[np.ndarray, "h w"], Float[np.ndarray, "h w"]]:
        """The points that points become, float32."""
        a, b, c, d, e, f = (np.float32(k) for k in (self.a, self.b, self.c, self.d, self.e, self.f))
        return a * x + (b * y + c), d * x + (e * y + f)


STILL = Affine(1, 0, 0, 0, 1, 0)


@dataclass(frozen=True)
class Thing:
    """Something with an outline: an object, or a patch of clutter that lies flat on the ground."""

    shape: str
    surface: Surface
    place: Affine  # from places on it to pixels
    motion: Affine  # from pixels to those of the second frame
    nearness: float = 0.0  # one over its depth; 0: a patch
    shade: tuple[float, float] = (0.0, 0.0)  # by how much light grows along u and v


@dataclass(frozen=True)
class World:
    """All that is seen; patches first, then objects, the farthest first."""

    size: int  # pixels, square
    ground: Surface
    ground_motion: Affine
    nearness: tuple[float, float]  # one over the depth of the ground in the first and in the last row
    things: tuple[Thing, ...]
    shadow: tuple[float, float, float] = (0.0, 0.0, 0.0)  # its darkness, and how far it falls, in units

    @property
    def objects(self) -> tuple[Thing, ...]:
        """What has labels, the farthest first."""
        return tuple(t for t in self.things if t.nearness)


def cover(world: World, *, later: bool = False) -> Int[np.ndarray, "h w"]:
    """What each pixel shows: 0 the ground, ``n`` the ``n``-th of the objects, counted from 1."""
    shown = np.zeros((world.size, world.size), np.int32)
    for number, thing in enumerate(world.objects, 1):
        rows, columns, u, v = _window(thing, world.size, later)
        shown[rows, columns][inside(thing.shape, u, v)] = number
    return shown


def paint(world: World, *, later: bool = False) -> Float[np.ndarray, "h w 3"]:
    """The picture, grey levels from 0 to 255."""
    side = np.arange(world.size, dtype=np.float32)
    back = world.ground_motion.inverse() if later else STILL
    unit = 2 / world.size
    place = Affine(unit, 0, -1, 0, unit, -1).after(back)
    picture = world.ground(*place(side[None, :], side[:, None]))
    darkness, right, down = world.shadow
    for thing in world.things:
        if thing.nearness and darkness:
            cast = dataclasses.replace(thing, place=thing.place.after(Affine(1, 0, right, 0, 1, down)))
            rows, columns, u, v = _window(cast, world.size, later)
            picture[rows, columns] *= 1 - np.float32(darkness) * inside(cast.shape, u, v)[..., None]
        rows, columns, u, v = _window(thing, world.size, later)
        light = 1 + np.float32(thing.shade[0]) * u + np.float32(thing.shade[1]) * v
        coloured = thing.surface(u, v) * light[..., None]
        mask = inside(thing.shape, u, v)[..., None]
        picture[rows, columns] = np.where(mask, coloured, picture[rows, columns])
    return picture


def depth(world: World, shown: Int[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """How far away each pixel is, float32."""
    near = np.array([0, *(t.nearness for t in world.objects)], np.float32)[shown]
    return 1 / np.where(shown == 0, ground_nearness(world)[:, None], near)


def ground_nearness(world: World) -> Float[np.ndarray, " h"]:
    """One over the depth of the ground in each row."""
    first, last = (np.float32(n) for n in world.nearness)
    return first + (last - first) * np.arange(world.size, dtype=np.float32) / np.float32(world.size)


def flow(world: World, shown: Int[np.ndarray, "h w"]) -> Float[np.ndarray, "h w 3"]:
    """Where each pixel goes in the second frame: pixels to the right, pixels down, and 1 if it is seen there.

    It is seen if all pixels around its goal show the same thing as itself: then what they show, weighted by
    how near they are, is what it shows.
    """
    side = np.arange(world.size, dtype=np.float32)
    motions = (world.ground_motion, *(t.motion for t in world.objects))
    shift = np.array([(m.a - 1, m.b, m.c, m.d, m.e - 1, m.f) for m in motions], np.float32)[shown]
    x, y = side[None, :], side[:, None]
    right = shift[..., 0] * x + shift[..., 1] * y + shift[..., 2]
    down = shift[..., 3] * x + shift[..., 4] * y + shift[..., 5]
    return np.stack([right, down, _seen(world, shown, x + right, y + down)], -1)


def _seen(
    world: World,
    shown: Int[np.ndarray, "h w"],
    x: Float[np.ndarray, "h w"],
    y: Float[np.ndarray, "h w"],
) -> Bool[np.ndarray, "h w"]:
    after = cover(world, later=True)
    last = world.size - 1
    inner = (x >= 0) & (y >= 0) & (x <= last) & (y <= last)
    columns = [f(x).clip(0, last).astype(np.int32) for f in (np.floor, np.ceil)]
    rows = [f(y).clip(0, last).astype(np.int32) * world.size for f in (np.floor, np.ceil)]
    flat = after.ravel()
    for row in rows:
        for column in columns:
            inner &= flat[row + column] == shown
    return inner


def window(place: Affine, size: int) -> tuple[slice, slice]:
    """Rows and columns that a thing at that place may touch."""
    wide, high = (_REACH * (abs(p) + abs(q)) for p, q in ((place.a, place.b), (place.d, place.e)))
    return _span(place.f, high, size), _span(place.c, wide, size)


def _window(
    thing: Thing, size: int, later: bool
) -> tuple[slice, slice, Float[np.ndarray, "h w"], Float[np.ndarray, "h w"]]:
    """Rows and columns that a thing may touch, and the places of their pixels on it."""
    place = thing.motion.after(thing.place) if later else thing.place
    rows, columns = window(place, size)
    x = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :]
    y = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None]
    return rows, columns, *place.inverse()(x, y)


def _span(centre: float, reach: float, size: int) -> slice:
    first = min(max(int(centre - reach), 0), size)
    return slice(first, max(min(int(centre + reach) + 2, size), first))
