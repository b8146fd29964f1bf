"""Textured objects on a sloped ground: boxes, classes, masks, depth and motion, all exact.

Sample ``i`` is a pure function of ``(seed, first + i)``, as those of ``sources/scenes.py`` are; questions and
answers are made by the same code. How far pictures differ from one another is a strength per cause, 0 to
switch it off.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image as PilImage

from vl_jax.data.images.spatial import Boxes, Instances, PixelMap
from vl_jax.data.picture import Orientation
from vl_jax.data.sample import IMAGE_PLACEHOLDER, Box, Media, Sample, Turn
from vl_jax.data.sources.scene_text import (
    SHAPE_NAMES,
    Kind,
    Language,
    Scene,
    SceneObject,
    make_turns,
    say,
)
from vl_jax.data.sources.scenes import COLOURS
from vl_jax.data.sources.synthesis import layers
from vl_jax.data.sources.synthesis.camera import CameraConfig, choose_shot, direction, photograph
from vl_jax.data.sources.synthesis.layers import STILL, Affine, Thing, World
from vl_jax.data.sources.synthesis.surfaces import Surface, choose_surface

_GREYS = ((128, 122, 110), (96, 110, 92), (150, 140, 120), (116, 120, 130), (170, 168, 160))
_FAR, _NEAR = (8.0, 14.0), (2.0, 4.0)  # depth of the ground in the first and in the last row
_TRIES = 12  # for a place of an object that leaves the others to be seen
SyntheticKind = Kind | Literal["nearer"]
# Questions for the nearer of two objects, and for the farther one.
_NEARER: dict[Language, tuple[str, str]] = {
    "en": ("which is nearer, the {0} or the {1}?", "which is farther away, the {0} or the {1}?"),
    "zh": ("{0}和{1}哪个更近？", "{0}和{1}哪个更远？"),
}


@dataclass(frozen=True)
class SyntheticScenesConfig:
    """A range of textured scenes."""

    name: str
    num_examples: int = 100_000
    seed: int = 0
    first: int = 0  # index of the first scene: ranges that do not meet are held out from one another
    image_size: int = 128  # pixels, square
    min_objects: int = 2  # as far as there is room for them
    max_objects: int = 6
    texture: float = 0.5  # 0..1, how much the two colours of a thing differ; 0: one colour
    clutter: int = 8  # the most patches on the ground that are nothing
    shadow: float = 0.5  # 0..1, the most by which a shadow darkens
    motion: float = 0.0  # the most pixels that camera and objects each move; 0: there is no second frame
    camera: CameraConfig = dataclasses.field(default_factory=CameraConfig)
    languages: tuple[Language, ...] = ("en", "zh")
    kinds: tuple[SyntheticKind, ...] = ("colour", "shape", "count", "position", "relation", "nearer")
    media: tuple[Literal["depth", "flow"], ...] = ()  # maps that are inputs too; no crop moves them

    def __post_init__(self):
        if not self.name:
            raise ValueError("name='' of a source: must not be empty")
        least = {"num_examples": 1, "first": 0, "image_size": 16, "min_objects": 1, "clutter": 0, "motion": 0}
        for field, limit in least.items():
            if getattr(self, field) < limit:
                raise ValueError(
                    f"{field}={getattr(self, field)} of source {self.name!r}: must be at least {limit}"
                )
        if self.max_objects < self.min_objects:
            raise ValueError(
                f"max_objects={self.max_objects} of source {self.name!r}: must be at least min_objects="
                f"{self.min_objects}"
            )
        for field in ("texture", "shadow"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field}={getattr(self, field)} of source {self.name!r}: must lie in 0..1")
        if self.motion > self.image_size / 4:
            raise ValueError(
                f"motion={self.motion} of source {self.name!r}: must be at most a quarter of image_size="
                f"{self.image_size}"
            )
        if "flow" in self.media and not self.motion:
            raise ValueError(f"media={self.media} of source {self.name!r}: flow needs motion above 0")
        if not self.languages or not self.kinds or "word" in self.kinds:
            raise ValueError(
                f"languages={self.languages} and kinds={self.kinds} of source {self.name!r}: must not be "
                "empty, and kinds must not have 'word', for nothing is written here"
            )

    def open(self, root: str, *, orientation: Orientation = "shown") -> SyntheticScenes:
        """The source; it reads no file, and its pictures have one orientation."""
        return SyntheticScenes(self)


class SyntheticScenes:
    """Random access to textured scenes.

    Labels of a sample: ``boxes`` (``Boxes``), ``classes`` (``PixelMap``: 0 ground, then the shapes in the
    order of ``SHAPE_NAMES``), ``instances`` (``Instances``) and ``depth`` (``PixelMap``). With motion,
    ``flow`` is a function that gives float32 [h w 3]: pixels to the right, pixels down, and 1 where the
    second frame shows the same; and ``media["second"]`` gives that frame, uint8 [h w 3]. If the config
    asks for them, ``media["depth"]`` is float32 [h w 1] and ``media["flow"]`` float32 [h w 2].
    """

    def __init__(self, config: SyntheticScenesConfig):
        self._config = config

    def __len__(self) -> int:
        return self._config.num_examples

    def __getitem__(self, index: int) -> Sample:
        """The sample of one scene; pictures and maps are drawn when they are asked for."""
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        config, number = self._config, self._config.first + index
        view = View(config, number)
        size = (config.image_size, config.image_size)
        turns = ask(view.told, config.kinds, config.languages, random.Random(f"text/{config.seed}/{number}"))
        boxes = tuple(
            Box(o.shape, corners) for o, corners in zip(view.world.objects, view.corners, strict=True)
        )
        labels = {
            "boxes": Boxes(boxes, size),
            "classes": PixelMap(view.classes, size, 255.0),
            "instances": Instances(boxes, view.masks, size),
            "depth": PixelMap(view.depth, size, 0.0),
        }
        moving = {"flow": view.flow} if config.motion else {}
        return Sample(
            id=f"synthetic-scene-{config.seed}-{number}",
            turns=turns,
            images=(view,),
            labels=labels | moving,
            media=_media(view),
        )


def _media(view: View) -> dict[str, Media]:
    """The second frame, where there is motion, and the maps that the config asks for."""
    config = view.config
    maps: dict[str, Media] = {
        "depth": lambda: view.depth()[..., None],
        "flow": lambda: view.flow()[..., :2],
    }
    second: dict[str, Media] = {"second": view.second} if config.motion else {}
    return second | {name: maps[name] for name in config.media}


def ask(
    scene: Scene, kinds: Sequence[SyntheticKind], languages: Sequence[Language], rng: random.Random
) -> tuple[Turn, ...]:
    """Questions as ``scene_text.make_turns`` asks them, and which of two objects is nearer or farther.

    Args:
      scene: its objects the farthest first.
    """
    named = [
        o
        for o in scene.objects
        if sum((p.colour, p.shape) == (o.colour, o.shape) for p in scene.objects) == 1
    ]
    flat: list[Kind] = [kind for kind in kinds if kind != "nearer"]
    compared = [_compare(named, languages, rng)] if "nearer" in kinds and len(named) > 1 else []
    if not flat and compared:
        (turn,) = compared
        return (dataclasses.replace(turn, question=f"{IMAGE_PLACEHOLDER}\n{turn.question}"),)
    return (*make_turns(scene, kinds=flat, languages=languages, rng=rng), *compared)


def _compare(named: Sequence[SceneObject], languages: Sequence[Language], rng: random.Random) -> Turn:
    language = rng.choice(languages)
    farther, nearer = sorted(rng.sample(range(len(named)), 2))
    boxes = [
        Box(
            (" " if language == "en" else "").join((say(o.colour, language), say(o.shape, language))),
            o.corners,
        )
        for o in (named[nearer], named[farther])
    ]
    asks_farther = rng.randrange(2)
    pair = rng.sample(boxes, 2)
    question = _NEARER[language][asks_farther].format(*(box.label for box in pair))
    return Turn(question, boxes[asks_farther].label, "nearer", language, tuple(pair))


@dataclass(frozen=True)
class SeenObject(SceneObject):
    """An object whose corners are those of what is seen of it."""

    seen: tuple[float, float, float, float]

    @property
    def corners(self) -> tuple[float, float, float, float]:
        """The least rectangle around its visible pixels."""
        return self.seen


@dataclass(frozen=True)
class View:
    """One scene; what is drawn of it once is kept with it."""

    config: SyntheticScenesConfig
    number: int

    def __call__(self) -> PilImage.Image:
        """The RGB picture."""
        return PilImage.fromarray(self._frame(later=False))

    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.config.image_size, self.config.image_size

    @functools.cached_property
    def _made(self) -> tuple[World, tuple[str, ...], Int[np.ndarray, "h w"]]:
        """The world, colours of its objects, and what pixels show; objects that none shows are left out."""
        world, colours = make_world(self.config, self._rng("world"))
        shown = layers.cover(world)
        seen = np.bincount(shown.ravel(), minlength=len(colours) + 1)[1:] > 0
        if not seen.all():  # in small pictures, where one may lie between pixels or behind others
            hidden = {id(thing) for thing, is_seen in zip(world.objects, seen, strict=True) if not is_seen}
            things = tuple(thing for thing in world.things if id(thing) not in hidden)
            world = dataclasses.replace(world, things=things)
            colours = tuple(itertools.compress(colours, seen))
            shown = layers.cover(world)
        return world, colours, shown

    @property
    def world(self) -> World:
        """What is where."""
        return self._made[0]

    @property
    def shown(self) -> Int[np.ndarray, "h w"]:
        """The object that each pixel shows, counted from 1; 0 is the ground."""
        return self._made[2]

    @functools.cached_property
    def corners(self) -> tuple[tuple[float, float, float, float], ...]:
        """The least rectangle around the visible pixels of each object."""
        found = []
        for number, thing in enumerate(self.world.objects, 1):
            rows, columns = layers.window(thing.place, self.world.size)
            seen = self.shown[rows, columns] == number
            down, right = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
            x, y = columns.start, rows.start
            found.append((x + right[0], y + down[0], x + right[-1] + 1, y + down[-1] + 1))
        return tuple((float(a), float(b), float(c), float(d)) for a, b, c, d in found)

    @property
    def told(self) -> Scene:
        """The scene for questions: a place is the ninth of the picture in which an object's centre lies."""
        size = self.config.image_size
        objects = []
        for thing, colour, seen in zip(self.world.objects, self._made[1], self.corners, strict=True):
            x, y = (seen[0] + seen[2]) / 2, (seen[1] + seen[3]) / 2
            cell = (int(x * 3 / size), int(y * 3 / size))
            objects.append(SeenObject(colour, thing.shape, cell, (x, y), (seen[2] - seen[0]) / 2, 0.0, seen))
        return Scene(size, (0, 0, 0), tuple(objects), "", "", (0.0, 0.0, 0.0, 0.0))

    def classes(self) -> UInt8[np.ndarray, "h w"]:
        """Class of each pixel: 0 the ground, then the shapes in the order of ``SHAPE_NAMES``."""
        shapes = [0, *(1 + SHAPE_NAMES.index(o.shape) for o in self.world.objects)]
        return np.array(shapes, np.uint8)[self.shown]

    def masks(self) -> Bool[np.ndarray, "n h w"]:
        """The visible pixels of each object."""
        return self.shown == np.arange(1, len(self.world.objects) + 1)[:, None, None]

    def depth(self) -> Float[np.ndarray, "h w"]:
        """How far away each pixel is, float32."""
        return layers.depth(self.world, self.shown)

    def flow(self) -> Float[np.ndarray, "h w 3"]:
        """See ``layers.flow``."""
        return layers.flow(self.world, self.shown)

    def second(self) -> UInt8[np.ndarray, "h w 3"]:
        """The frame after the motion."""
        return self._frame(later=True)

    def _frame(self, *, later: bool) -> UInt8[np.ndarray, "h w 3"]:
        shot = choose_shot(self.config.camera, self._rng("camera"))
        noise = self._rng("second noise" if later else "noise")
        return photograph(layers.paint(self.world, later=later), shot, noise)

    def _rng(self, purpose: str) -> random.Random:
        return random.Random(f"{purpose}/{self.config.seed}/{self.number}")


