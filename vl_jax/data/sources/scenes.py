"""Procedural scenes: coloured shapes and a written word, with exact bilingual questions and answers.

Sample ``i`` is a pure function of ``(seed, first + i)``: no file, no state, no order. Two sources whose
index ranges or seeds differ are held out from one another.

    +-------+-------+-------+   A scene is a grid of 3 x 3 (or 2 x 2) cells. An object fills most of its
    |  (o)  |       |  /\\   |   cell, jittered in place, size and angle; an English word takes two cells,
    +-------+-------+-------+   a Chinese character one. So nothing overlaps, and every place has a name.
    |     S U N     |       |
    +-------+-------+-------+   The text of the questions is made in ``scene_text``.
    |       |  [ ]  |       |
    +-------+-------+-------+
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image as PilImage
from PIL import ImageDraw, ImageFont

from vl_jax.data.images.phrases import Phrase, Phrases
from vl_jax.data.picture import Orientation
from vl_jax.data.sample import IMAGE_PLACEHOLDER, TEXT, Sample
from vl_jax.data.sources.glyphs import GLYPHS, draw_glyph
from vl_jax.data.sources.scene_text import (
    KINDS,
    SHAPE_NAMES,
    Kind,
    Language,
    Scene,
    SceneObject,
    caption,
    exchanged,
    make_turns,
    phrases,
    relation_caption,
)

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (219, 40, 40),
    "orange": (247, 134, 20),
    "yellow": (247, 212, 32),
    "green": (38, 158, 70),
    "blue": (40, 92, 222),
    "purple": (140, 60, 190),
    "pink": (248, 140, 192),
    "black": (36, 36, 40),
}
ENGLISH_WORDS = (
    "sun", "cat", "dog", "map", "box", "hat", "key", "cup",
    "fish", "tree", "moon", "bird", "milk", "ship", "road", "lamp",
)  # fmt: skip
CHINESE_WORDS = tuple(GLYPHS)
_INK = (24, 24, 44)


@dataclass(frozen=True)
class ScenesConfig:
    """A range of procedural scenes."""

    name: str
    num_examples: int = 100_000
    seed: int = 0
    first: int = 0  # index of the first scene: ranges that do not meet are held out from one another
    image_size: int = 64  # pixels, square
    min_objects: int = 1  # as far as there are free cells
    max_objects: int = 4
    grid: Literal[2, 3] = 3  # cells each way; with 2 everything is larger and has four places
    num_colours: int = 8  # of those in COLOURS, the first ones
    num_shapes: int = 6  # of those in SHAPE_NAMES, the first ones
    num_words: int = 16  # per language, the first ones
    word_rate: float = 0.85  # share of the scenes with a written word
    repeat_rate: float = 0.7  # share of the scenes whose objects repeat a colour or a shape
    languages: tuple[Literal["en", "zh"], ...] = ("en", "zh")
    kinds: tuple[Kind, ...] = KINDS

    def __post_init__(self):
        if not self.name:
            raise ValueError("name='' of a source: must not be empty")
        for field in ("num_examples", "image_size", "min_objects"):
            if getattr(self, field) < 1:
                raise ValueError(
                    f"{field}={getattr(self, field)} of source {self.name!r}: must be at least 1"
                )
        if not self.min_objects <= self.max_objects <= 6:
            raise ValueError(
                f"max_objects={self.max_objects} of source {self.name!r}: must be from min_objects="
                f"{self.min_objects} to 6"
            )
        most = {"num_colours": len(COLOURS), "num_shapes": len(SHAPE_NAMES), "num_words": len(ENGLISH_WORDS)}
        for field, limit in most.items():
            least = 1 if field == "num_words" else self.max_objects
            if not least <= getattr(self, field) <= limit:
                raise ValueError(
                    f"{field}={getattr(self, field)} of source {self.name!r}: must be from {least} to {limit}"
                )
        if self.first < 0:
            raise ValueError(f"first={self.first} of source {self.name!r}: must not be negative")
        for field in ("word_rate", "repeat_rate"):
            if not 0 <= getattr(self, field) <= 1:
                raise ValueError(f"{field}={getattr(self, field)} of source {self.name!r}: must lie in 0..1")
        if not self.languages or not self.kinds:
            raise ValueError(f"languages and kinds of source {self.name!r}: must not be empty")
        if set(self.kinds) == {"word"} and self.word_rate < 1:
            raise ValueError(
                f"word_rate={self.word_rate} of source {self.name!r}: must be 1 when kinds is ('word',)"
            )

    def open(self, root: str, *, orientation: Orientation = "shown") -> ScenesSource:
        """The source; it reads no file, and its pictures have one orientation."""
        return ScenesSource(self)


class ScenesSource:
    """Random access to procedural samples."""

    def __init__(self, config: ScenesConfig):
        self._config = config

    def __len__(self) -> int:
        return self._config.num_examples

    def __repr__(self) -> str:
        return f"ScenesSource({self._config!r})"

    def __getitem__(self, index: int) -> Sample:
        """The sample of one scene, every applicable question in a seeded order; drawn when loaded."""
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} of {len(self)}")
        config = self._config
        number = config.first + index
        rng = random.Random(f"{config.seed}/{number}")
        scene = make_scene(config, rng)
        turns = make_turns(scene, kinds=config.kinds, languages=config.languages, rng=rng)
        return Sample(
            id=f"scene-{config.seed}-{number}",
            turns=turns,
            images=(SceneImage(scene),),
        )


@dataclass(frozen=True)
class SceneTextsConfig:
    """What is said of procedural scenes, with fewer pictures or questions than ``ScenesConfig`` has."""

    name: str
    scenes: ScenesConfig = dataclasses.field(default_factory=lambda: ScenesConfig("scenes"))
    pictures: bool = False  # whether a text comes with its picture
    questions: bool = False  # or instead of them one sentence that says what is where, without a question
    relations: bool = False  # the sentence says which side of the other thing one of two things is on
    negatives: bool = False  # with sentences of scenes where two things have exchanged colour, shape or place
    phrases: bool = False  # the label ``phrases`` says which words of the sentence name what
    mixed_up: float = 0.0  # share of the scenes whose sentence is that of another scene

    def __post_init__(self):
        if not self.name:
            raise ValueError("name='' of a source: must not be empty")
        limits = self.scenes.min_objects, self.scenes.max_objects
        if self.relations and limits != (2, 2):
            raise ValueError(
                f"relations of source {self.name!r}: scenes.min_objects and scenes.max_objects are {limits}, "
                "must be 2 each"
            )
        if not 0 <= self.mixed_up <= 1:
            raise ValueError(f"mixed_up={self.mixed_up} of source {self.name!r}: must lie in 0..1")
        if self.mixed_up and (self.questions or self.negatives or self.phrases or not self.pictures):
            raise ValueError(
                f"mixed_up={self.mixed_up} of source {self.name!r}: must be 0 without pictures, and with "
                "questions, negatives or phrases"
            )
        if self.questions and (self.relations or self.negatives or self.phrases):
            raise ValueError(
                f"questions of source {self.name!r}: must be False with relations, negatives or phrases, "
                "which are of sentences"
            )

    def open(self, root: str, *, orientation: Orientation = "shown") -> SceneTexts:
        """The source; it reads no file, and its pictures have one orientation."""
        return SceneTexts(self)


MIXED_UP = "mixed_up"  # a label of scenes that have another's sentence


class SceneTexts:
    """Random access to texts about scenes; what is asked or said is what ``ScenesSource`` asks and says.

    The label ``image`` of a sentence is the id of its scene.
    """

    def __init__(self, config: SceneTextsConfig):
        self._config = config
        kinds = config.scenes.kinds if config.questions else ("caption",)
        self._scenes = ScenesSource(dataclasses.replace(config.scenes, kinds=kinds))

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Sample:
        """The texts of one scene."""
        sample = self._scenes[index]
        if not self._config.questions:
            sample = self._told(sample)
        rng = random.Random(f"mixed up/{sample.id}")
        if self._config.mixed_up and rng.random() < self._config.mixed_up:
            other = self._told(self._scenes[(index + rng.randrange(1, len(self))) % len(self)])
            sample = dataclasses.replace(sample, turns=other.turns, labels={**sample.labels, MIXED_UP: True})
        return sample if self._config.pictures else sample.without_images()

    def _told(self, sample: Sample) -> Sample:
        """A scene with one sentence about it, and sentences that are wrong of it where they are asked for."""
        (turn,), (image,) = sample.turns, sample.images
        assert isinstance(image, SceneImage)
        language: Language = "zh" if turn.language == "zh" else "en"
        say = relation_caption if self._config.relations else caption
        text = say(image.scene, language)
        turn = dataclasses.replace(turn, question=f"{IMAGE_PLACEHOLDER}\n", answer=text, kind=TEXT)
        wrong = [say(other, language) for other in exchanged(image.scene)] if self._config.negatives else []
        negatives = tuple(dict.fromkeys(other for other in wrong if other != text))
        labels: dict[str, Any] = {"image": sample.id}
        if self._config.phrases:
            size = image.scene.image_size
            found = phrases(image.scene, language, text, in_order=not self._config.relations)
            labels["phrases"] = Phrases(tuple(Phrase(*one) for one in found), (size, size))
        return dataclasses.replace(sample, turns=(turn,), labels=labels, negatives=negatives)


@dataclass(frozen=True)
class SceneImage:
    """A scene as an image, drawn when it is called."""

    scene: Scene

    def __call__(self) -> PilImage.Image:
        """The RGB picture."""
        return draw_scene(self.scene)

    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.scene.image_size, self.scene.image_size


def make_scene(config: ScenesConfig, rng: random.Random) -> Scene:
    """Chooses what is on a scene and where, in pixels."""
    grid, cell = config.grid, config.image_size / config.grid
    free = [(column, row) for row in range(grid) for column in range(grid)]
    word, script = "", ""
    word_corners = (0.0, 0.0, 0.0, 0.0)
    word_cells: list[tuple[int, int]] = []
    if rng.random() < config.word_rate:
        script = rng.choice(config.languages)
        word = rng.choice((ENGLISH_WORDS if script == "en" else CHINESE_WORDS)[: config.num_words])
        width = 2 if script == "en" else 1
        column, row = rng.randrange(grid + 1 - width), rng.randrange(grid)
        word_cells = [(column + i, row) for i in range(width)]
        word_corners = _place_word(word, script, (column, row, width), cell, rng)
    free = [c for c in free if c not in word_cells]
    most = min(config.max_objects, len(free))
    places = rng.sample(free, rng.randint(min(config.min_objects, most), most))
    looks = _choose_looks(config, len(places), rng)
    objects = tuple(_place(look, place, cell, rng) for look, place in zip(looks, places, strict=True))
    tint = rng.randint(222, 238)
    background = tuple(tint + rng.randint(0, 17) for _ in range(3))
    return Scene(config.image_size, background, objects, word, script, word_corners, grid)


def _choose_looks(config: ScenesConfig, count: int, rng: random.Random) -> list[tuple[str, str]]:
    """Colour and shape of each object; in some scenes one of the two repeats, for counting."""
    colours = rng.sample(list(COLOURS)[: config.num_colours], count)
    shapes: list[str] = rng.sample(SHAPE_NAMES[: config.num_shapes], count)
    repeats = rng.randint(2, count) if count > 1 else 1
    theme = rng.random()
    if theme < config.repeat_rate / 2:
        colours[:repeats] = [colours[0]] * repeats
    elif theme < config.repeat_rate:
        shapes[:repeats] = [shapes[0]] * repeats
    return list(zip(colours, shapes, strict=True))


def _place(look: tuple[str, str], place: tuple[int, int], cell: float, rng: random.Random) -> SceneObject:
    radius = cell * rng.uniform(0.33, 0.42)
    slack = cell / 2 - radius - 0.02 * cell
    x = (place[0] + 0.5) * cell + rng.uniform(-slack, slack)
    y = (place[1] + 0.5) * cell + rng.uniform(-slack, slack)
    return SceneObject(look[0], look[1], place, (x, y), radius, math.radians(rng.uniform(-10, 10)))


def _place_word(
    word: str, script: str, place: tuple[int, int, int], cell: float, rng: random.Random
) -> tuple[float, float, float, float]:
    """The pixel rectangle of a word inside its cells ``(column, row, number of cells)``."""
    column, row, width = place
    if script == "zh":
        height = cell * rng.uniform(0.78, 0.88)
        length = height
    else:
        x0, y0, x1, y1 = _font(100).getbbox(word, stroke_width=3)
        height = min(cell * rng.uniform(0.72, 0.86), 0.92 * width * cell * (y1 - y0) / (x1 - x0))
        length = height * (x1 - x0) / (y1 - y0)
    x = column * cell + rng.uniform(0.04, 0.96) * (width * cell - length - 0.04 * cell)
    y = row * cell + rng.uniform(0.1, 0.9) * (cell - height)
    return (x, y, x + length, y + height)


def draw_scene(scene: Scene) -> PilImage.Image:
    """Draws a scene as an RGB picture of ``image_size`` pixels each way."""
    scale = 3 if scene.image_size <= 128 else 2  # Drawn larger and averaged down: smooth edges.
    size = scene.image_size * scale
    picture = PilImage.new("RGB", (size, size), scene.background)
    canvas = ImageDraw.Draw(picture)
    for item in scene.objects:
        scaled = dataclasses.replace(
            item, centre=(item.centre[0] * scale, item.centre[1] * scale), radius=item.radius * scale
        )
        _draw_object(canvas, scaled)
    if scene.word:
        x0, y0, x1, y1 = (v * scale for v in scene.word_corners)
        if scene.word_script == "zh":
            width = max(1, round((x1 - x0) * 0.11))
            corners = (x0 + width / 2, y0 + width / 2, x1 - width / 2, y1 - width / 2)
            draw_glyph(canvas, scene.word, corners=corners, fill=_INK, stroke_width=width)
        else:
            unit = _font(100).getbbox(scene.word, stroke_width=3)
            font = _font(max(1, int(100 * (y1 - y0) / (unit[3] - unit[1]))))
            weight = max(1, round(0.03 * font.size))
            left, top, _, _ = font.getbbox(scene.word, stroke_width=weight)
            canvas.text((x0 - left, y0 - top), scene.word, fill=_INK, font=font, stroke_width=weight)
    return picture.reduce(scale)


def _draw_object(canvas: ImageDraw.ImageDraw, item: SceneObject) -> None:
    x, y = item.centre
    colour = COLOURS[item.colour]
    if item.shape == "circle":
        radius = 0.95 * item.radius
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        return
    sine, cosine = math.sin(item.angle), math.cos(item.angle)
    points = [
        (x + item.radius * (u * cosine - v * sine), y + item.radius * (u * sine + v * cosine))
        for u, v in _OUTLINES[item.shape]
    ]
    canvas.polygon(points, fill=colour)


def _star() -> tuple[tuple[float, float], ...]:
    angles = [math.pi * i / 5 - math.pi / 2 for i in range(10)]
    radii = [1.12, 0.46] * 5
    return tuple((r * math.cos(a), r * math.sin(a)) for a, r in zip(angles, radii, strict=True))


# Corner points of the shapes around the origin, about one unit in radius.
_OUTLINES: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)),
    "triangle": ((0.0, -0.98), (0.98, 0.8), (-0.98, 0.8)),
    "diamond": ((0.0, -1.12), (0.66, 0.0), (0.0, 1.12), (-0.66, 0.0)),
    "cross": tuple(
        (x * s, y * s)
        for s, x, y in [
            (1.0, -0.32, -1), (1.0, 0.32, -1), (1.0, 0.32, -0.32), (1.0, 1, -0.32),
            (1.0, 1, 0.32), (1.0, 0.32, 0.32), (1.0, 0.32, 1), (1.0, -0.32, 1),
            (1.0, -0.32, 0.32), (1.0, -1, 0.32), (1.0, -1, -0.32), (1.0, -0.32, -0.32),
        ]
    ),
    "star": _star(),
}  # fmt: skip


@functools.lru_cache(maxsize=256)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's built-in scalable Latin font; asked for by size because loading it is slow."""
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("this Pillow was built without FreeType, which the written words need")
    return font