def make_world(config: SyntheticScenesConfig, rng: random.Random) -> tuple[World, tuple[str, ...]]:
    """Chooses what is on a scene, where, and how it moves.

    Returns:
      the world, and the names of the objects' colours.
    """
    size = config.image_size
    far, near = 1 / rng.uniform(*_FAR), 1 / rng.uniform(*_NEAR)
    camera = (config.motion * rng.uniform(-1, 1), config.motion * rng.uniform(-1, 1))
    slope = (near - far) / size / near  # of one over the depth, by row, as a share of the nearest
    start = far / near
    x, y = camera
    ground_motion = Affine(1, x * slope, x * start, 0, 1 + y * slope, y * start)
    ground = choose_surface(rng.choice(_GREYS), config.texture, rng, (1.0, 3.0))
    lx, ly = direction(rng)
    strength = 0.25 * config.camera.lighting
    shade = (strength * lx, strength * ly)
    patches = tuple(
        Thing(
            rng.choice(SHAPE_NAMES),
            _patch_surface(config, rng),
            _place(rng.uniform(0, size), rng.uniform(0, size), size * rng.uniform(0.02, 0.1), rng),
            ground_motion,
        )
        for _ in range(rng.randint(0, config.clutter))
    )
    objects = _choose_objects(config, (far, near), camera, shade, rng)
    shadow = (config.shadow * rng.random(), 0.3 * lx, 0.3 * ly)
    things = (*patches, *(thing for thing, _ in objects))
    return World(size, ground, ground_motion, (far, near), things, shadow), tuple(c for _, c in objects)


def _patch_surface(config: SyntheticScenesConfig, rng: random.Random) -> Surface:
    level = rng.uniform(40, 215)
    colour = (level + rng.uniform(-30, 30), level + rng.uniform(-30, 30), level + rng.uniform(-30, 30))
    return choose_surface(colour, config.texture, rng)


def _choose_objects(
    config: SyntheticScenesConfig,
    ground: tuple[float, float],
    camera: tuple[float, float],
    shade: tuple[float, float],
    rng: random.Random,
) -> list[tuple[Thing, str]]:
    """The objects and the names of their colours, the farthest first."""
    size, (far, near) = config.image_size, ground
    taken: list[tuple[float, float, float]] = []
    made = []
    for _ in range(rng.randint(config.min_objects, config.max_objects)):
        for _ in range(_TRIES):
            foot = rng.uniform(0.3, 1.0)
            radius = size * rng.uniform(0.08, 0.16) * (0.5 + 0.5 * foot)
            x, y = rng.uniform(radius, size - radius), max(foot * size - radius, radius)
            if all(math.sqrt((x - p) ** 2 + (y - q) ** 2) > 1.1 * max(radius, r) for p, q, r in taken):
                break
        else:
            continue
        taken.append((x, y, radius))
        # The ground at the lowest point that the outline may reach, so that none of it is below the ground.
        lowest = min((y + 1.3 * radius) / size, 1.0)
        nearness = (far + (near - far) * lowest) * rng.uniform(1.02, 1.1)
        place = _place(x, y, radius, rng)
        motion = STILL
        if config.motion:
            dx = camera[0] * nearness / near + config.motion * rng.uniform(-1, 1)
            dy = camera[1] * nearness / near + config.motion * rng.uniform(-1, 1)
            motion = _turned(x, y, (x + dx, y + dy), rng.uniform(-0.05, 0.05))
        colour = rng.choice(list(COLOURS))
        red, green, blue = COLOURS[colour]
        surface = choose_surface((red, green, blue), config.texture, rng)
        made.append((Thing(rng.choice(SHAPE_NAMES), surface, place, motion, nearness, shade), colour))
    return sorted(made, key=lambda m: m[0].nearness)


def _place(x: float, y: float, radius: float, rng: random.Random) -> Affine:
    """A thing of that radius around a point, tilted a little."""
    return _turned(0, 0, (x, y), rng.uniform(-0.15, 0.15), radius)


def _turned(x: float, y: float, to: tuple[float, float], slope: float, scale: float = 1.0) -> Affine:
    """Turns about a point by twice the arctangent of ``slope``, scales, and takes the point to another."""
    a = scale * (1 - slope * slope) / (1 + slope * slope)
    b = scale * 2 * slope / (1 + slope * slope)
    return Affine(a, -b, to[0] - a * x + b * y, b, a, to[1] - b * x - a * y)
